//! Limits that accept up to a number: whether what exceeds it gets in all the same is said before anybody does.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use crate::lab::guests::{self, Guest};
use crate::lab::rules::{chain, input, restore};
use crate::lab::{Lab, Peer, Server};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const UPTO: &str = "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-upto 3 -j ACCEPT";
const RATE: &str = "INPUT -p tcp --syn --dport 80 -m limit --limit 50/s -j ACCEPT";
const DROP: &str = "INPUT -p tcp --syn --dport 80 -j DROP";

/// The exit code, and the findings of that name.
fn audit(lab: &Lab, id: &str) -> (i32, Vec<Value>) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    let findings = report["layers"]["limiter"]["findings"].as_array().unwrap();
    (code, findings.iter().filter(|it| it["id"] == id).cloned().collect())
}

fn host(tool: &str, rules: &str) -> Option<(Lab, Server, Peer)> {
    let lab = Lab::new()?;
    lab.server.feed(tool, rules);
    let server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(CLIENT);
    Some((lab, server, peer))
}

#[test]
fn a_limit_that_lets_in_what_exceeds_it_is_said_to() {
    let native = chain(
        "input priority 0",
        "tcp dport 80 ct state new add @web { ip saddr ct count 3 } accept",
    );
    for (tool, rules) in [("iptables-restore", input(&[UPTO])), ("nft -f -", native)] {
        let Some((lab, _server, peer)) = host(tool, &rules) else { return };
        for held in [0, 5] {
            let held = peer.hold(80, held);
            let (code, found) = audit(&lab, "limit-notes");
            let [found] = found.as_slice() else { panic!("{rules}: {found:?}") };
            assert_eq!(
                (code, &found["verdict"]),
                (1, &"bad".into()),
                "{} held: {found}",
                held.len()
            );
        }
        assert_eq!(peer.admitted(80, 5), 5, "{rules}: the truth");
    }
}

/// The controls: refused behind it, beyond four more, or but for a rate.
#[test]
fn one_behind_which_a_rule_refuses_is_a_limit() {
    let tier = "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 4 -j DROP";
    for (rules, admitted) in
        [(vec![UPTO, DROP], 3), (vec![UPTO, tier], 7), (vec![UPTO, RATE, DROP], 5)]
    {
        let Some((lab, _server, peer)) = host("iptables-restore", &input(&rules)) else { return };
        assert_eq!(audit(&lab, "limit-notes").1, [Value::Null; 0], "{rules:?}");
        let _held = peer.hold(80, admitted);
        let more = usize::from(admitted == 5);
        assert_eq!(peer.admitted(80, 1), more, "{rules:?}: the truth");
        let (code, over) = audit(&lab, "source-over-limit");
        let over: Vec<_> = over.iter().map(|it| it["verdict"].as_str().unwrap()).collect();
        assert_eq!((code, over), (0, if more > 0 { vec!["warn"] } else { vec![] }), "{rules:?}");
    }
}

/// A rate that refuses few of those that exceed a limit is no all-clear, at its number and beyond.
#[test]
fn a_rate_that_decides_who_is_refused_is_said() {
    let rated = "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 \
                 -m limit --limit 1/hour --limit-burst 1 -j DROP";
    let Some((lab, _server, peer)) = host("iptables-restore", &input(&[rated])) else { return };
    assert_eq!(audit(&lab, "limit-rated").1.len(), 1, "of nobody");
    let _held = peer.hold(80, 3);
    assert_eq!(peer.admitted(80, 1), 0, "the one of this hour");
    let _more = peer.hold(80, 3);
    let (code, found) = audit(&lab, "limit-rated");
    assert_eq!((code, &found[0]["verdict"]), (0, &"warn".into()), "{found:?}");
}

/// Of connections that one limit counts together some are of a client that gets in all the same: it is not the
/// limit of the others.
#[test]
fn a_client_that_is_let_in_beyond_a_limit_hides_nobody_that_is_not() {
    let text = "*filter\n:LIM - [0:0]\n-A LIM -s 198.51.100.9 -j RETURN\n-A LIM -j DROP\n\
        -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 --connlimit-mask 24 -j LIM\n\
        COMMIT\n";
    let Some((lab, _server, peer)) = host("iptables-restore", text) else { return };
    let trusted = lab.peer("198.51.100.9");
    let _trusted = trusted.hold(80, 8);
    let (code, over) = audit(&lab, "source-over-limit");
    assert_eq!((code, over.len()), (0, 0), "the trusted one alone: {over:?}");
    // What a reload makes anew has nobody on its list.
    let _more: Vec<_> = (0..2)
        .map(|_| {
            lab.server.feed("iptables-restore", text);
            peer.hold(80, 3)
        })
        .collect();
    let (code, over) = audit(&lab, "source-over-limit");
    let what = over.first().map_or("", |it| it["what"].as_str().unwrap());
    assert_eq!(
        (code, what.split(',').next()),
        (1, Some("198.51.100.0/24: 14 sockets")),
        "{over:?}"
    );
    assert_eq!(audit(&lab, "limit-notes").1, [Value::Null; 0]);
    let (_, killed, _) = lab.ctkeep(CTKEEP, &["kill", "--over-limit"]);
    let of = |client: &str| killed.lines().filter(|line| line.contains(client)).count();
    assert_eq!((of("198.51.100.7:"), of("198.51.100.9:")), (3, 0), "{killed}");
    assert_eq!((peer.admitted(80, 1), trusted.admitted(80, 1)), (0, 1), "the truth");
}

