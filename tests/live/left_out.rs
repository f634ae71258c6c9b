//! Rules that leave some packets out of conntrack (NOTRACK): SYNs alone, those of some clients, all but some.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::lab::{Lab, Peer, RawConn, Server};
use serde_json::Value;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;

/// A host with these rules in raw PREROUTING and a limit in INPUT.
fn host(raw: &str) -> Option<(Lab, Server)> {
    let lab = Lab::new()?;
    let limit = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP";
    let rules = format!("*raw\n{raw}COMMIT\n*filter\n{limit}\nCOMMIT\n");
    lab.server.feed("iptables-restore", &rules);
    let server = lab.serve("0.0.0.0:80");
    Some((lab, server))
}

fn audit(lab: &Lab) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all", "--format", "json"]);
    (code, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

/// What findings of this name say.
fn said(report: &Value, id: &str) -> Vec<String> {
    let all = report["layers"]["limiter"]["findings"].as_array().unwrap().iter();
    let all = all.filter(|it| it["id"] == id);
    all.map(|it| format!("{}: {}", it["verdict"].as_str().unwrap(), it["what"].as_str().unwrap()))
        .collect()
}

fn limit_of(report: &Value, source: &str) -> Value {
    let sources = report["sources"].as_array().unwrap().iter();
    let source = sources.clone().find(|it| it["source"] == format!("{source}/32"));
    source.unwrap_or_else(|| panic!("{report:#}"))["limit"].clone()
}

fn explained(lab: &Lab, conn: &RawConn) -> String {
    let (server, client) = (conn.server.to_string(), conn.client.to_string());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["explain", &server, &client]);
    out + &err
}

/// So many connections that have sent something since, by which conntrack may take them up.
fn talking(peer: &Peer, count: usize) -> Vec<RawConn> {
    let mut conns = peer.hold(80, count);
    conns.iter_mut().for_each(|conn| conn.ack());
    conns
}

/// What SYNPROXY leaves behind when it is taken away: connections are tracked, and the limit counts them.
#[test]
fn a_rule_for_syns_alone_keeps_no_connection_out() {
    let syns = "-A PREROUTING -p tcp --dport 80 --syn -j CT --notrack\n";
    let Some((lab, _server)) = host(syns) else { return };
    let (full, other) = (lab.peer("198.51.100.7"), lab.peer("203.0.113.9"));
    let held = talking(&full, LIMIT);
    let _others = talking(&other, 2);
    let (code, report) = audit(&lab);
    assert_eq!((held.len(), full.admitted(80, 1)), (LIMIT, 0), "the truth");
    let classes = &report["summary"]["classes"];
    assert_eq!((&classes["untracked"], &classes["agree"]), (&0.into(), &5.into()), "{report:#}");
    assert_eq!(limit_of(&report, "198.51.100.7"), LIMIT, "{report:#}");
    assert_eq!(said(&report, "untracked"), [""; 0]);
    let port = said(&report, "port-untracked");
    assert!(port.len() == 1 && port[0].starts_with("warn: SYNs to port 80"), "{port:?}");
    assert_eq!(code, 0, "{report:#}");
    let explained = explained(&lab, &held[0]);
    let is_of_it = explained.contains("holds 3 sockets, 3 have an entry that counts");
    assert!(is_of_it && explained.contains("tracked     yes"), "{explained}");
    assert!(!explained.contains("no sign"), "{explained}");
}

/// The limit is for others; no rule of the port would make conntrack see these.
#[test]
fn clients_that_a_rule_leaves_out_are_said_with_the_rule() {
    let Some((lab, _server)) =
        host("-A PREROUTING -s 198.51.100.14 -p tcp --dport 80 -j NOTRACK\n")
    else {
        return;
    };
    let (out, kept) = (lab.peer("198.51.100.14"), lab.peer("198.51.100.7"));
    let (mut held, tracked) = (out.hold(80, LIMIT), kept.hold(80, LIMIT));
    held.extend(out.hold(80, 1));
    assert_eq!((held.len(), kept.admitted(80, 1)), (LIMIT + 1, 0), "the truth");
    let (code, report) = audit(&lab);
    let untracked = said(&report, "untracked");
    let rule = "ip raw PREROUTING rule 1 leaves them out, so no limit counts them";
    assert!(untracked.len() == 1 && untracked[0].contains(rule), "{untracked:?}");
    assert_eq!((code, said(&report, "port-untracked")), (0, vec![]));
    let of_it = explained(&lab, &held[0]);
    assert!(of_it.contains("tracked     no: ip raw PREROUTING rule 1 leaves it out"), "{of_it}");
    assert!(of_it.contains("does not count it") && !of_it.contains("holds 0"), "{of_it}");
    assert!(!of_it.contains("no sign"), "{of_it}");
    let of_other = explained(&lab, &tracked[0]);
    assert!(of_other.contains("tracked     yes") && of_other.contains("holds 3"), "{of_other}");
}

/// What is accepted before stays tracked, and limited.
#[test]
fn a_port_is_not_called_untracked_for_those_that_are_accepted_before() {
    let raw = "-A PREROUTING -s 198.51.100.0/24 -p tcp --dport 80 -j ACCEPT\n\
               -A PREROUTING -p tcp --dport 80 -j NOTRACK\n";
    let Some((lab, _server)) = host(raw) else { return };
    let (kept, out) = (lab.peer("198.51.100.7"), lab.peer("203.0.113.9"));
    let _held = (kept.hold(80, LIMIT), out.hold(80, LIMIT + 1));
    assert_eq!((kept.admitted(80, 1), out.admitted(80, 1)), (0, 1), "the truth");
    let (code, report) = audit(&lab);
    assert_eq!((code, said(&report, "port-untracked")), (0, vec![]), "{report:#}");
    assert_eq!(limit_of(&report, "198.51.100.7"), LIMIT, "{report:#}");
    let passes = report["layers"]["limiter"]["rules"][0]["passes"].to_string();
    assert!(passes.contains("what goes untracked to port 80"), "{passes}");
    assert!(passes.contains("198.51.100.0/24"), "{passes}");
    // The control: without that rule it is the port.
    let raw = "-A PREROUTING -p tcp --dport 80 -j NOTRACK\n";
    let Some((lab, _server)) = host(raw) else { return };
    let (_, report) = audit(&lab);
    let port = said(&report, "port-untracked");
    assert!(port.len() == 1 && port[0].starts_with("bad: port 80 is not tracked"), "{port:?}");
}
