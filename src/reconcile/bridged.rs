//! Connections of other namespaces that this one's conntrack never sees: both ends stand at one bridge
//! of this host, or at one other device, and no packet of theirs goes through its rules.

use std::collections::HashSet;
use std::net::IpAddr;

use super::observe::Tables;
use super::snapshot::View;
use crate::error::Result;
use crate::flow::Connection;
use crate::host::sysctl;
use crate::netlink::Transport;
use crate::rtnetlink::route::{Destination, Routes};

impl<T: Transport> Tables<T> {
    /// Which of these connections are such, among those without an entry.
    pub(super) fn bridged(
        &mut self,
        views: impl Iterator<Item = View>,
    ) -> Result<HashSet<Connection>> {
        let mut bridged = HashSet::new();
        for View { connection, socket, entry } in views {
            if entry.is_some()
                || socket.is_none()
                || !self.sockets.is_of_member(connection.local.addr())
            {
                continue;
            }
            let Some(routes) = self.homes.first_mut() else { break };
            let behind = link(routes, connection.local.addr())?;
            if behind.is_some()
                && behind == link(routes, connection.remote.addr())?
                && !bridges_are_tracked(connection.local.addr())
            {
                bridged.insert(connection);
            }
        }
        Ok(bridged)
    }
}

/// The device that an address is right behind.
fn link<T: Transport>(routes: &mut Routes<T>, addr: IpAddr) -> Result<Option<u32>> {
    Ok(match routes.destination(addr, None)? {
        Destination::Interface { index, gateway: None } => Some(index),
        _ => None,
    })
}

/// Whether packets that a bridge passes on go through the rules, too (`br_netfilter`).
fn bridges_are_tracked(addr: IpAddr) -> bool {
    let setting = if addr.is_ipv4() { "iptables" } else { "ip6tables" };
    sysctl::number(&format!("net.bridge.bridge-nf-call-{setting}")) == Some(1)
}
