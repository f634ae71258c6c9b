//! Limits are found in the rule sets that people really have, as the running kernel holds them.
//!
//! Each rule set is loaded by the administrator's own tool into a namespace of the test, and read
//! back by ctkeep over netlink.

use crate::lab;
use std::net::IpAddr;

use crate::lab::Namespace;
use ctkeep::firewall::limits::{EarlierAccept, LimitRule, Limiter};
use ctkeep::firewall::{Hook, Key, Outcome, Ruleset};

/// Loads `rules` by `tool` and reads what the kernel then has; `None` where there is no lab.
fn found(tool: &str, rules: &str) -> Option<Limiter> {
    found_in_all(&[(tool, rules)])
}

fn found_in_all(loads: &[(&str, &str)]) -> Option<Limiter> {
    if !lab::require() {
        return None;
    }
    let namespace = Namespace::new().expect("namespace");
    for (tool, rules) in loads {
        namespace.feed(tool, rules);
    }
    let limiter = namespace.within(|| Limiter::of(&Ruleset::read()));
    assert!(limiter.unread.is_empty(), "{:?}", limiter.unread);
    Some(limiter)
}

fn one(limiter: &Limiter) -> &LimitRule {
    let [rule] = limiter.rules.as_slice() else { panic!("one limit expected: {limiter:#?}") };
    rule
}

const IPTABLES: &str = "iptables-nft-restore";
const IP6TABLES: &str = "ip6tables-nft-restore";
const LEGACY: &str = "iptables-legacy-restore";
const NFT: &str = "nft -f -";

#[test]
fn connlimit_with_syn_and_a_mask() {
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n\
        -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 40 --connlimit-mask 24 \
        -j REJECT --reject-with tcp-reset\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        let rule = one(&limiter);
        assert_eq!(
            rule.to_string(),
            "at most 40 from each /24 to port 80 (ip filter INPUT rule 1)",
            "{tool}"
        );
        assert!(rule.limit.over && !rule.limit.dynamic && !rule.matches.is_for_all(), "{tool}");
        assert!(!rule.matches.is_narrowed() && rule.before.is_empty(), "{tool}: {rule:#?}");
        assert_eq!(rule.outcome, Outcome::Reset, "{tool}");
    }
}

/// A jump ends in the table of the rule, and a rule has a name of its own, where iptables-legacy and iptables-nft
/// have rules at once.
#[test]
fn tables_of_one_name_are_two() {
    let rules = |above: u32| {
        format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:web - [0:0]\n-A INPUT -p tcp --dport 80 -j web\n\
             -A web -p tcp --syn -m connlimit --connlimit-above {above} -j DROP\nCOMMIT\n"
        )
    };
    let loads = [(IPTABLES, rules(40)), (LEGACY, rules(50))];
    let loads = loads.each_ref().map(|(tool, rules)| (*tool, rules.as_str()));
    let Some(limiter) = found_in_all(&loads) else { return };
    let mut all: Vec<_> = limiter.rules.iter().map(ToString::to_string).collect();
    all.sort();
    assert_eq!(
        all,
        [
            "at most 40 from each /32 to port 80 (ip filter web rule 1)",
            "at most 50 from each /32 to port 80 (ip filter (legacy) web rule 1)",
        ]
    );
}

#[test]
fn connlimit_of_ipv6() {
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n\
        -A INPUT -p tcp --syn --dport 443 -m connlimit --connlimit-above 16 --connlimit-mask 64 \
        -j DROP\nCOMMIT\n";
    let Some(limiter) = found(IP6TABLES, rules) else { return };
    let rule = one(&limiter);
    assert_eq!(rule.limit.key, Key::Source(64));
    let (v6, v4): (IpAddr, IpAddr) =
        ("2001:db8:1::7".parse().unwrap(), "198.51.100.7".parse().unwrap());
    assert!(rule.covers(v6, 443) && !rule.covers(v4, 443) && !rule.covers(v6, 80));
}

#[test]
fn connlimit_upto_accepts_under_a_drop_policy() {
    let rules = "*filter\n:INPUT DROP [0:0]\n\
        -A INPUT -m conntrack --ctstate INVALID -j DROP\n\
        -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
        -A INPUT -p tcp -m multiport --dports 80,443,8000:8010 -m state --state NEW \
        -m connlimit --connlimit-upto 5 -j ACCEPT\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        let rule = one(&limiter);
        assert_eq!(rule.matches.ports.to_string(), "80,443,8000-8010", "{tool}");
        assert_eq!((rule.limit.over, rule.limit.count), (false, 5), "{tool}");
        assert_eq!(rule.before, [EarlierAccept::Established], "{tool}");
        assert!(!rule.matches.is_for_all() && !rule.matches.is_narrowed(), "{tool}: {rule:#?}");
        assert_eq!(rule.position, 3, "{tool}");
    }
}

