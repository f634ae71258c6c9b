//! What `audit`, `doctor` and `explain` say of a limit, beside what it does with a new connection: no
//! all-clear over one that lets more in, and nothing bad where it refuses nobody or is not judged.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::net::SocketAddr;

use crate::lab::guests::{self, Guest};
use crate::lab::{Lab, Peer, SERVER_V4, Server};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const LIMIT: usize = 3;

fn json(lab: &Lab, args: &[&str]) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &[args, &["--format", "json"]].concat());
    (code, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

/// The verdicts of findings with this name.
fn verdicts(findings: &Value, id: &str) -> Vec<String> {
    let all = findings.as_array().unwrap().iter().filter(|it| it["id"] == id);
    all.map(|it| it["verdict"].as_str().unwrap().to_owned()).collect()
}

/// The exit code of a doctor, and its findings.
fn doctor(lab: &Lab) -> (i32, Value) {
    let (code, report) = json(lab, &["doctor"]);
    (code, report["findings"].clone())
}

/// The exit code of an audit, the findings of the layer limiter, and the first limit.
fn audit(lab: &Lab, args: &[&str]) -> (i32, Value, Value) {
    let (code, report) = json(lab, &[&["audit"], args].concat());
    let limiter = &report["layers"]["limiter"];
    (code, limiter["findings"].clone(), limiter["rules"][0].clone())
}

/// A host with these rules of iptables, and a client.
fn host(rules: &str) -> Option<(Lab, Server, Peer)> {
    let lab = Lab::new()?;
    lab.server.feed("iptables-restore", &format!("*filter\n{rules}COMMIT\n"));
    let server = lab.serve("0.0.0.0:80 0.0.0.0:81");
    let peer = lab.peer(CLIENT);
    Some((lab, server, peer))
}

const OPENS: &str = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3";

/// A source is at its limit, and nothing of it is counted any more.
#[test]
fn doctor_says_no_all_clear_where_entries_are_lost() {
    let Some((lab, _server, peer)) = host(&format!("{OPENS} -j DROP\n")) else { return };
    let _held = peer.hold(80, LIMIT);
    let (code, findings) = doctor(&lab);
    assert_eq!((code, verdicts(&findings, "tables-disagree")), (0, vec!["ok".to_owned()]));
    assert_eq!(verdicts(&findings, "limit-uncounted"), [""; 0], "{findings:#}");
    assert_eq!(peer.admitted(80, 1), 0, "the truth, before");
    lab.server.run("conntrack -F");
    let (code, findings) = doctor(&lab);
    let said = ["tables-disagree", "limit-uncounted"].map(|id| verdicts(&findings, id));
    assert_eq!((code, said), (1, [["bad"], ["bad"]].map(|it| it.map(str::to_owned).to_vec())));
    let (code, findings, limit) = audit(&lab, &[]);
    assert_eq!((code, verdicts(&findings, "limit-uncounted").len()), (1, 1), "{findings:#}");
    assert_eq!((&limit["holds"], &limit["verdict"]), (&false.into(), &"bad".into()), "{limit:#}");
    assert_eq!(peer.admitted(80, 1), 1, "the truth");
}

/// A rule that logs, counts or marks refuses nobody; one whose mark another rule refuses, one that refuses in
/// another chain, and one that bans, do.
#[test]
fn who_exceeds_a_rule_that_only_notes_is_not_over_it() {
    const LOG: &str = "-A INPUT -j LOG\n";
    for (refuses, rules) in [
        (false, format!("{OPENS} -j LOG\n")),
        (false, format!("{OPENS}\n")),
        (false, format!("{OPENS} -j MARK --set-mark 9\n{LOG}")),
        (false, format!(":X - [0:0]\n-A X -j LOG\n{OPENS} -j X\n")),
        (false, format!("{OPENS} -j RETURN\n-A INPUT -j ACCEPT\n")),
        (
            false,
            "COMMIT\n*nat\n-A PREROUTING -p tcp --dport 80 -m connlimit --connlimit-above 3 -j REDIRECT \
             --to-ports 81\n"
                .to_owned(),
        ),
        (true, format!("{OPENS} -j MARK --set-mark 9\n-A INPUT -m mark --mark 9 -j DROP\n")),
        (true, format!(":X - [0:0]\n-A X -j LOG\n-A X -j DROP\n{OPENS} -j X\n")),
    ] {
        let Some((lab, _server, peer)) = host(&rules) else { return };
        // Before the limit counts, so that both hold more than it allows.
        let held = if refuses { peer.hold(80, LIMIT) } else { peer.hold(80, LIMIT + 2) };
        if refuses {
            lab.server.run("conntrack -F");
        }
        let more = if refuses { peer.hold(80, 2) } else { Vec::new() };
        let (code, findings, limit) = audit(&lab, &[]);
        let over = verdicts(&findings, "source-over-limit");
        let noted = verdicts(&findings, "limit-notes").len();
        let full = limit["full"].as_array().unwrap().len();
        let said = (code, noted, full, over.contains(&"bad".to_owned()));
        let judged = verdicts(&findings, "limit-without-syn");
        assert_eq!(judged, [""; 0], "{rules}: none judges every packet: {findings:#}");
        if refuses {
            assert_eq!((noted, full, over.len()), (0, 1, 1), "{rules}: {findings:#}");
        } else {
            assert_eq!(said, (0, 1, 0, false), "{rules}: {findings:#}");
            assert_eq!(peer.admitted(80, 1), 1, "{rules}: the truth");
        }
        drop((held, more));
    }
}

/// What a limit by destination counts together is named by that: others are let in elsewhere.
#[test]
fn a_destination_that_is_full_is_not_said_to_be_all() {
    let rule = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 --connlimit-daddr -j DROP\n";
    let Some((lab, _server, peer)) = host(rule) else { return };
    lab.server.run("ip addr add 192.0.2.9/32 dev lo");
    lab.client.run("ip route add 192.0.2.9/32 via 192.0.2.1");
    let other = lab.peer("198.51.100.8");
    let elsewhere = lab.peer_to(CLIENT, "192.0.2.9");
    let held = (peer.hold(80, 2), other.hold(80, 1), elsewhere.hold(80, 2));
    let (code, _, limit) = audit(&lab, &[]);
    let full = limit["full"].as_array().unwrap();
    assert_eq!((code, full.len(), &full[0]["destination"]), (0, 1, &"192.0.2.1/32".into()));
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit"]);
    let at = "at it: what goes to 192.0.2.1/32, 3 sockets of 3, 3 counted";
    let row = out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(row.contains(at), "{out}{err}");
    let admitted = [peer.admitted(80, 1), elsewhere.admitted(80, 1)];
    assert_eq!(admitted, [0, 1], "the truth");
    drop(held);
}

/// A limit for what is established sees no packet behind a rule that accepts what is established, and none that
/// opens a connection in any case.
#[test]
fn a_limit_for_what_is_established_is_never_a_sound_one() {
    const ALL: &str = "-A INPUT -m state --state ESTABLISHED -j ACCEPT\n";
    const OTHERS: &str = "-A INPUT -s 203.0.113.0/24 -m state --state ESTABLISHED -j ACCEPT\n";
    const LIMIT: &str = "-A INPUT -p tcp --dport 80 -m state --state ESTABLISHED -m connlimit \
                         --connlimit-above 3 -j DROP\n";
    for (before, id, verdict) in [
        (ALL, "limit-shadowed", "bad"),
        (OTHERS, "limit-without-syn", "warn"),
        ("", "limit-without-syn", "warn"),
        (
            "-A INPUT -p tcp --dport 80 -m state --state RELATED -m connlimit --connlimit-above 3 -j DROP\n",
            "limit-unjudged",
            "ok",
        ),
    ] {
        let Some((lab, _server, peer)) = host(&format!("{before}{LIMIT}")) else { return };
        let (_, findings, _) = audit(&lab, &[]);
        assert_eq!(verdicts(&findings, id), [verdict], "{before}: {findings:#}");
        if before == ALL {
            assert_eq!(peer.hold(80, 5).len(), 5, "the truth");
        }
    }
}

/// A limit that accepts up to a number lets in all packets of these connections: what is said of it must not
/// have them dropped.
#[test]
fn a_limit_that_accepts_every_packet_within_it_is_not_told_to_look_at_syns_alone() {
    const ESTABLISHED: &str = "-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n";
    let rules = |before: &str, syn: &str| {
        format!(
            "{before}-A INPUT -p tcp --dport 80 {syn}-m connlimit --connlimit-upto 3 -j ACCEPT\n\
             -A INPUT -p tcp --dport 80 -j DROP\n"
        )
    };
    // Whether the server gets what the client says.
    let talks = |peer: &Peer| {
        let mut conn = peer.connect(80).unwrap();
        conn.send(b"hello");
        conn.await_ack()
    };
    let Some((lab, _server, peer)) = host(&rules("", "")) else { return };
    assert!(talks(&peer), "the truth");
    let (_, findings, limit) = audit(&lab, &[]);
    assert_eq!(verdicts(&findings, "limit-without-syn"), ["warn"], "{limit:#}");
    let said = findings.as_array().unwrap().iter().find(|it| it["id"] == "limit-without-syn");
    let advice = said.unwrap()["advice"].as_str().unwrap();
    let first = "first accept, in a rule before it, what is established: -m conntrack --ctstate \
                 ESTABLISHED -j ACCEPT";
    assert!(advice.starts_with(first), "{advice}");
    // Half of it, which was all of it once; and all of it.
    for (before, is_heard) in [("", false), (ESTABLISHED, true)] {
        let text = format!("*filter\n{}COMMIT\n", rules(before, "--syn "));
        lab.server.feed("iptables-restore", &text);
        assert_eq!(talks(&peer), is_heard, "{text}: the truth");
    }
    let (code, findings, limit) = audit(&lab, &[]);
    assert_eq!((code, verdicts(&findings, "limit-without-syn").len()), (0, 0), "{limit:#}");
}

/// Limits of what goes out, of bridges, and in chains that nothing leads to.
#[test]
fn a_limit_that_is_not_judged_is_named() {
    let Some((lab, _server, peer)) = host(
        "-A OUTPUT -p tcp --sport 80 --tcp-flags SYN,ACK SYN,ACK -m connlimit --connlimit-above 3 \
         --connlimit-daddr -j DROP\n\
         -A OUTPUT -p tcp --syn -m connlimit --connlimit-above 30 -j DROP\n\
         COMMIT\n*mangle\n\
         -A POSTROUTING -o docker0 -p tcp --syn -m connlimit --connlimit-above 3 -j DROP\n",
    ) else {
        return;
    };
    lab.server.feed(
        "nft -f -",
        "table inet x {\nset c { type ipv4_addr; flags dynamic; }\n\
         chain nowhere { tcp dport 80 ct state new add @c { ip saddr ct count over 3 } drop; }\n}\n",
    );
    let _held = peer.hold(80, LIMIT);
    assert_eq!(peer.admitted(80, 1), 0, "the truth: the first of them holds");
    let (code, findings, _) = audit(&lab, &[]);
    let mut all = verdicts(&findings, "limit-unjudged");
    all.sort();
    assert_eq!((code, all), (0, ["ok", "warn", "warn", "warn"].map(str::to_owned).to_vec()));
    let said = findings.to_string();
    for what in [
        "OUTPUT rule 1 is a limit on the way out",
        "x nowhere rule 1 is a limit in a chain",
        "POSTROUTING rule 1 is a limit behind routing, for what this host opens and what clients",
    ] {
        assert!(said.contains(what), "{what}: {findings:#}");
    }
}

/// A limit that names no protocol counts UDP, too.
#[test]
fn a_limit_of_any_protocol_says_so() {
    let Some((lab, _server, peer)) =
        host("-A INPUT -m state --state NEW -m connlimit --connlimit-above 3 -j DROP\n")
    else {
        return;
    };
    let udp: Vec<_> = (0..LIMIT)
        .map(|_| {
            lab.client.within(|| {
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
                socket.set_ip_transparent_v4(true).expect("an address of nobody");
                let client = CLIENT.parse().expect("an address");
                socket.bind(&SocketAddr::new(client, 0).into()).expect("bound");
                socket.send_to(b"x", &SocketAddr::from((SERVER_V4, 5353)).into()).expect("sent");
                socket
            })
        })
        .collect();
    assert_eq!(peer.admitted(80, 1), 0, "the truth: of UDP are as many as it allows");
    let (_, findings, limit) = audit(&lab, &[]);
    let what = limit["what"].as_str().unwrap();
    assert_eq!(what, "at most 3 from each /32 to any port, of any protocol", "{findings:#}");
    assert!(findings.to_string().contains("UDP and others count as well"), "{findings:#}");
    drop(udp);
}

/// A table of nft with these sets and chains, and a server at two ports.
fn native(text: &str) -> Option<(Lab, Server, Peer)> {
    let lab = Lab::new()?;
    lab.server.feed("nft -f -", &format!("table inet f {{\n{text}\n}}\n"));
    let server = lab.serve("0.0.0.0:80 0.0.0.0:81");
    let peer = lab.peer(CLIENT);
    Some((lab, server, peer))
}

/// One chain that two ports lead to counts what both take.
#[test]
fn one_limit_of_two_ports_behind_a_white_list_is_one() {
    let Some((lab, _server, peer)) = native(
        "set white { type ipv4_addr; flags interval; elements = { 203.0.113.0/25, 203.0.113.200 }; }\n\
         set conns { type ipv4_addr; flags dynamic; size 65535; }\n\
         chain web { ip saddr @white accept\n add @conns { ip saddr ct count over 3 } drop\n accept\n }\n\
         chain in { type filter hook input priority 0; policy drop;\n\
         ct state established accept\n tcp dport vmap { 80 : jump web, 81 : jump web }\n }",
    ) else {
        return;
    };
    let _held = [peer.hold(80, 2), peer.hold(81, 1)];
    assert_eq!((peer.admitted(80, 1), peer.admitted(81, 1)), (0, 0), "the truth");
    let (code, report) = json(&lab, &["audit"]);
    let rules = report["layers"]["limiter"]["rules"].as_array().unwrap();
    let [limit] = rules.as_slice() else { panic!("{rules:#?}") };
    assert_eq!((code, &limit["ports"]), (0, &"80-81".into()), "{limit:#}");
    let passes = "what goes to port 80-81, if source address in @white";
    assert_eq!(limit["may_pass"], serde_json::json!([passes]), "{limit:#}");
    assert_eq!(limit["full"][0]["held"], LIMIT, "{limit:#}");
}

/// Clients whose packets a rule keeps from conntrack pass a limit, which is said of it.
#[test]
fn who_goes_untracked_passes_a_limit() {
    const RAW: [&str; 2] = ["-s 198.51.100.7", "-s 198.51.100.7 -m mark --mark 7"];
    let lists = ["passes", "may_pass"];
    for (raw, list, admitted) in [(RAW[0], lists[0], 2), (RAW[1], lists[1], 0)] {
        let Some((lab, _server, peer)) = host(&format!("{OPENS} -j DROP\n")) else { return };
        let (_, _, limit) = audit(&lab, &[]);
        assert_eq!(lists.map(|it| limit[it].as_array().unwrap().len()), [0, 0], "the control");
        lab.server
            .feed("iptables-restore", &format!("*raw\n-A PREROUTING {raw} -j NOTRACK\nCOMMIT\n"));
        let _held = peer.hold(80, LIMIT);
        // An untracked SYN is on the list for two of the kernel's ticks.
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert_eq!(peer.admitted(80, 2), admitted, "the truth, {raw}");
        let (_, _, limit) = audit(&lab, &[]);
        let said = limit[list].as_array().unwrap();
        let is_named = said.len() == 1
            && said[0]
                .as_str()
                .unwrap()
                .starts_with("what goes untracked to any port, from 198.51.100.7/32");
        assert!(is_named, "{raw}: {limit:#}");
    }
}

/// The list is empty, though the entries are there.
#[test]
fn explain_does_not_say_that_the_rule_sees_what_its_list_lacks() {
    let Some((lab, _server, peer)) = native(
        "set conns { type ipv4_addr; flags dynamic; size 65535; }\n\
         chain in { type filter hook input priority 0;\n\
         tcp dport 80 ct state new add @conns { ip saddr ct count over 3 } drop\n }",
    ) else {
        return;
    };
    let held = peer.hold(80, LIMIT);
    let explain = || {
        let (server, client) = (held[0].server.to_string(), held[0].client.to_string());
        let (_, out, err) = lab.ctkeep(CTKEEP, &["explain", &server, &client, "--ask"]);
        out + &err
    };
    let said = explain();
    let counted = "holds 3 sockets, 3 have an entry that counts, at least 3 are on its list";
    assert!(said.contains(counted) && !said.contains("hint"), "the control: {said}");
    lab.server.run("nft flush set inet f conns");
    let said = explain();
    let counted = "holds 3 sockets, 3 have an entry that counts, 0 are on its list";
    assert!(said.contains(counted) && !said.contains("the rule sees"), "{said}");
    assert!(said.contains("the list of the limit lacks connections of this source"), "{said}");
    assert_eq!(peer.admitted(80, 1), 1, "the truth");
}

/// Two rules share a set: the one that makes an element gives it its number for both.
#[test]
fn the_number_of_an_element_is_told_from_that_of_the_rule() {
    let Some((lab, _server, peer)) = native(
        "set conns { type ipv4_addr; flags dynamic; size 65535; }\n\
         chain in { type filter hook input priority 0;\n\
         tcp dport 80 ct state new add @conns { ip saddr ct count over 3 } drop\n\
         tcp dport 81 ct state new add @conns { ip saddr ct count over 6 } drop\n }",
    ) else {
        return;
    };
    let mut held = peer.hold(81, 1);
    held.extend(peer.hold(80, 5));
    assert_eq!((held.len(), peer.admitted(80, 1)), (6, 0), "the truth");
    let (server, client) = (held[1].server.to_string(), held[1].client.to_string());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["explain", &server, &client]);
    let said = "198.51.100.7/32, whose element of the set allows 6, holds 6 sockets";
    assert!(out.contains("at most 3 ") && out.contains(said), "{out}{err}");
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit"]);
    assert!(!out.contains("over it") && !out.contains("perhaps"), "{out}{err}");
}

