//! What listens in containers, and the devices by which clients come in and go on to it: a limit for what is
//! forwarded is tried with that before anybody is there.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use super::families::stranger;
use crate::error::Result;
use crate::firewall::packet::{Interface, Syn};
use crate::firewall::published::Published;
use crate::flow::Endpoint;
use crate::rtnetlink::link::Link;
use crate::rtnetlink::route::{Destination, Routes};
use crate::sockdiag::{Cookie, SockDiag, Socket};

/// So many places are looked at; more of them say no more of a limit.
const PLACES: usize = 256;

/// What listens in other namespaces that this host forwards to.
#[derive(Clone, Debug, Default)]
pub struct Guests {
    /// Its sockets.
    pub sockets: HashSet<(Cookie, Endpoint)>,
    /// Where it listens, and by which device packets leave that go there.
    pub served: BTreeMap<Endpoint, Interface>,
    /// By which device clients come in that no rule knows, of IPv4 and of IPv6.
    pub arrivals: [Interface; 2],
}

impl Guests {
    /// Looks at the namespaces that are asked beside the own one.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn look(sockets: &mut SockDiag, links: &[Link]) -> Result<Self> {
        let listed = sockets.served_by_members()?;
        let mut this = Self::default();
        if listed.is_empty() {
            return Ok(this);
        }
        let mut routes = Routes::open()?;
        let mut device = |addr: IpAddr| {
            Ok::<_, crate::error::Error>(match routes.destination(addr, None, 0)? {
                Destination::Interface { index, gateway } => {
                    let link = links.iter().find(|link| link.index == index);
                    link.map(|link| (Interface::Known(link.name.clone(), index), gateway.is_some()))
                }
                Destination::Local | Destination::Unreachable => None,
            })
        };
        for (slot, ipv4) in this.arrivals.iter_mut().zip([true, false]) {
            *slot = device(stranger(ipv4))?.map_or(Interface::NotLoopback, |(by, _)| by);
        }
        this.sockets = listed.iter().map(|(socket, _)| (socket.cookie, socket.local)).collect();
        for local in listed.iter().flat_map(places) {
            if this.served.len() >= PLACES {
                break;
            }
            // What a router leads to is no container of this host.
            if let Some((by, false)) = device(local.addr())? {
                this.served.insert(local, by);
            }
        }
        Ok(this)
    }

    /// The SYN of a client that is forwarded to a place.
    pub fn syn(&self, source: IpAddr, local: Endpoint, leaves: &Interface) -> Syn {
        let [ipv4, ipv6] = &self.arrivals;
        let by = if source.is_ipv4() { ipv4 } else { ipv6 };
        // Whom rules name may come in by another.
        let is_stranger = source == stranger(source.is_ipv4());
        let interface = if is_stranger { by.clone() } else { Interface::NotLoopback };
        Syn { interface, leaves: leaves.clone(), is_forwarded: true, ..Syn::new(source, local) }
    }

    /// Whether a socket is that of another namespace.
    pub fn have(&self, socket: &Socket) -> bool {
        self.sockets.contains(&(socket.cookie, socket.local))
    }
}

/// What clients ask this host for that rules lead to a place, or may.
pub(super) fn asked(published: &Published, local: Endpoint) -> impl Iterator<Item = Endpoint> {
    let any = if local.addr().is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0_u16; 8]) };
    let leads = move |to: &BTreeSet<u16>| to.is_empty() || to.contains(&local.port());
    let ports = published.iter().filter(move |(_, to)| leads(to));
    ports.map(move |(port, _)| Endpoint::new(any, *port))
}

/// Where a listener is reached that its namespace has at these addresses.
fn places((socket, own): &(Socket, Vec<IpAddr>)) -> Vec<Endpoint> {
    let (addr, port) = (socket.local.addr(), socket.local.port());
    let is_far = |addr: &IpAddr| match addr {
        IpAddr::V4(addr) => !addr.is_loopback() && !addr.is_link_local(),
        IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
    };
    // One of [::] takes IPv4, too, or may.
    let is_its = |own: &IpAddr| addr.is_ipv6() || own.is_ipv4();
    let all = match addr.is_unspecified() {
        true => own.iter().copied().filter(is_its).collect(),
        false => vec![addr],
    };
    all.into_iter().filter(is_far).map(|addr| Endpoint::new(addr, port)).collect()
}
