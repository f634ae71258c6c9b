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
        let hop = match self.routes.destination(addr, from, mark)? {
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
}
