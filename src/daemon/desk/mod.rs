//! Beside the keeper of one worker: the event source, the shield, the log and the metrics.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Control;
use super::history::{History, Minutes};
use super::log::{ByOthers, Lines, line};
use super::{Foundation, Live, ShieldMode};
use crate::audit::survey::{Survey, SweepResult};
use crate::error::Result;
use crate::firewall::lists::Anew;
use crate::history::record::Record;
use crate::metrics::{EventType, GuardMetrics};
use crate::reconcile::apply::Outcome;
use crate::reconcile::checks::{Checked, Counted};
use crate::reconcile::keeper::{Acted, Keeper, Quiet, Shown, Sweep, Trigger, Witness};
use crate::reconcile::plan::{Action, ActionKind, Reason};
use crate::reconcile::pressure::Level;
use crate::shield::{Program, Shield};
use crate::sockdiag::Socket;
use crate::watch::syns::Syns;
use crate::watch::{Drained, Events, Memory, Wanted, nflog};

/// Repairs that are remembered for [`Desk::repairs`]: as many as an attack has in a minute, in a
/// megabyte or two.
const REPAIRS: usize = 65_536;
/// For so long.
const MINUTE: Duration = Duration::from_secs(60);

pub(super) struct Desk<'p> {
    pub(super) foundation: Arc<Foundation>,
    pub(super) live: Arc<Live>,
    pub(super) events: Events,
    /// The event source has failed and is to be opened anew.
    events_failed: bool,
    pub(super) shield: Option<Shield<'p>>,
    /// It is to be up.
    shield_is_wanted: bool,
    pub(super) share: GuardMetrics,
    lines: Lines,
    /// When connections of which peer were repaired, of the last minute; bounded by [`REPAIRS`].
    repairs: VecDeque<(Instant, IpAddr)>,
    pub(super) history: History,
    pub(super) minutes: Minutes,
    deleted: ByOthers,
    changed: ByOthers,
    /// The figures of the deep sweep under way.
    pub(super) survey: Option<Survey>,
}

impl<'p> Desk<'p> {
    /// Opens the event source for these ports.
    pub(super) fn open(
        control: &Control,
        live: Arc<Live>,
        ports: &HashSet<u16>,
        share: GuardMetrics,
    ) -> Result<Self> {
        let foundation = control.foundation.clone();
        let name = watch_name(&foundation.device);
        let events = Events::open(wanted(&foundation, &live, &name, ports))?;
        let this = Self {
            foundation,
            live,
            events,
            events_failed: false,
            shield: None,
            shield_is_wanted: false,
            share,
            lines: Lines::new(Instant::now()),
            repairs: VecDeque::new(),
            history: control.history.clone(),
            minutes: Minutes::new(Instant::now()),
            deleted: ByOthers::default(),
            changed: ByOthers::default(),
            survey: None,
        };
        this.publish_receive_buffer();
        Ok(this)
    }

    /// Works by these settings from now on.
    pub(super) fn apply_settings(&mut self, live: Arc<Live>, ports: &HashSet<u16>) {
        let before = std::mem::replace(&mut self.live, live);
        // Closing connections are remembered for this interval.
        self.events_failed |= before.sweep_interval != self.live.sweep_interval;
        self.reopen_events(ports);
    }

    /// Opens the event source anew where it has failed, and says whether it has; repairs never wait
    /// for it. What fails is tried again at the next sweep, and said once: also a refusal, for it has
    /// been open before.
    pub(super) fn reopen_events(&mut self, ports: &HashSet<u16>) -> bool {
        if !self.events_failed {
            return false;
        }
        // The old one first: a group has one owner.
        let was_off = matches!(std::mem::replace(&mut self.events, Events::Off), Events::Off);
        let name = watch_name(&self.foundation.device);
        match Events::open(wanted(&self.foundation, &self.live, &name, ports)) {
            Ok(events) => {
                self.events = events;
                self.events_failed = false;
            }
            Err(error) if was_off => tracing::debug!(%error, "still no events"),
            Err(error) => tracing::warn!(%error, "no event source, sweeps alone until one opens"),
        }
        self.publish_receive_buffer();
        true
    }

    /// What says when SYNs came last, where the packets are logged.
    pub(super) fn quiet(&self) -> Option<Quiet> {
        let is_noted = matches!(self.events, Events::Nflog(_) | Events::Ctnetlink(_, Some(_)));
        let mut syns =
            Syns::open(&watch_name(&self.foundation.device)).ok().filter(|_| is_noted)?;
        Some(Box::new(move |asked| syns.are_quiet(asked)))
    }

    fn publish_receive_buffer(&self) {
        let (source, bytes) = self.events.receive_buffer();
        self.share.receive_buffer(source, bytes);
    }

