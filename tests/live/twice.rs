//! A list that a connection meets twice: the kernel may count it twice, and no report says that there is room.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use serde_json::Value;

use crate::lab::Lab;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";

/// The exit code, findings of that name, and the limit that is measured.
fn audit(lab: &Lab, args: &[&str]) -> (i32, Vec<String>, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &[&["audit", "--format", "json"], args].concat());
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    let limiter = &report["layers"]["limiter"];
    let mut rules = limiter["rules"].as_array().unwrap().iter();
    let measured = rules.find(|rule| rule["full"] != Value::Array(Vec::new()));
    let all = limiter["findings"].as_array().unwrap().iter();
    let told = all.filter(|it| it["id"] == "limit-met-twice").map(|it| it["what"].to_string());
    (code, told.collect(), measured.unwrap_or(&Value::Null).clone())
}

/// Holds two connections at a limit of four that each of them meets twice.
fn assert_said(lab: &Lab, is_asked: bool, what: &str) {
    let _server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(CLIENT);
    let held = peer.hold(80, 2);
    assert_eq!(held.len(), 2, "{what}");
    let (code, told, limit) = audit(lab, &[]);
    let [told] = told.as_slice() else { panic!("{what}: {limit:#}") };
    assert!(told.contains("2 sockets, limit 4") && told.contains("no more than 2"), "{told}");
    assert_eq!((code, &limit["full"][0]["over"]), (0, &false.into()), "{what}: {limit:#}");
    let (_, told, limit) = audit(lab, &["--ask"]);
    // One that logs is not asked.
    let said = (limit["holds"] == true, told.len());
    assert_eq!(said, if is_asked { (true, 0) } else { (false, 1) }, "{what}: {limit:#}");
    assert_eq!(peer.admitted(80, 3), 0, "{what}: the truth");
}

#[test]
fn where_a_rule_logs_and_the_next_drops_by_one_set() {
    let Some(lab) = Lab::new() else { return };
    lab.server.feed(
        "nft -f -",
        "table inet f {\n set conns { type ipv4_addr; flags dynamic; size 65535; }\n\
         chain in { type filter hook input priority 0;\n\
         tcp dport 80 ct state new add @conns { ip saddr ct count over 4 } log prefix \"many\"\n\
         tcp dport 80 ct state new add @conns { ip saddr ct count over 4 } drop\n }\n}\n",
    );
    assert_said(&lab, false, "a set");
}

#[test]
fn where_two_jumps_lead_to_one_limit() {
    let Some(lab) = Lab::new() else { return };
    let limit = ":WEB - [0:0]\n-A WEB -p tcp --syn -m connlimit --connlimit-above 4 -j DROP";
    let jumps = "-A INPUT -p tcp --dport 80 -j WEB\n-A INPUT -s 198.51.100.0/24 -j WEB";
    lab.server.feed("iptables-restore", &format!("*filter\n{limit}\n{jumps}\nCOMMIT\n"));
    assert_said(&lab, true, "a chain");
}

/// The control: a list for each rule, one after the other.
#[test]
fn not_where_each_rule_has_a_list_of_its_own() {
    let Some(lab) = Lab::new() else { return };
    let rule = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 4 -j";
    lab.server.feed("iptables-restore", &format!("*filter\n{rule} LOG\n{rule} DROP\nCOMMIT\n"));
    let _server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(CLIENT);
    let _held = peer.hold(80, 2);
    let (code, told, _) = audit(&lab, &[]);
    assert_eq!((code, told.len(), peer.admitted(80, 3)), (0, 0, 2), "{told:?}");
}
