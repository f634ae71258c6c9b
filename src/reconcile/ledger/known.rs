//! What is remembered of one socket.

use std::time::Instant;

use super::held::Held;
use crate::conntrack::{Entry, Tcp, Zone};
use crate::flow::Connection;
use crate::recount::Hidden;
use crate::sockdiag::{Cookie, Lookup, Socket, State};

/// A socket that was seen. There are many: it is kept small.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) connection: Connection,
    pub(super) interface: u32,
    /// Of the socket, when it was last seen.
    pub(super) state: State,
    /// The last dump of sockets that it was in.
    pub(super) dump: u32,
    pub(super) entry: Last,
    pub(super) hold: Option<Hold>,
    /// When the connection is looked at next, where it is watched.
    pub(super) look: Option<Instant>,
}

/// That ctkeep answers for the entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    pub(super) since: Instant,
    pub(super) hidden: Option<Hidden>,
}

/// How an entry looked last.
#[derive(Clone, Debug)]
pub(super) enum Last {
    /// Fully derivable from its connection: opened by the peer.
    Plain(Option<Tcp>),
    /// Anything else, boxed.
    Other(Box<Entry>),
}

impl Known {
    pub(super) fn new(socket: &Socket, entry: Entry) -> Self {
        let connection = socket.connection();
        let entry = if entry.is_plain() && entry.reply == connection.sent() {
            Last::Plain(entry.tcp)
        } else {
            Last::Other(Box::new(entry))
        };
        let Socket { interface, state, .. } = *socket;
        Self { connection, interface, state, dump: 0, entry, hold: None, look: None }
    }

    pub(super) fn lookup(&self) -> Lookup {
        Lookup { connection: self.connection, interface: self.interface }
    }

    pub(super) fn last_entry(&self) -> Entry {
        match &self.entry {
            Last::Plain(tcp) => {
                Entry { tcp: *tcp, ..Entry::plain(self.connection.received(), Zone::default()) }
            }
            Last::Other(entry) => **entry,
        }
    }

    pub(super) fn held(&self, cookie: Cookie) -> Option<Held> {
        let Hold { since, hidden } = self.hold?;
        let lookup = self.lookup();
        let orig = match &self.entry {
            Last::Plain(_) => self.connection.received(),
            Last::Other(entry) => entry.orig,
        };
        Some(Held { cookie, lookup, orig, since, hidden })
    }
}
