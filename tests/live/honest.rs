//! Not a packet is kept from TCP: what ctkeep does about those who fool conntrack, and about what
//! conntrack forgets, leaves every connection able to end, also where rules drop all that is not
//! established.

use crate::lab;
use std::thread;
use std::time::Duration;

use crate::lab::{Peer, RawConn, Segment, holds_within, kernel};
use crate::scene::{CLIENT, LIMIT, Limiter, PORT, SOON, Scene, TRIES, contrast};

const CLIENT6: &str = "2001:db8:1::7";

/// Makes conntrack believe, so many times, that connections which are open, and stay so, have
/// ended.
fn fool(scene: &Scene, conns: &[RawConn], times: usize) {
    for time in 1..=times {
        for conn in conns {
            // The FIN has a hole before it, so TCP does not take it.
            conn.fin_at(50);
            conn.rst_at(kernel::stale_rst());
        }
        if time == 1 {
            scene.await_repair("revive", conns);
        }
        // From the second time on nothing may come of it.
        thread::sleep(Duration::from_millis(50));
    }
}

/// A source whose packets conntrack no longer believes, behind rules that drop what is not
/// established.
fn closes_as_ever(source: &str, shift: u32, args: &[&str]) {
    let Some(mut scene) = Scene::with_source(Limiter::Strict, source) else { return };
    scene.guard(args);
    let mut conns = scene.established();
    fool(&scene, &conns, 3);
    // An RST that TCP takes, with an ACK and without, and a FIN.
    let mut half_closed = conns.pop().expect("a connection");
    half_closed.fin();
    assert!(half_closed.await_ack(), "the FIN has not reached TCP");
    assert_eq!(scene.lab.socket_state(&half_closed).as_deref(), Some("close-wait"));
    assert!(scene.is_counted(&half_closed), "the FIN has reached conntrack");
    for (conn, flags) in conns.iter().zip([lab::RST, lab::RST | lab::ACK]) {
        scene.peer.send(&conn.segment(flags, 0));
    }
    // Without an ACK the acknowledgement number is any, on either side of what the server has sent.
    let ack = half_closed.segment(lab::RST, 0).ack;
    let last = Segment { ack: ack.wrapping_add(shift), ..half_closed.segment(lab::RST, 0) };
    for conn in &conns {
        let gone = holds_within(SOON, || scene.lab.socket_state(conn).is_none());
        assert!(gone, "the RST has not reached TCP:\n{}", scene.daemon().log());
    }
    scene.peer.send(&last);
    let over = holds_within(SOON, || scene.open_sockets() == 0);
    assert!(over, "the last RST has not reached TCP:\n{}", scene.daemon().log());
    assert_free(&scene.peer, "places of connections that are over stay taken");
}

fn assert_free(peer: &Peer, what: &str) {
    let mut most = 0;
    let free = holds_within(SOON, || {
        let conns = peer.open_promptly(PORT, LIMIT + 2);
        conns.iter().for_each(|conn| conn.rst_at(0));
        most = most.max(conns.len());
        most >= LIMIT
    });
    assert!(free, "{what}: {most}");
    assert_eq!(most, LIMIT, "more than the limit");
}

#[test]
fn who_has_fooled_conntrack_can_close_under_strict_rules() {
    closes_as_ever(CLIENT, 0x7000_0000, &["--events", "nflog"]);
    closes_as_ever(CLIENT, 0x9000_0000, &["--events", "nflog"]);
}

#[test]
fn who_has_fooled_conntrack_can_close_under_strict_rules_over_ipv6() {
    closes_as_ever(CLIENT6, 0x7000_0000, &["--events", "nflog"]);
}

/// What takes the entries of all connections away, without any doing of their peer.
const FORGOTTEN: [(&str, &str); 3] = [
    ("flush", "conntrack -F"),
    // As an early drop under a full table does, and the end of a short `timeout_established`.
    ("early drop or idle timeout", "conntrack -D -p tcp --dport 80"),
    ("reload of the limit", "nft flush set inet scene v4"),
];

/// Forgetting is no offence, however often: nothing is hidden of the client, and it closes its
/// connections as ever, under rules that drop what is neither new nor established.
#[test]
fn what_was_forgotten_counts_against_nobody() {
    for (what, command) in FORGOTTEN {
        let limiter = if what.starts_with("reload") { Limiter::NftSet } else { Limiter::Strict };
        let Some(mut scene) = Scene::new(limiter) else { return };
        let mut conns = scene.established();
        // Its first deep sweep sees that they are tracked.
        scene.guard(&["--sweep-interval", "200ms", "--deep-interval", "500ms"]);
        for round in 1..=2 {
            let before = acted(&scene);
            // Nothing to delete, where ctkeep has been asked for what is there no more.
            let _ = scene.lab.server.try_run(command);
            let again = holds_within(SOON, || acted(&scene) >= before + LIMIT);
            assert!(again, "{what}, round {round}: no repair\n{}", scene.daemon().log());
        }
        assert!(!scene.hides(), "{what}: counted as an offence");
        conns.iter_mut().for_each(RawConn::fin);
        assert!(conns.iter_mut().all(RawConn::await_ack), "{what}: a FIN has not reached TCP");
        scene.server.close_all();
        conns.iter_mut().for_each(|conn| {
            assert!(conn.await_fin(), "{what}: no FIN of the server");
            conn.ack_all();
        });
        let over = holds_within(SOON, || scene.open_sockets() == 0);
        assert!(over, "{what}: sockets are left");
        // The control: the same client, once it fools conntrack.
        let conns = scene.established();
        fool(&scene, &conns, 1);
        let hidden = holds_within(SOON, || scene.hides());
        assert!(hidden, "{what}: nothing is hidden of one that fools conntrack");
    }
}

/// How often a connection was put back or shown again.
fn acted(scene: &Scene) -> usize {
    let log = scene.daemon().log();
    let all = log.lines().filter(|line| line.contains("acted"));
    all.filter(|line| line.contains("\"reinsert\"") || line.contains("\"recount\"")).count()
}

/// An honest client whose RSTs a rule drops.
#[test]
fn an_rst_that_a_rule_drops_costs_and_gives_nothing() {
    // Places are taken exactly as long as the sockets live.
    let result = contrast(Limiter::Connlimit, CLIENT, &["--events", "nflog"], |scene| {
        scene.lab.server.run("iptables -A INPUT -p tcp --tcp-flags RST RST -j DROP");
        let conns = scene.established();
        conns.iter().for_each(|conn| conn.rst_at(0));
        scene.await_repair("revive", &conns);
        let during = scene.open(TRIES).len();
        scene.server.reset_all();
        let mut after = 0;
        holds_within(SOON, || {
            after = after.max(scene.open(TRIES).len());
            after >= LIMIT
        });
        (during, after)
    });
    let Some(result) = result else { return };
    assert_eq!((result.without.0, result.with), (LIMIT, (0, LIMIT)), "{result:?}");
}