#[test]
fn ufw_form_lets_loopback_and_established_pass_first() {
    let rules = "*filter\n:INPUT DROP [0:0]\n:ufw-before-input - [0:0]\n:ufw-user-input - [0:0]\n\
        :ufw-not-local - [0:0]\n\
        -A INPUT -j ufw-before-input\n\
        -A ufw-before-input -i lo -j ACCEPT\n\
        -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
        -A ufw-before-input -m conntrack --ctstate INVALID -j DROP\n\
        -A ufw-before-input -p icmp --icmp-type echo-request -j ACCEPT\n\
        -A ufw-before-input -p tcp --syn --dport 80 -m connlimit --connlimit-above 50 -j DROP\n\
        -A ufw-before-input -p udp --sport 67 --dport 68 -j ACCEPT\n\
        -A ufw-before-input -j ufw-not-local\n\
        -A ufw-before-input -j ufw-user-input\n\
        -A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN\n\
        -A ufw-user-input -p tcp --dport 80 -j ACCEPT\n\
        -A ufw-user-input -p tcp --dport 22 -j ACCEPT\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        let rule = one(&limiter);
        assert_eq!(rule.place(), "ip filter ufw-before-input rule 5", "{tool}");
        assert_eq!(rule.before, [EarlierAccept::Loopback, EarlierAccept::Established], "{tool}");
        assert_eq!((rule.limit.count, rule.limit.key.clone()), (50, Key::Source(32)), "{tool}");
    }
}

#[test]
fn firewalld_form_with_zones_and_an_own_table_for_the_limit() {
    let rules = r#"
        table inet firewalld {
            chain filter_IN_public_allow { tcp dport { 80, 443 } accept; }
            chain filter_IN_public { jump filter_IN_public_allow
                meta l4proto { icmp, ipv6-icmp } accept
                reject with icmpx admin-prohibited
            }
            chain filter_INPUT_ZONES { iifname "eth0" goto filter_IN_public
                goto filter_IN_public
            }
            chain filter_INPUT { type filter hook input priority filter + 10; policy accept;
                ct state { established, related } accept
                ct status dnat accept
                iifname "lo" accept
                ct state invalid drop
                jump filter_INPUT_ZONES
                reject with icmpx admin-prohibited
            }
        }
        table inet limits {
            set web { type ipv4_addr; size 65535; flags dynamic; }
            chain input { type filter hook input priority filter - 5; policy accept;
                iif lo accept
                tcp dport { 80, 443 } ct state new add @web { ip saddr ct count over 20 } reject with tcp reset
            }
        }"#;
    let Some(limiter) = found(NFT, rules) else { return };
    let rule = one(&limiter);
    assert_eq!(
        rule.to_string(),
        "at most 20 from each /32 to port 80,443 (inet limits input rule 2)"
    );
    assert_eq!(rule.before, [EarlierAccept::Loopback]);
    assert_eq!(rule.priority, -5);
    assert!(rule.limit.dynamic && rule.limit.over && !rule.matches.is_for_all());
}

#[test]
fn kube_proxy_form_in_iptables_with_a_limit_of_the_administrator() {
    let nat = "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-SVC-A - [0:0]\n\
        :KUBE-SEP-A - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-NODEPORTS - [0:0]\n\
        -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
        -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
        -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp --dport 443 -j KUBE-SVC-A\n\
        -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n\
        -A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A\n\
        -A KUBE-SEP-A -p tcp -j DNAT --to-destination 10.244.0.5:6443\nCOMMIT\n\
        *filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:KUBE-FIREWALL - [0:0]\n\
        :KUBE-PROXY-FIREWALL - [0:0]\n:KUBE-FORWARD - [0:0]\n\
        -A INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
        -A INPUT -j KUBE-FIREWALL\n\
        -A INPUT -p tcp --syn --dport 6443 -m connlimit --connlimit-above 100 -j DROP\n\
        -A FORWARD -j KUBE-FORWARD\n\
        -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
        -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
        -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
        -A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack \
        ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, nat) else { return };
        let rule = one(&limiter);
        assert_eq!((rule.position, rule.limit.count), (3, 100), "{tool}");
        assert_eq!(rule.before, [], "{tool}");
    }
}