    /// Counts what came from the event source.
    pub(super) fn drained(&mut self, drained: &Drained) {
        self.share.events(EventType::Nflog, drained.logged);
        self.share.events(EventType::Update, drained.updates);
        self.share.events(EventType::Destroy, drained.destroys);
        if drained.overrun || drained.malformed > 0 {
            tracing::warn!(
                overrun = drained.overrun,
                malformed = drained.malformed,
                "events were lost, sweeping at once"
            );
            self.share.lost_events(drained.overrun);
        }
        if drained.full {
            let what = "more connections close at once than are watched: sweeping instead";
            tracing::warn!(at_once = nflog::CLOSING, "{what}");
        }
    }

    /// Keeps from conntrack what would fool it, before the first look at what it knows; by itself
    /// only where the defence level says so.
    pub(super) fn open_shield(
        &mut self,
        program: &'p mut Program,
        ports: &HashSet<u16>,
        level: Level,
    ) -> Result<()> {
        let mark = self.foundation.shield_mark;
        self.shield_is_wanted = self.foundation.shield == ShieldMode::On || level > Level::Calm;
        let is_wanted = self.shield_is_wanted;
        let opened = Shield::open(program, &self.foundation.device, mark, ports);
        let raised = opened.and_then(|mut shield| {
            if is_wanted {
                shield.raise()?;
            }
            Ok(shield)
        });
        match raised {
            Ok(shield) if is_wanted => {
                tracing::info!(devices = shield.devices(), mark, "shield raised");
                self.shield = Some(shield);
            }
            Ok(shield) => {
                tracing::info!(mark, "shield ready, to be raised with the defence level");
                self.shield = Some(shield);
            }
            Err(error) if self.foundation.shield == ShieldMode::On => return Err(error),
            Err(error) => tracing::warn!(%error, "no shield, repairs go on without it"),
        }
        Ok(())
    }

    /// Raises the shield with the defence level, and lowers it with that, where it goes by itself.
    pub(super) fn follow_level(&mut self, level: Level) {
        if self.foundation.shield != ShieldMode::Auto {
            return;
        }
        self.shield_is_wanted = level > Level::Calm;
        let Some(is_up) = self.shield.as_ref().map(Shield::is_up) else { return };
        if self.shield_is_wanted && !is_up {
            self.update_shield(|shield| {
                shield.raise()?;
                tracing::info!(devices = shield.devices(), "shield raised");
                Ok(())
            });
        } else if is_up && !self.shield_is_wanted {
            self.update_shield(|shield| {
                shield.lower();
                tracing::info!("shield lowered");
                Ok(())
            });
        }
    }

