//! Ports that are served although nothing listens there any more: the application has closed its
//! listener and keeps its connections.

use std::collections::{HashMap, HashSet};

use super::ledger::Ledger;
use super::observe::Tables;
use super::policy::{Policy, Scope};
use super::snapshot::View;
use crate::error::Result;
use crate::netlink::Transport;
use crate::sockdiag::{Lookup, Opener};

/// So many connections of a port are asked about, some 10 µs each: all of them came to one listener,
/// or none did.
const ASKED: usize = 4;

impl<T: Transport> Tables<T> {
    /// Ports without a listener to which peers have connected, beside those of `scope`; none where
    /// the administrator names the ports.
    ///
    /// The entry shows who opened a connection, or, where it is gone or was made by a packet in the
    /// middle, TCP's own counters do. What this host has dialled is no service of its.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost.
    pub fn served_without_listener(
        &mut self,
        scope: &Scope,
        policy: &Policy,
    ) -> Result<HashSet<u16>> {
        if !policy.ports.is_empty() {
            return Ok(HashSet::new());
        }
        let mut asked: HashMap<u16, usize> = HashMap::new();
        let mut sockets = self.sockets.sockets(policy.states)?;
        sockets.retain(|socket| {
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
        });
        let lookups: Vec<_> = sockets.iter().map(Lookup::from).collect();
        if lookups.is_empty() {
            return Ok(HashSet::new());
        }
        let nothing = Ledger::new(super::pressure::Defence::Auto, policy.zone);
        let entries = self.entries_of(&lookups, nothing.zones())?;
        let openers = self.sockets.openers(&lookups)?;
        let each = sockets.iter().zip(entries).zip(openers);
        let came_in = each.filter(|((socket, entry), opener)| match entry {
            Some(entry) if !entry.is_picked_up() => {
                let view = View { flow: socket.flow(), socket: None, entry: Some(*entry) };
                !view.is_outgoing() && entry.reply == socket.flow()
            }
            _ => *opener == Some(Opener::Peer),
        });
        Ok(came_in.map(|((socket, _), _)| socket.local.port()).collect())
    }
}
