//! What both tables say about each connection, as plain values.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use super::evidence::Evidence;
use crate::conntrack::{Entry, Status, Tcp, TcpState, Zone};
use crate::flow::{Connection, Endpoint};
use crate::sockdiag::{Socket, State};

/// One connection as both tables show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The socket's, or what it would be: the reply tuple of the entry says so.
    pub connection: Connection,
    /// The server's socket.
    pub socket: Option<Socket>,
    /// The conntrack entry.
    pub entry: Option<Entry>,
}

/// In which direction an entry runs, seen from the server's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The peer opened the connection: the limiter counts it for the peer.
    FromPeer,
    /// Conntrack picked the connection up in its middle (`nf_conntrack_tcp_loose`), and the limiter
    /// does not count it for the peer: at a packet of the server, so that it takes the server for
    /// the client; or, of a half-closed connection, at one of the client that was no SYN.
    Reversed,
    /// This host opened the connection: none of our business.
    Outgoing,
}

impl View {
    /// Direction and state of the entry.
    pub fn entry_side(&self) -> Option<(Direction, TcpState)> {
        let entry = self.entry?;
        let state = entry.state()?;
        let direction = if entry.reply == self.connection.sent() {
            // Picked up by the kernel itself: no SYN of it has passed the limiter. An ESTABLISHED
            // one runs the right way and needs no more than a recount.
            let half_closed =
                |socket: Socket| socket.takes_a_slot() && socket.state != State::Established;
            let uncounted = self.socket.is_some_and(half_closed) && entry.is_picked_up();
            if uncounted { Direction::Reversed } else { Direction::FromPeer }
        } else if entry.is_picked_up() || entry.is_ours() {
            Direction::Reversed
        } else {
            Direction::Outgoing
        };
        Some((direction, state))
    }

    /// Whom limits count the connection for. Where sources are translated (masquerade before a pod)
    /// the server's socket has another peer.
    pub fn client(&self) -> Endpoint {
        let entry = self.entry.filter(|entry| entry.reply == self.connection.sent());
        entry.map_or(self.connection.remote, |entry| entry.orig.src)
    }

    /// Whether conntrack has seen packets of one side alone.
    pub fn is_unreplied(&self) -> bool {
        let status = self.entry.and_then(|entry| entry.status);
        status.is_some_and(|status| !status.has_seen_reply())
    }

    /// Whether this host opened the connection, as far as the entry shows.
    pub fn is_outgoing(&self) -> bool {
        matches!(self.entry_side(), Some((Direction::Outgoing, _)))
    }

    /// Whether nothing is left of the connection but an entry that no limiter counts.
    pub fn is_over(&self) -> bool {
        let is_closed =
            matches!(self.entry_side(), Some((Direction::FromPeer, state)) if !state.is_counted());
        self.socket.is_none() && is_closed
    }

    /// Whether a limiter counts the entry for the peer.
    pub fn is_counted(&self) -> bool {
        match self.entry_side() {
            Some((direction, state)) => direction == Direction::FromPeer && state.is_counted(),
            // A flow table has it: what it shows no state of is established to the limiter.
            None => self.entry.is_some_and(|entry| entry.reply == self.connection.sent()),
        }
    }
}

/// Compact storage for a hundred thousand connections: a plain one takes a third of a [`View`] and is
/// expanded on access.
#[derive(Clone, Debug, Default)]
pub struct Views(Vec<CompactView>);

#[derive(Clone, Debug)]
enum CompactView {
    /// The socket has the connection's tuple.
    Open(Socket, Option<PackedEntry>),
    /// No socket.
    Alone(Connection, Option<PackedEntry>),
}

/// An entry, beside the flow that its connection has in a view.
#[derive(Clone, Debug)]
enum PackedEntry {
    /// Fully derivable from its connection: opened by the peer.
    Plain {
        status: Option<Status>,
        timeout: Option<Duration>,
        tcp: Option<Tcp>,
        mark: Option<u32>,
        id: Option<u32>,
    },
    /// Anything else, boxed.
    Other(Box<Entry>),
}

impl Views {
    /// The connections, one by one.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = View> + Clone {
        self.0.iter().map(CompactView::view)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Some of the connections, by their numbers.
    pub fn part(&self, range: Range<usize>) -> impl ExactSizeIterator<Item = View> + Clone {
        let end = range.end.min(self.0.len());
        self.0.get(range.start.min(end)..end).unwrap_or_default().iter().map(CompactView::view)
    }

    /// Puts another in its place.
    pub(super) fn set(&mut self, index: usize, view: View) {
        if let Some(slot) = self.0.get_mut(index) {
            *slot = CompactView::new(view);
        }
    }

    /// Gives the one with this number an entry, where it has none; else says how it is.
    pub(super) fn give(&mut self, index: usize, given: &Entry) -> Option<View> {
        let slot = self.0.get_mut(index)?;
        let connection = slot.connection();
        let (CompactView::Open(_, entry) | CompactView::Alone(_, entry)) = slot;
        if entry.is_some() {
            return Some(slot.view());
        }
        *entry = Some(PackedEntry::new(connection, given));
        None
    }

