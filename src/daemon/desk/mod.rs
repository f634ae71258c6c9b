//! Beside the keeper of one worker: the event source, the shield, the log and the metrics.

mod shield;
mod witness;

use std::collections::{HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use super::control::Control;
use super::history::{History, Minutes};
use super::log::{ByOthers, Lines, line};
use super::{Foundation, Live};
use crate::audit::survey::Survey;
use crate::error::Result;
use crate::firewall::lists::Anew;
use crate::history::record::Record;
use crate::metrics::{EventType, GuardMetrics};
use crate::reconcile::keeper::{Keeper, Quiet, Sweep};
use crate::shield::Shield;
use crate::watch::syns::Syns;
use crate::watch::{Drained, Events, Memory, Wanted, nflog};

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
    /// When connections of which peer were repaired, of the last minute; bounded.
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
