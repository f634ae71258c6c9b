//! Ports that are served although nothing listens there any more: the application has closed its
//! listener and keeps its connections.

use std::collections::{HashMap, HashSet};

use super::ledger::Ledger;
use super::observe::Tables;
use super::policy::{Policy, Scope};
use super::pressure::Defence;
use super::snapshot::View;
use crate::error::Result;
use crate::netlink::Transport;
use crate::sockdiag::{Lookup, Opener, Socket};

/// So many connections of a port are asked about, some 10 µs each: all of them came to one listener,
/// or none did.
const ASKED: usize = 4;

impl<T: Transport> Tables<T> {
    /// Ports without a listener to which peers have connected, by these sockets, beside the ports of
    /// `scope`; none where the administrator names the ports.
    ///
    /// The entry shows who opened a connection, or, where it is gone or was made by a packet in the
    /// middle, TCP's own counters do. What this host has dialled is no service of its.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost.
    pub fn served_without_listener(
        &mut self,
        sockets: &[Socket],
        scope: &Scope,
        policy: &Policy,
    ) -> Result<HashSet<u16>> {
        let mut asked: HashMap<u16, usize> = HashMap::new();
        let mut is_asked = |socket: &Socket| {
            let port = socket.local.port();
            let is_one = policy.guards(socket)
                && policy.admits(socket.remote.addr())
                && policy.own_port != Some(port)
                && !scope.ports.contains(&port);
            is_one && {
                let count = asked.entry(port).or_default();
                *count += 1;
                *count <= ASKED
            }
        };
        let asked: Vec<Socket> = match policy.ports.is_empty() {
            true => sockets.iter().copied().filter(|socket| is_asked(socket)).collect(),
            false => Vec::new(),
        };
        if asked.is_empty() {
            return Ok(HashSet::new());
        }
        let lookups: Vec<_> = asked.iter().map(Lookup::from).collect();
        let nothing = Ledger::new(Defence::Auto, policy.zone);
        let entries = self.entries_of(&lookups, nothing.zones())?;
        let openers = self.sockets.openers(&lookups)?;
        let each = asked.iter().zip(entries).zip(openers);
        let came_in = each.filter(|((socket, entry), opener)| match entry {
            Some(entry) if !entry.is_picked_up() => {
                let view =
                    View { connection: socket.connection(), socket: None, entry: Some(*entry) };
                !view.is_outgoing() && entry.reply == socket.connection().sent()
            }
            _ => *opener == Some(Opener::Peer),
        });
        Ok(came_in.map(|((socket, _), _)| socket.local.port()).collect())
    }
}
