//! Ports that are limited for clients of one family of addresses alone, while the host serves both.
//! Pure.

use std::collections::{BTreeSet, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::finding::Finding;
use crate::firewall::limits::{Key, LimitRule, Limiter};
use crate::firewall::packet::Syn;
use crate::firewall::play::Player;
use crate::firewall::{Family, Ruleset};
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
    rules: &Ruleset,
    listeners: &[Socket],
    reached: &Reached,
) -> Vec<Finding> {
    if !limiter.unread.is_empty() || limiter.rules.is_empty() {
        return Vec::new();
    }
    let player = Player::new(rules);
    let open: Vec<Endpoint> = listeners.iter().map(|socket| socket.local).collect();
    let ports: BTreeSet<u16> = open.iter().map(|local| local.port()).collect();
    let find = |port| {
        let missing = [true, false].into_iter().find(|ipv4| {
            let limited = |ipv4: bool| limiter.of_port(port).any(|it| it.is_of(ipv4));
            !limited(*ipv4) && limited(!ipv4)
        })?;
        let limit = limiter.of_port(port).find(|it| it.covers(stranger(!missing), port))?;
        let local = listens(&open, port, missing, reached)?;
        let syn = Syn::new(stranger(missing), local);
        // Rules that let no stranger of the family in need no limit for it.
        let gets_in = player.play(&syn, &mut |_| Some(false)).admitted() != Some(false);
        gets_in.then(|| finding(limit, port, missing))
    };
    ports.into_iter().filter_map(find).collect()
}

/// A client that no rule knows.
pub(super) fn stranger(ipv4: bool) -> IpAddr {
    if ipv4 { STRANGER } else { STRANGER6 }
}

/// An address that clients of a family reach the port at.
fn listens(open: &[Endpoint], port: u16, ipv4: bool, reached: &Reached) -> Option<Endpoint> {
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

fn finding(limit: &LimitRule, port: u16, missing: bool) -> Finding {
    let name = |ipv4: bool| if ipv4 { "IPv4" } else { "IPv6" };
    let what = format!(
        "port {port} is limited for {} clients ({limit}) and not for those of {}, which it listens for, too",
        name(!missing),
        name(missing)
    );
    let count = limit.limit.count;
    let advice = if limit.limit.dynamic {
        let (address, network) =
            if missing { ("ip saddr", "") } else { ("ip6 saddr", " and ffff:ffff:ffff:ffff::") };
        let family = match (limit.family, missing) {
            (Family::Inet | Family::Netdev, _) => "the same table",
            (_, true) => "a table ip or inet",
            (_, false) => "a table ip6 or inet",
        };
        format!(
            "in {family}, with a dynamic SET of its own: tcp dport {port} ct state new add @SET {{ \
             {address}{network} ct count over {count} }} drop"
        )
    } else {
        let program = if missing { "iptables" } else { "ip6tables" };
        let mask = match (&limit.limit.key, missing) {
            (Key::All, _) => 0,
            (_, true) => 32,
            (_, false) => CUSTOMER,
        };
        format!(
            "{program} -I INPUT -p tcp --syn --dport {port} -m connlimit --connlimit-above {count} \
             --connlimit-mask {mask} -j DROP"
        )
    };
    Finding::warn("limit-one-family", what, advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::parse_saved;
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
        let all = one_sided(&Limiter::of(&rules), &rules, &listeners, &reached);
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
