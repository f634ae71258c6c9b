//! Limits that accept up to a number: whether what exceeds it gets in all the same is said before anybody does.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use serde_json::Value;

use crate::lab::rules::{chain, input};
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
        let advice = over.first().map_or("", |it| it["advice"].as_str().unwrap());
        let may_pass = advice.contains("a rule behind the limit");
        assert_eq!((may_pass, code == 1), (admitted == 5, admitted == 5), "{rules:?}: {over:?}");
    }
}
