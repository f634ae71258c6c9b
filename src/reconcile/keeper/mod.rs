//! The machine that keeps entries right: sweeps, suspects and second looks, and when each is due.
//!
//! It opens nothing, has no clock and writes no log: the kernel is a [`Transport`], what makes the
//! limiter count is a [`Recount`], `now` is an argument, and what was seen and done goes to a
//! [`Witness`]. The daemon waits, hands over, logs and publishes; `ctkeep reconcile` makes one pass;
//! tests play the kernel and the time.

mod checks;
mod deep;
mod in_place;
mod limits;
mod look;
mod repair;
mod samples;
mod suspects;
mod sweep;
mod withheld;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::deep::Deep;
use super::apply::Outcome;
use super::apply::change::believed;
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
use crate::error::Result;
use crate::firewall::tracking::Tracking;
use crate::flow::Connection;
use crate::netlink::{KernelSocket, Transport};
use crate::recount::{Recount, Recounter};
use crate::sockdiag::{Cookie, Lookup, Socket, State, States};
use crate::watch::Suspect;

pub use checks::AsRead;
pub use deep::Shown;
use in_place::InPlace;
pub use in_place::Quiet;
pub use suspects::Cookies;
use suspects::Deferred;
pub use sweep::{Depth, Sweep};

/// Zones of rules that are looked in before an entry was seen there: each is one question more for a connection.
const NAMED_ZONES: usize = 16;

/// What the keeper goes by.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Scope and lease.
    pub policy: Policy,
    /// Time from one look at half-closed sockets to the next.
    pub sweep_interval: Duration,
    /// Time from one look at every socket in scope to the next.
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
    /// Connections of a deep sweep have been worked through.
    fn shown(&mut self, shown: Shown<'_>) {
        let Shown { .. } = shown;
    }
    /// A limit was asked whether it counts what was shown to it.
    fn checked(&mut self, checked: Checked) {
        drop(checked);
    }
}

