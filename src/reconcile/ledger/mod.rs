//! What ctkeep remembers: the entries it answers for, and how each connection's entry looked.
//!
//! Keyed by the socket's cookie, never by the tuple alone: a port that is used again does not
//! inherit anything.

mod held;
mod known;
mod watched;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant};

pub use self::held::Held;
use self::known::Known;
use super::agenda::Agenda;
use super::evidence::{Arrival, Arrivals, Evidence, TrackedPort};
use super::pressure::{Defence, Pressure};
use super::snapshot::{Snapshot, View};
use crate::conntrack::{Entry, EntryKey, Tcp, TcpState, Zone};
use crate::firewall::lists::Loss;
use crate::flow::Connection;
use crate::sockdiag::{Cookie, Lookup, Socket, State};

/// The memory of one network namespace.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    known: HashMap<Cookie, Known>,
    /// The sockets of held entries.
    by_connection: HashMap<Connection, Cookie>,
    distrusted: HashSet<Cookie>,
    /// Open sockets that a limit is not known to count.
    uncounted: HashMap<Cookie, (Loss, Lookup)>,
    orphans: HashMap<EntryKey, Instant>,
    overdue: HashSet<EntryKey>,
    idle: Option<Idle>,
    /// While SYN cookies are sent: the connections of [`Ledger::may_have_a_cookie`].
    cookies: Option<HashSet<Connection>>,
    /// Handshakes whose closed entries were revived for their cookies, each until its lease has gone by.
    kept_handshakes: HashMap<Connection, Instant>,
    /// The looks of [`Known::look`].
    agenda: Agenda,
    /// Dumps of sockets so far.
    dumps: u32,
    /// Changes of what is held so far.
    changes: u64,
    pressure: Pressure,
    tracked: HashSet<TrackedPort>,
    arrivals: Arrivals,
    zones: BTreeSet<Zone>,
}

/// The timeout for entries of idle connections that the kernel would forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Idle {
    /// With less than this left an entry is gone before it is looked at again.
    pub below: Duration,
    /// What it gets.
    pub timeout: Duration,
}

impl Ledger {
    /// An empty memory, with this defence, that knows of this conntrack zone.
    pub fn new(defence: Defence, zone: u16) -> Self {
        let zones = [Zone::both(zone)].into();
        Self { pressure: Pressure::new(defence), zones, ..Self::default() }
    }

    /// The timeout of idle connections; `None` leaves them to the kernel.
    pub fn idle(&self) -> Option<Idle> {
        self.idle
    }

    /// Gives this to idle connections from now on.
    pub fn set_idle(&mut self, idle: Option<Idle>) {
        self.idle = idle;
    }

    /// Whether the server may have sent a SYN cookie for this connection a moment ago: then its handshake
    /// can end without a socket. An ACK that the server has answered by an RST does not end it, though
    /// conntrack has taken it for the end; and what was revived looks as if it had ended.
    pub fn may_have_a_cookie(&self, connection: Connection, is_assured: bool) -> bool {
        let was_revived = || self.kept_handshakes.contains_key(&connection);
        self.cookies
            .as_ref()
            .is_some_and(|answered| !is_assured || answered.contains(&connection) || was_revived())
    }

    /// The closed entry of a handshake was revived, until `end`.
    pub fn keep_handshake(&mut self, connection: Connection, end: Instant) {
        self.kept_handshakes.insert(connection, end);
    }

    /// Forgets the handshakes whose time is over.
    pub fn forget_handshakes(&mut self, now: Instant) {
        self.kept_handshakes.retain(|_, end| *end > now);
    }

    /// Takes note that the server has sent SYN cookies, with the connections of which it has answered an
    /// ACK by an RST; or that it has not.
    pub fn set_cookies(&mut self, answered: Option<HashSet<Connection>>) {
        self.cookies = answered;
    }

    /// How hard entries are fought over.
    pub fn pressure(&self) -> &Pressure {
        &self.pressure
    }

    /// The same, to be told of repairs and the time.
    pub fn pressure_mut(&mut self) -> &mut Pressure {
        &mut self.pressure
    }

    /// Takes note of all entries without a socket; those that have been so for `grace` are
    /// overdue.
    pub fn note_orphans(
        &mut self,
        orphans: impl IntoIterator<Item = EntryKey>,
        grace: Duration,
        now: Instant,
    ) {
        let mut present = HashMap::new();
        for key in orphans {
            present.insert(key, self.orphans.get(&key).copied().unwrap_or(now));
        }
        self.overdue = present
            .iter()
            .filter(|(_, since)| now.saturating_duration_since(**since) >= grace)
            .map(|(key, _)| *key)
            .collect();
        self.orphans = present;
    }

    /// Whether this entry has been without a socket for too long.
    pub fn is_overdue(&self, key: EntryKey) -> bool {
        self.overdue.contains(&key)
    }

    /// The record of this very socket.
    fn known(&self, socket: &Socket) -> Option<&Known> {
        self.known.get(&socket.cookie).filter(|known| known.connection == socket.connection())
    }

    /// Takes note that the entry of this socket is not to be believed, however it looks: conntrack
    /// closed it while it was being repaired, and the limiter may have thrown it out in between; or
    /// it has followed a packet of an impostor.
    pub fn distrust(&mut self, socket: &Socket) {
        self.distrusted.insert(socket.cookie);
    }

    /// Whether the entry of this socket must be repaired again, however it looks.
    pub fn distrusts(&self, socket: &Socket) -> bool {
        self.distrusted.contains(&socket.cookie)
    }

