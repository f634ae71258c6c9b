//! Which connections of other namespaces this host forwards, though nothing of them is left in its table.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use super::plays::Plays;
use crate::error::Result;
use crate::flow::Connection;
use crate::reconcile::bridged::calls_rules;
use crate::reconcile::snapshot::View;
use crate::rtnetlink::route::{Destination, Routes};

/// Addresses whose way is remembered: a look at another costs a question to the kernel.
const ADDRESSES: usize = 65_536;

/// The ways from the calling thread's namespace to addresses.
#[derive(Debug)]
pub struct Ways {
    routes: Routes,
    known: HashMap<IpAddr, Option<u32>>,
    /// Bridges, by family.
    calls: HashMap<(u32, bool), bool>,
}

impl Ways {
    /// Asks about routes.
    ///
    /// # Errors
    /// No socket of rtnetlink can be opened.
    pub fn open() -> Result<Self> {
        Ok(Self { routes: Routes::open()?, known: HashMap::new(), calls: HashMap::new() })
    }

    /// Whether a connection of which nothing shows that conntrack sees it is one of this table's: what another
    /// namespace has is not, unless a limit here counts it, or may.
    pub fn are_ours(
        &mut self,
        view: &View,
        behind: &HashSet<IpAddr>,
        plays: &mut Plays<'_>,
    ) -> bool {
        !behind.contains(&view.connection.local.addr())
            || (plays.is_limited(view) && self.lead_through(view.connection))
    }

    /// Whether packets between these two come in by one device and leave by another, or pass a bridge that has the
    /// rules see them. Those of a macvlan never reach them.
    fn lead_through(&mut self, connection: Connection) -> bool {
        let Connection { local, remote } = connection;
        match (self.device(local.addr()), self.device(remote.addr())) {
            (Some(one), Some(other)) => one != other || self.calls_rules(one, local.addr()),
            _ => false,
        }
    }

    fn calls_rules(&mut self, device: u32, addr: IpAddr) -> bool {
        let Self { routes, calls, .. } = self;
        let ask = || calls_rules(routes, device, addr.is_ipv4()).unwrap_or(false);
        *calls.entry((device, addr.is_ipv4())).or_insert_with(ask)
    }

    /// `None` of this host itself, and where no way leads.
    fn device(&mut self, addr: IpAddr) -> Option<u32> {
        if let Some(known) = self.known.get(&addr) {
            return *known;
        }
        let device = match self.routes.destination(addr, None, 0) {
            Ok(Destination::Interface { index, .. }) => Some(index),
            _ => None,
        };
        if self.known.len() < ADDRESSES {
            self.known.insert(addr, device);
        }
        device
    }
}
