//! Not a packet is kept from TCP: what ctkeep does about those who fool conntrack, and about what
//! conntrack forgets, leaves every connection able to end, also where rules drop all that is not
//! established.

mod lab;
#[path = "lab/scene.rs"]
mod scene;

use std::thread;
use std::time::Duration;

use lab::{Peer, RawConn, holds_within};
use scene::{CLIENT, LIMIT, Limiter, PORT, SOON, Scene};

const CLIENT6: &str = "2001:db8:1::7";

/// Makes conntrack believe, so many times, that connections which are open, and stay so, have
/// ended.
fn fool(scene: &Scene, conns: &[RawConn], times: usize) {
    for time in 1..=times {
        for conn in conns {
            // The FIN has a hole before it, so TCP does not take it.
            conn.fin_at(50);
            conn.rst_at(-6);
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
fn closes_as_ever(source: &str, args: &[&str]) {
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
    conns[0].rst_at(0);
    scene.peer.send(&conns[1].segment(lab::RST | lab::ACK, 0));
    for conn in &conns {
        let gone = holds_within(SOON, || scene.lab.socket_state(conn).is_none());
        assert!(gone, "the RST has not reached TCP:\n{}", scene.daemon().log());
    }
    half_closed.rst(0);
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
    closes_as_ever(CLIENT, &["--events", "nflog"]);
}

#[test]
fn who_has_fooled_conntrack_can_close_under_strict_rules_over_ipv6() {
    closes_as_ever(CLIENT6, &["--events", "nflog"]);
}
