//! One guarded conntrack table: waits for what is to be done, hands it to the [`Keeper`], publishes
//! what came of it.

mod answer;
mod wait;

use std::collections::HashMap;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use wait::Ready;

use super::control::Control;
use super::desk::Desk;
use super::ends::SocketEnds;
use super::guard;
use super::members::Members;
use super::outgoing::OutgoingConnections;
use super::overload::Overloads;
use super::reader::Reader;
use super::rules::Rules;
use super::survey;
use super::threads::cpu_time;
use super::{Live, OnExit};
use crate::audit::survey::{Survey, SweepResult};
use crate::conntrack::TcpState;
use crate::error::{Error, Result};
use crate::firewall::Ruleset;
use crate::firewall::lists::Lists;
use crate::firewall::timeouts::Policies;
use crate::host::counters::Cookies;
use crate::host::{random, sysctl};
use crate::metrics::{GuardMetrics, instant_of};
use crate::reconcile::keeper::{Depth, Forgets, Keeper, Sweep};
use crate::reconcile::observe::Tables;
use crate::shield;
use crate::sockdiag::States;

/// Containers that come within this time are looked at together: their servers may have had connections
/// already.
const NEWCOMERS: Duration = Duration::from_millis(200);

/// Asking limits may cost this share of a core.
const CHECKS: u32 = 20;

pub(super) struct Worker<'p> {
    pub(super) keeper: Keeper,
    pub(super) desk: Desk<'p>,
    /// The rules whose limits count these sockets, where they are followed.
    rules: Option<Rules>,
    /// Rules give connections policies of timeouts by their names (`CT --timeout`).
    name_policies: bool,
    /// Other namespaces whose connections are in this table.
    members: Option<&'p Members>,
    /// Reads whole tables for deep sweeps.
    reader: Reader,
    /// What the deep sweep under way has cost.
    deep_cost: Duration,
    ends: SocketEnds,
    overloads: Overloads,
    outgoing: OutgoingConnections,
    /// Where the audit asks.
    pub(super) claim: Option<UnixListener>,
    sweep_failing: bool,
}

impl<'p> Worker<'p> {
    pub(super) fn open(
        control: &Control,
        members: Option<&'p Members>,
        share: GuardMetrics,
    ) -> Result<Self> {
        let (foundation, live, now) = (&control.foundation, control.live(), Instant::now());
        let recounter = guard::open_recounter(foundation, now)?;
        let is_available = recounter.as_ref().is_none_or(|it| !it.ways().is_empty());
        let mut tables = Tables::open()?;
        if let Some(members) = members {
            members.begin(&mut tables.sockets);
        }
        let (settings, defence) = (live.keeper(foundation.dry_run), foundation.defence);
        let mut keeper = Keeper::new(tables, recounter, settings, defence, now, random::bits)?;
        // Before the first dump, so that nothing happens unseen between the two.
        let desk = Desk::open(control, live, &keeper.scope().ports, share)?;
        desk.share.recount_available(is_available);
        rely_on_events(&mut keeper, &desk);
        let mut cookies = Cookies::new(now);
        keeper.rely_on_cookies(Box::new(move || cookies.may_be_out(Instant::now())));
        keeper.read_beside();
        let reader = Reader::open()?;
        let rules = if foundation.follow_rules {
            Some(Rules::follow(members.is_some(), &foundation.device, now)?)
        } else {
            None
        };
        let name_policies = match &rules {
            Some(rules) => {
                know_rules(&mut keeper, rules);
                rules.name_policies()
            }
            None => {
                keeper.tables.follow_tracking(&Ruleset::read());
                keeper.follow_tracking(keeper.tables.tracking.clone());
                Lists::read(None).is_ok_and(|lists| lists.name_policies())
            }
        };
        know_timeouts(&mut keeper, name_policies);
        let (claim, sweep_failing) = (None, false);
        let overloads = Overloads::new(desk.live.clone(), desk.foundation.dry_run, now);
        let outgoing = OutgoingConnections::new(&desk.live, desk.foundation.dry_run, now);
        Ok(Self {
            keeper,
            desk,
            rules,
            name_policies,
            members,
            reader,
            deep_cost: Duration::ZERO,
            ends: SocketEnds::new(now),
            overloads,
            outgoing,
            claim,
            sweep_failing,
        })
    }

