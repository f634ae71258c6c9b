//! Ports that are limited for clients of one family of addresses alone, while the host serves both.
//! Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::finding::Finding;
use crate::firewall::limits::{Key, LimitRule, Limiter};
use crate::firewall::packet::Syn;
use crate::firewall::play::Player;
use crate::firewall::{Family, Match, Ports};
use crate::flow::Endpoint;
use crate::sockdiag::Socket;

/// Addresses of no host (RFC 5737, RFC 3849): rules treat them as any client.
const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1));
const STRANGER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
/// A customer has at least so much of IPv6 (RFC 6177).
const CUSTOMER: u8 = 64;

/// Which families of addresses come to a host.
#[derive(Clone, Debug, Default)]
pub struct Reached {
    /// It has an address of IPv6 that others can route to.
    pub by_ipv6: bool,
    /// Ports that a connection of IPv4 is open to: a listener of `[::]` may take these, or not.
    pub by_ipv4: HashSet<u16>,
}

/// The ports that are limited for one family alone. Nothing of rules that could not all be read.
pub fn one_sided(
    limiter: &Limiter,
    player: &Player<'_>,
    listeners: &[Socket],
    reached: &Reached,
) -> Vec<Finding> {
    if !limiter.unread.is_empty() || limiter.rules.is_empty() {
        return Vec::new();
    }
    let open: Vec<Endpoint> = listeners.iter().map(|socket| socket.local).collect();
    let ports: BTreeSet<u16> = open.iter().map(|local| local.port()).collect();
    let limited = |port, ipv4: bool| limiter.of_port(port).any(|it| it.is_of(ipv4));
    let find = |port| {
        let missing =
            [true, false].into_iter().find(|ipv4| !limited(port, *ipv4) && limited(port, !ipv4))?;
        let is_it = |it: &&LimitRule| it.covers(stranger(!missing), port);
        let limit = limiter.of_port(port).find(is_it)?;
        let local = listens(&open, port, missing, reached)?;
        let syn = Syn::new(stranger(missing), local);
        // Rules that let no stranger of the family in need no limit for it.
        let gets_in = player.play(&syn, &mut |_| Some(false)).admitted() != Some(false);
        let index = limiter.rules.iter().position(|it| std::ptr::eq(it, limit));
        gets_in.then_some(((index?, missing), port))
    };
    // A limit of several ports is one limit.
    let mut found: BTreeMap<(usize, bool), Vec<u16>> = BTreeMap::new();
    for (of, port) in ports.iter().copied().filter_map(find) {
        found.entry(of).or_default().push(port);
    }
    let all = found.into_iter().filter_map(|((index, missing), of_it)| {
        let limit = limiter.rules.get(index)?;
        // Where the other family has a limit of some of them, the same for all is not missing.
        let is_some =
            |port: &u16| limit.covers(stranger(!missing), *port) && limited(*port, missing);
        let rule = (!ports.iter().any(is_some)).then(|| rule_for(limit, missing)).flatten();
        Some(finding(limit, &of_it, missing, rule))
    });
    all.collect()
}

/// A client that no rule knows.
pub(super) fn stranger(ipv4: bool) -> IpAddr {
    if ipv4 { STRANGER } else { STRANGER6 }
}

/// An address that clients of a family reach the port at.
pub(super) fn listens(
    open: &[Endpoint],
    port: u16,
    ipv4: bool,
    reached: &Reached,
) -> Option<Endpoint> {
    let is_served = |local: &&Endpoint| {
        let addr = local.addr();
        let is_dual = ipv4 && addr.is_ipv6() && addr.is_unspecified();
        local.port() == port
            && !addr.is_loopback()
            && (addr.is_ipv4() == ipv4 || is_dual && reached.by_ipv4.contains(&port))
    };
    let local = open.iter().find(is_served).filter(|_| ipv4 || reached.by_ipv6)?;
    let any = if ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    Some(if local.addr().is_unspecified() { Endpoint::new(any, port) } else { *local })
}

fn finding(limit: &LimitRule, ports: &[u16], missing: bool, rule: Option<String>) -> Finding {
    let name = |ipv4: bool| if ipv4 { "IPv4" } else { "IPv6" };
    let ports = Ports::of(ports.iter().map(|port| (*port, *port)));
    let what = format!(
        "port {ports} is limited for {} clients ({limit}) and not for those of {}, which it listens for, too",
        name(!missing),
        name(missing)
    );
    let likewise =
        || format!("limit clients of {} likewise, before what accepts the port", name(missing));
    Finding::warn("limit-one-family", what, rule.unwrap_or_else(likewise))
}

