//! The same connections, added up for each source as a limiter would see them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::firewall::Hook;
use crate::firewall::limits::{LimitRule, Limiter};
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
    /// More sockets are held than that limit allows.
    pub over_limit: bool,
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

/// What one limit allows one group of connections, and what they take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Index of the rule.
    pub rule: usize,
    /// Whose connections.
    pub net: IpNet,
    /// Open sockets.
    pub held: usize,
    /// Entries that the rule can count.
    pub counted: usize,
}

impl Measure<'_> {
    fn net(&self, addr: IpAddr) -> IpNet {
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
        let net = measure.net(view.flow.dst.addr());
        let source = by_net.entry(net).or_insert_with(|| Source {
            net,
            sockets: BTreeMap::new(),
            held: 0,
            counted: 0,
            uncounted: 0,
            stale: 0,
            oldest_half_close: None,
            limit: measure.limit,
            over_limit: false,
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
            source.over_limit = source.held > size(limit);
        }
    }
    if measure.limit.is_none() {
        apply(&mut all, measure, loads);
    }
    all.sort_by_key(|source| {
        (Reverse(source.over_limit), Reverse(source.uncounted), Reverse(source.held), source.net)
    });
    all
}

/// Gives each source the limit that its connections come nearest to.
fn apply(all: &mut [Source], measure: Measure<'_>, loads: &[Load]) {
    let mut nearest: HashMap<IpNet, (i64, u32)> = HashMap::new();
    for load in loads {
        let Some(rule) = measure.limiter.rules.get(load.rule) else { continue };
        let left = i64::from(rule.limit.count) - i64::try_from(load.held).unwrap_or(i64::MAX);
        let best = nearest.entry(load.net).or_insert((left, rule.limit.count));
        *best = (*best).min((left, rule.limit.count));
    }
    for source in all {
        // The rule's networks and the report's may be of different size.
        let found = nearest.get(&source.net).copied().or_else(|| {
            let touches = |net: &IpNet| net.contains(&source.net) || source.net.contains(net);
            nearest.iter().filter(|(net, _)| touches(net)).map(|(_, found)| *found).min()
        });
        if let Some((left, limit)) = found {
            source.limit = Some(limit);
            source.over_limit = left < 0;
        }
    }
}

/// What each limit by source has to bear, group by group.
pub fn loads(views: impl IntoIterator<Item = View> + Clone, limiter: &Limiter) -> Vec<Load> {
    let mut all = Vec::new();
    for (index, rule) in limiter.rules.iter().enumerate() {
        // What is forwarded has its sockets elsewhere.
        let Some(prefix) = rule.source_prefix().filter(|_| rule.hook != Hook::Forward) else {
            continue;
        };
        let mut groups: HashMap<IpNet, Load> = HashMap::new();
        for view in views.clone().into_iter().filter(|view| !view.is_outgoing()) {
            let peer = view.flow.dst.addr();
            if rule.covers(peer, port_seen(rule, &view)) {
                let net = network(peer, prefix);
                let load =
                    groups.entry(net).or_insert(Load { rule: index, net, held: 0, counted: 0 });
                load.held += usize::from(is_open(&view));
                load.counted += usize::from(view.is_counted());
            }
        }
        let mut groups: Vec<_> = groups.into_values().collect();
        groups.sort_by_key(|load| (Reverse(load.held), load.net));
        all.extend(groups);
    }
    all
}

/// The destination port as the rule sees it: before destination NAT it is the one that the client
/// asked for.
fn port_seen(rule: &LimitRule, view: &View) -> u16 {
    let local = view.flow.src.port();
    if rule.is_before_nat() {
        view.entry.map_or(local, |entry| entry.orig.dst.port())
    } else {
        local
    }
}

fn is_open(view: &View) -> bool {
    view.socket.is_some_and(|socket| socket.takes_a_slot())
}

fn network(addr: IpAddr, bits: u8) -> IpNet {
    IpNet::new(addr, bits).unwrap_or_else(|_| IpNet::from(addr)).trunc()
}

fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}
