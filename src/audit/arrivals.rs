//! By which device the connections come in: the one that their answers leave by. Looked up where
//! rules ask for it, since each peer costs a question. What this host opens to a container comes in by none: it
//! passes OUTPUT alone, and stands here as of the loopback device.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use crate::error::Result;
use crate::firewall::Ruleset;
use crate::firewall::packet::Interface;
use crate::firewall::play::Player;
use crate::reconcile::snapshot::View;
use crate::rtnetlink::link::links;
use crate::rtnetlink::route::{Destination, Routes};

/// So many peers are looked up, some 20 µs each; the rest come in by any device.
const PEERS: usize = 20_000;

/// The device by the peer and the local address.
pub type Arrivals = HashMap<(IpAddr, IpAddr), Interface>;

/// The devices of these connections, where a rule asks for one; `behind` are the addresses of containers.
///
/// # Errors
/// A broken conversation.
pub fn arrivals(
    rules: &Ruleset,
    views: impl Iterator<Item = View>,
    behind: &HashSet<IpAddr>,
) -> Result<Arrivals> {
    let mut found = Arrivals::new();
    let is_asked = Player::new(rules).asks_for_interfaces();
    if !is_asked && behind.is_empty() {
        return Ok(found);
    }
    let mut own: HashMap<IpAddr, bool> = HashMap::new();
    let links = if is_asked { links()? } else { Vec::new() };
    let named: HashMap<u32, String> =
        links.into_iter().map(|link| (link.index, link.name)).collect();
    let mut routes = Routes::open()?;
    for view in views {
        let key = of(&view);
        if found.len() + own.len() >= PEERS || found.contains_key(&key) {
            continue;
        }
        if behind.contains(&key.1) {
            let is_own = match own.entry(key.0) {
                Entry::Occupied(known) => *known.get(),
                Entry::Vacant(new) => *new.insert(routes.is_local(key.0)?),
            };
            if is_own {
                found.insert(key, Interface::loopback());
                continue;
            }
        }
        if !is_asked {
            continue;
        }
        // A bound socket takes packets of its own device alone.
        let bound = view.socket.map(|socket| socket.interface).filter(|index| *index != 0);
        // What rules give its answers back (CONNMARK) may choose their way.
        let mark = view.entry.and_then(|entry| entry.mark).unwrap_or(0);
        let index = match bound {
            Some(index) => Some(index),
            None => match routes.destination(key.0, Some(key.1), mark)? {
                Destination::Interface { index, .. } => Some(index),
                Destination::Local | Destination::Unreachable => None,
            },
        };
        if let Some((index, name)) = index.and_then(|index| Some((index, named.get(&index)?))) {
            found.insert(key, Interface::Known(name.clone(), index));
        }
    }
    Ok(found)
}

/// What a connection is looked up by.
pub fn of(view: &View) -> (IpAddr, IpAddr) {
    (view.client().addr(), view.connection.local.addr())
}
