//! What `audit`, `doctor` and `explain` say of a limit, beside what it does with a new connection: no
//! all-clear over one that lets more in, and nothing bad where it refuses nobody or is not judged.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::lab::{Lab, Peer, Server};
use serde_json::Value;

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
    let server = lab.serve("0.0.0.0:80");
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
