//! The machine that keeps entries right: sweeps, suspects and second looks, and when each is due.
//!
//! It opens nothing, has no clock and writes no log: the kernel is a [`Transport`], what makes the
//! limiter count is a [`Recount`], `now` is an argument, and what was seen and done goes to a
//! [`Witness`]. The daemon waits, hands over, logs and publishes; `ctkeep reconcile` makes one pass;
//! tests play the kernel and the time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::apply::{Outcome, apply, believed};
use super::backoff::BackOff;
use super::confirm::{Confirmed, confirm};
use super::ledger::{Held, Ledger};
use super::observe::{Exact, Tables};
use super::plan::{Action, ActionKind, plan_for};
use super::policy::{Policy, Scope};
use super::pressure::{Defence, Transition};
use super::snapshot::Snapshot;
use super::timers::{Timer, Timers};
use super::uncounted::Uncounted;
use crate::conntrack::{Change, Entry, TableSize, TcpState};
use crate::error::{Error, Result};
use crate::firewall::lists::Anew;
use crate::flow::FourTuple;
use crate::netlink::{KernelSocket, Transport};
use crate::recount::{Notrack, Recount, Recounter};
use crate::sockdiag::{Cookie, Lookup, Socket, State, States};

/// The event of a packet can come before TCP has processed it, so a repaired connection is looked
/// at again this much later.
const SECOND_LOOK: Duration = Duration::from_millis(3);

/// An ordinary RST closes the entry a moment before TCP closes the socket: what an event makes of an
/// open connection is looked at again this much later, and only then acted upon.
const OPEN_LOOK: Duration = Duration::from_micros(500);

/// Connections that are planned for and repaired at once.
const PART: usize = 1024;

/// What the keeper goes by.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Scope and lease.
    pub policy: Policy,
    /// From sweep to sweep over half-closed sockets.
    pub sweep_interval: Duration,
    /// From sweep to sweep over every socket of the scope.
    pub deep_interval: Duration,
    /// Plan, and change nothing.
    pub dry_run: bool,
}

/// How far a sweep looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Half-closed sockets, and those whose entries are held.
    Shallow,
    /// Every socket of the scope.
    Deep,
}

/// Why a repair is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// An event told of it.
    Event,
    /// A sweep found it.
    Sweep,
    /// The firewall's rules have changed.
    Rules,
}

impl Trigger {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Sweep => "sweep",
            Self::Rules => "rules",
        }
    }
}

/// Opens what makes the limiter count; `None` where nothing is to.
pub type Opener<R> = Box<dyn FnMut(Instant) -> Result<Option<R>> + Send>;

/// What makes the limiter count: nothing, something, or something that is opened at the first repair
/// that needs it.
pub struct Recounting<R> {
    recounter: Option<R>,
    opener: Option<Opener<R>>,
}

impl<R> Recounting<R> {
    /// By this; by nothing, repairs are made in place.
    pub fn by(recounter: Option<R>) -> Self {
        Self { recounter, opener: None }
    }

    /// By what `opener` opens at the first repair that needs it.
    pub fn later(opener: Opener<R>) -> Self {
        Self { recounter: None, opener: Some(opener) }
    }

    fn open(&mut self, now: Instant) -> Result<()> {
        if let Some(opener) = &mut self.opener {
            self.recounter = opener(now)?;
            self.opener = None;
        }
        Ok(())
    }
}

/// Repairs that were carried out together.
#[derive(Debug)]
pub struct Acted {
    /// How each ended.
    pub outcomes: Vec<Outcome>,
    /// Why they were made.
    pub trigger: Trigger,
    /// When their need became known.
    pub since: Instant,
    /// The table was full, and inserts rest for so long; only where that should be said.
    pub table_full: Option<Duration>,
}

