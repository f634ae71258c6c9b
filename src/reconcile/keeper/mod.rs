//! The machine that keeps entries right: sweeps, suspects and second looks, and when each is due.
//!
//! It opens nothing, has no clock and writes no log: the kernel is a [`Transport`], what makes the
//! limiter count is a [`Recount`], `now` is an argument, and what was seen and done goes to a
//! [`Witness`]. The daemon waits, hands over, logs and publishes; `ctkeep reconcile` makes one pass;
//! tests play the kernel and the time.

mod checks;
mod limits;
mod look;
mod sweep;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::apply::{Outcome, apply, believed};
use super::backoff::BackOff;
use super::checks::{Checked, Checks};
use super::confirm::Confirmed;
use super::ledger::{Held, Ledger};
use super::observe::{Exact, Tables};
use super::plan::{Action, ActionKind};
use super::policy::{Policy, Scope};
use super::pressure::Defence;
use super::timers::{Timer, Timers};
use super::uncounted::Uncounted;
use crate::conntrack::{Change, TcpState, Zone};
use crate::error::{Error, Result};
use crate::firewall::lists::Loss;
use crate::flow::FourTuple;
use crate::netlink::{KernelSocket, Transport};
use crate::recount::{Notrack, Recount, Recounter};
use crate::sockdiag::{Cookie, Lookup, Socket, State};
use crate::watch::Suspect;