    /// Keeps those that `wanted` wants.
    pub fn retain(&mut self, mut wanted: impl FnMut(&View) -> bool) {
        self.0.retain(|packed| wanted(&packed.view()));
    }

    /// Sorts by a key that is computed once for each.
    pub(super) fn sort_by_key<K: Ord>(&mut self, key: impl Fn(&View) -> K) {
        self.0.sort_by_cached_key(|packed| key(&packed.view()));
    }

    /// Keeps the first of those that follow each other with the same tuple.
    pub(super) fn dedup(&mut self) {
        self.0.dedup_by_key(|packed| packed.connection());
    }

    /// Adds others behind.
    pub(super) fn append(&mut self, mut others: Self) {
        self.0.append(&mut others.0);
    }
}

impl Extend<View> for Views {
    fn extend<I: IntoIterator<Item = View>>(&mut self, views: I) {
        self.0.extend(views.into_iter().map(CompactView::new));
    }
}

impl FromIterator<View> for Views {
    fn from_iter<I: IntoIterator<Item = View>>(views: I) -> Self {
        Self(views.into_iter().map(CompactView::new).collect())
    }
}

impl CompactView {
    fn new(view: View) -> Self {
        let entry = view.entry.as_ref().map(|entry| PackedEntry::new(view.connection, entry));
        match view.socket {
            Some(socket) => Self::Open(socket, entry),
            None => Self::Alone(view.connection, entry),
        }
    }

    fn connection(&self) -> Connection {
        match self {
            Self::Open(socket, _) => socket.connection(),
            Self::Alone(flow, _) => *flow,
        }
    }

    fn view(&self) -> View {
        let (socket, entry) = match self {
            Self::Open(socket, entry) => (Some(*socket), entry),
            Self::Alone(_, entry) => (None, entry),
        };
        let connection = self.connection();
        View { connection, socket, entry: entry.as_ref().map(|entry| entry.entry(connection)) }
    }
}

impl PackedEntry {
    fn new(connection: Connection, entry: &Entry) -> Self {
        if entry.is_plain() && entry.reply == connection.sent() {
            let Entry { status, timeout, tcp, mark, id, .. } = *entry;
            Self::Plain { status, timeout, tcp, mark, id }
        } else {
            Self::Other(Box::new(*entry))
        }
    }

    fn entry(&self, connection: Connection) -> Entry {
        match *self {
            Self::Plain { status, timeout, tcp, mark, id } => {
                let plain = Entry::plain(connection.received(), Zone::default());
                Entry { status, timeout, tcp, mark, id, ..plain }
            }
            Self::Other(ref entry) => **entry,
        }
    }
}

/// Both tables at one moment, as far as they concern the scope.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The connections.
    pub views: Views,
    /// How many more there were that are over, where only their number is kept.
    pub over: u64,
    /// What they show of each other.
    pub evidence: Evidence,
    /// Entries that their connections have in other zones, of those that have a socket.
    pub others: HashMap<Connection, Vec<Entry>>,
}

impl Snapshot {
    /// A snapshot of these connections.
    pub fn new(views: impl IntoIterator<Item = View>) -> Self {
        Self::of(views.into_iter().collect())
    }

    pub(super) fn of(views: Views) -> Self {
        let evidence = Evidence::of(&views);
        Self { views, evidence, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Endpoint, FourTuple};
    use crate::sockdiag::Cookie;

    #[test]
    fn what_is_packed_comes_back_as_it_was() {
        let server: Endpoint = "192.0.2.1:80".parse().unwrap();
        let connection = Connection::new(server, "198.51.100.7:4000".parse().unwrap());
        let socket = Socket {
            local: connection.local,
            remote: connection.remote,
            state: State::CloseWait,
            inode: 1,
            uid: 2,
            cookie: Cookie(3),
            interface: 4,
            recv_queue: 5,
            send_queue: 6,
        };
        let tcp = Some(Tcp { state: TcpState::CloseWait, wscale: [7, 8], flags: [9, 10] });
        let (status, timeout) = (Some(Status::ASSURED), Some(Duration::from_millis(11)));
        let plain = Entry {
            status,
            timeout,
            tcp,
            mark: Some(0),
            id: Some(12),
            ..Entry::plain(connection.received(), Zone::default())
        };
        let first = FourTuple::new(connection.remote, "192.0.2.1:8080".parse().unwrap());
        let entries = [
            plain,
            Entry { mark: Some(13), ..plain },
            Entry { zone: Zone::both(14), ..plain },
            Entry { labels: Some([15; 16]), ..plain },
            Entry { orig: first, ..plain },
            Entry { orig: connection.sent(), reply: connection.received(), ..plain },
        ];
        for entry in entries.map(Some).into_iter().chain([None]) {
            for socket in [Some(socket), None] {
                let view = View { connection, socket, entry };
                assert_eq!(Views::from_iter([view]).iter().collect::<Vec<_>>(), [view]);
            }
        }
    }
}
