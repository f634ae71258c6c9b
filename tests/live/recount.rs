//! Counted again: under each rule set, by each route, limited sources stay limited after all their
//! tuples were thrown out of the limiter's list.
//!
//! Each test holds three connections from each of four addresses, closes their entries by stale
//! RSTs and lets one more SYN of each address throw the closed tuples out. Then the entries of
//! three addresses are repaired, each by another route, and those of the fourth in place: the
//! control. What counts is how many further connections are let in, never what the table shows.

use crate::lab;
use std::thread;
use std::time::Duration;

use crate::lab::rules::{CONNLIMIT, CONNLIMIT6, INPUT, chain, input, restore, syn_proxy};
use crate::lab::{Daemon, Lab, Namespace, Peer, RawConn, kernel, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const TRIES: usize = LIMIT + 2;
const SOON: Duration = Duration::from_secs(10);

/// Until the last handshake has become a socket.
const SETTLE: Duration = Duration::from_millis(50);

/// The ways to repair, each with the last octet of the address that it is tried on.
const REPAIRS: [(&str, u8); 4] = [("auto", 11), ("ingress", 12), ("loopback", 13), ("off", 14)];

/// What a rule set needs, beside the rules.
#[derive(Clone, Copy)]
struct Site {
    ipv6: bool,
    /// Where the server listens, when not on port 80 of every address.
    listen: &'static str,
    /// The server is in a container.
    container: bool,
    /// Whether a nudge by the client's interface reaches the limit.
    ingress: bool,
    /// Whether a nudge by the loopback device reaches the limit.
    loopback: bool,
    /// Something in front of the server completes handshakes by itself: only its sockets tell
    /// what was let in.
    proxy: bool,
}

const PLAIN: Site = Site {
    ipv6: false,
    listen: "[::]:80",
    container: false,
    ingress: true,
    loopback: true,
    proxy: false,
};
const INGRESS_ONLY: Site = Site { loopback: false, ..PLAIN };

fn iptables(site: Site, rules: &str) {
    counted_again(site, |lab| {
        let tool = if site.ipv6 { "ip6tables-restore" } else { "iptables-restore" };
        lab.server.feed(tool, rules);
    });
}

fn nft(site: Site, rules: &str) {
    counted_again(site, |lab| {
        lab.server.feed("nft -f -", rules);
    });
}

/// Three connections of one address that the limiter has forgotten.
struct Held {
    source: String,
    peer: Peer,
    conns: Vec<RawConn>,
}

/// Opens and half-closes three connections of each address, and has them thrown out.
fn evicted(lab: &Lab, site: Site, place: &Namespace) -> Vec<Held> {
    let network = if site.ipv6 { "2001:db8:1::" } else { "198.51.100." };
    let held = |(_, octet): &(&str, u8)| {
        let source = format!("{network}{octet}");
        let peer = lab.peer(&source);
        let conns = peer.hold(80, LIMIT);
        Held { source, peer, conns }
    };
    let mut all: Vec<Held> = REPAIRS.iter().map(held).collect();
    for held in &mut all {
        held.conns.iter_mut().for_each(RawConn::fin);
    }
    let wanted = all.len() * LIMIT;
    wait_for("CLOSE_WAIT", SOON, || close_wait(place) == wanted);
    throw_out(site, &all);
    let closed = lab.entries().iter().filter(|entry| entry.state == "CLOSE").count();
    assert!(closed >= wanted, "{closed} entries are closed, of {wanted}");
    all
}

fn close_wait(place: &Namespace) -> usize {
    place.output("ss -Htan state close-wait").lines().count()
}

/// A stale RST each, then one more SYN of each address, at which every kind of limit sweeps its
/// list; what it began is withdrawn at once.
fn throw_out(site: Site, all: &[Held]) {
    for held in all {
        held.conns.iter().for_each(|conn| conn.stale_rst());
        if site.proxy {
            held.peer.connect(80).expect("the proxy answers").rst(0);
        } else {
            held.peer.syn_only(80).rst(0);
        }
    }
}

fn repair(lab: &Lab, container: Option<&Namespace>, held: &Held, route: &str) {
    let source = &held.source;
    if let Some(container) = container {
        let path = container.path();
        let daemon = lab.daemon(
            PROGRAM,
            &["--netns", &path, "--source", source, "--recount", route, "--device", route],
        );
        await_repair(lab, &daemon, held);
        daemon.kill();
        return;
    }
    let (code, out, err) =
        lab.ctkeep(PROGRAM, &["reconcile", "--source", source, "--recount", route, "--no-header"]);
    assert_eq!(code, 0, "{out}{err}");
    // One line for each connection, its addresses and its outcome whole.
    for conn in &held.conns {
        let row = out.lines().find(|line| line.contains(&format!(" {} ", conn.client)));
        let row = row.unwrap_or_else(|| panic!("{route}: no {} in {out}{err}", conn.client));
        assert!(row.trim_start().starts_with("revive "), "{route}: {out}{err}");
        let is_counted = route != "loopback" || kernel::limits_count_nudges_by_loopback();
        if matches!(route, "ingress" | "loopback") && is_counted {
            // By loopback alone no limit can be asked, and none behind a SYN proxy.
            let is_asked =
                route == "ingress" && !lab.server.output("iptables-save").contains("SYNPROXY");
            let word = if is_asked { "recounted" } else { "sent" };
            assert!(row.ends_with(&format!("done, {word} by {route}")), "{route}: {out}{err}");
        } else if !is_counted {
            assert!(row.contains("not recounted: no limit of this kernel"), "{out}{err}");
        }
    }
    assert_eq!(out.lines().count(), LIMIT, "{route}: {out}{err}");
}

fn await_repair(lab: &Lab, daemon: &Daemon, held: &Held) {
    wait_for("repair", SOON, || {
        let entries = lab.entries();
        let alive = held.conns.iter().filter(|conn| {
            entries.iter().any(|entry| {
                entry.orig == (conn.client, conn.server)
                    && matches!(entry.state.as_str(), "ESTABLISHED" | "CLOSE_WAIT")
            })
        });
        alive.count() == LIMIT && daemon.log().matches("revive").count() >= LIMIT
    });
}

/// How many further connections each address is granted, all tried at the same time.
fn granted(all: &[Held], site: Site, place: &Namespace) -> Vec<usize> {
    let admitted = thread::scope(|scope| {
        let tries: Vec<_> =
            all.iter().map(|held| scope.spawn(|| held.peer.admitted(80, TRIES))).collect();
        tries.into_iter().map(|tried| tried.join().expect("a try")).collect()
    });
    if !site.proxy {
        return admitted;
    }
    thread::sleep(SETTLE);
    let sockets = place.output("ss -Htan state established");
    let of = |held: &Held| sockets.lines().filter(|line| line.contains(&held.source)).count();
    all.iter().map(of).collect()
}

fn counted_again(site: Site, rules: impl FnOnce(&Lab)) {
    let Some(lab) = Lab::new() else { return };
    let container = site.container.then(|| lab.container());
    let place = container.as_ref().unwrap_or(&lab.server);
    rules(&lab);
    let _server = lab::Server::start(place, site.listen);
    let all = evicted(&lab, site, place);
    for (held, (route, _)) in all.iter().zip(REPAIRS) {
        repair(&lab, container.as_ref(), held, route);
    }
    let granted = granted(&all, site, place);
    let loopback = site.loopback && kernel::limits_count_nudges_by_loopback();
    // The last one is the control.
    for (admitted, is_counted) in granted.iter().zip([true, site.ingress, loopback, false]) {
        let expected = if is_counted { 0..=0 } else { kernel::lacking_at_least()..=LIMIT };
        assert!(expected.contains(admitted), "{granted:?} by {REPAIRS:?}");
    }
}

#[test]
fn counted_again_by_connlimit_of_syns_in_input() {
    iptables(PLAIN, &input(&[&format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP")]));
}

#[test]
fn counted_again_by_connlimit_of_every_packet() {
    iptables(PLAIN, &input(&[&format!("INPUT -p tcp --dport 80 {CONNLIMIT} -j DROP")]));
}

#[test]
fn counted_again_by_connlimit_in_mangle_prerouting() {
    let rule = format!("PREROUTING -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    iptables(PLAIN, &restore("mangle", "PREROUTING", &[&rule]));
}

#[test]
fn counted_again_by_connlimit_in_raw_prerouting() {
    let rule = format!("PREROUTING -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    iptables(PLAIN, &restore("raw", "PREROUTING", &[&rule]));
}

#[test]
fn counted_again_behind_accepted_established() {
    iptables(
        PLAIN,
        &input(&[
            "INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            &format!("INPUT -p tcp --dport 80 {CONNLIMIT} -j DROP"),
        ]),
    );
}

#[test]
fn counted_again_behind_a_strict_policy() {
    iptables(
        PLAIN,
        &restore(
            "filter",
            "INPUT=DROP",
            &[
                "INPUT -m conntrack --ctstate INVALID -j DROP",
                "INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                &format!("INPUT -p tcp --dport 80 {CONNLIMIT} -j DROP"),
                "INPUT -p tcp --dport 80 -m conntrack --ctstate NEW -j ACCEPT",
            ],
        ),
    );
}

#[test]
fn counted_again_by_a_limit_that_rejects_new_connections() {
    let limit = format!("INPUT -p tcp --dport 80 -m conntrack --ctstate NEW {CONNLIMIT} -j REJECT");
    iptables(PLAIN, &input(&[&limit]));
}

#[test]
fn counted_again_by_a_limit_that_resets() {
    let reject = "-j REJECT --reject-with tcp-reset";
    iptables(PLAIN, &input(&[&format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} {reject}")]));
}

#[test]
fn counted_again_by_a_limit_that_accepts_what_is_below_it() {
    let upto = "-m connlimit --connlimit-upto 3 --connlimit-mask 32 -j ACCEPT";
    iptables(
        PLAIN,
        &restore(
            "filter",
            "INPUT=DROP",
            &[
                "INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                &format!("INPUT -p tcp --syn --dport 80 {upto}"),
            ],
        ),
    );
}

#[test]
fn counted_again_in_the_order_of_ufw() {
    iptables(
        INGRESS_ONLY,
        &restore(
            "filter",
            "INPUT=DROP ufw-before-input=- ufw-user-input=- ufw-user-limit=-",
            &[
                "INPUT -j ufw-before-input",
                "ufw-before-input -i lo -j ACCEPT",
                "ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                "ufw-before-input -m conntrack --ctstate INVALID -j DROP",
                "ufw-before-input -j ufw-user-input",
                &format!("ufw-user-input -p tcp --syn --dport 80 {CONNLIMIT} -j ufw-user-limit"),
                "ufw-user-input -p tcp --dport 80 -j ACCEPT",
                "ufw-user-limit -j REJECT --reject-with icmp-port-unreachable",
            ],
        ),
    );
}

#[test]
fn counted_again_by_a_limit_bound_to_the_interface() {
    let rule = format!("INPUT -i eth0 -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    iptables(INGRESS_ONLY, &input(&[&rule]));
}

#[test]
fn counted_again_in_the_order_of_kube_proxy() {
    let local = "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT";
    iptables(
        PLAIN,
        &restore(
            "filter",
            "INPUT KUBE-FIREWALL=- KUBE-NODEPORTS=- KUBE-PROXY-FIREWALL=-",
            &[
                "INPUT -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL",
                "INPUT -j KUBE-NODEPORTS",
                "INPUT -j KUBE-FIREWALL",
                &format!("KUBE-FIREWALL {local} -j DROP"),
                &format!("KUBE-NODEPORTS -p tcp --dport 80 --syn {CONNLIMIT} -j DROP"),
            ],
        ),
    );
}

#[test]
fn counted_again_behind_a_redirect() {
    let redirect = "PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080";
    let limit = format!("INPUT -p tcp --syn --dport 8080 {CONNLIMIT} -j DROP");
    iptables(
        Site { listen: "[::]:8080", ..PLAIN },
        &(restore("nat", "PREROUTING", &[redirect]) + &input(&[&limit])),
    );
}

#[test]
fn counted_again_in_forward_before_a_container() {
    let dnat = "PREROUTING -d 192.0.2.1 -p tcp --dport 80 -j DNAT --to-destination 10.0.0.2:8080";
    let limit = format!("FORWARD -p tcp --syn --dport 8080 {CONNLIMIT} -j DROP");
    iptables(
        Site { listen: "[::]:8080", container: true, loopback: false, ..PLAIN },
        &(restore("nat", "PREROUTING", &[dnat]) + &restore("filter", "FORWARD", &[&limit])),
    );
}

#[test]
fn counted_again_in_mangle_prerouting_before_a_container() {
    let dnat = "PREROUTING -d 192.0.2.1 -p tcp --dport 80 -j DNAT --to-destination 10.0.0.2:8080";
    let limit = format!("PREROUTING -i eth0 -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    iptables(
        Site { listen: "[::]:8080", container: true, loopback: false, ..PLAIN },
        &(restore("nat", "PREROUTING", &[dnat]) + &restore("mangle", "PREROUTING", &[&limit])),
    );
}

#[test]
fn counted_again_by_ct_count_in_a_set() {
    let rule = "tcp dport 80 ct state new add @web { ip saddr ct count over 3 } drop";
    nft(PLAIN, &chain(INPUT, rule));
}

#[test]
fn counted_again_by_ct_count_in_a_set_that_sees_every_packet() {
    nft(PLAIN, &chain(INPUT, "tcp dport 80 add @web { ip saddr ct count over 3 } drop"));
}

#[test]
fn counted_again_by_a_meter() {
    nft(PLAIN, &chain(INPUT, "tcp dport 80 meter web4 { ip saddr ct count over 3 } drop"));
}

#[test]
fn counted_again_by_plain_ct_count() {
    let rules: Vec<String> = REPAIRS
        .iter()
        .map(|(_, octet)| {
            format!("ip saddr 198.51.100.{octet} tcp dport 80 ct count over 3 counter drop")
        })
        .collect();
    nft(PLAIN, &chain(INPUT, &rules.join("\n")));
}

#[test]
fn counted_again_by_ct_count_that_rejects() {
    let rule = "tcp dport 80 ct state new add @web { ip saddr ct count over 3 } \
                reject with tcp reset";
    nft(PLAIN, &chain(INPUT, rule));
}

#[test]
fn counted_again_by_ct_count_before_conntrack() {
    let rule = "tcp dport 80 tcp flags syn add @web { ip saddr ct count over 3 } drop";
    nft(PLAIN, &chain("prerouting priority -300", rule));
}

#[test]
fn counted_again_in_the_order_of_firewalld() {
    nft(
        INGRESS_ONLY,
        &chain(
            "input priority 10",
            "ct state { established, related } accept\n\
             ct status dnat accept\n\
             iifname \"lo\" accept\n\
             ct state invalid drop\n\
             tcp dport 80 ct state { new, untracked } \
               add @web { ip saddr ct count over 3 } reject with icmpx admin-prohibited\n\
             tcp dport 80 ct state { new, untracked } accept\n\
             reject with icmpx admin-prohibited",
        ),
    );
}

#[test]
fn counted_again_by_ct_count_bound_to_the_interface() {
    let rule = "iifname \"eth0\" tcp dport 80 ct state new \
                add @web { ip saddr ct count over 3 } drop";
    nft(INGRESS_ONLY, &chain(INPUT, rule));
}

const OVER_IPV6: Site = Site { ipv6: true, ..PLAIN };
#[test]
fn counted_again_by_connlimit_over_ipv6() {
    iptables(OVER_IPV6, &input(&[&format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT6} -j DROP")]));
}

#[test]
fn counted_again_in_the_order_of_ufw_over_ipv6() {
    iptables(
        Site { ipv6: true, ..INGRESS_ONLY },
        &restore(
            "filter",
            "INPUT=DROP",
            &[
                "INPUT -i lo -j ACCEPT",
                "INPUT -p ipv6-icmp -j ACCEPT",
                "INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                "INPUT -m conntrack --ctstate INVALID -j DROP",
                &format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT6} -j REJECT"),
                "INPUT -p tcp --dport 80 -j ACCEPT",
            ],
        ),
    );
}

#[test]
fn counted_again_by_ct_count_over_ipv6() {
    let rule = "tcp dport 80 ct state new add @web6 { ip6 saddr ct count over 3 } \
                reject with tcp reset";
    nft(OVER_IPV6, &chain(INPUT, rule));
}

fn with_reverse_path_filter(mode: &str) {
    counted_again(INGRESS_ONLY, |lab| {
        for interface in ["all", "default", "eth0", "lo"] {
            lab.server.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), mode);
        }
        let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
        lab.server.feed("iptables-restore", &input(&["INPUT -i lo -j ACCEPT", &limit]));
    });
}

#[test]
fn counted_again_without_reverse_path_filter() {
    with_reverse_path_filter("0");
}

#[test]
fn counted_again_under_a_strict_reverse_path_filter() {
    with_reverse_path_filter("1");
}

#[test]
fn counted_again_under_a_loose_reverse_path_filter() {
    with_reverse_path_filter("2");
}

/// Two uplinks: answers leave by the one that their connection came by, which its mark remembers; without a
/// mark they would by the other.
fn with_uplinks(site: Site, network: &str, near: &str, far: &str) {
    counted_again(site, |lab| {
        for interface in ["all", "eth0"] {
            lab.server.sysctl(&format!("net/ipv4/conf/{interface}/rp_filter"), "0");
        }
        let (ip, bits) = if site.ipv6 { ("ip -6", 64) } else { ("ip", 24) };
        lab.server.feed(
            "ip -batch -",
            &format!(
                "link add eth1 type veth peer name far1\n\
                 link set eth1 addrgenmode none\n\
                 link set eth1 up\n\
                 link set far1 up\n\
                 addr add {far}1/{bits} dev eth1\n\
                 neigh add {far}2 lladdr 02:00:00:00:00:03 dev eth1\n\
                 route add {network} via {near} table 100\n\
                 route replace {network} via {far}2\n"
            ),
        );
        lab.server.run(&format!("{ip} rule add fwmark 7 lookup 100"));
        let marks = [
            "PREROUTING -i eth0 -m conntrack --ctstate NEW -j CONNMARK --set-mark 7",
            "OUTPUT -j CONNMARK --restore-mark",
        ];
        let count = if site.ipv6 { CONNLIMIT6 } else { CONNLIMIT };
        let limit = format!("INPUT -i eth0 -p tcp --syn --dport 80 {count} -j DROP");
        let rules = restore("mangle", "PREROUTING OUTPUT", &marks) + &input(&[&limit]);
        let tool = if site.ipv6 { "ip6tables-restore" } else { "iptables-restore" };
        lab.server.feed(tool, &rules);
    });
}

#[test]
fn counted_again_where_marks_choose_the_uplink() {
    with_uplinks(INGRESS_ONLY, "198.51.100.0/24", "192.0.2.2", "10.1.0.");
}

#[test]
fn counted_again_where_marks_choose_the_uplink_over_ipv6() {
    let site = Site { ipv6: true, ..INGRESS_ONLY };
    with_uplinks(site, "2001:db8:1::/64", "2001:db8::2", "fd00:1::");
}

/// The address moves to a bridge: what the route to the client names is the bridge, and the rules
/// are bound to it.
#[test]
fn counted_again_behind_a_bridge() {
    counted_again(INGRESS_ONLY, |lab| {
        lab.server.feed(
            "ip -batch -",
            "link add br0 address 02:00:00:00:00:01 type bridge\n\
             link set br0 addrgenmode none\n\
             addr flush dev eth0\n\
             link set eth0 master br0\n\
             link set br0 up\n\
             addr add 192.0.2.1/24 dev br0\n\
             neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev br0\n\
             route add 198.51.100.0/24 via 192.0.2.2\n",
        );
        let limit = format!("INPUT -i br0 -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
        lab.server.feed("iptables-restore", &input(&[&limit]));
    });
}

/// SYNPROXY answers the client's SYN, which conntrack never sees, and opens the connection to the
/// server by a SYN of its own: that one comes in by the loopback device, and is the one counted.
#[test]
fn counted_again_behind_a_syn_proxy() {
    let site = Site { proxy: true, ingress: false, ..PLAIN };
    counted_again(site, |lab| {
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
        let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
        lab.server.feed("iptables-restore", &syn_proxy(&[&limit]));
    });
}

/// What widely copied rule sets throw away: SYNs with an MSS that no client has, or with none.
#[test]
fn counted_again_behind_rules_that_want_a_usual_mss() {
    let odd = "PREROUTING -p tcp -m conntrack --ctstate NEW -m tcpmss ! --mss 536:65535 -j DROP";
    let shape = [
        "PREROUTING -m conntrack --ctstate INVALID -j DROP",
        "PREROUTING -p tcp ! --syn -m conntrack --ctstate NEW -j DROP",
        odd,
    ];
    let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    iptables(PLAIN, &(restore("mangle", "PREROUTING", &shape) + &input(&[&limit])));
}

#[test]
fn counted_again_behind_rules_that_want_a_usual_length_and_ttl() {
    let shape = [
        "PREROUTING -p tcp --syn -m length --length 0:40 -j DROP",
        "PREROUTING -p tcp --syn -m length --length 65:65535 -j DROP",
        "PREROUTING -p tcp --syn -m ttl --ttl-lt 40 -j DROP",
        "PREROUTING -p tcp --syn -m ttl --ttl-gt 64 -j DROP",
    ];
    let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    iptables(PLAIN, &(restore("mangle", "PREROUTING", &shape) + &input(&[&limit])));
}

#[test]
fn counted_again_behind_rules_that_want_no_signature() {
    let rules = "tcp dport 80 ct state new tcp option 19 exists drop\n\
                 tcp dport 80 ct state new add @web { ip saddr ct count over 3 } drop";
    nft(PLAIN, &chain(INPUT, rules));
}

/// Only what comes from the router's address is let in.
#[test]
fn counted_again_behind_rules_that_want_the_mac_of_the_router() {
    let rules = "ct state established,related accept\n\
                 iifname \"eth0\" ether saddr != 02:00:00:00:00:02 drop\n\
                 tcp dport 80 ct state new tcp option maxseg size < 536 drop\n\
                 tcp dport 80 ct state new add @web { ip saddr ct count over 3 } drop\n\
                 tcp dport 80 accept";
    nft(PLAIN, &chain(INPUT, rules).replace("policy accept", "policy drop"));
}

#[test]
fn counted_again_over_ipv6_behind_rules_that_look_at_the_syn() {
    let shape = [
        "PREROUTING -p tcp --syn -m tcpmss ! --mss 536:65535 -j DROP",
        "PREROUTING -p tcp --syn -m length --length 0:40 -j DROP",
        "PREROUTING -p tcp --syn -m hl --hl-lt 40 -j DROP",
        "PREROUTING -i eth0 -p tcp -m mac ! --mac-source 02:00:00:00:00:02 -j DROP",
    ];
    let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT6} -j DROP");
    iptables(OVER_IPV6, &(restore("mangle", "PREROUTING", &shape) + &input(&[&limit])));
}

/// The entry is lost, and the limiter with it; then an ACK of the client has conntrack pick the
/// connection up: the right way round, and behind every limit that asks for a SYN.
fn granted_after_a_pick_up(guarded: bool) -> Option<usize> {
    let lab = Lab::new()?;
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer("198.51.100.7");
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    lab.server.run("conntrack -D -p tcp");
    peer.syn_only(80).rst(0);
    conns.iter().for_each(RawConn::ack);
    let picked_up =
        conns.iter().filter(|conn| lab.entry_state(conn).as_deref() == Some("ESTABLISHED"));
    assert_eq!(picked_up.count(), LIMIT);
    let _daemon = guarded.then(|| lab.daemon(PROGRAM, &[]));
    Some(peer.admitted(80, TRIES))
}

#[test]
fn counted_again_after_an_ack_of_the_client_brought_the_entry_back() {
    assert!(granted_after_a_pick_up(true).is_none_or(|granted| granted == 0));
    assert!(granted_after_a_pick_up(false).is_none_or(|granted| granted == LIMIT));
}
