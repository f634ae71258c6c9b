//! The entries that ctkeep answers for.

use std::time::Instant;

use super::Ledger;
use super::known::Hold;
use crate::conntrack::Entry;
use crate::flow::{Connection, FourTuple};
use crate::reconcile::snapshot::Snapshot;
use crate::recount::Hidden;
use crate::sockdiag::{Cookie, Lookup, Socket};

/// An entry that ctkeep answers for.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// The socket that it is held for.
    pub cookie: Cookie,
    /// What finds that socket.
    pub lookup: Lookup,
    /// The entry's original tuple.
    pub orig: FourTuple,
    /// Since when it is held.
    pub since: Instant,
    /// What keeps it from being fooled again.
    pub hidden: Option<Hidden>,
}

impl Ledger {
    /// Whether the entry of this very socket is held.
    pub fn holds(&self, socket: &Socket) -> bool {
        self.known(socket).is_some_and(|known| known.hold.is_some())
    }

    /// Whether an entry of this connection is held for some socket.
    pub fn holds_connection(&self, connection: Connection) -> bool {
        self.by_connection.contains_key(&connection)
    }

    /// The device that the socket of a held entry is bound to, 0 for none.
    pub fn interface(&self, connection: Connection) -> Option<u32> {
        let known = self.by_connection.get(&connection).and_then(|cookie| self.known.get(cookie));
        known.map(|known| known.interface)
    }

    /// What keeps the entry of this very socket from being fooled again.
    pub fn hidden(&self, socket: &Socket) -> Option<Hidden> {
        self.known(socket)?.hold?.hidden
    }

    /// Takes note that packets of this socket's peer are kept from conntrack; its entry is held.
    pub(in crate::reconcile) fn set_hidden(&mut self, socket: &Socket, hidden: Hidden) {
        let known = self.known.get_mut(&socket.cookie);
        if let Some(hold) = known.and_then(|known| known.hold.as_mut()) {
            hold.hidden = hold.hidden.max(Some(hidden));
        }
    }

    /// Whether any entry is held.
    pub fn holds_any(&self) -> bool {
        !self.by_connection.is_empty()
    }

    /// A number that grows whenever another entry is held, or one no longer.
    pub fn holds_changed(&self) -> u64 {
        self.changes
    }

    /// All held entries.
    pub fn held(&self) -> impl Iterator<Item = Held> {
        self.known.iter().filter_map(|(cookie, known)| known.held(*cookie))
    }

    /// Answers for `entry` from now on.
    pub fn hold(&mut self, socket: Socket, entry: Entry, now: Instant) {
        // A tuple that is used again before its last holder was seen gone.
        if let Some(cookie) = self.by_connection.insert(socket.connection(), socket.cookie)
            && cookie != socket.cookie
        {
            self.forget(cookie);
        }
        self.distrusted.remove(&socket.cookie);
        self.remember(&socket, entry);
        if let Some(known) = self.known.get_mut(&socket.cookie) {
            self.changes += u64::from(known.hold.is_none());
            known.hold.get_or_insert(Hold { since: now, hidden: None });
        }
    }

    /// Answers no longer for the entry of this connection.
    pub fn drop_connection(&mut self, connection: Connection) {
        if let Some(cookie) = self.by_connection.remove(&connection) {
            self.forget(cookie);
        }
    }

    fn forget(&mut self, cookie: Cookie) {
        self.set_look(cookie, None);
        let known = self.known.remove(&cookie);
        self.changes += u64::from(known.is_some_and(|known| known.hold.is_some()));
        self.distrusted.remove(&cookie);
    }

    /// Drops what a snapshot shows to be over: no socket, or another one with the same tuple.
    ///
    /// Where the entry of a socket that is gone is still alive the hold stays: it must be
    /// released first.
    pub fn settle(&mut self, snapshot: &Snapshot) {
        for view in snapshot.views.iter() {
            let Some(cookie) = self.by_connection.get(&view.connection) else { continue };
            let over = match view.socket {
                Some(socket) => socket.cookie != *cookie,
                None => !matches!(view.entry_side(), Some((_, state)) if !state.is_closing()),
            };
            if over {
                self.drop_connection(view.connection);
            }
        }
    }
}
