//! Sealed: a connection that was revived once cannot be closed in conntrack by any further stale
//! RST, and is given back as soon as its socket is gone.

use std::time::Duration;

use crate::lab::rules::{CONNLIMIT, INPUT, chain, input};
use crate::lab::{
    ACK, Daemon, FIN, Lab, Peer, RST, RawConn, Server, wait_for, with_urgent_pointer,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const TRIES: usize = LIMIT + 2;
const SOON: Duration = Duration::from_secs(10);

/// Offsets that TCP does not take for a reset.
const STALE: [i64; 5] = [-1, -5, 6, 100, 200_000];

/// Three connections that were revived, hence are sealed.
struct Scene {
    lab: Lab,
    server: Server,
    daemon: Daemon,
    peer: Peer,
    conns: Vec<RawConn>,
}

impl Scene {
    fn sealed(tool: &str, rules: &str) -> Option<Self> {
        Self::with_source("198.51.100.7", tool, rules)
    }

    fn with_source(source: &str, tool: &str, rules: &str) -> Option<Self> {
        let lab = Lab::new()?;
        lab.server.feed(tool, rules);
        let server = lab.serve("[::]:80");
        let daemon = lab.daemon(PROGRAM, &[]);
        let peer = lab.peer(source);
        let mut conns = peer.hold(80, LIMIT);
        conns.iter_mut().for_each(|conn| lab.half_close(conn));
        wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
        conns.iter().for_each(|conn| conn.stale_rst());
        let scene = Self { lab, server, daemon, peer, conns };
        wait_for("seal", SOON, || {
            scene.entries() == ["ESTABLISHED"; LIMIT] && scene.revived() == LIMIT
        });
        Some(scene)
    }

    fn entries(&self) -> Vec<String> {
        let entries = self.lab.entries();
        let state = |conn: &RawConn| {
            let entry = entries.iter().find(|entry| entry.orig == (conn.client, conn.server));
            entry.map(|entry| entry.state.clone()).unwrap_or_default()
        };
        self.conns.iter().map(state).collect()
    }

    fn timeouts(&self) -> Vec<u64> {
        self.conns.iter().filter_map(|conn| self.lab.entry(conn)).map(|e| e.timeout).collect()
    }

    fn revived(&self) -> usize {
        self.daemon.log().matches("\"revive\"").count()
    }
}

fn stale_rsts_change_nothing(source: &str, tool: &str, rules: &str) {
    let Some(scene) = Scene::with_source(source, tool, rules) else { return };
    for offset in STALE {
        for _ in 0..20 {
            scene.conns.iter().for_each(|conn| conn.rst(offset));
        }
        assert_eq!(scene.entries(), ["ESTABLISHED"; LIMIT], "after offset {offset}");
    }
    assert_eq!(scene.peer.admitted(80, TRIES), 0);
    assert_eq!(scene.revived(), LIMIT, "nothing was left to revive");
    assert_eq!(scene.lab.sockets("close-wait"), LIMIT);
}

#[test]
fn stale_rsts_change_nothing_under_connlimit_of_syns() {
    let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    stale_rsts_change_nothing("198.51.100.7", "iptables-restore", &input(&[&limit]));
}

#[test]
fn stale_rsts_change_nothing_under_connlimit_of_every_packet() {
    let limit = format!("INPUT -p tcp --dport 80 {CONNLIMIT} -j DROP");
    stale_rsts_change_nothing("198.51.100.7", "iptables-restore", &input(&[&limit]));
}

#[test]
fn stale_rsts_change_nothing_under_ct_count_in_a_set() {
    let limit = "tcp dport 80 add @web { ip saddr ct count over 3 } drop";
    stale_rsts_change_nothing("198.51.100.7", "nft -f -", &chain(INPUT, limit));
}

#[test]
fn stale_rsts_change_nothing_under_plain_ct_count() {
    let limit = "tcp dport 80 ct state new ct count over 3 drop";
    stale_rsts_change_nothing("198.51.100.7", "nft -f -", &chain(INPUT, limit));
}

#[test]
fn stale_rsts_change_nothing_over_ipv6() {
    let limit = "tcp dport 80 add @web6 { ip6 saddr ct count over 3 } drop";
    stale_rsts_change_nothing("2001:db8:1::7", "nft -f -", &chain(INPUT, limit));
}

fn by_syns() -> Option<Scene> {
    let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
    Scene::sealed("iptables-restore", &input(&[&limit]))
}

#[test]
fn an_exact_rst_closes_the_socket_and_the_entry_is_released() {
    let Some(scene) = by_syns() else { return };
    scene.conns.iter().for_each(|conn| conn.rst(0));
    wait_for("end of the sockets", SOON, || scene.lab.sockets("close-wait") == 0);
    wait_for("release", Duration::from_secs(2), || {
        scene.entries().iter().all(|state| matches!(state.as_str(), "" | "CLOSE" | "TIME_WAIT"))
    });
    assert_eq!(scene.peer.admitted(80, TRIES), LIMIT);
}

#[test]
fn a_close_of_the_server_gives_the_slots_back() {
    let Some(mut scene) = by_syns() else { return };
    scene.server.close_all();
    for conn in &mut scene.conns {
        assert!(conn.await_fin(), "the server's FIN");
        conn.ack_all();
    }
    wait_for("end of the sockets", SOON, || {
        scene.lab.all_sockets().iter().all(|socket| socket.state == "listen")
    });
    wait_for("release", Duration::from_secs(2), || {
        scene.entries().iter().all(|state| matches!(state.as_str(), "" | "CLOSE" | "TIME_WAIT"))
    });
    assert_eq!(scene.peer.admitted(80, TRIES), LIMIT);
}

/// What is hidden says by its urgent pointer what it was. A packet that comes in so is none of them: here it
/// would be an exact RST, or a FIN.
#[test]
fn what_looks_like_a_hidden_packet_is_none() {
    const OF_THE_TUPLE: [u16; 3] = [0x0001, 0x0004, 0xfff3];
    const OF_THE_SHIELD: [u16; 3] = [0xffe0, 0xffe3, 0xffd3];
    let Some(scene) = by_syns() else { return };
    for conn in &scene.conns {
        let ack = conn.segment(ACK, 0).to_packet();
        for (pointer, flag) in
            OF_THE_TUPLE.map(|it| (it, false)).into_iter().chain(OF_THE_SHIELD.map(|it| (it, true)))
        {
            scene.peer.send_packet(&with_urgent_pointer(&ack, pointer, flag));
        }
    }
    assert_eq!(scene.lab.sockets("close-wait"), LIMIT);
    assert_eq!(scene.entries(), ["ESTABLISHED"; LIMIT]);
    assert_eq!(scene.lab.counter("TcpInCsumErrors"), 0);
    assert_eq!(scene.peer.admitted(80, TRIES), 0);
}

/// A pointer of its own, and the flag for it, hide nothing from being hidden, and leave the checksum right.
#[test]
fn urgent_fins_and_rsts_are_hidden_and_reach_tcp() {
    let Some(mut scene) = by_syns() else { return };
    let heard = scene.lab.counter("TcpInSegs");
    for (pointer, flag) in [(1, true), (0x20, true), (0xffff, true), (7, false)] {
        for conn in &mut scene.conns {
            let fin = conn.segment(FIN | ACK, -1).to_packet();
            scene.peer.send_packet(&with_urgent_pointer(&fin, pointer, flag));
        }
        assert_eq!(scene.entries(), ["ESTABLISHED"; LIMIT], "after a FIN with {pointer} {flag}");
    }
    assert_eq!(scene.lab.counter("TcpInSegs") - heard, 4 * LIMIT as u64);
    assert_eq!(scene.lab.counter("TcpInCsumErrors"), 0);
    assert_eq!(scene.peer.admitted(80, TRIES), 0);
    for conn in &scene.conns {
        let rst = conn.segment(RST | ACK, 0).to_packet();
        scene.peer.send_packet(&with_urgent_pointer(&rst, 0xfffe, false));
    }
    wait_for("end of the sockets", SOON, || scene.lab.sockets("close-wait") == 0);
    assert_eq!(scene.lab.counter("TcpInCsumErrors"), 0);
}

/// RSTs beyond the window shorten the timeout of a sealed entry and those inside of it lengthen it,
/// without any event: the shield keeps them from it, or the sweep finds both.
#[test]
fn a_timeout_that_stale_rsts_changed_is_set_right() {
    let Some(scene) = by_syns() else { return };
    for offset in [200_000, 100] {
        scene.daemon.stop();
        scene.conns.iter().for_each(|conn| conn.rst(offset));
        scene.daemon.cont();
        wait_for("renewal", Duration::from_secs(5), || {
            scene.timeouts().iter().all(|timeout| (30..=60).contains(timeout))
        });
    }
    assert_eq!(scene.peer.admitted(80, TRIES), 0);
}
