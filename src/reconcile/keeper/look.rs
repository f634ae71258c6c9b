//! Looks at watched connections, where something can have changed: a lease that wants it, a socket
//! that is new, not as it was or gone, and a sample.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Keeper, Trigger, Witness};
use crate::error::Result;
use crate::flow::Connection;
use crate::netlink::Transport;
use crate::reconcile::apply::Outcome;
use crate::reconcile::confirm::confirm;
use crate::reconcile::plan::{ActionKind, Reason, plan_for};
use crate::reconcile::snapshot::{Snapshot, View};
use crate::reconcile::timers::Timer;
use crate::recount::Recount;
use crate::sockdiag::{Cookie, Lookup, State};
use crate::watch::Suspect;

/// Connections that are looked at before events have their turn: some 3 ms.
const LOOKS: usize = 256;

/// Watched connections that each sweep looks at besides: of a loss of a tenth of all entries it
/// misses 3 %, and of a flush nothing.
const SAMPLE: usize = 32;

/// Sweeps that ask for half-closed sockets after a FIN: the event source does not report each, and
/// perhaps before TCP has seen it.
pub(super) const DUMPS: u32 = 2;

/// Sweeps without such a question at most: a connection that is closed from this side has two of
/// the kernel's minutes.
const UNTOLD: u32 = 10;

/// A look at one connection takes some 10 us (benches/tables.rs), and looks at all on suspicion at
/// most a tenth of a core.
const REST_FOR_EACH: Duration = Duration::from_micros(100);

/// Such a look walks a table of the whole machine, for half a millisecond.
const WITHOUT_TCP_REST: Duration = Duration::from_millis(20);

/// By the next sweep, and not by this one again.
const SOON: Duration = Duration::from_nanos(1);

