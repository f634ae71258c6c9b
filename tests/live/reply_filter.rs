//! Seen by nobody: nudges and seals leave no trace on the client's wire and none in the sockets,
//! whatever the rules answer; and nothing of ctkeep's own is left behind when it is killed.

use std::thread;
use std::time::Duration;

use ctkeep::nftables::{Table, TableSpec};

use crate::lab::rules::{CONNLIMIT, CONNLIMIT6, INPUT, chain, input, syn_proxy};
use crate::lab::{Daemon, Lab, RawConn, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const TRIES: usize = LIMIT + 2;
const SOON: Duration = Duration::from_secs(10);

fn await_repair(lab: &Lab, daemon: &Daemon, conns: &[RawConn]) {
    wait_for("repair", SOON, || {
        let alive = conns.iter().filter(|conn| lab.is_alive(conn));
        alive.count() == LIMIT && daemon.log().matches("revive").count() >= LIMIT
    });
}

/// All that TCP knows of its connections, but for what time alone changes.
fn inner_life(lab: &Lab) -> Vec<String> {
    let text = lab.server.output("ss -HtineO state close-wait");
    let mut sockets: Vec<String> = text
        .lines()
        .map(|line| {
            let timeless = |word: &&str| !word.starts_with("last") && !word.starts_with("timer:");
            line.split_whitespace().filter(timeless).collect::<Vec<_>>().join(" ")
        })
        .collect();
    sockets.sort();
    sockets
}

/// A daemon that finds three closed entries at once, and what the client sees of its work.
fn silent_below_the_limit(route: &str, source: &str) {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &["--recount", route]);
    let peer = lab.peer(source);
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    daemon.stop();
    conns.iter().for_each(|conn| conn.stale_rst());
    let names = [
        "TcpExtTCPChallengeACK",
        "TcpExtTCPSYNChallenge",
        "TcpOutRsts",
        "TcpOutSegs",
        // TCP does not even see what is made so that it would drop it.
        "TcpExtTCPMD5Unexpected",
        "TcpInCsumErrors",
    ];
    let counters = || names.map(|name| lab.counter(name));
    let before = counters();
    let sockets_before = inner_life(&lab);
    let seen = lab.client_sees(|| {
        daemon.cont();
        await_repair(&lab, &daemon, &conns);
    });
    assert!(seen.is_empty(), "the client sees {seen:?}");
    assert_eq!(counters(), before, "{names:?}");
    assert_eq!(inner_life(&lab), sockets_before);
    assert_eq!(peer.admitted(80, TRIES), 0);
}

#[test]
fn a_nudge_by_ingress_ends_behind_the_rules_in_silence() {
    silent_below_the_limit("ingress", "198.51.100.7");
}

#[test]
fn a_nudge_by_ingress_ends_behind_the_rules_in_silence_over_ipv6() {
    silent_below_the_limit("ingress", "2001:db8:1::7");
}

#[test]
fn a_nudge_by_loopback_ends_behind_the_rules_in_silence() {
    silent_below_the_limit("loopback", "198.51.100.7");
}

#[test]
fn a_nudge_by_loopback_ends_behind_the_rules_in_silence_over_ipv6() {
    silent_below_the_limit("loopback", "2001:db8:1::7");
}

/// Three connections are repaired after three more took their places: each nudge is over the
/// limit. What the rule answers must not reach the client, and must not close the entries again;
/// and the connections count all the same.
fn silent_over_the_limit(route: &str, source: &str, tool: &str, rules: &str) {
    let Some(lab) = Lab::new() else { return };
    lab.server.feed(tool, rules);
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &["--recount", route]);
    let peer = lab.peer(source);
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    daemon.stop();
    conns.iter().for_each(|conn| conn.stale_rst());
    let others = peer.hold(80, LIMIT);
    let seen = lab.client_sees(|| {
        daemon.cont();
        await_repair(&lab, &daemon, &conns);
        // What an answer would do to the entry is repaired again, and again.
        thread::sleep(Duration::from_millis(100));
    });
    assert!(seen.is_empty(), "the client sees {seen:?}");
    assert_eq!(daemon.log().matches("revive").count(), LIMIT, "once is enough");
    assert_eq!(peer.admitted(80, TRIES), 0, "six count");
    others.iter().for_each(|conn| conn.rst(0));
    assert_eq!(peer.admitted(80, TRIES), 0, "three count");
}

#[test]
fn a_limit_that_resets_answers_no_nudge() {
    let limit =
        format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j REJECT --reject-with tcp-reset");
    silent_over_the_limit("auto", "198.51.100.7", "iptables-restore", &input(&[&limit]));
}

#[test]
fn a_limit_that_rejects_answers_no_nudge() {
    let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j REJECT");
    silent_over_the_limit("auto", "198.51.100.7", "iptables-restore", &input(&[&limit]));
}