/// A mark that is asked for behind the limit cannot be known: nobody is over it for certain, and none is closed.
#[test]
fn what_a_rule_behind_the_limit_looks_at_makes_it_uncertain() {
    for (is_known, rule) in [
        (true, "tcp dport 80 ct state new add @web { ip saddr ct count over 3 } drop"),
        (
            false,
            "tcp dport 80 ct state new add @web { ip saddr ct count over 3 } meta mark & 16 == 16 drop",
        ),
    ] {
        let text = chain("input priority 0", rule);
        let Some((lab, _server, peer)) = host("nft -f -", &text) else { return };
        let _held = peer.hold(80, 3);
        // The list is made anew.
        lab.server.run("nft flush ruleset");
        lab.server.feed("nft -f -", &text);
        let _more = peer.hold(80, 2);
        let (code, over) = audit(&lab, "source-over-limit");
        let verdict = if is_known { "bad" } else { "warn" };
        assert_eq!(
            (code == 1, &over[0]["verdict"]),
            (is_known, &verdict.into()),
            "{rule}: {over:?}"
        );
        let (_, killed, _) = lab.ctkeep(CTKEEP, &["kill", "--over-limit"]);
        assert_eq!(killed.contains(CLIENT), is_known, "{rule}: {killed}");
        assert_eq!(peer.admitted(80, 2), if is_known { 1 } else { 2 }, "{rule}: the truth");
    }
}

/// What the limit's rule writes to the header another rule may refuse; written before, it makes nothing uncertain.
#[test]
fn a_class_of_service_that_a_rule_behind_refuses_is_no_note() {
    let above = "PREROUTING -p tcp --syn --dport 80 -m connlimit --connlimit-above 3";
    let certain = "INPUT -p tcp -m conntrack --ctstate NEW --ctorigdstport 80 -m connlimit \
                   --connlimit-above 3 -j DROP";
    for (what, refuse, held, is_noted) in [
        (format!("{above} -j DSCP --set-dscp 1"), "INPUT -m dscp --dscp 1 -j DROP", 3, false),
        (format!("{above} -j TOS --set-tos 8"), "INPUT -m tos --tos 8 -j DROP", 3, false),
        (format!("{above} -j DSCP --set-dscp 1"), "INPUT -p icmp -j DROP", 5, true),
        ("PREROUTING -j DSCP --set-dscp 1".to_owned(), certain, 3, false),
    ] {
        let text = restore("mangle", "PREROUTING", &[&what]) + &input(&[refuse]);
        for tool in ["iptables-nft-restore", "iptables-legacy-restore"] {
            let Some((lab, _server, peer)) = host(tool, &text) else { return };
            let conns = peer.hold(80, held);
            let noted = audit(&lab, "limit-notes");
            let verdicts: Vec<_> =
                noted.1.iter().map(|it| it["verdict"].as_str().unwrap()).collect();
            let wanted = if is_noted { vec!["ok"] } else { vec![] };
            assert_eq!((noted.0, verdicts), (0, wanted), "{tool}: {text}");
            assert_eq!(peer.admitted(80, 1), usize::from(is_noted), "{tool}: the truth: {text}");
            if refuse == certain {
                lab.server.feed(tool, &text);
                let _more = peer.hold(80, 1);
                let over = audit(&lab, "source-over-limit").1;
                assert!(over.len() == 1 && over[0]["verdict"] == "bad", "{tool}: {over:?}");
            }
            drop(conns);
        }
    }
}