#[test]
fn kube_proxy_form_in_nft_with_verdict_maps() {
    let rules = r#"
        table ip kube-proxy {
            map service-ips { type ipv4_addr . inet_proto . inet_service : verdict
                elements = { 10.96.0.1 . tcp . 443 : goto service-a, 10.96.0.9 . tcp . 80 : goto service-b }
            }
            map limited-ips { type ipv4_addr . inet_proto . inet_service : verdict
                elements = { 192.0.2.1 . tcp . 80 : goto limited }
            }
            chain limited { ct count over 500 reject with tcp reset; }
            chain endpoint { meta l4proto tcp dnat to 10.244.0.5:6443; }
            chain service-a { numgen random mod 2 vmap { 0 : goto endpoint, 1 : goto endpoint }; }
            chain service-b { goto endpoint; }
            chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
            chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept;
                jump services
            }
            chain filter-input { type filter hook input priority -110; policy accept;
                ct state new ip daddr . meta l4proto . th dport vmap @limited-ips
            }
        }"#;
    let Some(limiter) = found(NFT, rules) else { return };
    let rule = one(&limiter);
    assert_eq!((rule.hook, rule.limit.key.clone(), rule.limit.count), (Hook::Input, Key::All, 500));
    let words = "at most 500 in all to port 80 of 192.0.2.1/32 (ip kube-proxy limited rule 1)";
    assert_eq!(rule.to_string(), words);
}

#[test]
fn nft_meter_by_network() {
    let rules = "table inet t { chain c { type filter hook input priority 0; policy accept;
        tcp dport 80 meter m { ip saddr and 255.255.255.0 ct count over 7 } drop
        tcp dport 80 meter m6 { ip6 saddr and ffff:ffff:ffff:ffff:: ct count over 9 } drop
    }
    }";
    let Some(limiter) = found(NFT, rules) else { return };
    let limits: Vec<_> =
        limiter.rules.iter().map(|rule| (rule.limit.count, rule.limit.key.clone())).collect();
    assert_eq!(limits, [(7, Key::Source(24)), (9, Key::Source(64))]);
    let v6: IpAddr = "2001:db8:1::7".parse().unwrap();
    assert_eq!(limiter.rules.iter().map(|r| r.covers(v6, 80)).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn nft_set_that_declares_its_limit_itself() {
    let rules = "table inet t {
        set s { type ipv4_addr . inet_service; size 65535; flags dynamic
            ct count over 9
        }
        chain c { type filter hook prerouting priority mangle; policy accept;
            tcp flags syn / fin,syn,rst,ack tcp dport 1000-2000 add @s { ip saddr . tcp dport } drop
        }
    }";
    let Some(limiter) = found(NFT, rules) else { return };
    let rule = one(&limiter);
    assert_eq!(
        rule.to_string(),
        "at most 9 from each /32 for each port to port 1000-2000 (inet t c rule 1)"
    );
    assert!(rule.is_before_nat() && !rule.matches.is_for_all());
}

#[test]
fn nft_plain_count_is_for_all_sources_together() {
    let rules = "table ip t { chain sub { tcp dport 22 ct count over 4 reject; }
        chain c { type filter hook input priority 0; policy drop;
            ct state vmap { established : accept, related : accept, invalid : drop }
            tcp dport != 23 jump sub
        }
    }";
    let Some(limiter) = found(NFT, rules) else { return };
    let rule = one(&limiter);
    assert_eq!(rule.to_string(), "at most 4 in all to port 22 (ip t sub rule 1)");
    assert_eq!(rule.before, [EarlierAccept::Established]);
    assert_eq!(rule.source_prefix(), None);
}

#[test]
fn nft_verdict_map_by_port() {
    let rules = "table inet t { set s { type ipv4_addr; size 65535; flags dynamic; }
        chain web { ct state new add @s { ip saddr ct count over 30 } counter drop; }
        chain c { type filter hook input priority 0; policy drop;
            tcp dport vmap { 22 : accept, 80 : jump web, 8000-8010 : jump web }
        }
    }";
    let Some(limiter) = found(NFT, rules) else { return };
    assert_eq!(one(&limiter).matches.ports.to_string(), "80,8000-8010");
}

#[test]
fn notrack_hides_a_port_and_synproxy_is_seen() {
    let rules = "*raw\n:PREROUTING ACCEPT [0:0]\n\
        -A PREROUTING -p tcp --dport 81 -j CT --notrack\n\
        -A PREROUTING -p tcp --syn --dport 80 -j CT --notrack\nCOMMIT\n\
        *filter\n:INPUT ACCEPT [0:0]\n\
        -A INPUT -p tcp --dport 80 -m conntrack --ctstate INVALID,UNTRACKED -j SYNPROXY \
        --sack-perm --timestamp --wscale 7 --mss 1460\n\
        -A INPUT -p tcp --dport 81 --syn -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        assert_eq!(limiter.notrack(81), Some("ip raw PREROUTING rule 1"), "{tool}");
        assert_eq!(limiter.notrack(443), None, "{tool}");
        assert!(limiter.synproxied.iter().any(|ports| ports.contains(80)), "{tool}");
        assert_eq!(one(&limiter).limit.count, 3, "{tool}");
    }
}

