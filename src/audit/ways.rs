//! Which connections of other namespaces this host forwards, though nothing of them is left in its table.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::error::Result;
use crate::flow::Connection;
use crate::rtnetlink::route::{Destination, Routes};

/// Addresses whose way is remembered: a look at another costs a question to the kernel.
const ADDRESSES: usize = 65_536;

/// The ways from the calling thread's namespace to addresses.
#[derive(Debug)]
pub(super) struct Ways {
    routes: Routes,
    known: HashMap<IpAddr, Option<u32>>,
}

impl Ways {
    pub(super) fn open() -> Result<Self> {
        Ok(Self { routes: Routes::open()?, known: HashMap::new() })
    }

    /// Whether packets between these two come in by one device and leave by another. Between two ports of a bridge
    /// they may not reach the rules, and those of a macvlan do not.
    pub(super) fn lead_through(&mut self, connection: Connection) -> bool {
        let Connection { local, remote } = connection;
        match (self.device(local.addr()), self.device(remote.addr())) {
            (Some(one), Some(other)) => one != other,
            _ => false,
        }
    }

    /// `None` of this host itself, and where no way leads.
    fn device(&mut self, addr: IpAddr) -> Option<u32> {
        if let Some(known) = self.known.get(&addr) {
            return *known;
        }
        let device = match self.routes.destination(addr, None) {
            Ok(Destination::Interface { index, .. }) => Some(index),
            _ => None,
        };
        if self.known.len() < ADDRESSES {
            self.known.insert(addr, device);
        }
        device
    }
}
