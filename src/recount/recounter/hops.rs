//! Where the packets of clients come in, as routes and neighbours show it.

use std::net::IpAddr;

use super::{Hop, REMEMBERED, Recounter};
use crate::error::Result;
use crate::recount::ingress::Entrance;
use crate::rtnetlink::route::Destination;

impl Recounter {
    pub(super) fn hop(&mut self, addr: IpAddr, from: Option<IpAddr>) -> Result<Hop> {
        if let Some(known) = self.remembered.get(&(addr, from)) {
            return Ok(*known);
        }
        let mark = from.and_then(|from| self.connmarks.get(&(addr, from))).copied().unwrap_or(0);
        let mut destination = self.routes.destination(addr, from, mark)?;
        // Of an address that every device may have the route names any of them.
        if let Some(index) = from.and_then(|from| self.devices.get(&(addr, from)))
            && destination != Destination::Local
        {
            destination = Destination::Interface { index: *index, gateway: None };
        }
        let hop = match destination {
            Destination::Local => Hop::Local,
            Destination::Unreachable => Hop::Unreachable,
            Destination::Interface { index, gateway } => Hop::Entrance(Entrance {
                interface: index,
                mac: self.neighbours.mac(index, gateway.unwrap_or(addr))?,
                routed: gateway.is_some(),
            }),
        };
        if self.remembered.len() >= REMEMBERED {
            self.remembered.clear();
        }
        self.remembered.insert((addr, from), hop);
        Ok(hop)
    }

    pub(super) fn note_device(&mut self, client: IpAddr, server: IpAddr, device: u32) {
        let is_link_local = matches!(client, IpAddr::V6(client) if client.is_unicast_link_local());
        if !is_link_local || device == 0 {
            return;
        }
        if self.devices.len() >= REMEMBERED {
            self.devices.clear();
        }
        if self.devices.insert((client, server), device) != Some(device) {
            self.remembered.remove(&(client, Some(server)));
        }
    }
}