    /// One turn of the loop. What fails is tried again, be it refused: the kernel has granted all of
    /// it at the start.
    pub(super) fn turn(&mut self, ready: Ready) {
        let done = self.try_turn(ready);
        self.desk.sum_up();
        match done {
            Ok(()) => self.sweep_failing = false,
            Err(error) => self.note_failure(&error),
        }
    }

    pub(super) fn note_failure(&mut self, error: &Error) {
        if !self.sweep_failing {
            tracing::warn!(%error, "sweep failed, will be repeated");
        }
        self.sweep_failing = true;
        self.desk.share.failed(error);
    }

    fn try_turn(&mut self, ready: Ready) -> Result<()> {
        let began = Instant::now();
        if let Some(members) = self.members.filter(|_| ready.members) {
            members.follow(&mut self.keeper.tables.sockets);
            self.keeper.sweep_by(began + NEWCOMERS);
        }
        // What has failed there is tried again at the next sweep.
        if ready.devices || self.keeper.sweep_is_due(began) {
            self.desk.update_shield(shield::Shield::follow_devices);
        }
        if ready.events {
            self.overloads.hasten();
            self.take_events(began)?;
        }
        if ready.ends {
            self.ends.take(&mut self.keeper, &mut self.desk)?;
        }
        if ready.question {
            self.answer();
        }
        self.follow_rules(ready.rules)?;
        self.sweep()?;
        self.ends.follow(&mut self.keeper);
        let (tables, scope, policy, _) = self.keeper.parts();
        self.overloads.turn(&mut tables.sockets, scope, policy, &self.desk.share)?;
        self.outgoing.turn(&mut self.keeper, &self.desk.share)?;
        self.check_limits()
    }

    /// Does what is due of sweeps, of a deep one a part.
    fn sweep(&mut self) -> Result<()> {
        let worked = cpu_time();
        let was_deep = self.keeper.is_sweeping_deep();
        if let Some((whole, cost)) = self.reader.take() {
            self.deep_cost += cost;
            self.keeper.has_read(whole, Instant::now(), &mut self.desk)?;
        }
        let swept = self.keeper.turn(Instant::now(), &mut self.desk)?;
        if let Some(reading) = self.keeper.reading() {
            self.deep_cost = Duration::ZERO;
            self.reader.read(reading);
        }
        let cost = cpu_time().saturating_sub(worked);
        self.deep_cost += if was_deep { cost } else { Duration::ZERO };
        self.desk.follow_level(self.keeper.ledger().pressure().level());
        match swept {
            Some(sweep) if sweep.is_beside => self.swept(&sweep, self.deep_cost),
            Some(sweep) => self.swept(&sweep, cost),
            None => {}
        }
        Ok(())
    }

    /// Hears of rules that change, and shows limits that have lost their lists what is open.
    fn follow_rules(&mut self, ready: bool) -> Result<()> {
        let Some(rules) = &mut self.rules else { return Ok(()) };
        if ready {
            rules.hear(Instant::now())?;
        }
        let looked = rules.look(Instant::now());
        if looked.is_some() {
            self.desk.rules_changed();
            know_rules(&mut self.keeper, rules);
            self.name_policies = rules.name_policies();
            if rules.take_doubt() && !self.desk.foundation.dry_run {
                self.keeper.doubt_limits(Instant::now())?;
            }
        }
        let (anew, since) = looked.unwrap_or_else(|| (Vec::new(), Instant::now()));
        self.desk.limits_lost(&anew);
        let now = Instant::now();
        self.keeper.limits_lost(anew, since, rules.free_at().max(now));
        if self.keeper.recount_is_due(now) {
            let worked = cpu_time();
            self.keeper.recount(now, &mut self.desk)?;
            let now = Instant::now();
            rules.spend(cpu_time().saturating_sub(worked), now);
            self.keeper.put_off_recount(rules.free_at().max(now));
            self.desk.uncounted(self.keeper.ledger().uncounted_sockets());
        }
        Ok(())
    }