pub use sweep::{Depth, Sweep};

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
    /// A sweep has looked, and repaired nothing yet: the ports of the scope, and its sockets in
    /// CLOSE_WAIT, where it has asked for all of them.
    fn seen(&mut self, ports: &HashSet<u16>, half_closed: Option<&[Socket]>);
    /// A part of the repairs has been carried out.
    fn acted(&mut self, acted: Acted);
    /// In a dry run: what would have been carried out.
    fn planned(&mut self, actions: &[Action], trigger: Trigger);
    /// A limit was asked whether it counts what was shown to it.
    fn checked(&mut self, checked: Checked) {
        drop(checked);
    }
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
    /// The kernel's timeout of an ESTABLISHED entry, which idle connections are given before they are
    /// forgotten; `None` leaves them to the kernel.
    pub idle_timeout: Option<Duration>,
    /// What makes the limiter count; without it repairs are made in place.
    recounter: Option<R>,
    settings: Arc<Settings>,
    scope: Scope,
    /// Ports that had a listener in this run and may still have connections.
    former_listeners: HashSet<u16>,
    ledger: Ledger,
    timers: Timers,
    /// A deep sweep on suspicion comes no sooner.
    soonest_deep: Instant,
    /// When the last deep sweep began.
    last_deep: Option<Instant>,
    /// How long a watched connection may go without a look.
    longest_unseen: Duration,
    /// The ends of sockets are told.
    ends_are_told: bool,
    /// So many of the next sweeps ask for half-closed sockets.
    dumps: u32,
    /// One asks at the latest then.
    next_dump: Instant,
    /// The next sweep looks at every watched connection.
    suspects_all: bool,
    /// A look at all of them on suspicion comes no sooner.
    soonest_all: Instant,
    /// Sources whose half-closed connections are held otherwise from now on.
    hardened: HashSet<IpAddr>,
    /// The last shallow sweep.
    round: Instant,
    /// What it has not looked at yet, beside what is due: new sockets, and those that have changed.
    looks: Vec<Lookup>,
    /// Half-closed sockets for which the last deep sweep found no entry either.
    unaccounted: HashSet<Cookie>,
    second_look: Deferred,
    open_look: Deferred,
    back_off: BackOff,
    uncounted: Uncounted,
    checks: Checks,
    /// When the first change of rules became known that has not been followed.
    rules_changed: Option<Instant>,
    random: fn() -> u64,
    /// Nothing is asked of limits before.
    quiet: Instant,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// A keeper with an empty memory, whose first deep sweep is due at once. `random` gives random
    /// bits, so that nobody can time packets by the sweeps.
    ///
    /// # Errors
    /// The kernel refused to list its listeners.
    pub fn new(
        mut tables: Tables<T>,
        recounter: Option<R>,
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
            idle_timeout: None,
            recounter,
            settings: Arc::new(settings),
            scope,
            former_listeners: HashSet::new(),
            ledger,
            timers,
            soonest_deep: now,
            last_deep: None,
            longest_unseen: Duration::ZERO,
            ends_are_told: false,
            dumps: look::DUMPS,
            next_dump: now,
            suspects_all: false,
            soonest_all: now,
            hardened: HashSet::new(),
            round: now,
            looks: Vec::new(),
            unaccounted: HashSet::new(),
            second_look: Deferred::default(),
            open_look: Deferred::default(),
            back_off: BackOff::default(),
            uncounted: Uncounted::default(),
            checks: Checks::default(),
            rules_changed: None,
            random,
            quiet: now,
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
        self.ledger.know_zone(Zone::both(settings.policy.zone));
        self.settings = Arc::new(settings);
        self.suspect_all();
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
            self.sweep_in_parts(Depth::Deep, now, witness).map(Some)
        } else if self.timers.is_due(Timer::Shallow, now) {
            self.sweep_in_parts(Depth::Shallow, now, witness).map(Some)
        } else if self.timers.is_due(Timer::Look, now) {
            self.look_on(now, witness).map(|()| None)
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

    /// What an event source has seen, by connections of the server. `since` is when the first of
    /// them became known.
    ///
    /// # Errors
    /// A conversation broke: the next sweep finds what was not repaired.
    pub fn suspects(
        &mut self,
        suspects: HashMap<FourTuple, Suspect>,
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let mut suspects = self.tables.as_their_sockets_see_them(suspects, &self.ledger)?;
        suspects.retain(|flow, _| self.scope.contains(&self.settings.policy, *flow));
        if suspects.is_empty() {
            return Ok(());
        }
        // A held socket's device is known; any other's can be that of the packet.
        let lookup = |suspect: &Suspect| Lookup {
            flow: suspect.flow,
            interface: self.ledger.interface(suspect.flow).unwrap_or(suspect.interface),
        };
        let lookups: Vec<_> = suspects.values().map(lookup).collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let recent: HashSet<_> =
            self.second_look.lookups.iter().map(|lookup| lookup.flow).collect();
        for view in snapshot.views.iter() {
            let destroyed = suspects.get(&view.flow).map(|suspect| suspect.destroyed);
            match (view.socket, destroyed) {
                // A destroyed entry is known from its last event alone.
                (Some(socket), Some(Some(entry))) if self.ledger.last_entry(&socket).is_none() => {
                    self.ledger.remember(&socket, entry);
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
        if !confirmed.actions().is_empty() {
            self.no_questions_before(now + checks::QUIET);
        }
        self.defer(Timer::OpenLook, OPEN_LOOK, lookups, since, now);
        confirmed.retain(|action| open(action).is_none());
        self.carry_out(confirmed, Trigger::Event, since, now, witness)
    }

    /// Events were lost: everything must be looked at, at once.
    pub fn events_lost(&mut self, now: Instant) {
        self.timers.set(Timer::Deep, now);
        self.suspect_all();
    }

    /// There is reason to look at everything soon.
    pub fn hasten_deep(&mut self) {
        self.timers.hasten(Timer::Deep, self.soonest_deep);
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

    /// The guarded sockets, as a dump shows them.
    fn guarded(&mut self) -> Result<Vec<Socket>> {
        let policy = &self.settings.policy;
        let mut sockets = self.tables.sockets.sockets(policy.states)?;
        sockets
            .retain(|socket| policy.guards(socket) && self.scope.contains(policy, socket.flow()));
        Ok(sockets)
    }

    /// What exact look-ups call for.
    fn confirmed(&self, snapshot: &Exact) -> Confirmed {
        let (policy, ledger) = (&self.settings.policy, &self.ledger);
        self.but_releases_of_others(Confirmed::new(snapshot, &self.scope, policy, ledger))
    }

    /// What is not held is not given back by exact look-ups alone: the device of its socket is a
    /// guess, and the entry can be one that another ctkeep holds for sockets of its own. The deep
    /// sweep knows.
    fn but_releases_of_others(&self, mut confirmed: Confirmed) -> Confirmed {
        confirmed.retain(|action| {
            action.kind != ActionKind::Release || self.ledger.holds_flow(action.view.flow)
        });
        confirmed
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
        for socket in confirmed.opened_here() {
            self.ledger.remember_own(socket);
        }
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
        if self.recounter.is_none() {
            confirmed.retain(|action| action.kind != ActionKind::Recount);
        }
        let withheld = self.withheld(confirmed.actions())?;
        let is_withheld = |action: &Action| {
            let socket = action.view.socket.filter(|_| action.kind.needs_recount());
            socket.is_some_and(|socket| withheld.contains(&socket.cookie))
        };
        let mut in_place = confirmed.clone();
        in_place.retain(is_withheld);
        confirmed.retain(|action| !is_withheld(action));
        let recounter = &mut self.recounter;
        let (tables, ledger) = (&mut self.tables, &mut self.ledger);
        let policy = &settings.policy;
        let applied =
            apply(tables, recounter, &confirmed, policy, ledger, now).and_then(|mut all| {
                if !in_place.actions().is_empty() {
                    all.extend(apply(tables, &mut None::<R>, &in_place, policy, ledger, now)?);
                }
                Ok(all)
            });
        self.note_not_shown(in_place.actions().iter());
        let outcomes = match applied {
            Ok(outcomes) => outcomes,
            Err(error) => {
                self.note_not_shown(confirmed.actions().iter());
                return Err(error);
            }
        };
        let table_full = self.note_full_table(&outcomes, now);
        self.note_repairs(&outcomes, trigger, now);
        let failed = outcomes.iter().filter(|outcome| outcome.result.is_err());
        self.note_not_shown(failed.map(|outcome| &outcome.action));
        self.note_shown(&outcomes, now);
        self.attend_repaired(&outcomes, now);
        witness.acted(Acted { outcomes, trigger, since, table_full });
        Ok(())
    }

    /// Repairs that were broken off: an entry may be back, and look well, of which no limit has been
    /// shown the connection.
    fn note_not_shown<'a>(&mut self, actions: impl Iterator<Item = &'a Action>) {
        let repairs = actions.filter(|action| action.kind.needs_recount());
        for socket in repairs.filter_map(|action| action.view.socket) {
            self.ledger.set_uncounted(&socket, Loss::Unknown);
        }
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
                    let source = socket.remote.addr();
                    let hardened = self.ledger.pressure().hardens(source);
                    self.ledger.pressure_mut().repaired(source, now);
                    if !hardened && self.ledger.pressure().hardens(source) {
                        self.hardened.insert(source);
                    }
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
}
