//! Sweeps: what they look at, what they repair, and when the next ones are due.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{Forgets, Keeper, Settings, Witness};
use crate::conntrack::TableSize;
use crate::error::{Error, Result};
use crate::netlink::Transport;
use crate::reconcile::policy::Scope;
use crate::reconcile::pressure::Transition;
use crate::reconcile::snapshot::Snapshot;
use crate::reconcile::timers::Timer;
use crate::recount::Recount;
use crate::sockdiag::{Socket, State};

/// From one deep sweep that dumps the table to the next. Each connection is to be looked at once in
/// five minutes, whatever the size of the table.
const LONGEST_REST: Duration = Duration::from_secs(150);

/// Deep sweeps that must come so often may take a tenth of a core.
const HASTY: Duration = Duration::from_secs(3);

/// Where the kernel forgets within a second.
const SHORTEST_BLIND: Duration = Duration::from_millis(250);

/// Sweeps from one look at what transparent proxies take to the next: a dump of all open sockets.
const PROXY_LOOKS: u32 = 30;

/// How far a sweep looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Half-closed sockets, and those whose entries are held.
    Shallow,
    /// Every socket of the scope.
    Deep,
}

/// A sweep that ended well.
#[derive(Debug)]
pub struct Sweep {
    /// How far it looked.
    pub depth: Depth,
    /// When it began.
    pub began: Instant,
    /// Others have read the tables for it, and shallow ones have come and gone meanwhile.
    pub is_beside: bool,
    /// What a deep one saw before its repairs. A shallow one looks at what can have changed.
    pub snapshot: Snapshot,
    /// Size of the conntrack table after it.
    pub table: TableSize,
    /// Its greatest size, where it is known.
    pub maximum: Option<u64>,
    /// The defence level has changed.
    pub transition: Option<Transition>,
    /// The hidden tuples could not be brought up to date; they are tried again at the next sweep.
    pub hidden: Option<Error>,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
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
        if depth == Depth::Deep {
            return self.sweep_deep(now, witness);
        }
        let swept = self.sweep_shallow(now, witness)?;
        while self.timers.is_due(Timer::Look, now) {
            self.look_on(now, witness)?;
        }
        Ok(swept)
    }

    /// A look where something can have changed; what is left of it is due at once.
    pub(super) fn sweep_shallow(
        &mut self,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<Sweep> {
        let swept = self.try_sweep_shallow(now, witness);
        match &swept {
            Ok(_) => self.timers.succeeded(Timer::Shallow),
            // The other kind may work: it is due as it was.
            Err(_) => {
                let (first, most) = (self.settings.sweep_interval, self.settings.deep_interval);
                self.timers.failed(Timer::Shallow, now, first, most);
            }
        }
        swept
    }

    fn try_sweep_shallow(&mut self, now: Instant, witness: &mut impl Witness) -> Result<Sweep> {
        let listening = self.follow_listeners()?;
        self.look_for_changes(now, witness)?;
        self.end(Depth::Shallow, now, Snapshot::default(), &listening, false, now)
    }

    /// What follows the repairs of a sweep.
    pub(super) fn end(
        &mut self,
        depth: Depth,
        began: Instant,
        snapshot: Snapshot,
        listening: &HashSet<u16>,
        is_beside: bool,
        now: Instant,
    ) -> Result<Sweep> {
        let held = self.ledger.held().flat_map(|held| [held.orig, held.lookup.connection.sent()]);
        let narrowed = self.recounter.as_mut().map(|it| it.narrow_hidden(held, now));
        self.ledger.forget_handshakes(now);
        let (table, maximum, transition) = self.weigh(now)?;
        let hidden = narrowed.and_then(Result::err);
        let sweep = Sweep { depth, began, is_beside, snapshot, table, maximum, transition, hidden };
        self.schedule(&sweep, listening);
        Ok(sweep)
    }

    /// What a sweep has cost: `ended` is when it was done, `cost` the time of a processor that it
    /// took. Intervals count from its end, and deep sweeps never take more than a hundredth of a
    /// core, a tenth where the kernel forgets within seconds: where a dump of the table is too much for
    /// that, half of it is for dumps, and half for sweeps between them that ask for the entry of each
    /// socket. Another hundredth is for questions for half-closed sockets that are asked because
    /// something closes: for each the kernel walks its whole table of sockets.
    pub fn took(&mut self, sweep: &Sweep, ended: Instant, cost: Duration) {
        let elapsed = ended.saturating_duration_since(sweep.began);
        if !sweep.is_beside {
            self.timers.delay(Timer::Shallow, elapsed);
        }
        if std::mem::take(&mut self.has_asked) && sweep.depth == Depth::Shallow {
            self.soonest_question = ended + cost * 100;
        }
        if sweep.depth == Depth::Deep {
            self.timers.delay(Timer::Deep, elapsed);
            // On suspicion a tenth of a core.
            self.soonest_deep = ended + cost * 9;
            let share = if self.blind(self.forgets.open) <= HASTY { 10 } else { 100 };
            let rest = if !self.was_dumped {
                cost * 2 * share
            } else if cost * share <= LONGEST_REST {
                cost * share
            } else {
                self.soonest_dump = ended + cost * 2 * share;
                Duration::ZERO
            };
            let due = self.timers.due(Timer::Deep).unwrap_or(ended);
            self.timers.set(Timer::Deep, due.max(ended + rest));
            if std::mem::take(&mut self.is_deep_owed) {
                self.hasten_deep();
            }
        }
    }

    /// The scope by who listens now; a server may stop listening and keep its connections.
    pub(super) fn follow_listeners(&mut self) -> Result<HashSet<u16>> {
        let mut listening = self.tables.scope(&self.settings.policy)?.ports;
        self.follow_proxy(&listening)?;
        listening.extend(&self.proxied);
        self.former_listeners.extend(&listening);
        let ports = listening.union(&self.former_listeners).copied().collect();
        if self.scope.ports != ports {
            self.scope.ports = ports;
            // At the others nothing was heard of.
            self.miss_packets();
            self.closing();
        }
        Ok(listening)
    }

    /// What a transparent proxy takes has a port on which nothing listens.
    fn follow_proxy(&mut self, listening: &HashSet<u16>) -> Result<()> {
        if self.tables.sockets.proxies().is_empty() {
            self.proxied.clear();
            return Ok(());
        }
        self.proxy_looks = self.proxy_looks.wrapping_add(1);
        if self.proxied.is_empty() || self.proxy_looks.is_multiple_of(PROXY_LOOKS) {
            let sockets = self.tables.sockets.transparent()?;
            let scope = Scope { ports: listening.clone(), ..Scope::default() };
            let policy = &self.settings.policy;
            self.proxied = self.tables.served_without_listener(&sockets, &scope, policy)?;
        }
        Ok(())
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
        let pressure = self.ledger.pressure_mut();
        let (level, hardened) = (pressure.level(), pressure.pins_all_early());
        let transition = pressure.tick(fill, now);
        if pressure.level() > level || pressure.pins_all_early() && !hardened {
            self.suspect_all();
        }
        // Flushed, most likely: of open connections that are not held nothing else tells.
        if size.entries < self.entries / 2 || size.entries == 0 && self.entries > 0 {
            self.hasten_deep();
        }
        self.entries = size.entries;
        Ok((size, maximum, transition))
    }

    /// A half-closed socket without an entry in any zone that is known may have one in another
    /// zone, or evidence that only a look at the whole table shows.
    pub(super) fn hasten_deep_sweep(&mut self, snapshot: &Snapshot) {
        if unaccounted(snapshot).any(|socket| !self.unaccounted.contains(&socket.cookie)) {
            self.hasten_deep();
        }
    }

    /// Says when the next sweeps are due, after one that ended well.
    fn schedule(&mut self, sweep: &Sweep, listening: &HashSet<u16>) {
        let Sweep { depth, began, is_beside, ref snapshot, .. } = *sweep;
        let pressure = self.ledger.pressure();
        let Forgets { open, half_closed } = self.forgets;
        let (shallow, deep) = (
            pressure.scale_interval(self.settings.sweep_interval).min(self.blind(half_closed)),
            pressure.scale_interval(self.settings.deep_interval).min(self.blind(open)),
        );
        if !is_beside || self.timers.due(Timer::Shallow).is_none() {
            self.timers.set(Timer::Shallow, began + jittered(shallow, (self.random)()));
        }
        if depth == Depth::Deep {
            self.forget_closed_ports(snapshot, listening);
            self.unaccounted = unaccounted(snapshot).map(|socket| socket.cookie).collect();
            self.soonest_deep = began;
            self.timers.set(Timer::Deep, began + deep);
        }
    }

    /// How long a connection may go without a look where the kernel forgets it so soon: no bound but where
    /// that is sooner than others look.
    pub(super) fn blind(&self, timeout: Option<Duration>) -> Duration {
        let Settings { policy, deep_interval, .. } = &*self.settings;
        let usual = policy.lease.max(*deep_interval * 2);
        let short = timeout.filter(|timeout| *timeout < usual);
        short.map_or(Duration::MAX, |timeout| (timeout / 2).max(SHORTEST_BLIND))
    }

    /// A port without listener and without open sockets is out of scope again.
    fn forget_closed_ports(&mut self, snapshot: &Snapshot, listening: &HashSet<u16>) {
        let alive: HashSet<u16> = snapshot
            .views
            .iter()
            .filter(|view| view.socket.is_some())
            .map(|view| view.connection.local.port())
            .collect();
        self.former_listeners.retain(|port| alive.contains(port) || listening.contains(port));
    }
}

/// Sockets that one side has closed and that have no entry.
fn unaccounted(snapshot: &Snapshot) -> impl Iterator<Item = Socket> {
    let lacking = snapshot.views.iter().filter(|view| view.entry.is_none());
    let sockets = lacking.filter_map(|view| view.socket);
    sockets.filter(|socket| socket.state != State::Established && socket.takes_a_slot())
}

/// A twentieth to a fifth sooner: no attacker can time packets by the sweeps, and what the event source
/// remembers for one interval is seen by a sweep before it is forgotten.
fn jittered(interval: Duration, random: u64) -> Duration {
    let random = u8::try_from(random % 151).unwrap_or(75);
    interval.mul_f64(0.8 + f64::from(random) / 1000.0)
}