    /// Asks limits whether they count what was shown to them.
    fn check_limits(&mut self) -> Result<()> {
        let began = Instant::now();
        if !self.keeper.check_is_due(began) {
            return Ok(());
        }
        let worked = cpu_time();
        let rules = &mut self.rules;
        let mut as_read =
            || rules.as_mut().map_or(Ok(true), |rules| rules.are_as_read(Instant::now()));
        let checked = self.keeper.check(began, &mut as_read, &mut self.desk);
        let cost = cpu_time().saturating_sub(worked);
        self.keeper.no_questions_before(Instant::now() + cost * CHECKS);
        self.desk.uncounted(self.keeper.ledger().uncounted_sockets());
        checked
    }

    /// The deep sweep of the start: what comes before it is not guarded.
    pub(super) fn sweep_first(&mut self) -> Result<()> {
        let worked = cpu_time();
        self.list_for_survey();
        let sweep = self.keeper.sweep(Depth::Deep, Instant::now(), &mut self.desk)?;
        self.swept(&sweep, cpu_time().saturating_sub(worked));
        if self.rules.is_some() && !self.desk.foundation.dry_run {
            // A limit that was added while connections were open has none of them on its list.
            self.keeper.doubt_limits(Instant::now())?;
        }
        Ok(())
    }

    fn take_events(&mut self, now: Instant) -> Result<()> {
        let own = self.keeper.tables.conntrack.port();
        let mut suspects = HashMap::new();
        let mut since = now;
        let drained = self.desk.events.drain(own, |suspect| {
            since = since.min(suspect.at.map_or(since, instant_of));
            let known = suspects.entry(suspect.connection).or_insert(suspect);
            *known = known.and_then(suspect);
        })?;
        let now = Instant::now();
        if drained.overrun || drained.malformed > 0 {
            self.keeper.events_lost(now);
        }
        if !drained.closing.is_empty() {
            self.keeper.have_begun_to_close(drained.closing.iter().copied());
        }
        self.keeper.opening(drained.opening.iter().copied());
        if drained.full {
            self.keeper.miss_packets();
            self.keeper.hasten_deep();
            self.keeper.suspect_all();
        }
        self.desk.drained(&drained);
        if !drained.opening.is_empty() {
            self.keeper.look_without_tcp(now, &mut self.desk)?;
        }
        self.keeper.suspects(suspects, since, now, &mut self.desk)
    }

    /// Publishes a sweep that ended well, and what it has cost.
    fn swept(&mut self, sweep: &Sweep, cost: Duration) {
        if self.desk.reopen_events(&self.keeper.scope().ports) {
            self.keeper.suspect_all();
            rely_on_events(&mut self.keeper, &self.desk);
        }
        if sweep.depth == Depth::Deep {
            know_timeouts(&mut self.keeper, self.name_policies);
            self.survey(sweep);
        }
        self.desk.follow_opened(&self.keeper.tables.sockets.mptcp_ports());
        self.desk.swept(sweep, &self.keeper);
        self.keeper.took(sweep, Instant::now(), cost);
    }

    /// Has figures taken of the whole tables, where somebody reads them.
    fn survey(&mut self, sweep: &Sweep) {
        let Some(survey) = self.desk.survey.take() else { return };
        let (tables, scope, policy, ledger) = self.keeper.parts();
        let repaired = self.desk.share.repaired();
        let seen = SweepResult { snapshot: &sweep.snapshot, scope, policy, ledger, repaired };
        match survey::finish(tables, seen, survey) {
            Ok(survey) => {
                self.desk.share.surveyed(&survey);
                let Desk { minutes, history, share, .. } = &mut self.desk;
                let (sources, snapshot) = (&survey.sources, &sweep.snapshot);
                let behind = || tables.sockets.addresses_of_members();
                minutes.note(history, share.name(), sources, snapshot, behind, Instant::now());
            }
            Err(error) => {
                tracing::warn!(%error, "metrics of the whole tables not updated");
            }
        }
    }

