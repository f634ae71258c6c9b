//! A host that forgets everything after a second, as far as its settings go: what has a socket must not be.

use std::thread;
use std::time::Duration;

use super::{ATTACKER, ATTACKER6, PORT, Scene, assert_bounded, contrast};
use crate::lab::{self, Lab, RawConn};

const ROUNDS: usize = 5;
const GROWN: usize = 15;
/// The kernel has forgotten what was not heard of for so long.
const FORGOTTEN: Duration = Duration::from_millis(1300);

/// A sixth of the time from one deep sweep to the next.
const REPAIRED: Duration = Duration::from_secs(5);

/// All that a client can be waited for.
const TIMEOUTS: [&str; 8] = [
    "established",
    "close_wait",
    "fin_wait",
    "last_ack",
    "syn_recv",
    "max_retrans",
    "unacknowledged",
    "time_wait",
];

fn hasty(lab: &Lab) {
    for timeout in TIMEOUTS {
        lab.server.sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{timeout}"), "1");
    }
}

/// What the client does with the connections that it holds, round by round, before conntrack forgets them.
fn assert_kept(what: &str, act: impl Fn(&mut Scene, Vec<RawConn>) + Sync) {
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, hasty, GROWN, ROUNDS, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let begun = scene.attacker.half_open(begun, Duration::from_millis(20));
            act(scene, begun);
            thread::sleep(FORGOTTEN);
            if scene.daemon.is_some() {
                // Half a second later, on a machine with nothing else to do.
                let is_back = |conn| scene.lab.entry(conn).is_some();
                lab::holds_within(REPAIRED, || scene.held.iter().all(is_back));
            }
        });
        assert_bounded(what, &counts, GROWN);
    }
}

#[test]
fn a_host_that_forgets_idle_connections_at_once_keeps_its_limit() {
    assert_kept("idle", |scene, begun| {
        begun.iter().for_each(RawConn::ack);
        scene.held.extend(begun);
    });
}

/// A packet gives the entry the kernel's timeout again, whatever it had.
#[test]
fn packets_that_shorten_leases_open_no_limit() {
    assert_kept("a byte each, ESTABLISHED", |scene, begun| {
        begun.iter().for_each(RawConn::ack);
        scene.held.extend(begun);
        scene.held.iter_mut().for_each(|conn| conn.send(b"x"));
    });
    assert_kept("an ACK each, CLOSE_WAIT", |scene, mut begun| {
        begun.iter().for_each(RawConn::ack);
        begun.iter_mut().for_each(RawConn::fin);
        scene.held.extend(begun);
        scene.held.iter().for_each(RawConn::ack);
    });
}

#[test]
fn a_host_that_forgets_half_closed_connections_at_once_keeps_its_limit() {
    assert_kept("CLOSE_WAIT", |scene, mut begun| {
        begun.iter().for_each(RawConn::ack);
        begun.iter_mut().for_each(RawConn::fin);
        scene.held.extend(begun);
    });
}

/// The last packet comes when the entry has gone, and is picked up.
#[test]
fn a_handshake_that_ends_when_its_entry_has_gone_keeps_its_place() {
    assert_kept("SYN_RECV", |scene, begun| {
        thread::sleep(FORGOTTEN);
        begun.iter().for_each(RawConn::ack);
        scene.held.extend(begun);
    });
}

/// A FIN behind a hole closes the entry and not the socket, and with what administrators set it is forgotten
/// before a deep sweep.
#[test]
fn a_fin_that_tcp_does_not_take_frees_no_slot() {
    const FORGETS: u64 = 2;
    let forgets = |lab: &Lab| {
        for timeout in ["close_wait", "fin_wait", "last_ack"] {
            let setting = format!("net/netfilter/nf_conntrack_tcp_timeout_{timeout}");
            lab.server.sysctl(&setting, &FORGETS.to_string());
        }
    };
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, forgets, GROWN, ROUNDS, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let new = scene.attacker.complete(begun, Duration::from_millis(50));
            new.iter().for_each(|conn| conn.fin_at(100));
            scene.held.extend(new);
            thread::sleep(Duration::from_millis(FORGETS * 1000 + 300));
        });
        assert_bounded("a FIN behind a hole", &counts, GROWN);
    }
}

/// A policy of the rules (`ct timeout`) goes before the kernel's settings.
#[test]
fn a_policy_that_forgets_idle_connections_opens_no_limit() {
    let policy = |lab: &Lab| {
        lab.server.feed(
            "nft -f -",
            "table ip hasty {\n\
             ct timeout short { protocol tcp; l3proto ip; policy = { established: 2, close_wait: 2 }\n }\n\
             chain names { type filter hook prerouting priority 0; ct timeout set \"short\"\n }\n}\n",
        );
    };
    let counts = contrast(ATTACKER, policy, GROWN, ROUNDS, |scene| {
        let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
        let new = scene.attacker.complete(begun, Duration::from_millis(50));
        scene.held.extend(new);
        thread::sleep(Duration::from_millis(2300));
        if scene.daemon.is_some() {
            // As above.
            let is_back = |conn| scene.lab.entry(conn).is_some();
            lab::holds_within(REPAIRED, || scene.held.iter().all(is_back));
        }
    });
    assert_bounded("idle, by a policy", &counts, GROWN);
}