    /// A limit that is for this socket's connection has lost its list.
    pub fn set_uncounted(&mut self, socket: &Socket, loss: Loss) {
        self.uncounted.insert(socket.cookie, (loss, Lookup::from(socket)));
    }

    /// The limits have been shown the connection of this socket.
    pub fn set_counted(&mut self, socket: &Socket) {
        self.uncounted.remove(&socket.cookie);
    }

    /// Why a limit does not count the connection of this socket, where that is known.
    pub fn uncounted(&self, socket: &Socket) -> Option<Loss> {
        self.uncounted.get(&socket.cookie).map(|(loss, _)| *loss)
    }

    /// What finds sockets that no limit is known to count, other than these.
    pub fn uncounted_but(&self, alive: &HashSet<Cookie>) -> Vec<Lookup> {
        let others = self.uncounted.iter().filter(|(cookie, _)| !alive.contains(cookie));
        others.map(|(_, (_, lookup))| *lookup).collect()
    }

    /// How many open sockets no limit is known to count that should.
    pub fn uncounted_sockets(&self) -> usize {
        self.uncounted.len()
    }

    /// The last entry seen for this very socket: what an entry for it must look like. Of what
    /// changes by itself it has the TCP state alone.
    pub fn last_entry(&self, socket: &Socket) -> Option<Entry> {
        self.known(socket).map(Known::last_entry)
    }

    /// Whether some connection of this local port had an entry when the port was last looked at.
    pub fn is_tracked(&self, port: TrackedPort) -> bool {
        self.tracked.contains(&port)
    }

    /// How packets got to local endpoints when the whole tables were last looked at.
    pub fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    /// Looks for entries in this zone, too.
    pub fn know_zone(&mut self, zone: Zone) {
        self.zones.insert(zone);
    }

    /// The zones in which entries of the scope were seen; the default zone always among them.
    pub fn zones(&self) -> impl Iterator<Item = Zone> {
        let default = Zone::default();
        std::iter::once(default).chain(self.zones.iter().copied().filter(move |z| *z != default))
    }

    /// Takes note of what a snapshot shows.
    ///
    /// Of an ESTABLISHED connection only what a plain entry would get wrong: there are many.
    pub fn note(&mut self, snapshot: &Snapshot) {
        self.note_zones(&snapshot.evidence);
        self.note_views(snapshot.views.iter(), &snapshot.evidence);
    }

    /// Looks for entries in the zones of these, too.
    pub fn note_zones(&mut self, evidence: &Evidence) {
        self.zones.extend(evidence.zones.iter().copied());
    }

    /// Takes note of these connections of a snapshot.
    pub fn note_views(&mut self, views: impl Iterator<Item = View>, evidence: &Evidence) {
        // Of siblings that come in in various ways each is remembered, or a forgotten one could not
        // be put back.
        let is_one_of_many =
            |view: &View| evidence.arrivals.get(&view.connection.local) == Some(&Arrival::Various);
        for view in views {
            if let (Some(socket), Some(entry)) = (view.socket, view.entry)
                && (socket.state != State::Established && socket.takes_a_slot()
                    || !entry.is_plain()
                    || is_one_of_many(&view))
            {
                self.remember(&socket, entry);
            }
        }
    }

    /// Remembers how the entry of a socket looked.
    pub fn remember(&mut self, socket: &Socket, entry: Entry) {
        let mut known = Known::new(socket, entry);
        match self.known.get(&socket.cookie) {
            Some(before) if before.connection == known.connection => {
                let Known { hold, look, dump, .. } = *before;
                known = Known { hold, look, dump, ..known };
            }
            // A socket can be connected anew; the lease ends what was held for it.
            Some(before) => {
                self.changes += u64::from(before.hold.is_some());
                self.by_connection.remove(&before.connection);
                self.agenda.move_look(socket.cookie, before.look, None);
            }
            None => {}
        }
        self.known.insert(socket.cookie, known);
    }

    /// Remembers that this socket has opened its connection itself: that is none of our business.
    pub fn remember_own(&mut self, socket: &Socket) {
        let tcp = Some(Tcp { state: TcpState::Established, wscale: [0; 2], flags: [0; 2] });
        self.remember(
            socket,
            Entry { tcp, ..Entry::plain(socket.connection().sent(), Zone::default()) },
        );
    }

    /// Forgets how the entries of sockets other than these looked. What is watched may have come
    /// since these were listed, or was skipped: it is looked at.
    pub fn retain_seen(&mut self, alive: &HashSet<Cookie>, now: Instant) {
        let agenda = &mut self.agenda;
        self.known.retain(|cookie, known| {
            if known.look.is_some() && !alive.contains(cookie) {
                agenda.move_look(*cookie, known.look, Some(now));
                known.look = Some(now);
            }
            known.hold.is_some() || known.look.is_some() || alive.contains(cookie)
        });
        self.uncounted.retain(|cookie, _| alive.contains(cookie));
        self.distrusted.retain(|cookie| alive.contains(cookie));
    }

    /// Ports of which some connection has an entry now; replaces what was known.
    pub fn set_tracked(&mut self, ports: HashSet<TrackedPort>) {
        self.tracked = ports;
    }

    /// How packets get to local endpoints now; replaces what was known.
    pub fn set_arrivals(&mut self, arrivals: Arrivals) {
        self.arrivals = arrivals;
    }
}
