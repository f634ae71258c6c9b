//! What is remembered of half-closed sockets outside the scope: who opened each, how its entry looked,
//! and when it is looked at next. One record for each such socket. Pure: time is an argument.

use std::collections::HashMap;
use std::time::Instant;

use super::plan::{Loss, is_candidate};
use crate::conntrack::Entry;
use crate::reconcile::agenda::Agenda;
use crate::sockdiag::{Cookie, Lookup, Socket, State};

/// The records, and when each is due.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    records: HashMap<Cookie, Record>,
    agenda: Agenda,
    /// What the records come to.
    figures: Figures,
    /// Rounds of lists so far.
    round: u32,
}

/// One socket.
#[derive(Clone, Debug)]
pub struct Record {
    /// What finds it.
    pub lookup: Lookup,
    /// Its namespace is another one.
    pub is_of_member: bool,
    /// What is known of its connection.
    pub known: Known,
    state: State,
    /// The last round of lists that it was in.
    round: u32,
    look: Option<Instant>,
}

/// What is known of a connection.
#[derive(Clone, Debug, Default)]
pub enum Known {
    /// It was not looked at, or nothing shows who opened it.
    #[default]
    Nothing,
    /// The peer opened it: none of ours.
    Incoming,
    /// This host opened it.
    Outgoing(Box<Own>),
}

/// A connection that this host opened.
#[derive(Clone, Copy, Debug)]
pub struct Own {
    /// How its entry looked last.
    pub entry: Entry,
    /// Since when its timeout is ours.
    pub since: Option<Instant>,
    /// It has no entry of its own, and why none can be put back.
    pub lost: Option<Loss>,
}

/// How many connections there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Half-closed connections that this host opened.
    pub outgoing: usize,
    /// Those whose entries are kept beyond the kernel's time.
    pub held: usize,
    /// Those that have no entry of their own, and get none.
    pub lost: usize,
}

impl Known {
    /// The connection, where this host opened it.
    pub fn own(&self) -> Option<&Own> {
        match self {
            Self::Outgoing(own) => Some(own),
            _ => None,
        }
    }
}

impl Memory {
    /// Takes note of a part of a list: what is new, or not as it was, is looked at now.
    pub fn list(
        &mut self,
        sockets: impl IntoIterator<Item = Socket>,
        is_of_member: bool,
        now: Instant,
    ) {
        for socket in sockets {
            let record = self.records.get_mut(&socket.cookie);
            match record.filter(|it| it.lookup.connection == socket.connection()) {
                Some(record) => {
                    record.round = self.round;
                    if std::mem::replace(&mut record.state, socket.state) != socket.state {
                        self.set_look(socket.cookie, Some(now));
                    }
                }
                None if is_candidate(&socket) => {
                    self.forget(socket.cookie);
                    let record = Record {
                        lookup: Lookup::from(&socket),
                        is_of_member,
                        known: Known::Nothing,
                        state: socket.state,
                        round: self.round,
                        look: None,
                    };
                    self.records.insert(socket.cookie, record);
                    self.set_look(socket.cookie, Some(now));
                }
                None => {}
            }
        }
    }

    /// All lists of a round are there: of our own connections those that none had are looked at now, for a
    /// list does not prove absence; the others are forgotten.
    pub fn end_round(&mut self, now: Instant) {
        let Self { records, agenda, round, .. } = self;
        records.retain(|cookie, record| {
            if record.round == *round {
                return true;
            }
            let is_own = record.known.own().is_some();
            let look = is_own.then_some(now);
            agenda.move_look(*cookie, record.look, look);
            record.look = look;
            is_own
        });
        self.round = self.round.wrapping_add(1);
    }

    /// Sockets whose look is due, at most so many; they have none until it is set anew.
    pub fn take_due(&mut self, now: Instant, most: usize) -> Vec<(Cookie, Lookup)> {
        let mut due = Vec::new();
        while due.len() < most
            && let Some(cookie) = self.agenda.due(now)
        {
            self.set_look(cookie, None);
            due.extend(self.records.get(&cookie).map(|record| (cookie, record.lookup)));
        }
        due
    }

    /// When the next look is due.
    pub fn next_look(&self) -> Option<Instant> {
        self.agenda.next()
    }

    /// This socket is looked at again at `at`, if at all.
    pub fn set_look(&mut self, cookie: Cookie, at: Option<Instant>) {
        if let Some(record) = self.records.get_mut(&cookie) {
            self.agenda.move_look(cookie, record.look, at);
            record.look = at;
        }
    }

    /// The record of a socket.
    pub fn get(&self, cookie: Cookie) -> Option<&Record> {
        self.records.get(&cookie)
    }

    /// Changes what is known of the connection of this socket.
    pub fn amend(&mut self, cookie: Cookie, change: impl FnOnce(&mut Known)) {
        if let Some(record) = self.records.get_mut(&cookie) {
            self.figures.count(&record.known, usize::wrapping_sub);
            change(&mut record.known);
            self.figures.count(&record.known, usize::wrapping_add);
        }
    }

    /// The same, where this host opened it.
    pub fn amend_own(&mut self, cookie: Cookie, change: impl FnOnce(&mut Own)) {
        self.amend(cookie, |known| {
            if let Known::Outgoing(own) = known {
                change(own);
            }
        });
    }

    /// Forgets a socket.
    pub fn forget(&mut self, cookie: Cookie) {
        self.set_look(cookie, None);
        if let Some(record) = self.records.remove(&cookie) {
            self.figures.count(&record.known, usize::wrapping_sub);
        }
    }

    /// The sockets whose entries are held, and since when.
    pub fn held(&self) -> impl Iterator<Item = (Cookie, Lookup, Instant)> + '_ {
        self.records.iter().filter_map(|(cookie, record)| {
            let since = record.known.own()?.since?;
            Some((*cookie, record.lookup, since))
        })
    }

    /// How many there are of each kind.
    pub fn figures(&self) -> Figures {
        self.figures
    }
}

impl Figures {
    /// One more, or one less.
    fn count(&mut self, known: &Known, sum: fn(usize, usize) -> usize) {
        if let Some(own) = known.own() {
            self.outgoing = sum(self.outgoing, 1);
            self.held = sum(self.held, usize::from(own.since.is_some()));
            self.lost = sum(self.lost, usize::from(own.lost.is_some()));
        }
    }
}