#[test]
fn a_limit_that_resets_answers_no_nudge_over_ipv6() {
    let limit =
        format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT6} -j REJECT --reject-with tcp-reset");
    silent_over_the_limit("ingress", "2001:db8:1::7", "ip6tables-restore", &input(&[&limit]));
}

#[test]
fn a_limit_that_rejects_answers_no_nudge_over_ipv6() {
    let rule = "tcp dport 80 ct state new add @web6 { ip6 saddr ct count over 3 } \
                reject with icmpx admin-prohibited";
    silent_over_the_limit("ingress", "2001:db8:1::7", "nft -f -", &chain(INPUT, rule));
}

#[test]
fn a_limit_that_resets_answers_no_nudge_by_loopback() {
    let limit =
        format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j REJECT --reject-with tcp-reset");
    silent_over_the_limit("loopback", "198.51.100.7", "iptables-restore", &input(&[&limit]));
}

#[test]
fn a_limit_that_resets_before_conntrack_is_done_answers_no_nudge() {
    let rule = "tcp dport 80 ct state new add @web { ip saddr ct count over 3 } \
                reject with tcp reset";
    let rules = chain("prerouting priority -150", rule);
    silent_over_the_limit("ingress", "198.51.100.7", "nft -f -", &rules);
}

fn silent_behind_a_syn_proxy(route: &str) {
    let Some(lab) = Lab::new() else { return };
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
    lab.server.feed("iptables-restore", &syn_proxy(&[]));
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &["--recount", route]);
    let peer = lab.peer("198.51.100.7");
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    daemon.stop();
    conns.iter().for_each(|conn| conn.stale_rst());
    let seen = lab.client_sees(|| {
        daemon.cont();
        await_repair(&lab, &daemon, &conns);
    });
    assert!(seen.is_empty(), "the client sees {seen:?}");
}

#[test]
fn a_syn_proxy_answers_no_nudge() {
    silent_behind_a_syn_proxy("auto");
}

#[test]
fn a_syn_proxy_answers_no_nudge_by_ingress() {
    silent_behind_a_syn_proxy("ingress");
}

/// What bears the name of ctkeep or of its making in the server's namespace.
fn traces(lab: &Lab) -> Vec<String> {
    ["ip -o link show", "nft list tables", "tc qdisc show", "tc filter show dev eth0 ingress"]
        .iter()
        .flat_map(|command| {
            let text = lab.server.output(command);
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        })
        .filter(|line| line.contains("ctkeep") || line.contains("clsact"))
        .collect()
}

#[test]
fn nothing_is_left_of_a_daemon_that_is_killed() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &[]);
    let mut conn = lab.peer("198.51.100.7").connect(80).expect("below the limit");
    lab.half_close(&mut conn);
    conn.stale_rst();
    wait_for("repair", SOON, || daemon.logged("revive"));
    assert!(traces(&lab).len() >= 3, "device, table, qdisc: {:?}", traces(&lab));
    daemon.kill();
    assert_eq!(traces(&lab), Vec::<String>::new());
    // And the next one starts as if nothing had been.
    let daemon = lab.daemon(PROGRAM, &["--recount", "ingress"]);
    assert!(daemon.logged("recount=[\"ingress\"] seal=true"), "{}", daemon.log());
}

#[test]
fn a_device_name_that_is_taken_leaves_the_loopback_route() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    lab.server.run("ip link add ctkeep0 type veth peer name other");
    let daemon = lab.daemon(PROGRAM, &[]);
    assert!(daemon.logged("is the name taken (ip link show ctkeep0)"), "{}", daemon.log());
    assert!(daemon.logged("recount=[\"loopback\"] seal=true"), "{}", daemon.log());
    let peer = lab.peer("198.51.100.7");
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    daemon.stop();
    conns.iter().for_each(|conn| conn.stale_rst());
    peer.syn_only(80).rst(0);
    daemon.cont();
    await_repair(&lab, &daemon, &conns);
    assert_eq!(peer.admitted(80, TRIES), 0);
}

#[test]
fn a_device_name_that_is_taken_ends_a_daemon_that_must_have_the_ingress_route() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80");
    lab.server.run("ip link add ctkeep0 type veth peer name other");
    let (code, _, err) = lab.ctkeep(PROGRAM, &["run", "--recount", "ingress"]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("is the name taken (ip link show ctkeep0)"), "{err}");
    // The stranger's device is as it was.
    assert!(lab.server.output("ip -o link show ctkeep0").contains("ctkeep0@other"));
}

#[test]
fn a_table_name_that_another_process_owns_is_said_and_left_alone() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let path = lab.server.path();
    let table = || Table::create("same", &TableSpec::default()).expect("a table");
    let first = lab.server.within(table);
    let (code, _, err) =
        lab.ctkeep(PROGRAM, &["run", "--netns", &path, "--recount", "ingress", "--device", "same"]);
    assert_ne!(code, 0, "{err}");
    assert!(err.contains("another process owns table same"), "{err}");
    assert!(lab.server.output("nft list tables").contains("inet same"));
    drop(first);
}