/// The kernel's shortest timeouts: a packet gives an entry one of them, whatever it had.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forgets {
    /// Of connections that neither side has closed, and of handshakes that wait for their last packet.
    pub open: Option<Duration>,
    /// Of those that one side has closed.
    pub half_closed: Option<Duration>,
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
    /// How soon the kernel forgets what it hears nothing of.
    pub forgets: Forgets,
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
    /// Entries of the whole table at the last sweep.
    entries: u32,
    /// When the last deep sweep began.
    last_deep: Option<Instant>,
    /// The one under way.
    deep: Deep,
    /// Others read the tables for it.
    is_read_beside: bool,
    /// Another one is wanted since.
    is_deep_owed: bool,
    /// The last one has read the whole table.
    was_dumped: bool,
    /// No other one does before then.
    soonest_dump: Instant,
    /// Sockets in these states are listed for the witness besides.
    aside: States,
    /// How long a watched connection may go without a look.
    longest_unseen: Duration,
    /// The ends of sockets are told.
    ends_are_told: bool,
    /// So many of the next sweeps ask for half-closed sockets.
    dumps: u32,
    /// What has begun to close since the last sweep.
    begun_to_close: HashMap<Connection, Suspect>,
    /// One asks at the latest then.
    next_dump: Instant,
    /// None asks sooner only because connections begin to close.
    soonest_question: Instant,
    /// The last shallow sweep has asked.
    has_asked: bool,
    /// The next sweep looks at every watched connection.
    suspects_all: bool,
    /// A look at all of them on suspicion comes no sooner.
    soonest_all: Instant,
    /// Ports of what transparent proxies take.
    proxied: HashSet<u16>,
    /// Looks for them so far, or times that they were left out.
    proxy_looks: u32,
    /// A look for connections without a TCP socket comes no sooner.
    soonest_without_tcp: Instant,
    /// Sources whose watched connections the next sweep looks at: they open others, or are held
    /// otherwise from now on.
    sources: HashSet<IpAddr>,
    /// The last shallow sweep.
    round: Instant,
    /// What it has not looked at yet, beside what is due: new sockets, and those that have changed.
    looks: Vec<Lookup>,
    /// Half-closed sockets for which the last deep sweep found no entry either.
    unaccounted: HashSet<Cookie>,
    second_look: Deferred,
    open_look: Deferred,
    /// Whose recount has failed.
    retry: Deferred,
    back_off: BackOff,
    uncounted: Uncounted,
    checks: Checks,
    /// When the first change of rules became known that has not been followed.
    rules_changed: Option<Instant>,
    random: fn() -> u64,
    /// Nothing is asked of limits before.
    quiet: Instant,
    in_place: InPlace,
    cookies: Option<Cookies>,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// A keeper with an empty memory, whose first deep sweep is due at once. `random` gives random
    /// bits, so that no attacker can time packets by the sweeps.
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
        let mut scope = tables.scope(&settings.policy)?;
        let open = match settings.policy.ports.is_empty() {
            true => tables.sockets.sockets(settings.policy.states)?,
            false => Vec::new(),
        };
        // Of a listener that ended before this life began.
        let former_listeners = tables.served_without_listener(&open, &scope, &settings.policy)?;
        scope.ports.extend(&former_listeners);
        let ledger = Ledger::new(defence, settings.policy.zone);
        let mut timers = Timers::default();
        timers.set(Timer::Deep, now);
        Ok(Self {
            tables,
            maximum: None,
            idle_timeout: None,
            forgets: Forgets::default(),
            recounter,
            settings: Arc::new(settings),
            scope,
            former_listeners,
            ledger,
            timers,
            soonest_deep: now,
            entries: 0,
            last_deep: None,
            deep: Deep::default(),
            is_read_beside: false,
            is_deep_owed: false,
            was_dumped: false,
            soonest_dump: now,
            aside: States::default(),
            longest_unseen: Duration::ZERO,
            ends_are_told: false,
            dumps: look::DUMPS,
            begun_to_close: HashMap::new(),
            next_dump: now,
            soonest_question: now,
            has_asked: false,
            suspects_all: false,
            soonest_all: now,
            proxied: HashSet::new(),
            proxy_looks: 0,
            soonest_without_tcp: now,
            sources: HashSet::new(),
            round: now,
            looks: Vec::new(),
            unaccounted: HashSet::new(),
            second_look: Deferred::default(),
            open_look: Deferred::default(),
            retry: Deferred::default(),
            back_off: BackOff::default(),
            uncounted: Uncounted::default(),
            checks: Checks::default(),
            rules_changed: None,
            random,
            quiet: now,
            in_place: InPlace::blind(),
            cookies: None,
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

    /// Goes by what rules say of conntrack. Zones that they name may have no entry yet, and so be seen nowhere
    /// until the next deep sweep.
    pub fn follow_tracking(&mut self, tracking: Option<Arc<Tracking>>) {
        let named = tracking.as_deref().map(Tracking::named_zones).unwrap_or_default();
        for zone in named.into_iter().take(NAMED_ZONES) {
            self.ledger.know_zone(Zone::both(zone));
        }
        self.tables.tracking = tracking;
    }

    /// The connections that are held, and how hard they are fought over.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// When there is something to do next.
    pub fn next_timeout(&self) -> Option<Instant> {
        let not_now = self.is_sweeping_deep().then_some(Timer::Deep);
        self.timers.next_but(not_now)
    }

    /// Whether a sweep is due.
    pub fn sweep_is_due(&self, now: Instant) -> bool {
        self.timers.is_due(Timer::Shallow, now) || self.deep_is_due(now)
    }

    fn deep_is_due(&self, now: Instant) -> bool {
        self.timers.is_due(Timer::Deep, now) && !self.is_sweeping_deep()
    }

    /// Does what is due.
    ///
    /// # Errors
    /// A conversation broke; the work that failed is due again by the rule of its timer.
    pub fn turn(&mut self, now: Instant, witness: &mut impl Witness) -> Result<Option<Sweep>> {
        self.look_again(now, witness)?;
        if self.deep_is_due(now) && self.is_read_beside {
            self.begin_deep(now).map(|()| None)
        } else if self.deep_is_due(now) {
            self.sweep_deep(now, witness).map(Some)
        } else if self.timers.is_due(Timer::Shallow, now) {
            self.sweep_shallow(now, witness).map(Some)
        } else if self.timers.is_due(Timer::Part, now) {
            self.go_on_deep(now, witness)
        } else if self.timers.is_due(Timer::Look, now) {
            self.look_on(now, witness).map(|()| None)
        } else {
            Ok(None)
        }
    }

    /// Events were lost: everything must be looked at, at once.
    pub fn events_lost(&mut self, now: Instant) {
        self.timers.set(Timer::Deep, now);
        self.miss_packets();
        self.suspect_all();
    }

    /// There is reason to look at everything soon.
    pub fn hasten_deep(&mut self) {
        self.timers.hasten(Timer::Deep, self.soonest_deep);
    }

    /// Sockets have come that no event has told of: the next sweep lists them, by this time.
    pub fn sweep_by(&mut self, time: Instant) {
        self.closing();
        self.timers.hasten(Timer::Shallow, time);
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
        sockets.retain(|socket| {
            policy.guards(socket) && self.scope.contains(policy, socket.connection())
        });
        Ok(sockets)
    }

    /// What exact look-ups call for.
    fn confirmed(&self, snapshot: &Exact) -> Confirmed {
        let (policy, ledger) = (&self.settings.policy, &self.ledger);
        self.but_releases_of_others(Confirmed::new(snapshot, &self.scope, policy, ledger))
    }

    /// An entry that is not held is not given back by exact look-ups alone: the device of its socket is a
    /// guess, and the entry can be one that another ctkeep holds for sockets of its own. The deep
    /// sweep knows.
    fn but_releases_of_others(&self, mut confirmed: Confirmed) -> Confirmed {
        confirmed.retain(|action| {
            action.kind != ActionKind::Release
                || self.ledger.holds_connection(action.view.connection)
        });
        confirmed
    }
}