#[test]
fn a_rule_of_an_interface_in_mangle_prerouting() {
    let rules = "*mangle\n:PREROUTING ACCEPT [0:0]\n\
        -A PREROUTING -i eth0 -p tcp --syn -m connlimit --connlimit-above 8 -j DROP\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        let rule = one(&limiter);
        assert_eq!(rule.matches.interfaces, ["eth0"], "{tool}");
        assert!(rule.is_before_nat() && rule.matches.ports.is_all(), "{tool}");
    }
}

#[test]
fn exempted_sources_are_no_business_of_the_limit() {
    let rules = "*filter\n:INPUT ACCEPT [0:0]\n\
        -A INPUT ! -s 10.0.0.0/8 -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP\n\
        COMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        let rule = one(&limiter);
        assert!(!rule.covers("10.1.2.3".parse().unwrap(), 80), "{tool}");
        assert!(rule.covers("198.51.100.7".parse().unwrap(), 80), "{tool}");
    }
}

/// What a `goto` of the base chain leads elsewhere does not come back: its end is the policy's.
#[test]
fn what_a_goto_of_the_base_chain_leads_elsewhere_passes_before_the_limit() {
    for (policy, rule, passes) in [
        (
            "accept",
            "tcp dport 22 accept",
            vec![("what goes to any port, from 192.0.2.0/24", false)],
        ),
        ("accept", "", vec![("what goes to any port, from 192.0.2.0/24", true)]),
        ("drop", "tcp dport 22 accept", vec![]),
        ("accept", "drop", vec![]),
    ] {
        let rules = format!(
            "table inet f {{\n chain g {{\n {rule}\n }}\n\
             chain i {{ type filter hook input priority 0; policy {policy};\n\
             ip saddr 192.0.2.0/24 goto g\n tcp dport 80 ct state new ct count over 3 drop\n }}\n}}\n"
        );
        let Some(limiter) = found(NFT, &rules) else { return };
        let before = one(&limiter).before.iter().map(|it| (it.to_string(), it.is_sure()));
        let before: Vec<_> = before.collect();
        let before: Vec<_> = before.iter().map(|(what, sure)| (what.as_str(), *sure)).collect();
        assert_eq!(before, passes, "{policy}, {rule}");
    }
}

#[test]
fn a_limit_behind_an_accept_of_its_port_never_counts() {
    let rules = "*filter\n:INPUT DROP [0:0]\n-A INPUT -p tcp --dport 80 -j ACCEPT\n\
        -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        let rule = one(&limiter);
        assert!(
            matches!(rule.before.as_slice(), [EarlierAccept::Ports(ports)] if ports.contains(80))
        );
        assert!(!rule.covers("198.51.100.7".parse().unwrap(), 80), "{tool}");
    }
}

#[test]
fn docker_form_limits_what_is_forwarded() {
    let rules = "*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n:DOCKER - [0:0]\n\
        -A FORWARD -j DOCKER-USER\n\
        -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
        -A FORWARD -o docker0 -j DOCKER\n\
        -A DOCKER-USER -p tcp --syn --dport 8080 -m connlimit --connlimit-above 12 -j DROP\n\
        -A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp --dport 8080 -j ACCEPT\nCOMMIT\n";
    for tool in [IPTABLES, LEGACY] {
        let Some(limiter) = found(tool, rules) else { return };
        assert_eq!(one(&limiter).hook, Hook::Forward, "{tool}");
    }
}

#[test]
fn tables_of_both_kinds_are_read_side_by_side() {
    let legacy = "*filter\n:INPUT ACCEPT [0:0]\n\
        -A INPUT -p tcp --syn --dport 25 -m connlimit --connlimit-above 2 -j DROP\nCOMMIT\n";
    let nft = "table inet t { chain c { type filter hook input priority 0; policy accept;
        tcp dport 80 ct state new meter m { ip saddr ct count over 7 } drop
    }
    }";
    let Some(limiter) = found_in_all(&[(LEGACY, legacy), (NFT, nft)]) else { return };
    assert_eq!(limiter.rules.len(), 2, "{limiter:#?}");
}

#[test]
fn a_host_without_rules_has_no_limits() {
    let Some(limiter) = found(NFT, "") else { return };
    assert_eq!(limiter, Limiter::default());
}