/// Learns of what the keeper sees and does while it works.
pub trait Witness {
    /// Both tables have been looked at, and nothing is repaired yet: the ports of the scope, and
    /// its half-closed connections, seen from the server.
    fn seen(&mut self, ports: &HashSet<u16>, half_closed: HashSet<FourTuple>);
    /// A part of the repairs has been carried out.
    fn acted(&mut self, acted: Acted);
    /// In a dry run: what would have been carried out.
    fn planned(&mut self, actions: &[Action], trigger: Trigger);
}

/// A sweep that ended well.
#[derive(Debug)]
pub struct Sweep {
    /// How far it looked.
    pub depth: Depth,
    /// When it began.
    pub began: Instant,
    /// What it saw before its repairs.
    pub snapshot: Snapshot,
    /// Size of the conntrack table after it.
    pub table: TableSize,
    /// Its greatest size, where anybody tells it.
    pub maximum: Option<u64>,
    /// The defence level has changed.
    pub transition: Option<Transition>,
    /// Notrack sets could not be brought up to date; they are tried again at the next sweep.
    pub notrack: Option<Error>,
}

/// Connections to look at, in a moment.
#[derive(Clone, Debug, Default)]
struct Deferred {
    /// When the first of them became known.
    since: Option<Instant>,
    lookups: HashSet<Lookup>,
}

/// Keeps the entries of one conntrack table right.
pub struct Keeper<T: Transport = KernelSocket, R: Recount = Recounter> {
    /// Both tables.
    pub tables: Tables<T>,
    /// The greatest size of the conntrack table, where the kernel does not say it with its size.
    pub maximum: Option<u64>,
    recounting: Recounting<R>,
    settings: Arc<Settings>,
    scope: Scope,
    /// Ports that had a listener in this run and may still have connections.
    former_listeners: HashSet<u16>,
    ledger: Ledger,
    timers: Timers,
    /// A deep sweep on suspicion comes no sooner.
    soonest_deep: Instant,
    /// Half-closed sockets for which the last deep sweep found no entry either.
    unaccounted: HashSet<Cookie>,
    second_look: Deferred,
    open_look: Deferred,
    back_off: BackOff,
    uncounted: Uncounted,
    /// When the first change of rules became known that has not been followed.
    rules_changed: Option<Instant>,
    random: fn() -> u64,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// A keeper with an empty memory, whose first deep sweep is due at once. `random` gives random
    /// bits, so that nobody can time packets by the sweeps.
    ///
    /// # Errors
    /// The kernel refused to list its listeners.
    pub fn new(
        mut tables: Tables<T>,
        recounting: Recounting<R>,
        settings: Settings,
        defence: Defence,
        now: Instant,
        random: fn() -> u64,
    ) -> Result<Self> {
        let scope = tables.scope(&settings.policy)?;
        let ledger = Ledger::new(defence, settings.policy.zone);
        let mut timers = Timers::default();
        timers.set(Timer::Deep, now);
        Ok(Self {
            tables,
            maximum: None,
            recounting,
            settings: Arc::new(settings),
            scope,
            former_listeners: HashSet::new(),
            ledger,
            timers,
            soonest_deep: now,
            unaccounted: HashSet::new(),
            second_look: Deferred::default(),
            open_look: Deferred::default(),
            back_off: BackOff::default(),
            uncounted: Uncounted::default(),
            rules_changed: None,
            random,
        })
    }

    /// The ports in scope, as of the last sweep.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// What it goes by.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Goes by these from now on.
    pub fn apply_settings(&mut self, settings: Settings) {
        self.settings = Arc::new(settings);
    }

    /// What is held, and how hard it is fought over.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// When there is something to do next.
    pub fn next_timeout(&self) -> Option<Instant> {
        self.timers.next()
    }

    /// Whether a sweep is due.
    pub fn sweep_is_due(&self, now: Instant) -> bool {
        self.timers.is_due(Timer::Shallow, now) || self.timers.is_due(Timer::Deep, now)
    }