/// The same limit for the clients of the other family; `None` where its form cannot be kept.
pub(super) fn rule_for(limit: &LimitRule, missing: bool) -> Option<String> {
    let Match { others, asked, interfaces, sources, destinations, .. } = &limit.matches;
    // Addresses of one family say nothing of the other.
    let is_plain = others.is_empty() && !limit.matches.is_rated && asked.is_all();
    if !is_plain || !sources.is_empty() || !destinations.is_empty() {
        return None;
    }
    let interface = match interfaces.as_slice() {
        [] => None,
        [name] if !name.contains('*') => Some(name),
        _ => return None,
    };
    let (count, key) = (limit.limit.count, &limit.limit.key);
    // Each address on its own; the limit is of the other family.
    let is_whole = |prefix: u8| prefix == if missing { 128 } else { 32 };
    if limit.limit.dynamic || limit.limit.is_keyless {
        let (name, network) =
            if missing { ("ip", "") } else { ("ip6", " and ffff:ffff:ffff:ffff::") };
        let counts = match key {
            Key::Source(_) => format!("add @SET {{ {name} saddr{network} ct count over {count} }}"),
            Key::Destination(prefix) if is_whole(*prefix) => {
                format!("add @SET {{ {name} daddr ct count over {count} }}")
            }
            Key::All if limit.limit.is_keyless => format!("ct count over {count}"),
            _ => return None,
        };
        let table = match (limit.family, missing) {
            (Family::Inet | Family::Netdev, _) => "the same table",
            (_, true) => "a table ip or inet",
            (_, false) => "a table ip6 or inet",
        };
        let set = if limit.limit.dynamic { ", with a dynamic SET of its own" } else { "" };
        let ports = match limit.matches.ports.is_all() {
            true => "meta l4proto tcp".to_owned(),
            false => format!("tcp dport {{ {} }}", limit.matches.ports),
        };
        let by = interface.map_or(String::new(), |name| format!("iifname \"{name}\" "));
        return Some(format!(
            "in {table}{set}, before what accepts the port: {by}{ports} ct state new {counts} drop"
        ));
    }
    let counts = match key {
        Key::All => "--connlimit-mask 0".to_owned(),
        Key::Source(_) => format!("--connlimit-mask {}", if missing { 32 } else { CUSTOMER }),
        Key::Destination(prefix) if is_whole(*prefix) => "--connlimit-daddr".to_owned(),
        _ => return None,
    };
    let program = if missing { "iptables" } else { "ip6tables" };
    let by = interface.map_or(String::new(), |name| format!("-i {name} "));
    let ports = ports_of_iptables(&limit.matches.ports)?;
    Some(format!(
        "{program} -I INPUT {by}-p tcp --syn {ports}-m connlimit --connlimit-above {count} {counts} -j DROP"
    ))
}

