//! Connections of which both ends are in other namespaces. Those that this one's conntrack never sees: both ends stand
//! at one bridge of this host, or at one other device, and no packet of theirs goes through its rules. And those
//! that nothing translates, as both sockets show.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::observe::Tables;
use super::snapshot::View;
use crate::error::Result;
use crate::flow::Connection;
use crate::host::sysctl;
use crate::netlink::Transport;
use crate::rtnetlink::route::{Destination, Routes};
use crate::sockdiag::{Lookup, Socket};

impl<T: Transport> Tables<T> {
    /// Which of these connections are such, among those without an entry.
    pub(super) fn bridged(
        &mut self,
        views: impl Iterator<Item = View>,
    ) -> Result<HashSet<Connection>> {
        let (mut bridged, mut calls) = (HashSet::new(), HashMap::new());
        for View { connection, socket, entry } in views {
            if entry.is_some()
                || socket.is_none()
                || !self.sockets.is_of_member(connection.local.addr())
            {
                continue;
            }
            let Some(routes) = self.homes.first_mut() else { break };
            let Some(device) = link(routes, connection.local.addr())? else { continue };
            if Some(device) != link(routes, connection.remote.addr())? {
                continue;
            }
            let key = (device, connection.local.addr().is_ipv4());
            let calls_rules = match calls.get(&key) {
                Some(known) => *known,
                None => {
                    let asked = calls_rules(routes, key.0, key.1)?;
                    calls.insert(key, asked);
                    asked
                }
            };
            if !calls_rules {
                bridged.insert(connection);
            }
        }
        Ok(bridged)
    }

    /// Which of these connections have both their sockets in other namespaces, with the same addresses.
    pub(super) fn direct(
        &mut self,
        views: impl Iterator<Item = View>,
    ) -> Result<HashSet<Connection>> {
        let lost = views.filter(|view| view.socket.is_some() && view.entry.is_none());
        let between = lost.map(|view| view.connection).filter(|it| self.is_between_members(*it));
        let other_ends: Vec<_> = between
            .map(|it| Lookup { connection: Connection::of_receiver(it.sent()), interface: 0 })
            .collect();
        if other_ends.is_empty() {
            return Ok(HashSet::new());
        }
        let sockets = self.sockets.lookup(&other_ends)?.into_iter().flatten();
        Ok(sockets.map(|socket| Connection::of_receiver(socket.connection().sent())).collect())
    }

    /// The ends of connections of which both are in other namespaces, seen from the other end.
    pub(super) fn other_ends(&self, sockets: &[Socket]) -> HashSet<Connection> {
        let connections = sockets.iter().map(Socket::connection);
        let between = connections.filter(|it| self.is_between_members(*it));
        between.map(|it| Connection::of_receiver(it.sent())).collect()
    }

    fn is_between_members(&self, connection: Connection) -> bool {
        let Connection { local, remote } = connection;
        self.sockets.is_of_member(local.addr()) && self.sockets.is_of_member(remote.addr())
    }
}

/// The device that an address is right behind.
fn link<T: Transport>(routes: &mut Routes<T>, addr: IpAddr) -> Result<Option<u32>> {
    Ok(match routes.destination(addr, None, 0)? {
        Destination::Interface { index, gateway: None } => Some(index),
        _ => None,
    })
}

/// Whether packets between two hosts behind this device go through the rules of IP: it is a bridge, and they are
/// called for all of them (`net.bridge.bridge-nf-call-iptables`) or for this one.
///
/// # Errors
/// A broken conversation.
pub fn calls_rules<T: Transport>(
    routes: &mut Routes<T>,
    device: u32,
    is_ipv4: bool,
) -> Result<bool> {
    let of_it = routes.bridge_calls(device, is_ipv4)?;
    let tables = if is_ipv4 { "iptables" } else { "ip6tables" };
    let of_all = || sysctl::number(&format!("net.bridge.bridge-nf-call-{tables}")) == Some(1);
    Ok(of_it.is_some_and(|is_on| is_on || of_all()))
}
