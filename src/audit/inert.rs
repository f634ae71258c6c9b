//! Limits that accept up to a number, and let in what exceeds it. Pure.

use std::net::IpAddr;

use super::families::stranger;
use crate::firewall::limits::LimitRule;
use crate::firewall::packet::Syn;
use crate::firewall::play::{Hit, Player};
use crate::flow::Endpoint;
use crate::sockdiag::Socket;

/// Whether a client that exceeds this limit gets in all the same, to whatever port that is listened at. Whom nobody
/// can tell it of it is not said to be.
pub fn is_inert(rule: &LimitRule, player: &Player<'_>, listeners: &[Socket]) -> bool {
    if rule.limit.over || rule.notes || rule.remembers {
        return false;
    }
    let mut tried = listeners.iter().filter_map(|socket| syn(rule, socket.local)).peekable();
    tried.peek().is_some()
        && tried.all(|syn| {
            let exceeds = &mut |hit: &Hit| Some(hit.at == rule.at || hit.limit.count == 0);
            let played = player.play(&syn, exceeds);
            // What exceeds one limit may have the places of another.
            played.admitted == Some(true)
                && !played.hits.is_empty()
                && played.hits.iter().all(|hit| hit.at == rule.at)
        })
}

/// The SYN of a client that the limit counts.
fn syn(rule: &LimitRule, local: Endpoint) -> Option<Syn> {
    let families = [true, false].into_iter().filter(|ipv4| rule.is_of(*ipv4));
    let of_family = |ipv4: bool| {
        let named = rule.matches.sources.iter().filter(|(_, inside)| *inside);
        let mut named = named.map(|(net, _)| net.addr()).filter(|addr| addr.is_ipv4() == ipv4);
        let source: IpAddr = named.next().unwrap_or_else(|| stranger(ipv4));
        let is_served = local.addr().is_ipv4() == ipv4 || local.addr().is_unspecified();
        let is_it = is_served && rule.covers(source, local.port());
        let any = if ipv4 { [0; 4].into() } else { IpAddr::from([0_u16; 8]) };
        let to = if local.addr().is_ipv4() == ipv4 { local.addr() } else { any };
        is_it.then(|| Syn::new(source, Endpoint::new(to, local.port())))
    };
    families.filter(|_| !local.addr().is_loopback()).find_map(of_family)
}
