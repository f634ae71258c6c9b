//! What ctkeep needs for a recount suffers: its device is set down or deleted, its filters are
//! taken away, its table is flushed. It is noticed and mended before the next nudge.

use std::time::Duration;

use crate::lab::rules::{CONNLIMIT, restore};
use crate::lab::{Lab, RawConn, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const TRIES: usize = LIMIT + 2;
const SOON: Duration = Duration::from_secs(10);

/// As of ufw: loopback is accepted first, so that only the ingress route reaches the limit.
fn ufw(lab: &Lab) {
    let rules = restore(
        "filter",
        "INPUT=DROP",
        &[
            "INPUT -i lo -j ACCEPT",
            "INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            &format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP"),
            "INPUT -p tcp --dport 80 -j ACCEPT",
        ],
    );
    lab.server.feed("iptables-restore", &rules);
}

/// Three connections are thrown out of the list, and repaired; how many more are then let in.
fn granted_after(lab: &Lab, damage: &[&str], recount: &str) -> usize {
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &["--recount", recount]);
    // The helper device and its filter are in use before they suffer.
    for (round, source) in ["198.51.100.8", "198.51.100.7"].into_iter().enumerate() {
        let peer = lab.peer(source);
        let mut conns = peer.hold(80, LIMIT);
        conns.iter_mut().for_each(|conn| lab.half_close(conn));
        wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
        if round == 1 {
            damage.iter().for_each(|line| drop(lab.server.try_run(line)));
        }
        daemon.stop();
        conns.iter().for_each(RawConn::stale_rst);
        peer.syn_only(80).rst(0);
        daemon.cont();
        wait_for("repair", SOON, || {
            let alive = conns.iter().filter(|conn| lab.is_alive(conn));
            alive.count() == LIMIT && daemon.log().matches("revive").count() >= (round + 1) * LIMIT
        });
        if round == 1 {
            return peer.admitted(80, TRIES);
        }
    }
    unreachable!()
}

fn holds_in_spite_of(damage: &[&str]) {
    let Some(lab) = Lab::new() else { return };
    ufw(&lab);
    assert_eq!(granted_after(&lab, damage, "auto"), 0);
}

#[test]
fn without_recount_the_bypass_is_there() {
    let Some(lab) = Lab::new() else { return };
    ufw(&lab);
    assert_eq!(granted_after(&lab, &[], "off"), LIMIT);
}

#[test]
fn the_limit_holds_when_the_device_was_set_down() {
    holds_in_spite_of(&["ip link set ctkeep0 down"]);
}

#[test]
fn the_limit_holds_when_the_device_was_set_down_and_up() {
    holds_in_spite_of(&["ip link set ctkeep0 down", "ip link set ctkeep0 up"]);
}

#[test]
fn the_limit_holds_when_the_device_was_deleted() {
    holds_in_spite_of(&["ip link del ctkeep0"]);
}

#[test]
fn the_limit_holds_when_the_queueing_discipline_was_deleted() {
    holds_in_spite_of(&["tc qdisc del dev ctkeep0 ingress"]);
}

#[test]
fn the_limit_holds_when_the_filters_were_deleted() {
    holds_in_spite_of(&["tc filter del dev ctkeep0 ingress"]);
}

#[test]
fn the_limit_holds_when_the_table_was_deleted() {
    let Some(lab) = Lab::new() else { return };
    ufw(&lab);
    // Since 5.12 the table has an owner, and this is refused.
    let granted = granted_after(&lab, &["nft delete table inet ctkeep0"], "auto");
    assert_eq!(granted, 0);
}

/// The interface is deleted and made again: the client is reached by another number.
#[test]
fn the_limit_holds_when_the_interface_was_made_anew() {
    let Some(lab) = Lab::new() else { return };
    ufw(&lab);
    let again = [
        "ip link add br0 address 02:00:00:00:00:01 type bridge",
        "ip link set br0 addrgenmode none",
        "ip link set br0 up",
        "ip addr flush dev eth0",
        "ip link set eth0 master br0",
        "ip addr add 192.0.2.1/24 dev br0",
        "ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev br0",
        "ip route replace 198.51.100.0/24 via 192.0.2.2",
    ];
    again.iter().for_each(|line| lab.server.run(line));
    let damage = [&["ip link del br0"], &again[..]].concat();
    assert_eq!(granted_after(&lab, &damage, "auto"), 0);
}

/// The server's address, and with it the route to the client, is away while the rules are loaded anew: as
/// of a virtual address that moves to another host and back. How many more are let in when it is back, and what
/// was logged while it was away.
fn granted_after_an_absence(lab: &Lab, recount: &str) -> (usize, String) {
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &["--recount", recount, "--deep-interval", "5m"]);
    let peer = lab.peer("198.51.100.7");
    let _conns = peer.hold(80, LIMIT);
    wait_for("entries", SOON, || lab.entries().len() == LIMIT);
    lab.server.run("ip addr del 192.0.2.1/24 dev eth0");
    ufw(lab);
    std::thread::sleep(Duration::from_millis(2500));
    let away = daemon.log();
    [
        "ip addr add 192.0.2.1/24 dev eth0",
        "ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev eth0",
        "ip route replace 198.51.100.0/24 via 192.0.2.2",
    ]
    .iter()
    .for_each(|line| lab.server.run(line));
    std::thread::sleep(Duration::from_secs(5));
    (peer.admitted(80, TRIES), away)
}

#[test]
fn a_recount_that_fails_is_tried_again_when_the_address_is_back() {
    let Some(lab) = Lab::new() else { return };
    ufw(&lab);
    let (granted, away) = granted_after_an_absence(&lab, "auto");
    assert_eq!(granted, 0, "{away}");
    let failed = away.matches("recount failed").count();
    // At once, a second later and two more.
    assert!((LIMIT..=LIMIT * 3).contains(&failed), "{failed} times:\n{away}");
    assert!(!away.contains("acted"), "{away}");
}

#[test]
fn without_recount_the_absence_of_an_address_lets_more_in() {
    let Some(lab) = Lab::new() else { return };
    ufw(&lab);
    assert_eq!(granted_after_an_absence(&lab, "off").0, LIMIT);
}