/// A limit for one port makes conntrack see all; what is lost of another port is not untracked.
#[test]
fn a_port_without_a_limit_that_conntrack_sees_is_not_said_to_be_untracked() {
    let Some((lab, _server, peer)) = native("chain none { }") else { return };
    let before = peer.hold(81, 1);
    let said = |lab: &Lab| {
        let (_, findings, _) = audit(lab, &[]);
        let all = findings.as_array().unwrap().iter().filter(|it| it["id"] == "untracked");
        all.map(|it| it["what"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
    };
    let text = said(&lab);
    assert!(text.contains("1 open connections to port 81 are not tracked"), "the control: {text}");
    lab.connlimit(80, 3);
    let more = peer.hold(81, 2);
    lab.server.run("conntrack -F");
    let text = said(&lab);
    let seen = "3 open connections to port 81 have no entry, and no limit is for them";
    assert!(text.contains(seen) && !text.contains("not tracked"), "{text}");
    let _one = peer.hold(81, 1);
    assert!(!lab.entries().is_empty(), "the truth: conntrack looks");
    drop((before, more));
}

/// Two ports lead to one container, and the limit is for one of them: what a connection without an entry asked
/// for is not what its sibling did.
#[test]
fn what_two_ports_lead_to_is_not_measured_by_one_of_them() {
    let Some(lab) = Lab::new() else { return };
    lab.server.sysctl("net/ipv4/ip_forward", "1");
    lab.server.run(
        "iptables -A FORWARD -p tcp --syn -m conntrack --ctorigdstport 8001 -m connlimit \
         --connlimit-above 3 --connlimit-mask 32 -j DROP",
    );
    let guest = Guest::start(&lab, 1);
    let to = format!("{}:{}", guest.address, guests::INSIDE);
    lab.server.run(&format!(
        "iptables -t nat -A PREROUTING -p tcp --dport 8443 -j DNAT --to-destination {to}"
    ));
    let (peer, other) = (lab.peer(CLIENT), lab.peer("198.51.100.8"));
    let _held = [peer.hold(guest.port, LIMIT), peer.hold(8443, 2)];
    let _sibling = other.hold(guest.port, 1);
    let over = || {
        let (_, report) = json(&lab, &["audit"]);
        let all = report["sources"].as_array().unwrap().clone();
        let ours = all.into_iter().find(|it| it["source"] == format!("{CLIENT}/32")).unwrap();
        (ours["held"].clone(), ours["limit"].clone(), ours["over_limit"].clone())
    };
    let sockets = LIMIT + 2;
    assert_eq!(over(), (sockets.into(), LIMIT.into(), false.into()), "the control");
    assert_eq!(peer.admitted(guest.port, 1), 0, "the truth");
    lab.server.run(&format!("conntrack -D -p tcp -s {CLIENT}"));
    assert_eq!(over(), (sockets.into(), LIMIT.into(), Value::Null));
}

/// A source that is asked for two limits says of each list once what it lacks.
#[test]
fn a_list_that_lacks_connections_is_named_once() {
    let wider = OPENS.replace("above 3", "above 5");
    let Some((lab, _server, peer)) = host(&format!("{wider} -j DROP\n{OPENS} -j DROP\n")) else {
        return;
    };
    let _held = peer.hold(80, LIMIT);
    lab.server.run("conntrack -F");
    let (code, findings, _) = audit(&lab, &["--ask"]);
    assert_eq!(
        (code, verdicts(&findings, "limit-lacking")),
        (1, vec!["bad".to_owned()]),
        "{findings:#}"
    );
    assert_eq!(peer.admitted(80, 1), 1, "the truth");
}

/// What exceeds one limit has the places of another: the room that is left is not that of the first, which
/// lacks nothing.
#[test]
fn room_behind_a_limit_is_not_taken_for_its_own() {
    let within = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-upto 2";
    let above = OPENS.replace("above 3", "above 4");
    let behind = ":X - [0:0]\n-A X -m connlimit --connlimit-upto 4 -j RETURN\n-A X -j DROP\n";
    for rules in [
        format!("{within} -j ACCEPT\n{above} -j DROP\n"),
        format!("{behind}{} -j X\n", OPENS.replace("above 3", "above 2")),
    ] {
        let Some((lab, _server, peer)) = host(&rules) else { return };
        let _held = peer.hold(80, LIMIT);
        let (code, findings, limit) = audit(&lab, &["--ask"]);
        assert_eq!(verdicts(&findings, "limit-lacking"), [""; 0], "{rules}: {findings:#}");
        assert_eq!((code, &limit["holds"]), (0, &Value::Null), "{rules}: {limit:#}");
        assert_eq!(
            peer.admitted(80, 9),
            3,
            "{rules}: the truth: two within the first, four behind it"
        );
        let (_, recounted, _) = lab.ctkeep(CTKEEP, &["recount"]);
        assert!(!recounted.contains("not counted"), "{rules}: {recounted}");
    }
}

/// A limit for a port that rules lead elsewhere before it sees none of what clients open to it.
#[test]
fn a_limit_for_the_port_before_a_translation_is_not_said_to_be_sound() {
    const REDIRECT: &str =
        "COMMIT\n*nat\n-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 81\n";
    for (port, is_seen) in [("80", false), ("81", true)] {
        let limit = OPENS.replace("dport 80", &format!("dport {port}"));
        let Some((lab, _server, peer)) = host(&format!("{limit} -j DROP\n{REDIRECT}")) else {
            return;
        };
        let _held = peer.hold(80, if is_seen { LIMIT } else { LIMIT + 2 });
        let (code, findings, limit) = audit(&lab, &[]);
        let said = (code, verdicts(&findings, "limit-translated").len(), limit["verdict"].clone());
        let wanted = if is_seen { (0, 0, "ok".into()) } else { (0, 1, "warn".into()) };
        assert_eq!(said, wanted, "{port}: {findings:#}");
        assert_eq!(peer.admitted(80, 1), usize::from(!is_seen), "{port}: the truth");
    }
}

/// An accept in a chain that has sent some packets back before does not take those from a limit.
#[test]
fn what_a_chain_sends_back_before_it_accepts_comes_to_the_limit() {
    let accept = ":U - [0:0]\n-A INPUT -j U\n-A U {back} -j RETURN\n-A U -p tcp -j ACCEPT\n";
    for (back, is_limited) in [
        (format!("-s {CLIENT}"), true),
        ("-p tcp --dport 80".to_owned(), true),
        ("-m mark ! --mark 9".to_owned(), true),
        ("-m mark ! --mark 9 -j RETURN\n-A U -m mark ! --mark 8".to_owned(), true),
        ("-p tcp --dport 81".to_owned(), false),
    ] {
        let rules = format!("{}{OPENS} -j DROP\n", accept.replace("{back}", &back));
        let Some(limit) = assert_shadowed(&rules, !is_limited, &back) else { return };
        let passes = limit["may_pass"].to_string();
        assert!(!passes.contains("before and not sent back"), "{back}: once: {passes}");
    }
}

/// Whether the limit of these rules is said to be shadowed, and is; its figures.
fn assert_shadowed(rules: &str, is_shadowed: bool, what: &str) -> Option<Value> {
    let (lab, _server, peer) = host(rules)?;
    let _held = peer.hold(80, LIMIT);
    let (code, findings, limit) = audit(&lab, &[]);
    let said = verdicts(&findings, "limit-shadowed");
    let wanted: &[&str] = if is_shadowed { &["bad"] } else { &[] };
    assert_eq!(said, wanted, "{what}: {findings:#}");
    assert_eq!(code, i32::from(is_shadowed), "{what}: {findings:#}");
    assert_eq!(peer.admitted(80, 1), usize::from(is_shadowed), "{what}: the truth");
    Some(limit)
}

/// What a chain hands to another one by `goto` comes back to the chain that called it, if at all.
#[test]
fn what_goes_on_elsewhere_before_a_chain_accepts_may_come_to_the_limit() {
    for (there, is_limited) in [
        ("-A V -p tcp --dport 81 -j DROP\n", true),
        (&format!("-A V -s {CLIENT} -j RETURN\n-A V -j ACCEPT\n")[..], true),
        ("-A V -j ACCEPT\n", false),
    ] {
        let rules = format!(
            ":U - [0:0]\n:V - [0:0]\n-A INPUT -j U\n-A U -s 198.51.100.0/24 -g V\n-A U -p tcp -j ACCEPT\n\
             {there}{OPENS} -j DROP\n"
        );
        if assert_shadowed(&rules, !is_limited, there).is_none() {
            return;
        }
    }
}

/// Whom a chain sends back by what cannot be known from outside, before it accepts the others, a limit may count:
/// it is asked.
#[test]
fn who_may_be_sent_back_before_an_accept_may_be_limited() {
    let rules = |back: &str| {
        format!(
            ":U - [0:0]\n-A INPUT -j U\n-A U {back} -j RETURN\n-A U -j ACCEPT\n{OPENS} -j DROP\n"
        )
    };
    for back in ["-m mark --mark 0", "-m limit --limit 100/s --limit-burst 100"] {
        let Some((lab, _server, peer)) = host(&rules(back)) else { return };
        let _held = peer.hold(80, LIMIT);
        let (code, _, limit) = audit(&lab, &[]);
        assert_eq!((code, limit["full"].as_array().unwrap().len()), (0, 1), "{back}: {limit:#}");
        assert_eq!(peer.admitted(80, 1), 0, "{back}: the truth");
        lab.server.feed("iptables-restore", "*filter\nCOMMIT\n");
        lab.server.feed("iptables-restore", &format!("*filter\n{}COMMIT\n", rules(back)));
        let (_, findings, _) = audit(&lab, &["--ask"]);
        assert_eq!(verdicts(&findings, "limit-lacking"), ["warn"], "{back}: {findings:#}");
        assert_eq!(peer.admitted(80, 1), 1, "{back}: the truth, after a reload");
    }
}

/// connlimit keeps a list for each zone of conntrack; `ct count` does not.
#[test]
fn connlimit_counts_each_zone_apart() {
    let connlimit = OPENS.replace("above 3", "above 3 --connlimit-mask 24");
    let count = "table ip f {\n chain i { type filter hook input priority 10; tcp dport 80 ct state new \
                 ct count over 3 drop\n }\n}\n";
    for is_native in [false, true] {
        let rules = if is_native { String::new() } else { format!("{connlimit} -j DROP\n") };
        let Some((lab, _server, peer)) = host(&rules) else { return };
        if is_native {
            lab.server.feed("nft -f -", count);
        }
        lab.server.feed(
            "iptables-restore -n",
            "*raw\n-A PREROUTING -s 198.51.100.8 -j CT --zone 5\n-A OUTPUT -d 198.51.100.8 -j CT --zone 5\nCOMMIT\n",
        );
        let other = lab.peer("198.51.100.8");
        let _held = (peer.hold(80, 2), other.hold(80, if is_native { 1 } else { 2 }));
        let (code, findings, limit) = audit(&lab, &[]);
        let full = limit["full"].as_array().unwrap().len();
        assert_eq!((code, full), (0, usize::from(is_native)), "{findings:#} {limit:#}");
        assert_eq!(peer.admitted(80, 2), usize::from(!is_native), "the truth");
    }
}

/// A limit for each pair of source and destination: what the list of one client holds is said of no other.
#[test]
fn what_the_list_of_another_client_holds_is_not_said_of_a_source() {
    let Some(lab) = Lab::new() else { return };
    lab.server.feed(
        "nft -f -",
        "table inet f {\n set c { type ipv4_addr . ipv4_addr; flags dynamic; size 64; }\n\
         chain i { type filter hook input priority 0; ct state established accept\n\
         tcp dport 80 add @c { ip saddr . ip daddr ct count over 3 } drop\n }\n}\n",
    );
    let _server = lab.serve("0.0.0.0:80");
    let (peer, other) = (lab.peer(CLIENT), lab.peer("198.51.100.8"));
    let _held = [peer.hold(80, LIMIT), other.hold(80, LIMIT)];
    lab.server.run(&format!("conntrack -D -p tcp -s {CLIENT}"));
    let (code, report) = json(&lab, &["audit", "--ask"]);
    let of = |client: &str| {
        let all = report["sources"].as_array().unwrap().iter();
        let one = all.clone().find(|it| it["source"] == format!("{client}/32")).unwrap();
        (one["listed"].clone(), one["full"].clone())
    };
    assert_eq!(of(CLIENT), (0.into(), false.into()), "{:#}", report["sources"]);
    assert_eq!(of("198.51.100.8"), (LIMIT.into(), true.into()), "the control");
    let findings = report["layers"]["limiter"]["findings"].as_array().unwrap();
    let lacking = findings.iter().find(|it| it["id"] == "limit-lacking").unwrap();
    let named = lacking["what"].as_str().unwrap().starts_with(&format!("{CLIENT}/32: 3 sockets"));
    assert!(code == 1 && named, "{lacking:#}");
    assert_eq!((peer.admitted(80, 1), other.admitted(80, 1)), (1, 0), "the truth");
}

/// A limit whose set has no room for another source holds for those alone that are in it.
#[test]
fn a_limit_without_room_does_not_hold() {
    let Some(lab) = Lab::new() else { return };
    let rules = |size: usize| {
        format!(
            "flush ruleset\ntable inet f {{\n set c {{ type ipv4_addr; flags dynamic; size {size}; }}\n\
             chain i {{ type filter hook input priority 0; ct state established accept\n\
             tcp dport 80 add @c {{ ip saddr ct count over 3 }} drop\n }}\n}}\n"
        )
    };
    let _server = lab.serve("0.0.0.0:80");
    let (peer, other) = (lab.peer(CLIENT), lab.peer("198.51.100.8"));
    for (size, holds) in [(64, true), (1, false)] {
        lab.server.feed("nft -f -", &rules(size));
        let held = [peer.hold(80, LIMIT), other.hold(80, LIMIT)];
        let (code, _, limit) = audit(&lab, &["--ask"]);
        assert_eq!((code, &limit["holds"]), (i32::from(!holds), &holds.into()), "{limit:#}");
        assert_eq!(other.admitted(80, 1), usize::from(!holds), "the truth, of {size}");
        drop(held);
    }
}

/// Who is silent for longer than conntrack remembers gets the limit again.
#[test]
fn a_timeout_that_forgets_idle_clients_is_named_where_no_daemon_runs() {
    let Some((lab, _server, peer)) = host(&format!("{OPENS} -j DROP\n")) else { return };
    let timeout = "net/netfilter/nf_conntrack_tcp_timeout_established";
    let of = |lab: &Lab| {
        let (_, report) = json(lab, &["audit"]);
        let findings = report["layers"]["conntrack"]["findings"].clone();
        let (_, by_doctor) = doctor(lab);
        assert_eq!(verdicts(&findings, "idle-timeout"), verdicts(&by_doctor, "idle-timeout"));
        verdicts(&findings, "idle-timeout")
    };
    assert_eq!(of(&lab), ["ok"]);
    lab.server.sysctl(timeout, "2");
    assert_eq!(of(&lab), ["warn"]);
    let _held = peer.hold(80, LIMIT);
    assert_eq!(peer.admitted(80, 1), 0);
    std::thread::sleep(std::time::Duration::from_secs(4));
    let _again = peer.hold(80, LIMIT);
    let daemon = lab.daemon(CTKEEP, &["--port", "80"]);
    assert_eq!(of(&lab), ["ok"]);
    drop(daemon);
    lab.server.run("iptables -F INPUT");
    assert_eq!(of(&lab), [""; 0], "no limit counts");
}
