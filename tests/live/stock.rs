//! What the stock kernel does, without ctkeep: the positive controls of all live tests.
//!
//! When one of these fails, the kernel has changed and docs/ must say so; the other live tests
//! prove something only as long as these pass.

use crate::lab;
use std::net::Ipv4Addr;
use std::time::Duration;

use crate::lab::{Lab, Peer, RawConn, kernel, wait_for};

const LIMIT: u32 = 3;
const TRIES: usize = 10;

/// A limit of three, and a server that holds what it gets.
struct Scene {
    lab: Lab,
    server: lab::Server,
    peer: Peer,
}

impl Scene {
    fn new() -> Option<Self> {
        Self::with_source("198.51.100.7")
    }

    fn with_source(source: &str) -> Option<Self> {
        let lab = Lab::new()?;
        lab.connlimit(80, LIMIT);
        let server = lab.serve("[::]:80");
        let peer = lab.peer(source);
        Some(Self { lab, server, peer })
    }

    /// Opens ten connections one after another, each half-closed and then followed by `trick`.
    /// Returns those that were admitted.
    fn attack(&self, trick: impl Fn(&mut RawConn)) -> Vec<RawConn> {
        let mut admitted = Vec::new();
        for _ in 0..TRIES {
            let Some(mut conn) = self.peer.connect(80) else {
                // Refused once is refused for good: nothing changes between two tries.
                break;
            };
            self.lab.half_close(&mut conn);
            trick(&mut conn);
            admitted.push(conn);
        }
        admitted
    }
}

/// An RST after the server has acknowledged the FIN.
fn rst_after_ack(conn: &mut RawConn, offset: i64) {
    assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
    conn.rst(offset);
}

/// A stale RST frees the slot in the limiter, where conntrack believes it, and leaves the socket
/// where it is.
fn assert_offset_bypasses(offset: i64) {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let admitted = scene.attack(|conn| rst_after_ack(conn, offset));
    let expected = if kernel::believes_rst(offset) { TRIES } else { 3 };
    assert_eq!(admitted.len(), expected, "offset {offset}");
    assert_eq!(scene.lab.sockets("close-wait"), expected);
    assert_eq!(scene.server.held(), expected);
}

/// An exact RST ends socket and entry alike: the slot is rightly free. Where conntrack does not
/// believe it, the slot stays taken.
fn assert_offset_destroys(offset: i64) {
    let Some(scene) = Scene::new() else { return };
    let admitted = scene.attack(|conn| rst_after_ack(conn, offset));
    let expected = if kernel::believes_rst(offset) { TRIES } else { 3 };
    assert_eq!(admitted.len(), expected, "offset {offset}");
    wait_for("end of the sockets", Duration::from_secs(5), || scene.lab.sockets("close-wait") == 0);
}

#[test]
fn half_closed_connections_count_as_long_as_nothing_disturbs_them() {
    let Some(mut scene) = Scene::new() else {
        return;
    };
    let admitted = scene.attack(|_| {});
    assert_eq!(admitted.len(), 3);
    assert_eq!(scene.peer.admitted(80, TRIES), 0);
    assert_eq!(scene.lab.sockets("close-wait"), 3);
    assert_eq!(scene.server.held(), 3);
}

#[test]
fn an_rst_one_before_the_fin_bypasses_the_limit() {
    assert_offset_bypasses(-1);
}

#[test]
fn an_rst_five_before_the_fin_bypasses_the_limit() {
    assert_offset_bypasses(-5);
}

#[test]
fn an_rst_six_after_the_fin_bypasses_the_limit() {
    assert_offset_bypasses(6);
}

#[test]
fn an_rst_a_hundred_after_the_fin_bypasses_the_limit() {
    assert_offset_bypasses(100);
}

#[test]
fn an_rst_far_outside_the_window_bypasses_the_limit() {
    assert_offset_bypasses(200_000);
}

#[test]
fn an_rst_at_the_fin_destroys_the_socket() {
    assert_offset_destroys(0);
}

#[test]
fn an_rst_just_after_the_fin_destroys_the_socket() {
    assert_offset_destroys(1);
}

#[test]
fn the_same_over_ipv6() {
    let Some(scene) = Scene::with_source("2001:db8:1::7") else {
        return;
    };
    let admitted = scene.attack(|conn| conn.stale_rst());
    assert_eq!(admitted.len(), TRIES);
    assert_eq!(scene.lab.sockets("close-wait"), TRIES);
}

#[test]
fn a_repeated_fin_bypasses_the_limit_without_any_rst() {
    let Some(scene) = Scene::new() else { return };
    let admitted = scene.attack(|conn| {
        conn.fin_again();
        wait_for("TIME_WAIT", Duration::from_secs(5), || {
            scene.lab.entry_state(conn).as_deref() == Some("TIME_WAIT")
        });
    });
    assert_eq!(admitted.len(), TRIES);
    assert_eq!(scene.lab.sockets("close-wait"), TRIES);
}

#[test]
fn waiting_for_the_close_wait_timeout_bypasses_the_limit() {
    let Some(scene) = Scene::new() else { return };
    let sysctl = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    scene.lab.server.sysctl(sysctl, "3");
    for batch in 1..=2 {
        let mut admitted = scene.peer.open(80, TRIES);
        assert_eq!(admitted.len(), 3, "batch {batch}");
        for conn in &mut admitted {
            scene.lab.half_close(conn);
            // The entry turns from FIN_WAIT (120 s) to CLOSE_WAIT with the server's answer.
            assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
        }
        wait_for("end of the entries", Duration::from_secs(10), || scene.lab.entries().is_empty());
    }
    assert_eq!(scene.lab.sockets("close-wait"), 6);
}

/// The SYN of a source that is new to an xt limit looks at the lists that it passes on the way to its place
/// (`insert_tree()`), in one of 256 trees: what is closed just then is forgotten for good.
#[test]
fn syns_of_others_throw_a_closed_connection_off_its_list() {
    /// So many more get in of a source that holds its limit, one of which was closed for a moment.
    fn admitted(strangers: u32) -> Option<usize> {
        let scene = Scene::new()?;
        let mut conns = scene.peer.hold(80, LIMIT as usize);
        let conn = conns.first_mut()?;
        scene.lab.half_close(conn);
        rst_after_ack(conn, kernel::stale_rst());
        let is_closed = || scene.lab.entry_state(conn).as_deref() == Some("CLOSE");
        wait_for("a closed entry", Duration::from_secs(2), is_closed);
        let own = conn.segment(lab::SYN, 0);
        for number in 0..strangers {
            let source = (Ipv4Addr::from(0x0b00_0000 + number), 2000).into();
            scene.peer.send(&lab::Segment { source, ack: 0, ..own.clone() });
        }
        let port = conn.client.port();
        scene.lab.server.run(&format!(
            "conntrack -U -p tcp --orig-src 198.51.100.7 --orig-port-src {port} --state ESTABLISHED --timeout 60"
        ));
        Some(scene.peer.open_promptly(80, 2).len())
    }
    let Some(quiet) = admitted(0) else { return };
    assert_eq!(quiet, 0, "an entry that is right again is counted again");
    assert_eq!(admitted(4000), Some(1), "nobody has looked at the list");
}
