//! Sweeps: what they look at, what they repair, and when the next ones are due.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{Keeper, PART, Trigger, Witness};
use crate::conntrack::TableSize;
use crate::error::{Error, Result};
use crate::netlink::Transport;
use crate::reconcile::confirm::confirm;
use crate::reconcile::ledger::Idle;
use crate::reconcile::plan::{ActionKind, plan_for};
use crate::reconcile::pressure::Transition;
use crate::reconcile::snapshot::Snapshot;
use crate::reconcile::timers::Timer;
use crate::recount::Recount;
use crate::sockdiag::{Socket, State, States};

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
    /// What a deep one saw before its repairs. A shallow one looks at what can have changed.
    pub snapshot: Snapshot,
    /// Size of the conntrack table after it.
    pub table: TableSize,
    /// Its greatest size, where anybody tells it.
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
        let swept = self.sweep_in_parts(depth, now, witness)?;
        while self.timers.is_due(Timer::Look, now) {
            self.look_on(now, witness)?;
        }
        Ok(swept)
    }

    /// The same; what a shallow sweep has not looked at yet is due at once.
    pub(super) fn sweep_in_parts(
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
            Depth::Shallow => {
                self.look_for_changes(now, witness)?;
                Snapshot::default()
            }
            Depth::Deep => {
                let mut snapshot = self.look_at_everything(now)?;
                self.tables.play(&mut snapshot, &self.ledger);
                self.ledger.note(&snapshot);
                let sockets = snapshot.views.iter().filter_map(|view| view.socket);
                let half_closed: Vec<_> =
                    sockets.filter(|it| it.state == State::CloseWait).collect();
                witness.seen(&self.scope.ports, Some(&half_closed));
                self.attend(&snapshot, now);
                // What the sweep before it learned is evidence to this one too: after a flush of
                // the table this one sees no entry.
                self.repair(&snapshot, now, witness)?;
                if !self.back_off.rests(now) {
                    self.ledger.set_tracked(snapshot.evidence.tracked.clone());
                    self.ledger.set_ways(snapshot.evidence.ways.clone());
                }
                snapshot
            }
        };
        let held = self.ledger.held().map(|held| held.orig);
        let narrowed = self.recounter.as_mut().map(|it| it.narrow_hidden(held, now));
        let (table, maximum, transition) = self.weigh(now)?;
        self.schedule(depth, &snapshot, &listening, now);
        let hidden = narrowed.and_then(Result::err);
        Ok(Sweep { depth, began: now, snapshot, table, maximum, transition, hidden })
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

    /// The scope by who listens now; a server may stop listening and keep its connections.
    fn follow_listeners(&mut self) -> Result<HashSet<u16>> {
        let listening = self.tables.scope(&self.settings.policy)?.ports;
        self.former_listeners.extend(&listening);
        let ports = listening.union(&self.former_listeners).copied().collect();
        if self.scope.ports != ports {
            self.scope.ports = ports;
            self.closing();
        }
        Ok(listening)
    }

    fn look_at_everything(&mut self, now: Instant) -> Result<Snapshot> {
        if let Some(recounter) = &mut self.recounter {
            recounter.refresh(now);
        }
        let policy = &self.settings.policy;
        let mut snapshot = self.tables.whole(&self.scope, policy, States::open())?;
        let cookies = |snapshot: &Snapshot| -> HashSet<_> {
            let sockets = snapshot.views.iter().filter_map(|view| view.socket);
            sockets.map(|socket| socket.cookie).collect()
        };
        // A dump does not prove absence, and what waits to be counted must not be forgotten.
        let skipped = self.ledger.uncounted_but(&cookies(&snapshot));
        if !skipped.is_empty() {
            let found = self.tables.exactly(&skipped, &self.ledger)?.into_snapshot().views;
            let found: Vec<_> = found.iter().filter(|view| view.socket.is_some()).collect();
            let flows: HashSet<_> = found.iter().map(|view| view.flow).collect();
            snapshot.views.retain(|view| view.socket.is_some() || !flows.contains(&view.flow));
            snapshot.views.extend(found);
        }
        if let Some(grace) = policy.reap {
            let orphans = snapshot.views.iter().filter(|view| view.socket.is_none());
            let keys = orphans.filter_map(|view| view.entry).map(|entry| entry.key());
            self.ledger.note_orphans(keys, grace, now);
        }
        self.ledger.retain_seen(&cookies(&snapshot));
        self.ledger.set_idle(self.idle(now));
        self.last_deep = Some(now);
        Ok(snapshot)
    }

    /// An idle entry must outlive the time to the next deep sweep, which can come late, and to the
    /// one behind it, if that fails.
    fn idle(&self, now: Instant) -> Option<Idle> {
        let timeout = self.idle_timeout?;
        let last = self.last_deep.map(|last| now.saturating_duration_since(last));
        let interval = self.settings.deep_interval.max(last.unwrap_or_default());
        let below = self.settings.policy.lease.max(interval * 2);
        Some(Idle { below, timeout: timeout.max(below * 2) })
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
        let (level, hardened) = (pressure.level(), pressure.hardens_all());
        let transition = pressure.tick(fill, now);
        if pressure.level() > level || pressure.hardens_all() && !hardened {
            self.suspect_all();
        }
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
        if depth == Depth::Deep {
            self.forget_closed_ports(snapshot, listening);
            self.unaccounted = unaccounted(snapshot).map(|socket| socket.cookie).collect();
            self.soonest_deep = now;
            self.timers.set(Timer::Deep, now + deep);
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