/// A limit for a device that no packet comes in by: audit says it as doctor does.
#[test]
fn a_limit_for_a_device_that_no_packet_comes_in_by_is_said_not_to_hold() {
    let rule = |device: &str| {
        input(&[&format!(
            "INPUT -i {device} -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP"
        )])
    };
    let Some((lab, _server, peer)) = host("iptables-restore", &rule("nothere0")) else { return };
    let _held = peer.hold(80, 5);
    let (code, found) = audit(&lab, "limit-interface");
    assert_eq!((code, found.len()), (0, 1), "{found:?}");
    assert_eq!(found[0]["verdict"], "warn", "{found:?}");
    assert_eq!(peer.admitted(80, 1), 1, "the truth");
}

/// A limit for the public address, which DNAT has made another one before: none of its clients comes to it.
#[test]
fn a_limit_for_an_address_that_is_translated_before_it_is_said_to_see_nobody() {
    let text = "*nat\n-A PREROUTING -d 203.0.113.80 -j DNAT --to 192.0.2.1\nCOMMIT\n*filter\n\
        -A INPUT -d 203.0.113.80 -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n";
    let Some((lab, _server, _)) = host("iptables-restore", text) else { return };
    lab.client.run("ip route add 203.0.113.80 via 192.0.2.1");
    let to = ([203, 0, 113, 80], 80).into();
    let one = || TcpStream::connect_timeout(&to, Duration::from_secs(5)).ok();
    let held: Vec<_> = lab.client.within(|| (0..5).map_while(|_| one()).collect());
    assert_eq!(held.len(), 5, "the truth: more than the limit");
    let (code, found) = audit(&lab, "limit-translated");
    assert_eq!((code, found.len()), (0, 1), "{found:?}");
}

/// The packets of a transparent proxy's clients keep the port that they asked for: a limit for its own port sees none
/// of them. One for another port is not blamed for it.
#[test]
fn a_limit_for_the_port_of_a_transparent_proxy_is_said_to_see_nobody() {
    let hand = restore(
        "mangle",
        "PREROUTING",
        &["PREROUTING -p tcp --dport 80 -j TPROXY --on-port 8080 --tproxy-mark 1"],
    );
    for (port, is_seen, found) in [(80, true, 0), (8080, false, 1), (22, false, 0)] {
        let limit =
            format!("INPUT -p tcp --syn --dport {port} -m connlimit --connlimit-above 3 -j DROP");
        let Some(lab) = Lab::new() else { return };
        lab.server.run("ip rule add fwmark 1 lookup 100");
        lab.server.run("ip route add local 0.0.0.0/0 dev lo table 100");
        lab.server.feed("iptables-restore", &(hand.clone() + &input(&[&limit])));
        let _server = lab.serve("0.0.0.0:8080%transparent 0.0.0.0:22");
        lab.client.run("ip route add 203.0.113.80 via 192.0.2.1");
        let peer = lab.peer_to(CLIENT, "203.0.113.80");
        let _held = peer.hold(80, if is_seen { 3 } else { 5 });
        let (code, said) = audit(&lab, "limit-translated");
        assert_eq!((code, said.len()), (0, found), "{port}: {said:?}");
        assert_eq!(peer.admitted(80, 1), usize::from(!is_seen), "{port}: the truth");
    }
}

/// A limit in INPUT for any port, beside a container whose port is published: its clients pass FORWARD alone. A limit
/// there, and a host without clients of it, are the controls.
#[test]
fn a_limit_for_any_port_is_said_not_to_see_what_goes_to_containers() {
    let any = "iptables -A INPUT -p tcp --syn -m connlimit --connlimit-above 3 -j DROP";
    for (is_limited, held, found) in [(false, 0, 0), (false, 5, 1), (true, 3, 0)] {
        let Some(lab) = Lab::new() else { return };
        lab.server.sysctl("net/ipv4/ip_forward", "1");
        lab.server.run(any);
        if is_limited {
            guests::limit(&lab);
        }
        let guest = Guest::start(&lab, 1);
        let peer = lab.peer(CLIENT);
        let conns = peer.hold(guest.port, held);
        let (code, said) = audit(&lab, "limit-translated");
        assert_eq!((code, said.len()), (0, found), "{held} held: {said:?}");
        let more = peer.admitted(guest.port, 1);
        assert_eq!((conns.len(), more), (held, usize::from(!is_limited)), "the truth");
    }
}

/// A port that rules close to everybody is none at which a limit refuses.
#[test]
fn a_port_that_is_closed_in_any_case_hides_no_limit_that_refuses_nobody() {
    for (drop, admitted) in [("", 5), ("-A X -j DROP\n", 3)] {
        let text = format!(
            "*filter\n:X - [0:0]\n-A X -j LOG\n{drop}\
             -A INPUT -p tcp --syn -m connlimit --connlimit-above 3 -j X\n\
             -A INPUT -p tcp --dport 22 -j DROP\nCOMMIT\n"
        );
        let Some((lab, _server, peer)) = host("iptables-restore", &text) else { return };
        let _shut = lab.serve("0.0.0.0:22");
        let noted = audit(&lab, "limit-notes").1;
        assert_eq!(noted.len(), usize::from(drop.is_empty()), "{text}: {noted:?}");
        let truth = (peer.admitted(80, 5), peer.admitted(22, 1));
        assert_eq!(truth, (admitted, 0), "{text}: the truth");
    }
}

