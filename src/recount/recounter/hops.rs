//! Where the packets of clients come in, as routes and neighbours show it.

use std::collections::HashMap;
use std::net::IpAddr;

use super::{Hop, REMEMBERED, Recounter};
use crate::conntrack::Entry;
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
        self.note(|this| &mut this.devices, client, server, device);
    }

    pub(super) fn note_mark(&mut self, entry: &Entry) {
        // One that was put back by itself has none; its siblings had.
        let Some(mark) = entry.mark.filter(|mark| *mark != 0) else { return };
        let (client, server) = (entry.orig.src.addr(), entry.orig.dst.addr());
        self.note(|this| &mut this.connmarks, client, server, mark);
    }

    /// By another value the way is another one.
    fn note(
        &mut self,
        known: fn(&mut Self) -> &mut HashMap<(IpAddr, IpAddr), u32>,
        client: IpAddr,
        server: IpAddr,
        value: u32,
    ) {
        let known = known(self);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        if known.insert((client, server), value) != Some(value) {
            self.remembered.remove(&(client, Some(server)));
        }
    }
}