    /// What fails about the shield is tried again, and never stands in the way of a repair.
    pub(super) fn update_shield(&mut self, update: impl FnOnce(&mut Shield<'p>) -> Result<()>) {
        if let Some(Err(error)) = self.shield.as_mut().map(update) {
            line!(
                self.lines.fits("shield"),
                warn,
                %error,
                "shield does not follow, will be tried again"
            );
        }
    }

    /// Publishes what the shield has decided, and whether it is missing where it can be raised.
    pub(super) fn publish_shield(&self, can_be_raised: bool) {
        let is_wanted = can_be_raised
            && match self.foundation.shield {
                ShieldMode::Off => false,
                // One that could not even be made ready is missing in peace, too.
                ShieldMode::Auto => self.shield_is_wanted || self.shield.is_none(),
                ShieldMode::On => true,
            };
        let is_whole = self.shield.as_ref().is_some_and(|it| it.is_up() && !it.is_refused());
        self.share.shield_missing(is_wanted && !is_whole);
        match self.shield.as_ref().map(|shield| (shield.devices(), shield.counts())) {
            Some((devices, Ok(counts))) => self.share.shield(devices, counts),
            Some((_, Err(error))) => tracing::debug!(%error, "counters stay as they were"),
            None => {}
        }
    }

    /// Others have changed rules.
    pub(super) fn rules_changed(&mut self) {
        self.changed.note();
    }

    /// Logs and counts limits that have lost their lists.
    pub(super) fn limits_lost(&mut self, anew: &[Anew]) {
        for Anew { rule, loss } in anew {
            self.share.rules_changed(*loss);
            self.history.keep(|at| Record::Limit {
                at,
                netns: self.share.name().to_owned(),
                limit: rule.to_string(),
                loss: loss.name().to_owned(),
            });
            line!(
                self.lines.fits("limit lost its list"),
                info,
                limit = %rule,
                reason = %loss,
                "showing a limit its open connections again"
            );
        }
    }

    /// Publishes how many open connections no limit is known to count that should.
    pub(super) fn uncounted(&self, sockets: usize) {
        self.share.uncounted(sockets);
    }

    /// Logs and publishes a sweep that ended well.
    pub(super) fn swept(&mut self, sweep: &Sweep, keeper: &Keeper) {
        if let Some(error) = &sweep.hidden {
            tracing::warn!(%error, "hidden tuples stay as they are for now");
        }
        self.share.table(sweep.table, sweep.maximum);
        if let Some(change) = &sweep.transition {
            self.share.defence_changed(change);
            let (from, to) = (change.from as u8, change.to as u8);
            let netns = self.share.name().to_owned();
            self.history.keep(|at| Record::Level { at, netns, from, to });
            tracing::warn!(
                from = change.from as u8,
                to = change.to as u8,
                repairs_per_second = change.rate,
                table_fill = change.fill,
                "defence level changed"
            );
        }
        tracing::debug!(depth = ?sweep.depth, took = ?sweep.began.elapsed(), "swept");
        self.share.swept(keeper.ledger(), sweep.began, self.live.sweep_interval);
        if !keeper.is_sweeping_deep() {
            self.share.forget_repaired();
        }
    }

    /// Whether figures are read: by a scrape, the status page, a file.
    pub(super) fn is_published(&self) -> bool {
        self.foundation.metrics_listen.is_some()
            || self.live.metrics_textfile.is_some()
            || self.history.is_kept()
    }

    /// Logs what has been done since the start.
    pub(super) fn say_done(&self) {
        let done = self.share.done();
        tracing::info!(
            actions = ?done.actions,
            errors = ?done.errors,
            recounts = ?done.recounts,
            late_repairs = done.late_repairs,
            sweeps = done.sweeps,
            sweep_errors = done.sweep_errors,
            event_overruns = done.event_overruns,
            "done so far"
        );
    }

    /// Once a second: of which log lines there were too many to write each.
    pub(super) fn sum_up(&mut self) {
        let now = Instant::now();
        if let Some(changes) = self.changed.take_due(now) {
            tracing::info!(
                changes,
                "somebody else changes the firewall's rules: a limit that lost its list by it is shown \
                 what is open"
            );
        }
        if let Some(entries) = self.deleted.take_due(now) {
            tracing::warn!(
                entries,
                "somebody else deletes entries of open connections: conntrack -D or -F, a program, \
                 or the kernel from a full table"
            );
        }
        let withheld = self.lines.withheld(now);
        if !withheld.is_empty() {
            tracing::info!(?withheld, "and more of the same in the last second");
        }
    }

    /// How often connections of each peer were repaired in the last minute.
    pub(super) fn repairs(&self, now: Instant) -> HashMap<IpAddr, u64> {
        let mut repairs = HashMap::new();
        for (_, peer) in self.repairs.iter().filter(|(at, _)| now - *at < MINUTE) {
            *repairs.entry(*peer).or_default() += 1;
        }
        repairs
    }

    fn note_repairs(&mut self, outcomes: &[Outcome], now: Instant) {
        use ActionKind::{Reinsert, Reverse, Revive};
        let is_repair = |it: &&Outcome| {
            it.result.is_ok() && matches!(it.action.kind, Revive | Reinsert | Reverse)
        };
        let peers = outcomes.iter().filter(is_repair).map(|it| it.action.client());
        self.repairs.extend(peers.map(|peer| (now, peer)));
        let is_old = |(at, _): &(Instant, IpAddr)| now - *at >= MINUTE;
        while self.repairs.len() > REPAIRS || self.repairs.front().is_some_and(is_old) {
            self.repairs.pop_front();
        }
    }

    fn log_outcome(&mut self, outcome: &Outcome, trigger: Trigger) {
        let action = &outcome.action;
        let flow = action.view.connection.received();
        // ctkeep comes before an entry that it has seen expires.
        if action.reason == Reason::EntryMissing && action.template.tcp.is_some() {
            self.deleted.note();
        }
        match &outcome.result {
            // Routine: a sealed connection with traffic has it at every sweep.
            Ok(()) if action.kind == ActionKind::Extend => tracing::debug!(%flow, "extended"),
            Ok(()) if action.kind == ActionKind::Recount && outcome.recount.is_none() => {
                tracing::debug!(%flow, "not shown to a limit that logs or bans what exceeds it");
            }
            Ok(()) if outcome.is_in_place => {
                self.log_action(action, trigger, "acted, and its limits have it on their lists");
            }
            Ok(()) => self.log_action(action, trigger, "acted"),
            Err(error) if error.is_table_full() => {}
            Err(error) => line!(
                self.lines.fits("action failed"),
                warn,
                action = action.kind.name(),
                %flow,
                %error,
                "action failed, will be planned again"
            ),
        }
        if let Some(Err(error)) = &outcome.recount {
            line!(self.lines.fits("recount failed"), warn, %flow, %error, "recount failed");
        }
        if let Some(Err(error)) = &outcome.seal {
            line!(self.lines.fits("seal failed"), warn, %flow, %error, "seal failed");
        }
    }

    fn log_action(&mut self, action: &Action, trigger: Trigger, message: &'static str) {
        line!(
            self.lines.fits(action.kind.name()),
            info,
            action = action.kind.name(),
            flow = %action.view.connection.received(),
            reason = %action.reason,
            trigger = ?trigger,
            zone = action.template.zone.id(),
            // An entry that was never seen is put back as a plain one, without mark, labels and the like.
            seen = action.template.tcp.is_some(),
            "{message}"
        );
    }

    /// Has some SYNs to these ports told.
    pub(super) fn follow_opened(&mut self, ports: &HashSet<u16>) {
        let followed = self.events.follow_opened(ports);
        self.check_events(followed);
    }

    fn check_events(&mut self, followed: Result<()>) {
        if let Err(error) = followed {
            // Somebody took its table away, or a set is full.
            tracing::warn!(%error, "event source failed, opening it again");
            self.events_failed = true;
        }
    }
}

impl Witness for Desk<'_> {
    fn seen(&mut self, ports: &HashSet<u16>, half_closed: Option<&[Socket]>) {
        if let Some(sockets) = half_closed {
            self.share.half_closed(sockets, Instant::now());
        }
        let flows = half_closed.map(|sockets| sockets.iter().map(Socket::connection).collect());
        let followed = self.events.follow(ports, flows);
        self.check_events(followed);
        self.update_shield(|shield| shield.follow(ports));
    }

