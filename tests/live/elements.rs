//! Sets and maps whose elements count: each keeps one list for all that it stands for.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use serde_json::Value;

use crate::lab::Lab;
use crate::lab::rules::chain;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const OTHER: &str = "198.51.100.8";
const STRANGER: &str = "198.51.100.9";

/// The exit code, and the limits.
fn audit(lab: &Lab) -> (i32, Vec<Value>) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    (code, report["layers"]["limiter"]["rules"].as_array().unwrap().clone())
}

#[test]
fn a_network_that_is_one_element_has_one_list() {
    let set = "set nets { type ipv4_addr; ct count over 2; flags interval; elements = { 198.51.100.0/24 }; }";
    let map = "map nets { type ipv4_addr : verdict; ct count over 2; flags interval; \
               elements = { 198.51.100.0/24 : drop }; }";
    for (declared, rule) in [
        (set, "tcp dport 80 ct state new ip saddr @nets drop"),
        (map, "tcp dport 80 ct state new ip saddr vmap @nets"),
    ] {
        let Some(lab) = Lab::new() else { return };
        let text = chain("input priority 0", rule).replacen(
            "chain web_input",
            &format!("{declared}\nchain web_input"),
            1,
        );
        lab.server.feed("nft -f -", &text);
        let _server = lab.serve("0.0.0.0:80");
        let peers = [CLIENT, OTHER, STRANGER].map(|client| lab.peer(client));
        let _held = peers[0].hold(80, 2);
        assert_eq!(peers[1].admitted(80, 1), 0, "{rule}: the truth: one list for all of them");
        let (code, limits) = audit(&lab);
        let [limit] = limits.as_slice() else { panic!("{rule}: {limits:#?}") };
        assert_eq!((code, &limit["counts"]), (0, &"from each /24".into()), "{limit:#}");
        assert_eq!(limit["full"][0]["source"], "198.51.100.0/24", "{limit:#}");
        // A list that is made anew has none of them.
        lab.server.run("nft flush ruleset");
        lab.server.feed("nft -f -", &text);
        let _more = peers[1].hold(80, 2);
        let (code, limits) = audit(&lab);
        let full = &limits[0]["full"][0];
        assert_eq!((code, &full["held"], &full["over"]), (1, &4.into(), &true.into()), "{full:#}");
        assert_eq!(peers[2].admitted(80, 1), 0, "{rule}: the truth, of one that holds none");
    }
}