/// `--dport 80 `; `None` where one rule cannot name so many.
fn ports_of_iptables(ports: &Ports) -> Option<String> {
    if ports.is_all() {
        return Some(String::new());
    }
    // A range takes two of fifteen places (`XT_MULTI_PORTS`).
    let words = ports.to_string().replace('-', ":");
    match words.matches([',', ':']).count() {
        _ if !words.contains(',') => Some(format!("--dport {words} ")),
        0..15 => Some(format!("-m multiport --dports {words} ")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::{Ruleset, parse_saved};
    use crate::sockdiag::{Cookie, State};

    fn listener(local: &str) -> Socket {
        Socket {
            local: local.parse().unwrap(),
            remote: "0.0.0.0:0".parse().unwrap(),
            state: State::Listen,
            inode: 1,
            uid: 0,
            cookie: Cookie(1),
            interface: 0,
            recv_queue: 0,
            send_queue: 128,
        }
    }

    const LIMIT: &str =
        "-A INPUT -p tcp -m tcp --syn --dport 80 -m connlimit --connlimit-above 40 -j DROP\n";

    fn found(
        four: &str,
        six: &str,
        listeners: &[&str],
        by_ipv6: bool,
        by_ipv4: &[u16],
    ) -> Vec<String> {
        let text = |rules: &str| format!("*filter\n:INPUT ACCEPT [0:0]\n{rules}COMMIT\n");
        let chains = [(four, Family::Ip), (six, Family::Ip6)]
            .map(|(rules, family)| parse_saved(&text(rules), family));
        let rules = Ruleset { chains: chains.concat(), unread: Vec::new() };
        let listeners: Vec<_> = listeners.iter().map(|local| listener(local)).collect();
        let reached = Reached { by_ipv6, by_ipv4: by_ipv4.iter().copied().collect() };
        let all = one_sided(&Limiter::of(&rules), &Player::new(&rules), &listeners, &reached);
        all.into_iter().map(|it| format!("{} | {}", it.what, it.advice)).collect()
    }

    #[test]
    fn a_port_that_is_limited_for_one_family_alone_is_named_with_the_rule_for_the_other() {
        let dual = &["[::]:80"][..];
        let ipv4_alone = found(LIMIT, "", dual, true, &[]);
        assert_eq!(ipv4_alone.len(), 1);
        for wanted in [
            "port 80 is limited for IPv4 clients (at most 40 from each /32 to port 80 (ip filter INPUT rule 1))",
            "not for those of IPv6",
            "| ip6tables -I INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 40 --connlimit-mask 64",
        ] {
            assert!(ipv4_alone[0].contains(wanted), "{ipv4_alone:?}");
        }
        let ipv6_alone = found("", LIMIT, &["0.0.0.0:80", "[::]:80"], true, &[]);
        assert!(
            ipv6_alone.len() == 1 && ipv6_alone[0].contains("| iptables -I INPUT"),
            "{ipv6_alone:?}"
        );
        assert_eq!(found("", LIMIT, dual, true, &[80]).len(), 1);
    }

    /// One limit is one limit in the other family, too, or none is shown.
    #[test]
    fn the_rule_for_the_other_family_is_the_same_limit() {
        let ports = &["[::]:80", "[::]:443"][..];
        let advice = |rule: &str| -> Vec<String> {
            let all = found(&format!("-A INPUT {rule} -j DROP\n"), "", ports, true, &[]);
            all.iter().map(|it| it.split_once(" | ").unwrap().1.to_owned()).collect()
        };
        let above = "-m connlimit --connlimit-above 3";
        let six = "ip6tables -I INPUT -p tcp --syn";
        let none = "limit clients of IPv6 likewise, before what accepts the port";
        for (rule, wanted) in [
            (
                format!("-p tcp --syn -m multiport --dports 80,443 {above}"),
                format!("{six} -m multiport --dports 80,443 {above} --connlimit-mask 64 -j DROP"),
            ),
            (format!("-p tcp --syn {above}"), format!("{six} {above} --connlimit-mask 64 -j DROP")),
            (
                format!("-i eth0 -p tcp --syn --dport 80:443 {above} --connlimit-mask 0"),
                format!(
                    "ip6tables -I INPUT -i eth0 -p tcp --syn --dport 80:443 {above} --connlimit-mask 0 -j DROP"
                ),
            ),
            (
                format!("-p tcp --syn --dport 80 {above} --connlimit-daddr"),
                format!("{six} --dport 80 {above} --connlimit-daddr -j DROP"),
            ),
            (
                format!("-p tcp --syn --dport 80 {above} --connlimit-daddr --connlimit-mask 24"),
                none.to_owned(),
            ),
            (format!("-p tcp --syn --dport 80 -m mark ! --mark 1 {above}"), none.to_owned()),
            (format!("-p tcp --syn --dport 80 -d 192.0.2.1 {above}"), none.to_owned()),
        ] {
            assert_eq!(advice(&rule), [wanted], "{rule}");
        }
        let both = format!("-A INPUT -p tcp --syn -m multiport --dports 80,443 {above} -j DROP\n");
        let one = format!("-A INPUT -p tcp --syn --dport 80 {above} -j DROP\n");
        let rest = found(&both, &one, ports, true, &[]);
        assert!(rest.len() == 1 && rest[0].starts_with("port 443 is limited"), "{rest:?}");
        assert!(rest[0].ends_with(none), "{rest:?}");
    }

    #[test]
    fn where_no_such_client_comes_nothing_is_missing() {
        let dual = &["[::]:80"][..];
        let none: Vec<String> = Vec::new();
        assert_eq!(found(LIMIT, LIMIT, dual, true, &[]), none, "both");
        assert_eq!(found(LIMIT, "", dual, false, &[]), none, "no address of IPv6");
        assert_eq!(found(LIMIT, "", &["0.0.0.0:80"], true, &[]), none, "IPv4 alone is served");
        assert_eq!(found(LIMIT, "", &["0.0.0.0:80", "[::1]:80"], true, &[]), none, "loopback");
        assert_eq!(found("", LIMIT, dual, true, &[]), none, "of IPv6 alone, for all that is known");
        assert_eq!(
            found(LIMIT, "-A INPUT -p tcp --dport 80 -j DROP\n", dual, true, &[]),
            none,
            "shut"
        );
        let of_one = LIMIT.replace("-A INPUT", "-A INPUT -s 10.0.0.0/8");
        assert_eq!(found(&of_one, "", dual, true, &[]), none, "for some clients alone");
    }
}
