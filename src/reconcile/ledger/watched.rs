//! The connections that are looked at again, and when.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Instant;

use super::Ledger;
use super::known::Known;
use crate::flow::Connection;
use crate::sockdiag::{Cookie, Lookup, Socket, State};

impl Ledger {
    /// The connection of this socket, of which an entry is known, is looked at again at `at`.
    pub fn look_at(&mut self, socket: &Socket, at: Instant) {
        if self.known(socket).is_some() {
            self.set_look(socket.cookie, Some(at));
        }
    }

    /// The held entry of this connection is looked at again at `at`.
    pub fn look_at_connection(&mut self, connection: Connection, at: Instant) {
        if let Some(cookie) = self.by_connection.get(&connection) {
            self.set_look(*cookie, Some(at));
        }
    }

    pub(super) fn set_look(&mut self, cookie: Cookie, at: Option<Instant>) -> Option<Lookup> {
        let known = self.known.get_mut(&cookie)?;
        self.agenda.move_look(cookie, known.look, at);
        known.look = at;
        Some(known.lookup())
    }

    /// Every watched connection is looked at again at `at`, or as before where that is sooner.
    pub fn look_at_all(&mut self, at: Instant) {
        for cookie in self.agenda.later_than(at) {
            self.set_look(cookie, Some(at));
        }
    }

    /// The same for those of these sources.
    pub fn look_at_sources(&mut self, sources: &HashSet<IpAddr>, at: Instant) {
        let mut all = self.agenda.later_than(at);
        let is_theirs = |known: &Known| sources.contains(&known.connection.remote.addr());
        all.retain(|cookie| self.known.get(cookie).is_some_and(is_theirs));
        for cookie in all {
            self.set_look(cookie, Some(at));
        }
    }

    /// Connections whose look is due, at most so many; they have none until it is set anew.
    pub fn take_due(&mut self, now: Instant, most: usize) -> Vec<Lookup> {
        let mut due = Vec::new();
        while due.len() < most
            && let Some(cookie) = self.agenda.due(now)
        {
            due.extend(self.set_look(cookie, None));
        }
        due
    }

    /// Whether the look at some connection is due.
    pub fn is_look_due(&self, now: Instant) -> bool {
        self.agenda.due(now).is_some()
    }

    /// Some watched connections, others each time.
    pub fn sample(&mut self, most: usize) -> Vec<Lookup> {
        let cookies = self.agenda.sample(most).into_iter();
        cookies.filter_map(|cookie| self.known.get(&cookie)).map(Known::lookup).collect()
    }

    /// What finds a socket that is watched.
    pub fn watched_socket(&self, cookie: Cookie) -> Option<Lookup> {
        self.known.get(&cookie).filter(|known| known.look.is_some()).map(Known::lookup)
    }

    /// How many connections are watched.
    pub fn watched(&self) -> usize {
        self.agenda.len()
    }

    /// Takes note of a dump of sockets; those of them that are new, or not as they were, are handed
    /// back, and so are the watched ones that it lacks.
    ///
    /// Open ones are in no dump: their ends have to be looked for where they are not told.
    pub fn compare(&mut self, dump: &[Socket], ends_are_told: bool) -> Vec<Lookup> {
        self.dumps = self.dumps.wrapping_add(1);
        let mut differing = Vec::new();
        for socket in dump {
            match self
                .known
                .get_mut(&socket.cookie)
                .filter(|it| it.connection == socket.connection())
            {
                Some(known) if known.look.is_some() && known.state == socket.state => {
                    known.dump = self.dumps;
                }
                _ => differing.push(Lookup::from(socket)),
            }
        }
        let is_dumped = |known: &Known| known.state != State::Established || !ends_are_told;
        let is_lacking =
            |known: &&Known| known.look.is_some() && known.dump != self.dumps && is_dumped(known);
        let found: HashSet<_> = differing.iter().map(|lookup| lookup.connection).collect();
        let lacking = self.known.values().filter(is_lacking).map(Known::lookup);
        differing.extend(lacking.filter(|lookup| !found.contains(&lookup.connection)));
        differing
    }
}
