//! The same connections, added up for each source as a limiter would see them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::loads::{Load, is_open, size};
use super::plays::network;
use crate::firewall::limits::Limiter;
use crate::reconcile::snapshot::View;
use crate::sockdiag::State;

/// One source network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The network.
    pub net: IpNet,
    /// Sockets of the server's side by state.
    pub sockets: BTreeMap<State, usize>,
    /// Sockets that are open on the server's side: ESTABLISHED or CLOSE_WAIT.
    pub held: usize,
    /// Entries that a limiter counts.
    pub counted: usize,
    /// Open sockets without a counted entry.
    pub uncounted: usize,
    /// Counted entries without a socket.
    pub stale: usize,
    /// For how many seconds a daemon has held the oldest of its half-closed connections.
    pub oldest_half_close: Option<u64>,
    /// The limit that it is nearest to, or furthest beyond.
    pub limit: Option<u32>,
    /// Whether more sockets are held than that limit allows; `None` where that cannot be told.
    pub over_limit: Option<bool>,
    /// How many connections the list of a limit holds; `None` where it was not asked.
    pub listed: Option<Listed>,
}

/// What a limit said when it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// So many connections of the source are on its list; where it is full, at least so many.
    pub count: u32,
    /// It lets no further one in.
    pub is_full: bool,
    /// How many it allows.
    pub limit: u32,
}

/// How sources are put together and what they are measured by.
#[derive(Clone, Copy, Debug)]
pub struct Measure<'l> {
    /// Prefix length of IPv4 sources.
    pub mask: u8,
    /// Prefix length of IPv6 sources.
    pub mask6: u8,
    /// The limit that the administrator names; goes before the rules.
    pub limit: Option<u32>,
    /// The limits that were found.
    pub limiter: &'l Limiter,
}

impl Measure<'_> {
    /// The source that an address belongs to.
    pub fn net(&self, addr: IpAddr) -> IpNet {
        network(addr, if addr.is_ipv4() { self.mask } else { self.mask6 })
    }
}

/// Sources of these connections, those that hurt most first. `ages` are seconds by the cookie of
/// the socket.
pub fn sources(
    views: impl IntoIterator<Item = View>,
    measure: Measure<'_>,
    loads: &[Load],
    ages: &HashMap<u64, u64>,
) -> Vec<Source> {
    let mut by_net: HashMap<IpNet, Source> = HashMap::new();
    // What this host has opened is no load of the peer's.
    for view in views.into_iter().filter(|view| !view.is_outgoing()) {
        let net = measure.net(view.client().addr());
        let source = by_net.entry(net).or_insert_with(|| Source {
            net,
            sockets: BTreeMap::new(),
            held: 0,
            counted: 0,
            uncounted: 0,
            stale: 0,
            oldest_half_close: None,
            limit: measure.limit,
            over_limit: Some(false),
            listed: None,
        });
        let counted = view.is_counted();
        source.counted += usize::from(counted);
        match view.socket {
            Some(socket) => {
                *source.sockets.entry(socket.state).or_default() += 1;
                source.held += usize::from(is_open(&view));
                source.uncounted += usize::from(is_open(&view) && !counted);
                if socket.state == State::CloseWait {
                    let age = ages.get(&socket.cookie.0).copied();
                    source.oldest_half_close = source.oldest_half_close.max(age);
                }
            }
            None => source.stale += usize::from(counted),
        }
    }
    let mut all: Vec<_> = by_net.into_values().collect();
    for source in &mut all {
        if let Some(limit) = measure.limit {
            source.over_limit = Some(source.held > size(limit));
        }
    }
    if measure.limit.is_none() {
        apply(&mut all, measure, loads);
    }
    all.sort_by_key(|source| {
        (
            Reverse(source.over_limit == Some(true)),
            Reverse(source.uncounted),
            Reverse(source.held),
            source.net,
        )
    });
    all
}

/// Gives each source the limit that its connections come nearest to.
fn apply(all: &mut [Source], measure: Measure<'_>, loads: &[Load]) {
    let mut nearest: HashMap<IpNet, (i64, u32, Option<bool>)> = HashMap::new();
    for load in loads {
        let Some(rule) = measure.limiter.rules.get(load.rule) else { continue };
        if rule.source_prefix().is_none() || load.is_noted() {
            continue;
        }
        let left = i64::from(load.limit) - i64::try_from(load.held).unwrap_or(i64::MAX);
        let this = (left, load.limit, load.is_over());
        let best = nearest.entry(load.net).or_insert(this);
        *best = (*best).min(this);
    }
    for source in all {
        // The rule's networks and the report's may be of different size.
        let found = nearest.get(&source.net).copied().or_else(|| {
            let touches = |net: &IpNet| net.contains(&source.net) || source.net.contains(net);
            nearest.iter().filter(|(net, _)| touches(net)).map(|(_, found)| *found).min()
        });
        if let Some((_, limit, over)) = found {
            source.limit = Some(limit);
            source.over_limit = over;
        }
    }
}
