//! Ports that rules lead to containers for clients of IPv4 alone, while a proxy of this host takes those of IPv6
//! (docker-proxy): a limit for what is forwarded counts none of these. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::families::{Reached, listens, rule_for, stranger};
use super::finding::Finding;
use super::guests::{self, Guests};
use crate::firewall::limits::{LimitRule, Limiter};
use crate::firewall::packet::{Interface, Syn};
use crate::firewall::play::{Certainty, Player};
use crate::firewall::published::Published;
use crate::firewall::{Match, Ports};
use crate::flow::Endpoint;
use crate::sockdiag::Socket;

/// Where ports lead to, as entries show.
pub type Led = HashMap<u16, BTreeSet<Endpoint>>;

/// The ports whose clients of IPv6 pass a limit so. Nothing of rules that could not all be read.
pub fn passing(
    limiter: &Limiter,
    player: &Player<'_>,
    listeners: &[Socket],
    published: &[Option<Published>; 2],
    (guests, led): (&Guests, &Led),
    reached: &Reached,
) -> Vec<Finding> {
    if !limiter.unread.is_empty() || limiter.rules.is_empty() || guests.served.is_empty() {
        return Vec::new();
    }
    let [Some(ipv4), Some(ipv6)] = published else { return Vec::new() };
    let own = listeners.iter().filter(|socket| !guests.have(socket));
    let own: Vec<Endpoint> = own.map(|socket| socket.local).collect();
    let limit_of = |syn: &Syn| {
        player.limits(syn).hits.into_iter().find_map(|hit| {
            let is_it = |rule: &LimitRule| rule.at == hit.at && !rule.notes;
            let index = limiter.rules.iter().position(is_it)?;
            Some((index, hit.certainty > Certainty::Perhaps))
        })
    };
    let of_this_host = |port| limiter.of_port(port).any(|rule| rule.covers(stranger(true), port));
    // By the limit, and whether it is certain that it is for the port.
    let mut found: BTreeMap<(usize, bool), Vec<u16>> = BTreeMap::new();
    // Of what a limit of this host is for, too, `families` says it.
    for port in ipv4.keys().filter(|port| !ipv6.contains_key(*port) && !of_this_host(**port)) {
        let Some(local) = listens(&own, *port, false, reached) else { continue };
        let taken = Syn::new(stranger(false), local);
        let gets_in = player.play(&taken, &mut |_| Some(false)).admitted() != Some(false);
        if !gets_in || limit_of(&taken).is_some() {
            continue;
        }
        let leads = |(place, _): &(&Endpoint, &Interface)| {
            let is_led = led.get(port).is_none_or(|places| places.contains(*place));
            place.addr().is_ipv4() && is_led
        };
        let places = guests.served.iter().filter(leads);
        let limits = places.filter_map(|(place, leaves)| {
            let mut all = guests::asked(ipv4, *place);
            let asked = all.find(|asked| asked.port() == *port)?;
            let syn = guests.syn(stranger(true), *place, leaves);
            Some(limit_of(&Syn { asked: Some(asked), ..syn }))
        });
        let limits: Vec<_> = limits.collect();
        if let Some(first) = limits.iter().flatten().min() {
            let is_sure = limits.iter().all(|limit| limit.is_some_and(|(_, is_sure)| is_sure));
            found.entry((first.0, is_sure)).or_default().push(*port);
        }
    }
    let all = found.into_iter().filter_map(|((index, is_sure), ports)| {
        Some(finding(limiter.rules.get(index)?, &ports, is_sure))
    });
    all.collect()
}

fn finding(limit: &LimitRule, ports: &[u16], is_sure: bool) -> Finding {
    let ports = Ports::of(ports.iter().map(|port| (*port, *port)));
    let perhaps = if is_sure { "" } else { "perhaps " };
    let what = format!(
        "port {ports} is {perhaps}limited for IPv4 clients, whom rules lead to a container ({limit}), and not for \
         those of IPv6: what listens here for them (docker-proxy) opens connections of its own to it"
    );
    // On the way in of this host, where the port is the one that clients ask for.
    let matches = Match {
        ports: ports.clone(),
        asked: Ports::default(),
        destinations: Vec::new(),
        ..limit.matches.clone()
    };
    let is_of_xt = !limit.limit.dynamic && !limit.limit.is_keyless;
    let rule = is_of_xt.then(|| rule_for(&LimitRule { matches, ..limit.clone() }, false)).flatten();
    let likewise = || {
        format!("limit clients of IPv6 to port {ports} likewise in INPUT, before what accepts it")
    };
    Finding::warn("limit-one-family", what, rule.unwrap_or_else(likewise))
}