    fn acted(&mut self, acted: Acted) {
        self.share.acted(&acted.outcomes, acted.trigger, acted.since);
        self.note_repairs(&acted.outcomes, Instant::now());
        for outcome in acted.outcomes.iter().filter(|it| it.result.is_ok()) {
            let Action { kind, reason, view, .. } = &outcome.action;
            // Routine, each minute for each connection that is held.
            if *kind != ActionKind::Extend {
                self.history.keep(|at| Record::Action {
                    at,
                    netns: self.share.name().to_owned(),
                    action: kind.name().to_owned(),
                    reason: reason.to_string(),
                    source: outcome.action.client(),
                    port: view.connection.local.port(),
                });
            }
        }
        for outcome in &acted.outcomes {
            self.log_outcome(outcome, acted.trigger);
        }
        if let Some(rest) = acted.table_full {
            let full = |outcome: &&Outcome| {
                outcome.result.as_ref().is_err_and(crate::error::Error::is_table_full)
            };
            if let Some(Err(error)) = acted.outcomes.iter().find(full).map(|it| &it.result) {
                tracing::warn!(%error, retry_in = ?rest, "conntrack table full");
            }
        }
    }

    fn shown(&mut self, shown: Shown<'_>) {
        if !self.is_published() {
            return;
        }
        let Shown { whole, part, scope, policy, ledger } = shown;
        let repaired = self.share.repaired();
        let sweep = SweepResult { snapshot: &whole.snapshot, scope, policy, ledger, repaired };
        if part.start == 0 {
            self.survey = Some(Survey::begin(sweep, &whole.aside));
        }
        if let Some(survey) = &mut self.survey {
            survey.take(sweep, part);
        }
    }

    fn checked(&mut self, checked: Checked) {
        self.share.checked(checked.counted);
        let Checked { source, local, limit, held, counted, why, again } = checked;
        match (counted, again) {
            (Counted::Yes, _) => line!(
                self.lines.fits("recounted"),
                info,
                %source,
                %local,
                limit,
                held,
                "recounted"
            ),
            (Counted::No, Some(again)) => line!(
                self.lines.fits("not counted"),
                warn,
                %source,
                %local,
                limit,
                held,
                ?again,
                "sent, and the limit does not count them, will be shown again"
            ),
            (Counted::No, None) => line!(
                self.lines.fits("never counted"),
                warn,
                %source,
                %local,
                limit,
                held,
                "the limit does not count them, however often they were shown"
            ),
            (Counted::Unknown, _) => line!(
                self.lines.fits("unknown"),
                info,
                %source,
                %local,
                limit,
                why,
                "sent, and the limit could not be asked"
            ),
        }
    }

    fn planned(&mut self, actions: &[Action], trigger: Trigger) {
        for action in actions {
            self.log_action(action, trigger, "would act");
        }
    }
}

fn watch_name(device: &str) -> String {
    format!("{device}-watch")
}

fn wanted<'a>(
    foundation: &Foundation,
    live: &Live,
    name: &'a str,
    ports: &'a HashSet<u16>,
) -> Wanted<'a> {
    Wanted {
        source: foundation.events,
        name,
        group: foundation.nflog_group,
        ports,
        memory: Memory {
            most: nflog::CLOSING,
            // A sweep takes its time, and may come a little late.
            time: live.deep_interval + live.deep_interval / 4,
        },
    }
}