/// Conntrack counts whole seconds: so much later a lease is surely due.
const ROUNDED: Duration = Duration::from_secs(1);

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// Events name what changes, so a watched connection may go without a look for `longest`, and
    /// for half of a lease at most. Before that each sweep looks at all of them.
    pub fn rely_on_events(&mut self, longest: Duration) {
        self.longest_unseen = longest;
    }

    /// Ends of sockets are told ([`Self::ended`]), from now on or no more.
    pub fn rely_on_ends(&mut self, are_told: bool) {
        self.ends_are_told = are_told;
    }

    /// A connection has begun to close: the next sweeps ask for half-closed sockets.
    pub fn closing(&mut self) {
        self.dumps = DUMPS;
    }

    /// These have: the next sweep looks at them besides, as TCP may not have taken their FINs.
    pub fn have_begun_to_close(&mut self, suspects: impl IntoIterator<Item = Suspect>) {
        self.closing();
        self.begun_to_close.extend(suspects.into_iter().map(|it| (it.connection, it)));
    }

    /// What has begun to close since the last sweep, as its sockets see it.
    fn take_begun_to_close(&mut self) -> Result<Vec<Lookup>> {
        let lookup = |it: &Suspect| Lookup { connection: it.connection, interface: it.interface };
        let mut lookups: HashSet<_> = self.begun_to_close.values().map(lookup).collect();
        // The event says nothing of translation, which the entry does.
        let of_wire = |(connection, suspect): (&Connection, &Suspect)| {
            (*connection, Suspect { is_translated: true, ..*suspect })
        };
        let begun = self.begun_to_close.iter().map(of_wire).collect();
        let (scope, policy) = (&mut self.scope, &self.settings.policy);
        let seen = self.tables.as_their_sockets_see_them(begun, &self.ledger, scope, policy)?;
        let translated =
            seen.values().filter(|it| !self.begun_to_close.contains_key(&it.connection));
        lookups.extend(translated.map(lookup));
        lookups.retain(|it| self.scope.contains(policy, it.connection));
        self.begun_to_close.clear();
        Ok(lookups.into_iter().collect())
    }

    /// These sources have opened connections: the next sweep looks at what else they have.
    pub fn opening(&mut self, sources: impl IntoIterator<Item = IpAddr>) {
        self.sources.extend(sources);
    }

    /// Looks for connections of Multipath TCP that have no TCP socket any more: no event reports their
    /// end, and a limiter forgets them at the next SYN.
    ///
    /// # Errors
    /// A conversation broke: the next sweep finds them.
    pub fn look_without_tcp(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        if !self.tables.sockets.uses_mptcp() {
            return Ok(());
        }
        if now < self.soonest_without_tcp {
            self.timers.hasten(Timer::Shallow, self.soonest_without_tcp);
            return Ok(());
        }
        self.soonest_without_tcp = now + WITHOUT_TCP_REST;
        let policy = &self.settings.policy;
        let mut all = self.tables.sockets.without_tcp()?;
        all.retain(|it| self.scope.contains(policy, it.connection()) && !self.ledger.holds(it));
        let lookups: Vec<_> = all.iter().map(Lookup::from).collect();
        if lookups.is_empty() { Ok(()) } else { self.look_at(&lookups, now, now, witness) }
    }

    /// These sockets have ended, it is said.
    ///
    /// # Errors
    /// A conversation broke: the next sweep looks at all.
    pub fn ended(
        &mut self,
        sockets: &[Cookie],
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let watched = sockets.iter().filter_map(|it| self.ledger.watched_socket(*it));
        let lookups: Vec<_> = watched.collect();
        if lookups.is_empty() {
            return Ok(());
        }
        let looked = self.look_at(&lookups, now, now, witness);
        if looked.is_err() {
            self.suspect_all();
        }
        looked
    }

    /// Whether half-closed sockets are asked for: not by the clock where what changes is told, but for
    /// those that half-close from this side, of which no packet comes in.
    fn is_dump_due(&self, now: Instant) -> bool {
        let is_told = self.longest_unseen == Duration::MAX && self.ends_are_told;
        // No event reports a connection of Multipath TCP whose last TCP connection ends by FINs.
        let is_told = is_told && !self.tables.sockets.uses_mptcp();
        !is_told || self.dumps > 0 && now >= self.soonest_question || now >= self.next_dump
    }

    /// The next sweep looks at every watched connection.
    pub fn suspect_all(&mut self) {
        self.suspects_all = true;
        self.closing();
    }

    /// What a shallow sweep looks at, and the first part of it.
    pub(super) fn look_for_changes(
        &mut self,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        self.round = now;
        if std::mem::take(&mut self.suspects_all) {
            self.ledger.look_at_all(now);
        }
        let sources = std::mem::take(&mut self.sources);
        if !sources.is_empty() {
            self.ledger.look_at_sources(&sources, now);
        }
        if self.looks.is_empty() && self.is_dump_due(now) {
            let policy = &self.settings.policy;
            let dump = self.tables.half_closed(&self.scope, policy, &self.ledger)?;
            self.dumps = self.dumps.saturating_sub(1);
            self.has_asked = true;
            self.next_dump = now + self.settings.sweep_interval * UNTOLD;
            self.looks = self.ledger.compare(&dump, self.ends_are_told);
            let half_closed = dump.into_iter().filter(|it| it.state == State::CloseWait);
            witness.seen(&self.scope.ports, Some(&half_closed.collect::<Vec<_>>()));
        } else {
            witness.seen(&self.scope.ports, None);
        }
        self.looks.extend(self.ledger.sample(SAMPLE));
        let begun = self.take_begun_to_close()?;
        self.looks.extend(begun);
        self.look_on(now, witness)
    }

    /// Goes on with the looks of the last sweep by one part.
    pub(super) fn look_on(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        let mut part = self.ledger.take_due(self.round, LOOKS);
        let left = self.looks.len().saturating_sub(LOOKS - part.len());
        part.extend(self.looks.drain(left..));
        let mut flows = HashSet::new();
        part.retain(|lookup| flows.insert(lookup.connection));
        let looked = self.look_at_watched(&part, now, witness);
        if looked.is_err() {
            self.looks.append(&mut part);
            self.timers.set(Timer::Look, now + self.settings.sweep_interval);
        } else if !self.looks.is_empty() || self.ledger.is_look_due(self.round) {
            self.timers.set(Timer::Look, now);
        } else {
            self.timers.clear(Timer::Look);
        }
        looked
    }

    fn look_at_watched(
        &mut self,
        lookups: &[Lookup],
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let snapshot = self.tables.exactly(lookups, &self.ledger)?;
        self.suspect_loss(&snapshot, now);
        self.ledger.note(&snapshot);
        self.ledger.settle(&snapshot);
        self.hasten_deep_sweep(&snapshot);
        self.attend(snapshot.views.iter(), now);
        let mut extensions = self.confirmed(&snapshot);
        extensions.retain(|action| action.kind == ActionKind::Extend);
        self.carry_out(extensions, Trigger::Sweep, now, now, witness)?;
        // Repairs are rare, and worth a second look: no single wrong answer makes a wrong one.
        let (evidence, policy) = (&snapshot.evidence, &self.settings.policy);
        let mut repairs =
            plan_for(snapshot.views.iter(), evidence, &self.scope, policy, &self.ledger);
        repairs.actions.retain(|action| action.kind != ActionKind::Extend);
        let (scope, ledger) = (&self.scope, &self.ledger);
        let confirmed = confirm(&mut self.tables, &repairs, evidence, scope, policy, ledger)?;
        let confirmed = self.but_releases_of_others(confirmed);
        self.carry_out(confirmed, Trigger::Sweep, now, now, witness)
    }

    /// Where an entry has gone that no event has told of, others may have gone with it.
    fn suspect_loss(&mut self, snapshot: &Snapshot, now: Instant) {
        let is_lost = |view: &View| {
            let known = view.socket.filter(|socket| self.settings.policy.guards(socket));
            view.entry.is_none()
                && known.is_some_and(|socket| self.ledger.last_entry(&socket).is_some())
        };
        if now >= self.soonest_all
            && !self.may_not_insert(now)
            && snapshot.views.iter().any(|view| is_lost(&view))
        {
            let watched = u32::try_from(self.ledger.watched()).unwrap_or(u32::MAX);
            self.soonest_all = now + REST_FOR_EACH * watched;
            self.ledger.look_at_all(self.round);
            self.hasten_deep();
        }
    }

    /// Says when each of these connections is looked at next, where it is one to be watched.
    pub(super) fn attend(&mut self, views: impl Iterator<Item = View>, now: Instant) {
        for view in views {
            match view.socket {
                Some(socket) => {
                    let is_half_closed = socket.state != State::Established
                        && self.settings.policy.guards(&socket)
                        && self.scope.contains(&self.settings.policy, view.connection);
                    if is_half_closed || self.ledger.holds(&socket) {
                        let at = now + self.unseen_for(&view);
                        self.ledger.look_at(&socket, at);
                    }
                }
                // Its entry is still to be released.
                None => self.ledger.look_at_connection(view.connection, now + SOON),
            }
        }
    }

    /// How long a connection goes without a look: what is not right is looked at again by the next
    /// sweep, until it is.
    fn unseen_for(&self, view: &View) -> Duration {
        let socket = view.socket;
        let is_urgent = view.entry_side().is_none_or(|(_, state)| state.is_closing())
            || socket.is_some_and(|it| self.ledger.uncounted(&it).is_some())
            || socket.is_some_and(|it| self.ledger.distrusts(&it));
        let policy = &self.settings.policy;
        if is_urgent && view.entry.is_none_or(|entry| entry.state().is_some()) {
            return SOON;
        }
        let timeout = view.entry.and_then(|entry| entry.timeout).unwrap_or(policy.lease);
        let wanted = timeout.saturating_sub(policy.renew_below()) + self.rounded();
        wanted.min(self.longest_unseen).min(self.blind(self.forgets.half_closed)).max(SOON)
    }

    /// The same for what has just been acted upon: what is held has been given its lease.
    pub(super) fn attend_repaired(&mut self, outcomes: &[Outcome], now: Instant) {
        let policy = &self.settings.policy;
        let wanted = policy.lease - policy.renew_below() + self.rounded();
        let wanted =
            wanted.min(self.longest_unseen).min(self.blind(self.forgets.half_closed)).max(SOON);
        for Outcome { action, result, .. } in outcomes {
            if action.reason == Reason::CookieSent && result.is_ok() {
                self.ledger.keep_handshake(action.view.connection, now + policy.lease);
            }
            match action.view.socket {
                Some(socket) if result.is_err() => self.ledger.look_at(&socket, now + SOON),
                Some(socket) if self.ledger.holds(&socket) => {
                    self.ledger.look_at(&socket, now + wanted);
                }
                _ => {}
            }
        }
    }

    fn rounded(&self) -> Duration {
        ROUNDED.min(self.settings.policy.lease / 8)
    }
}