    /// Works by these settings from now on.
    pub(super) fn apply_settings(&mut self, live: Arc<Live>) {
        if Arc::ptr_eq(&live, &self.desk.live) {
            return;
        }
        self.keeper.apply_settings(live.keeper(self.desk.foundation.dry_run));
        self.overloads.apply_settings(live.clone(), &self.desk.share);
        self.outgoing.apply_settings(&live, &self.desk.share, Instant::now());
        self.desk.apply_settings(live, &self.keeper.scope().ports);
        rely_on_events(&mut self.keeper, &self.desk);
        self.list_for_survey();
        self.say_unheard();
    }

    /// Has sockets listed that figures of the whole tables are taken of, where somebody reads them.
    fn list_for_survey(&mut self) {
        let states = if self.desk.is_published() { Survey::states() } else { States::default() };
        self.keeper.list_besides(states);
    }

    /// Says which ports are named in vain.
    pub(super) fn say_unheard(&mut self) {
        let policy = &self.keeper.settings().policy;
        if policy.ports.is_empty() {
            return;
        }
        let policy = policy.clone();
        let Ok(listeners) = self.keeper.tables.sockets.listeners() else { return };
        for port in policy.unheard(&listeners, self.keeper.scope(), &Ruleset::read()) {
            tracing::warn!(port, "nothing listens on this port, and no rule leads it elsewhere");
        }
    }

    /// Gives held entries back, if that is wanted; else they live out their lease.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.desk.say_done();
        if self.desk.live.on_exit == OnExit::Keep || self.desk.foundation.dry_run {
            return Ok(());
        }
        self.keeper.give_back(kernel_timeout)?;
        self.outgoing.give_back(&mut self.keeper)
    }
}

/// Has the keeper go by the rules as they are.
fn know_rules(keeper: &mut Keeper, rules: &Rules) {
    keeper.know_limits(rules.limited());
    keeper.know_all_limits(rules.all_limits());
    keeper.follow_tracking(rules.tracking());
}

/// Has the keeper go by the event source that has been opened.
fn rely_on_events(keeper: &mut Keeper, desk: &Desk<'_>) {
    keeper.rely_on_events(desk.events.longest_unseen());
    keeper.rely_on_syns(desk.quiet());
}

/// Has the keeper know how soon the kernel forgets, by its settings and by the policies that rules give; of
/// iptables these have names.
fn know_timeouts(keeper: &mut Keeper, name_policies: bool) {
    keeper.idle_timeout = kernel_timeout(TcpState::Established);
    // Where data is not acknowledged, or comes again and again, in whatever state.
    let unanswered = ["unacknowledged", "max_retrans"]
        .map(|which| sysctl::conntrack(&format!("nf_conntrack_tcp_timeout_{which}")));
    let unanswered = unanswered.map(|timeout| timeout.map(Duration::from_secs));
    // Rules that cannot be read are said where limits are looked for.
    let of_nft = Policies::of_nft().unwrap_or_default();
    let named = if name_policies { Policies::named() } else { Ok(Policies::default()) };
    let named = named.unwrap_or_else(|error| {
        tracing::warn!(%error, "timeouts that rules give by name could not be read");
        Policies::default()
    });
    let by_rules = [of_nft, named];
    let shortest = |states: &[TcpState]| {
        let by_kernel = states.iter().map(|state| kernel_timeout(*state)).chain(unanswered);
        by_kernel.chain(by_rules.iter().map(|it| it.shortest(states))).flatten().min()
    };
    keeper.forgets = Forgets {
        // A FIN that TCP does not take, because of a hole before it, closes the entry alone.
        open: shortest(&[
            TcpState::SynRecv,
            TcpState::Established,
            TcpState::FinWait,
            TcpState::CloseWait,
        ]),
        // A sealed one is ESTABLISHED.
        half_closed: shortest(&[TcpState::FinWait, TcpState::CloseWait, TcpState::Established]),
    };
}

/// The timeout that the kernel itself gives an entry in this state.
pub(super) fn kernel_timeout(state: TcpState) -> Option<Duration> {
    sysctl::conntrack(&state.timeout_setting()?).map(Duration::from_secs)
}