/// A limit for what is forwarded to a container: whether it refuses anybody is said before anybody is at it.
#[test]
fn a_limit_for_containers_that_refuses_nobody_is_said_to() {
    const ABOVE: &str = "--dport 8080 -m connlimit --connlimit-above 3 -j X";
    const ASKED: &str = "-m conntrack --ctorigdstport 8001 -m connlimit --connlimit-above 3 -j X";
    const UPTO: &str = "--dport 8080 -m connlimit --connlimit-upto 3 -j ACCEPT";
    const LOG: &str = "-A X -j LOG\n";
    // As Docker has it: what is not published is dropped, before and behind.
    const DOCKER: &str = ":DOCKER - [0:0]\n-A FORWARD -o guest1 -m conntrack --ctstate ESTABLISHED -j ACCEPT\n\
        -A FORWARD -o guest1 -j DOCKER\n-A FORWARD -i guest1 ! -o guest1 -j ACCEPT\n\
        -A DOCKER -d 10.1.1.2/32 ! -i guest1 -o guest1 -p tcp -m tcp --dport 8080 -j ACCEPT\n\
        -A DOCKER ! -i guest1 -o guest1 -j DROP\n\
        COMMIT\n*raw\n-A PREROUTING -d 10.1.1.2/32 ! -i guest1 -j DROP\n";
    for (policy, limit, behind, verdict) in [
        ("ACCEPT", ABOVE, LOG, Some("ok")),
        ("ACCEPT", ASKED, LOG, Some("ok")),
        ("ACCEPT", UPTO, "", Some("bad")),
        ("DROP", ABOVE, &format!("{LOG}{DOCKER}"), Some("ok")),
        ("DROP", ASKED, &format!("{LOG}{DOCKER}"), Some("ok")),
        // The controls.
        ("ACCEPT", ABOVE, "-A X -j DROP\n", None),
        ("ACCEPT", ASKED, "-A X -o guest1 -j DROP\n", None),
        ("ACCEPT", UPTO, "-A FORWARD -p tcp --syn -o guest1 -j DROP\n", None),
        ("DROP", ASKED, &format!("-A X -j DROP\n{DOCKER}"), None),
    ] {
        let text = format!(
            "*filter\n:FORWARD {policy} [0:0]\n:X - [0:0]\n-A FORWARD -p tcp --syn {limit}\n{behind}COMMIT\n"
        );
        for tool in ["iptables-nft-restore", "iptables-legacy-restore"] {
            let Some(lab) = Lab::new() else { return };
            lab.server.sysctl("net/ipv4/ip_forward", "1");
            let guest = Guest::start(&lab, 1);
            lab.server.feed(tool, &text);
            let (code, noted) = audit(&lab, "limit-notes");
            let verdicts: Vec<_> = noted.iter().map(|it| it["verdict"].as_str().unwrap()).collect();
            let wanted = (i32::from(verdict == Some("bad")), verdict.into_iter().collect());
            assert_eq!((code, verdicts), wanted, "{tool}: {text}");
            let admitted = lab.peer(CLIENT).admitted(guest.port, 5);
            let open = if verdict.is_some() { 5 } else { 3 };
            assert_eq!(admitted, open, "{tool}: the truth: {text}");
        }
    }
}

/// A limit counts two ports together, of which one alone is looked at.
#[test]
fn what_a_limit_counts_of_ports_that_are_not_looked_at_is_said() {
    let rule =
        "INPUT -p tcp --syn -m multiport --dports 80,443 -m connlimit --connlimit-above 3 -j DROP";
    let Some((lab, _server, peer)) = host("iptables-restore", &input(&[rule])) else { return };
    let _other = lab.serve("0.0.0.0:443");
    let _held = [peer.hold(80, 1), peer.hold(443, 2)];
    let said = |args: &[&str]| {
        let (_, out, err) = lab.ctkeep(CTKEEP, &[&["audit"], args].concat());
        assert!(err.is_empty(), "{err}");
        (out.contains("at it: 198.51.100.7/32"), out.contains("counts port 443, too"))
    };
    assert_eq!((said(&[]), said(&["--port", "80"])), ((true, false), (false, true)));
    assert_eq!(peer.admitted(80, 1), 0, "the truth");
}
