//! What both tables say about each connection, as plain values.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::conntrack::{Entry, TcpState, Zone};
use crate::flow::{Endpoint, FourTuple};
use crate::sockdiag::{Socket, State};

/// One connection as both tables show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// From the server to its peer: the socket's own tuple, and the reply tuple of its entry.
    pub flow: FourTuple,
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
        let direction = if entry.reply == self.flow {
            // Picked up by the kernel itself: no SYN of it has passed the limiter. An ESTABLISHED
            // one is left as it is: after a restart of the firewall that is every connection.
            let half_closed = self.socket.is_some_and(|socket| socket.state == State::CloseWait);
            let uncounted = half_closed && entry.is_picked_up() && !entry.is_ours();
            if uncounted { Direction::Reversed } else { Direction::FromPeer }
        } else if entry.is_picked_up() {
            Direction::Reversed
        } else {
            Direction::Outgoing
        };
        Some((direction, state))
    }

    /// Whether a limiter counts the entry for the peer.
    pub fn is_counted(&self) -> bool {
        matches!(self.entry_side(), Some((Direction::FromPeer, state)) if state.is_counted())
    }
}

/// Both tables at one moment, as far as they concern the scope.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The connections.
    pub views: Vec<View>,
    /// Local ports of which some connection has an entry: tracking is on there.
    pub tracked: HashSet<u16>,
    /// Zones that entries of the scope were found in.
    pub zones: BTreeSet<Zone>,
    /// For each local port the first destination that its peers have, before translation.
    pub destinations: HashMap<u16, Destination>,
}

/// Where the peers of a local port send their packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To the socket itself, all of them.
    Direct,
    /// To this other endpoint, all of them: it is translated (REDIRECT, DNAT).
    Translated(Endpoint),
    /// Some here, some there.
    Various,
}

impl Snapshot {
    /// A snapshot of these connections.
    pub fn new(views: Vec<View>) -> Self {
        let mut tracked = HashSet::new();
        let mut zones = BTreeSet::new();
        let mut destinations = HashMap::new();
        for view in &views {
            let Some(entry) = view.entry else { continue };
            let port = view.flow.src.port();
            tracked.insert(port);
            zones.insert(entry.zone);
            if entry.reply == view.flow {
                let direct = entry.orig.dst == view.flow.src;
                let this = if direct {
                    Destination::Direct
                } else {
                    Destination::Translated(entry.orig.dst)
                };
                let all = destinations.entry(port).or_insert(this);
                if *all != this {
                    *all = Destination::Various;
                }
            }
        }
        Self { views, tracked, zones, destinations }
    }
}
