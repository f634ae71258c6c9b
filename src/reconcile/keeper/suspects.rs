//! What events name, looked at at once and again a moment later.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::{Keeper, Trigger, Witness, checks};
use crate::conntrack::TcpState;
use crate::error::Result;
use crate::flow::Connection;
use crate::netlink::Transport;
use crate::reconcile::plan::Action;
use crate::reconcile::snapshot::View;
use crate::reconcile::timers::Timer;
use crate::recount::{Hidden, Recount};
use crate::sockdiag::{Lookup, Socket, State};
use crate::watch::Suspect;

/// The event of a packet can come before TCP has processed it, so a repaired connection is looked
/// at again this much later.
pub(super) const SECOND_LOOK: Duration = Duration::from_millis(3);

/// An ordinary RST closes the entry a moment before TCP closes the socket: what an event makes of an
/// open connection is looked at again this much later, and only then acted upon.
const OPEN_LOOK: Duration = Duration::from_micros(500);

/// Of so many that are reported together most have closed as they should, and their sockets alone are asked
/// for first: a third of the price.
const MANY: usize = 8;

/// Whether the server has sent SYN cookies a moment ago.
pub type Cookies = Box<dyn FnMut() -> bool + Send>;

/// Connections to look at, in a moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Deferred {
    /// When the first of them became known.
    since: Option<Instant>,
    pub(super) lookups: HashSet<Lookup>,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// Looks again, where that is due, at what was just repaired or seemed to need it: the socket may
    /// be gone by now.
    ///
    /// # Errors
    /// A conversation broke: the next sweep finds what was not repaired.
    pub fn look_again(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        for timer in [Timer::SecondLook, Timer::OpenLook, Timer::Retry] {
            if !self.timers.take(timer, now) {
                continue;
            }
            let Deferred { since, lookups } = std::mem::take(self.deferred(timer));
            let (since, lookups) = (since.unwrap_or(now), lookups.into_iter().collect::<Vec<_>>());
            let looked = self.look_at(&lookups, since, now, witness);
            self.forget_packets();
            let (sweep, deep) = (self.settings.sweep_interval, self.settings.deep_interval);
            if looked.is_err() {
                self.defer(timer, sweep, lookups, since, now);
            }
            if timer == Timer::Retry {
                if self.retry.lookups.is_empty() {
                    self.timers.succeeded(timer);
                } else {
                    self.timers.failed(timer, now, sweep, deep);
                }
            }
            looked?;
        }
        Ok(())
    }

    pub(super) fn look_at(
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

    /// What an event source has seen, by connections of the server; what has waited already comes
    /// last. `since` is when the first of them became known.
    ///
    /// # Errors
    /// A conversation broke: they are looked at again one sweep interval later.
    pub fn suspects(
        &mut self,
        suspects: HashMap<Connection, Suspect>,
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let (waited, urgent) = suspects.into_iter().partition(|(_, it)| it.has_waited);
        let looked = self.look_for(urgent, since, now, witness);
        looked.and(self.look_for(waited, since, now, witness))
    }

    fn look_for(
        &mut self,
        suspects: HashMap<Connection, Suspect>,
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let (scope, policy) = (&mut self.scope, &self.settings.policy);
        let translated =
            self.tables.as_their_sockets_see_them(suspects, &self.ledger, scope, policy);
        let mut suspects = translated.inspect_err(|_| {
            self.suspect_all();
            self.hasten_deep();
        })?;
        suspects.retain(|flow, _| self.scope.contains(&self.settings.policy, *flow));
        if suspects.is_empty() {
            return Ok(());
        }
        self.note_packets(suspects.values());
        // A held socket's device is known; any other's can be that of the packet.
        let lookup = |suspect: &Suspect| Lookup {
            connection: suspect.connection,
            interface: self.ledger.interface(suspect.connection).unwrap_or(suspect.interface),
        };
        let lookups: Vec<_> = suspects.values().map(lookup).collect();
        let looked = self
            .but_ended(&suspects, &lookups)
            .and_then(|open| self.look_at_suspects(&suspects, &open, since, now, witness));
        if looked.is_err() {
            // No sweep but a deep one looks at an open connection that is not held.
            self.defer(Timer::OpenLook, self.settings.sweep_interval, lookups, since, now);
        }
        looked
    }

    /// Those of many of which there is more to know than that their sockets have gone.
    fn but_ended(
        &mut self,
        suspects: &HashMap<Connection, Suspect>,
        lookups: &[Lookup],
    ) -> Result<Vec<Lookup>> {
        if lookups.len() < MANY {
            return Ok(lookups.to_vec());
        }
        let sockets = self.tables.open_sockets(lookups)?;
        // With SYN cookies a connection has no socket before the end of its handshake.
        if sockets.iter().any(Option::is_none) && self.were_cookies_sent() {
            return Ok(lookups.to_vec());
        }
        let is_plain = |connection: &Connection| {
            let suspect = suspects.get(connection);
            suspect.is_some_and(|it| !it.is_spoofed && it.destroyed.is_none())
                && !self.ledger.holds_connection(*connection)
        };
        let all = lookups.iter().zip(sockets);
        let left = all.filter(|(lookup, it)| it.is_some() || !is_plain(&lookup.connection));
        Ok(left.map(|(lookup, _)| *lookup).collect())
    }

    fn look_at_suspects(
        &mut self,
        suspects: &HashMap<Connection, Suspect>,
        lookups: &[Lookup],
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let snapshot = self.tables.exactly(lookups, &self.ledger)?;
        let recent: HashSet<_> =
            self.second_look.lookups.iter().map(|lookup| lookup.connection).collect();
        let is_open = |it: &Socket| matches!(it.state, State::Established | State::SynRecv);
        for view in snapshot.views.iter() {
            // What conntrack makes of it is not what the server has done: the next FIN would end it.
            if let Some(socket) = view.socket.filter(is_open)
                && suspects.get(&view.connection).is_some_and(|suspect| suspect.is_spoofed)
                && let Some((_, TcpState::FinWait | TcpState::CloseWait)) = view.entry_side()
            {
                self.ledger.distrust(&socket);
            }
            let destroyed = suspects.get(&view.connection).map(|suspect| suspect.destroyed);
            match (view.socket, destroyed) {
                // A destroyed entry is known from its last event alone.
                (Some(socket), Some(Some(entry))) if self.ledger.last_entry(&socket).is_none() => {
                    self.ledger.remember(&socket, entry);
                }
                // What is logged had an entry then.
                (Some(socket), Some(None)) if view.entry.is_none() => self.ledger.distrust(&socket),
                // Perhaps it closed the entry in the midst of its repair.
                (Some(socket), Some(None))
                    if recent.contains(&view.connection)
                        && self.ledger.holds(&socket)
                        && self.ledger.hidden(&socket) != Some(Hidden::FinsAndRsts) =>
                {
                    self.ledger.distrust(&socket);
                }
                _ => {}
            }
        }
        self.hasten_deep_sweep(&snapshot);
        // Not beyond this look: a sweep cannot tell an RST from a refusal of the server.
        let closed = |view: &View| view.entry_side().is_some_and(|(_, state)| state.is_closing());
        let were_sent = snapshot.views.iter().any(|view| view.socket.is_none() && closed(&view))
            && self.were_cookies_sent();
        let answered = suspects.values().filter(|suspect| suspect.is_answered);
        let answered = answered.map(|suspect| suspect.connection).collect();
        self.ledger.set_cookies(were_sent.then_some(answered));
        let mut confirmed = self.confirmed(&snapshot);
        self.ledger.set_cookies(None);
        let open =
            |action: &Action| action.view.socket.filter(|socket| socket.state != State::CloseWait);
        let lookups = confirmed.actions().iter().filter_map(open).map(|it| Lookup::from(&it));
        let lookups: Vec<_> = lookups.collect();
        if !confirmed.actions().is_empty() {
            self.no_questions_before(now + checks::QUIET);
        }
        self.defer(Timer::OpenLook, OPEN_LOOK, lookups, since, now);
        confirmed.retain(|action| open(action).is_none());
        let carried_out = self.carry_out(confirmed, Trigger::Event, since, now, witness);
        self.forget_packets();
        carried_out
    }

    /// What says whether the server has sent SYN cookies: then an RST can close the entry of a
    /// handshake, and its last packet comes all the same.
    pub fn rely_on_cookies(&mut self, cookies: Cookies) {
        self.cookies = Some(cookies);
    }

    fn were_cookies_sent(&mut self) -> bool {
        self.cookies.as_mut().is_some_and(|were_sent| were_sent())
    }

    /// Adds to what waits for `timer`, which keeps its time.
    pub(super) fn defer(
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

    pub(super) fn deferred(&mut self, timer: Timer) -> &mut Deferred {
        match timer {
            Timer::OpenLook => &mut self.open_look,
            Timer::Retry => &mut self.retry,
            _ => &mut self.second_look,
        }
    }
}
