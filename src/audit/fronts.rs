//! Ports whose clients all come from one address that stands before this namespace: its own, or its
//! gateway. A proxy hands them on (docker-proxy, rootlessport, slirp4netns), or a router hides them.
//! Those of a container are told from the host's by its address.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use crate::error::Result;
use crate::reconcile::snapshot::View;
use crate::rtnetlink::route::{Destination, Routes};

/// Fewer connections of one address say nothing.
const SOME: usize = 3;
/// Addresses of no network in use, by family: the way to them is that to everywhere (RFC 5737, 3849).
const FAR: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

/// A port behind something that hides its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Front {
    /// The address of the container that has it; `None` of this namespace.
    pub behind: Option<IpAddr>,
    /// The local port.
    pub port: u16,
    /// The address that all of them have.
    pub from: IpAddr,
    /// How many connections.
    pub connections: usize,
    /// It is the gateway's; else one of this host.
    pub is_gateway: bool,
}

/// The ports of these connections that are so; `behind` are the addresses of containers.
///
/// # Errors
/// A broken conversation.
pub fn fronts(views: impl Iterator<Item = View>, behind: &HashSet<IpAddr>) -> Result<Vec<Front>> {
    let mut ports: BTreeMap<_, Option<(IpAddr, usize)>> = BTreeMap::new();
    let is_open = |view: &View| view.socket.is_some_and(|socket| socket.takes_a_slot());
    for view in views.filter(|view| is_open(view) && !view.is_outgoing()) {
        let from = view.client().addr();
        let local = view.connection.local;
        let container = Some(local.addr()).filter(|addr| behind.contains(addr));
        let one = ports.entry((container, local.port())).or_insert(Some((from, 0)));
        *one = one.filter(|(known, _)| *known == from).map(|(known, count)| (known, count + 1));
    }
    let mut found = Vec::new();
    let mut routes = Routes::open()?;
    let some = ports.into_iter().filter_map(|(port, one)| Some((port, one?)));
    for ((behind, port), (from, connections)) in some.filter(|(_, (_, count))| *count >= SOME) {
        let mut far = FAR.iter().filter_map(|far| far.parse::<IpAddr>().ok());
        let far = far.find(|far| far.is_ipv4() == from.is_ipv4());
        let mut is_gateway = false;
        if let Some(far) = far {
            let way = routes.destination(far, None, 0)?;
            is_gateway =
                matches!(way, Destination::Interface { gateway: Some(via), .. } if via == from);
        }
        if is_gateway || routes.is_local(from)? {
            found.push(Front { behind, port, from, connections, is_gateway });
        }
    }
    Ok(found)
}