    /// Does what is due.
    ///
    /// # Errors
    /// A conversation broke; the work that failed is due again by the rule of its timer.
    pub fn turn(&mut self, now: Instant, witness: &mut impl Witness) -> Result<Option<Sweep>> {
        self.look_again(now, witness)?;
        if self.timers.is_due(Timer::Deep, now) {
            self.sweep(Depth::Deep, now, witness).map(Some)
        } else if self.timers.is_due(Timer::Shallow, now) {
            self.sweep(Depth::Shallow, now, witness).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Looks again, where that is due, at what was just repaired or seemed to need it: the socket may
    /// be gone by now.
    ///
    /// # Errors
    /// A conversation broke: the next sweep finds what was not repaired.
    pub fn look_again(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        for timer in [Timer::SecondLook, Timer::OpenLook] {
            if !self.timers.take(timer, now) {
                continue;
            }
            let Deferred { since, lookups } = std::mem::take(self.deferred(timer));
            let (since, lookups) = (since.unwrap_or(now), lookups.into_iter().collect::<Vec<_>>());
            let looked = self.look_at(&lookups, since, now, witness);
            if looked.is_err() {
                self.defer(timer, self.settings.sweep_interval, lookups, since, now);
            }
            looked?;
        }
        Ok(())
    }

    fn look_at(
        &mut self,
        lookups: &[Lookup],
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let snapshot = self.tables.exactly(lookups, &self.ledger)?;
        self.ledger.settle(&snapshot);
        let confirmed = self.confirmed(&snapshot);
        self.carry_out(confirmed, Trigger::Event, since, now, witness)
    }

    /// What an event source has seen: connections of the server, with the last entry where they
    /// have none any more. `since` is when the first of them became known.
    ///
    /// # Errors
    /// A conversation broke: the next sweep finds what was not repaired.
    pub fn suspects(
        &mut self,
        mut suspects: HashMap<FourTuple, Option<Entry>>,
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        suspects.retain(|flow, _| self.scope.contains(&self.settings.policy, *flow));
        if suspects.is_empty() {
            return Ok(());
        }
        let lookups: Vec<_> = suspects
            .keys()
            .map(|flow| Lookup { flow: *flow, interface: self.ledger.interface(*flow) })
            .collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let recent: HashSet<_> =
            self.second_look.lookups.iter().map(|lookup| lookup.flow).collect();
        for view in snapshot.views.iter() {
            match (view.socket, suspects.get(&view.flow)) {
                // A destroyed entry is known from its last event alone.
                (Some(socket), Some(Some(entry))) if self.ledger.last_entry(&socket).is_none() => {
                    self.ledger.remember(&socket, *entry);
                }
                // Perhaps it closed the entry in the midst of its repair.
                (Some(socket), Some(None))
                    if recent.contains(&view.flow)
                        && self.ledger.notrack(&socket) != Some(Notrack::FinsAndRsts) =>
                {
                    self.ledger.distrust(&socket);
                }
                _ => {}
            }
        }
        self.hasten_deep_sweep(&snapshot);
        let mut confirmed = self.confirmed(&snapshot);
        let open =
            |action: &Action| action.view.socket.filter(|socket| socket.state != State::CloseWait);
        let lookups = confirmed.actions().iter().filter_map(open).map(|it| Lookup::from(&it));
        let lookups: Vec<_> = lookups.collect();
        self.defer(Timer::OpenLook, OPEN_LOOK, lookups, since, now);
        confirmed.retain(|action| open(action).is_none());
        self.carry_out(confirmed, Trigger::Event, since, now, witness)
    }

    /// These limits have lost their lists: what is open of theirs is shown to them in the next
    /// turns, part by part, from `at` on. `since` is when that became known.
    pub fn limits_lost(&mut self, anew: Vec<Anew>, since: Instant, at: Instant) {
        if anew.is_empty() {
            return;
        }
        self.uncounted.add(anew);
        self.rules_changed.get_or_insert(since);
        self.timers.hasten(Timer::Recount, at);
    }

    /// Whether limits wait for what is open of theirs.
    pub fn recount_is_due(&self, now: Instant) -> bool {
        self.timers.is_due(Timer::Recount, now)
    }

    /// Shows limits that have lost their lists one part of what is open of theirs; more is due at
    /// once, so that events come in between.
    ///
    /// # Errors
    /// A conversation broke: the sweeps show what was left.
    pub fn recount(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        let recounted = self.try_recount(now, witness);
        if recounted.is_err() {
            self.timers.set(Timer::Recount, now + self.settings.sweep_interval);
        }
        recounted
    }

    fn try_recount(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        let settings = self.settings.clone();
        if !self.uncounted.is_waiting() && self.uncounted.is_new() {
            let mut sockets = self.tables.sockets.sockets(settings.policy.states)?;
            let policy = &settings.policy;
            sockets.retain(|socket| {
                policy.guards(socket) && self.scope.contains(policy, socket.flow())
            });
            let ledger = &mut self.ledger;
            self.uncounted.find(&sockets, |socket, loss| ledger.set_uncounted(socket, loss));
        }
        let lookups = self.uncounted.next(PART);
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        for view in snapshot.views.iter().filter(|view| !self.uncounted.concerns(view)) {
            if let Some(socket) = view.socket {
                self.ledger.set_counted(&socket);
            }
        }
        let since = self.rules_changed.unwrap_or(now);
        let confirmed = self.confirmed(&snapshot);
        self.carry_out(confirmed, Trigger::Rules, since, now, witness)?;
        self.timers.take(Timer::Recount, now);
        if self.uncounted.is_waiting() || self.uncounted.is_new() {
            self.timers.set(Timer::Recount, now);
        } else {
            self.rules_changed = None;
        }
        Ok(())
    }

    /// Limits that lost their lists while what is open was shown to them begin anew at `at`.
    pub fn put_off_recount(&mut self, at: Instant) {
        if !self.uncounted.is_waiting() && self.uncounted.is_new() {
            self.timers.set(Timer::Recount, at);
        }
    }

    /// Events were lost: everything must be looked at, at once.
    pub fn events_lost(&mut self, now: Instant) {
        self.timers.set(Timer::Deep, now);
    }

    /// There is reason to look at everything soon.
    pub fn hasten_deep(&mut self) {
        self.timers.hasten(Timer::Deep, self.soonest_deep);
    }

    /// One sweep with its repairs.
    ///
    /// # Errors
    /// A conversation broke; the sweep is due again by the rule of its timer.
    pub fn sweep(
        &mut self,
        depth: Depth,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<Sweep> {
        let timer = match depth {
            Depth::Shallow => Timer::Shallow,
            Depth::Deep => Timer::Deep,
        };
        let swept = self.try_sweep(depth, now, witness);
        match &swept {
            Ok(_) => self.timers.succeeded(timer),
            // The other kind may work: it is due as it was.
            Err(_) => {
                let (first, most) = (self.settings.sweep_interval, self.settings.deep_interval);
                self.timers.failed(timer, now, first, most);
            }
        }
        swept
    }

    fn try_sweep(
        &mut self,
        depth: Depth,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<Sweep> {
        let listening = self.follow_listeners()?;
        let snapshot = match depth {
            Depth::Shallow => self.look_at_half_closed()?,
            Depth::Deep => self.look_at_everything(now)?,
        };
        self.ledger.note(&snapshot);
        witness.seen(&self.scope.ports, half_closed(&snapshot));
        if depth == Depth::Shallow {
            self.ledger.settle(&snapshot);
        }
        // What the sweep before it learned is evidence to this one too: after a flush of the table
        // this one sees no entry.
        self.repair(&snapshot, now, witness)?;
        if depth == Depth::Deep && !self.back_off.rests(now) {
            self.ledger.set_tracked(snapshot.evidence.tracked.clone());
        }
        let held = self.ledger.held().map(|held| held.orig);
        let narrowed = self.recounting.recounter.as_mut().map(|it| it.narrow_notrack(held, now));
        let (table, maximum, transition) = self.weigh(now)?;
        self.schedule(depth, &snapshot, &listening, now);
        let notrack = narrowed.and_then(Result::err);
        Ok(Sweep { depth, began: now, snapshot, table, maximum, transition, notrack })
    }

    /// What a sweep has cost: `ended` is when it was done, `cost` the time of a processor that it
    /// took. Intervals count from its end, and a deep sweep never takes more than a hundredth of a
    /// core.
    pub fn took(&mut self, sweep: &Sweep, ended: Instant, cost: Duration) {
        let elapsed = ended.saturating_duration_since(sweep.began);
        self.timers.delay(Timer::Shallow, elapsed);
        if sweep.depth == Depth::Deep {
            self.timers.delay(Timer::Deep, elapsed);
            // On suspicion a tenth of a core.
            self.soonest_deep = ended + cost * 9;
            let due = self.timers.due(Timer::Deep).unwrap_or(ended);
            self.timers.set(Timer::Deep, due.max(ended + cost * 100));
        }
    }

    /// Gives held entries the timeouts that the kernel itself would give them.
    ///
    /// # Errors
    /// A conversation broke: what was not given back lives out its lease.
    pub fn give_back(&mut self, timeout: impl Fn(TcpState) -> Option<Duration>) -> Result<()> {
        let lookups: Vec<_> = self.ledger.held().map(|held| held.lookup).collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let changes: Vec<_> = snapshot
            .views
            .iter()
            .filter_map(|view| {
                let entry = view.entry?;
                // Not the entry's own state: a sealed one is held as ESTABLISHED, and would live
                // for days.
                let state = match view.socket.map(|socket| socket.state) {
                    Some(State::Established) => entry.state()?,
                    Some(state) => believed(state),
                    None => TcpState::Close,
                };
                let timeout = timeout(state)?;
                Some(Change::Update { key: entry.key(), state, status: None, timeout })
            })
            .collect();
        self.tables.conntrack.change(&changes)?;
        Ok(())
    }

    /// Connections whose entries are held.
    pub fn held(&self) -> impl Iterator<Item = Held> {
        self.ledger.held()
    }

    /// The tables, and what they are looked at by.
    pub fn parts(&mut self) -> (&mut Tables<T>, &Scope, &Policy, &Ledger) {
        (&mut self.tables, &self.scope, &self.settings.policy, &self.ledger)
    }

    /// The tables, for one that begins with an empty memory.
    pub fn into_tables(self) -> Tables<T> {
        self.tables
    }

    /// The scope by who listens now; a server may stop listening and keep its connections.
    fn follow_listeners(&mut self) -> Result<HashSet<u16>> {
        let listening = self.tables.scope(&self.settings.policy)?.ports;
        self.former_listeners.extend(&listening);
        self.scope.ports = listening.union(&self.former_listeners).copied().collect();
        Ok(listening)
    }

    fn look_at_half_closed(&mut self) -> Result<Snapshot> {
        self.tables.half_closed(&self.scope, &self.settings.policy, &self.ledger)
    }

    fn look_at_everything(&mut self, now: Instant) -> Result<Snapshot> {
        if let Some(recounter) = &mut self.recounting.recounter {
            recounter.refresh(now);
        }
        let policy = &self.settings.policy;
        let snapshot = self.tables.whole(&self.scope, policy, States::open())?;
        if let Some(grace) = policy.reap {
            let orphans = snapshot.views.iter().filter(|view| view.socket.is_none());
            let keys = orphans.filter_map(|view| view.entry).map(|entry| entry.key());
            self.ledger.note_orphans(keys, grace, now);
        }
        let alive = snapshot.views.iter().filter_map(|view| view.socket);
        self.ledger.retain_seen(alive.map(|socket| socket.cookie));
        Ok(snapshot)
    }

    /// Plans, makes sure and carries out, part by part. Extensions come first: repairs are slow,
    /// and leases must not expire meanwhile.
    fn repair(
        &mut self,
        snapshot: &Snapshot,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let settings = self.settings.clone();
        let (policy, evidence) = (&settings.policy, &snapshot.evidence);
        let mut is_any_lost = false;
        for bring_back in [false, true] {
            let mut views = snapshot.views.iter();
            while views.len() > 0 && (is_any_lost || !bring_back) {
                let part = views.by_ref().take(PART);
                let mut planned = plan_for(part, evidence, &self.scope, policy, &self.ledger);
                if self.may_not_insert(now) {
                    planned.actions.retain(|action| action.kind != ActionKind::Reinsert);
                }
                let before = planned.actions.len();
                planned.actions.retain(|action| action.kind.needs_recount() == bring_back);
                is_any_lost |= planned.actions.len() < before;
                let (tables, scope, ledger) = (&mut self.tables, &self.scope, &self.ledger);
                let confirmed = confirm(tables, &planned, evidence, scope, policy, ledger)?;
                self.carry_out(confirmed, Trigger::Sweep, now, now, witness)?;
            }
        }
        Ok(())
    }

    /// What exact look-ups call for.
    fn confirmed(&self, snapshot: &Exact) -> Confirmed {
        Confirmed::new(snapshot, &self.scope, &self.settings.policy, &self.ledger)
    }

    /// Carries a plan out and arranges the second look.
    fn carry_out(
        &mut self,
        mut confirmed: Confirmed,
        trigger: Trigger,
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        if self.may_not_insert(now) {
            confirmed.retain(|action| action.kind != ActionKind::Reinsert);
        }
        if confirmed.actions().is_empty() {
            return Ok(());
        }
        let settings = self.settings.clone();
        if settings.dry_run {
            witness.planned(confirmed.actions(), trigger);
            return Ok(());
        }
        if confirmed.actions().iter().any(|action| action.kind.needs_recount()) {
            self.recounting.open(now)?;
        }
        if self.recounting.recounter.is_none() {
            confirmed.retain(|action| action.kind != ActionKind::Recount);
        }
        let recounter = &mut self.recounting.recounter;
        let (tables, ledger) = (&mut self.tables, &mut self.ledger);
        let outcomes = apply(tables, recounter, &confirmed, &settings.policy, ledger, now)?;
        let table_full = self.note_full_table(&outcomes, now);
        self.note_repairs(&outcomes, trigger, now);
        witness.acted(Acted { outcomes, trigger, since, table_full });
        Ok(())
    }

    /// Remembers what was repaired, against its source and for a second look.
    fn note_repairs(&mut self, outcomes: &[Outcome], trigger: Trigger, now: Instant) {
        let mut again = Vec::new();
        let mut fooled_open = false;
        for outcome in outcomes.iter().filter(|outcome| outcome.result.is_ok()) {
            if outcome.action.kind.needs_recount()
                && let Some(socket) = outcome.action.view.socket
            {
                // Forgetting (a flush, an idle timeout, an early drop) is nobody's offence.
                if outcome.action.reason.is_fooled() {
                    fooled_open |= socket.state == State::Established;
                    self.ledger.pressure_mut().repaired(socket.remote.addr(), now);
                }
                again.push(Lookup::from(&socket));
            }
        }
        if fooled_open && trigger == Trigger::Event {
            self.hasten_deep();
        }
        self.defer(Timer::SecondLook, SECOND_LOOK, again, now, now);
    }

    fn note_full_table(&mut self, outcomes: &[Outcome], now: Instant) -> Option<Duration> {
        let refused = |outcome: &Outcome| outcome.result.as_ref().is_err_and(Error::is_table_full);
        if outcomes.iter().any(refused) {
            return self.back_off.failed(now);
        }
        let is_inserted = |outcome: &Outcome| {
            outcome.result.is_ok() && outcome.action.kind == ActionKind::Reinsert
        };
        if outcomes.iter().any(is_inserted) {
            self.back_off.succeeded();
        }
        None
    }

    /// Adds to what waits for `timer`, which keeps its time.
    fn defer(
        &mut self,
        timer: Timer,
        delay: Duration,
        lookups: Vec<Lookup>,
        since: Instant,
        now: Instant,
    ) {
        if lookups.is_empty() {
            return;
        }
        self.timers.hasten(timer, now + delay);
        let deferred = self.deferred(timer);
        deferred.since.get_or_insert(since);
        deferred.lookups.extend(lookups);
    }

    fn deferred(&mut self, timer: Timer) -> &mut Deferred {
        if timer == Timer::OpenLook { &mut self.open_look } else { &mut self.second_look }
    }

    fn may_not_insert(&self, now: Instant) -> bool {
        self.back_off.rests(now) || !self.ledger.pressure().allows_inserts()
    }

    /// Weighs how hard entries are fought over.
    fn weigh(&mut self, now: Instant) -> Result<(TableSize, Option<u64>, Option<Transition>)> {
        let size = self.tables.conntrack.size()?;
        let maximum = size.maximum.map(u64::from).or(self.maximum);
        let fill = maximum.filter(|maximum| *maximum > 0).map_or(0.0, |maximum| {
            #[allow(clippy::cast_precision_loss, reason = "a share of at most 2^32 entries")]
            let maximum = maximum as f64;
            f64::from(size.entries) / maximum
        });
        Ok((size, maximum, self.ledger.pressure_mut().tick(fill, now)))
    }

    /// A half-closed socket without an entry in any zone that is known may have one in another
    /// zone, or evidence that only a look at the whole table shows.
    fn hasten_deep_sweep(&mut self, snapshot: &Snapshot) {
        if unaccounted(snapshot).any(|socket| !self.unaccounted.contains(&socket.cookie)) {
            self.hasten_deep();
        }
    }

    /// Says when the next sweeps are due, after one that ended well.
    fn schedule(
        &mut self,
        depth: Depth,
        snapshot: &Snapshot,
        listening: &HashSet<u16>,
        now: Instant,
    ) {
        let pressure = self.ledger.pressure();
        let (shallow, deep) = (
            pressure.hurry(self.settings.sweep_interval),
            pressure.hurry(self.settings.deep_interval),
        );
        self.timers.set(Timer::Shallow, now + jittered(shallow, (self.random)()));
        match depth {
            Depth::Shallow => self.hasten_deep_sweep(snapshot),
            Depth::Deep => {
                self.forget_closed_ports(snapshot, listening);
                self.unaccounted = unaccounted(snapshot).map(|socket| socket.cookie).collect();
                self.soonest_deep = now;
                self.timers.set(Timer::Deep, now + deep);
            }
        }
    }

    /// A port without listener and without open sockets is out of scope again.
    fn forget_closed_ports(&mut self, snapshot: &Snapshot, listening: &HashSet<u16>) {
        let alive: HashSet<u16> = snapshot
            .views
            .iter()
            .filter(|view| view.socket.is_some())
            .map(|view| view.flow.src.port())
            .collect();
        self.former_listeners.retain(|port| alive.contains(port) || listening.contains(port));
    }
}

/// Half-closed connections, seen from the server.
fn half_closed(snapshot: &Snapshot) -> HashSet<FourTuple> {
    let sockets = snapshot.views.iter().filter_map(|view| view.socket);
    sockets.filter(|it| it.state == State::CloseWait).map(|it| it.flow()).collect()
}

/// Sockets that one side has closed and that have no entry.
fn unaccounted(snapshot: &Snapshot) -> impl Iterator<Item = Socket> {
    let lacking = snapshot.views.iter().filter(|view| view.entry.is_none());
    let sockets = lacking.filter_map(|view| view.socket);
    sockets.filter(|socket| socket.state != State::Established && socket.takes_a_slot())
}

/// A twentieth to a fifth sooner: nobody can time packets by the sweeps, and what the event source
/// remembers for one interval is seen by a sweep before it is forgotten.
fn jittered(interval: Duration, random: u64) -> Duration {
    let random = u8::try_from(random % 151).unwrap_or(75);
    interval.mul_f64(0.8 + f64::from(random) / 1000.0)
}
