//! What comes before a handshake ends, or begins another on the same tuple.

use std::thread;
use std::time::Duration;

use super::dropped::Dropped;
use super::{ATTACKER, ATTACKER6, LONG_PAUSE, PORT, Scene, assert_bounded, contrast};
use crate::lab::{self, Lab, RawConn, Segment};

/// Begins three connections, has the RST come before the handshake ends, and ends it 20 ms later.
fn reset_in_the_handshake(scene: &mut Scene, dropped: Dropped) -> Vec<RawConn> {
    let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
    let begun = scene.attacker.half_open(begun, Duration::from_millis(10));
    begun.iter().for_each(|conn| scene.attacker.send_packet(&dropped.rst(conn)));
    thread::sleep(Duration::from_millis(20).max(scene.pause));
    begun
}

/// Begins three connections, acknowledges what was never sent, and later what was.
fn acknowledge_wrongly(scene: &mut Scene, later: Duration) {
    let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
    let begun = scene.attacker.half_open(begun, Duration::from_millis(10));
    for conn in &begun {
        let wrong = conn.segment(lab::ACK, 0);
        scene.attacker.send(&Segment { ack: wrong.ack.wrapping_sub(100), ..wrong });
    }
    thread::sleep(later);
    begun.iter().for_each(RawConn::ack);
}

/// TCP answers an ACK of what it has never sent by an RST of its own, which conntrack believes, and goes on
/// to wait for the end of the handshake.
#[test]
fn no_rst_of_the_server_in_the_handshake_frees_a_slot() {
    let counts = contrast(
        ATTACKER,
        |_| {},
        24,
        8,
        |scene| acknowledge_wrongly(scene, Duration::from_millis(20).max(scene.pause)),
    );
    assert_bounded("an ACK of what was never sent", &counts, 24);
}

/// The same of a server that has nothing of the handshake: the wrong ACK has made conntrack take it for
/// over before the RST ended it.
#[test]
fn no_rst_of_the_server_frees_a_slot_while_cookies_are_sent() {
    let always = |lab: &Lab| lab.server.sysctl("net/ipv4/tcp_syncookies", "2");
    let counts = contrast(ATTACKER, always, 15, 5, |scene| acknowledge_wrongly(scene, LONG_PAUSE));
    assert_bounded("an ACK of what was never sent, cookies", &counts, 15);
}

/// TCP gets none of these RSTs, so it takes the end of the handshake.
#[test]
fn no_rst_in_the_handshake_frees_a_slot() {
    for (source, dropped) in [(ATTACKER, Dropped::SourceRoute), (ATTACKER6, Dropped::Md5)] {
        let counts = contrast(
            source,
            |_| {},
            24,
            8,
            |scene| {
                let begun = reset_in_the_handshake(scene, dropped);
                begun.iter().for_each(RawConn::ack);
            },
        );
        assert_bounded(&format!("{dropped:?} in the handshake"), &counts, 24);
    }
}

/// A server that sends SYN cookies has nothing that RSTs could end: it takes the end of the handshake
/// minutes later, and all that were collected at once.
#[test]
fn no_rst_frees_a_slot_while_cookies_are_sent() {
    for (source, times) in [(ATTACKER, 1), (ATTACKER6, 1), (ATTACKER, 2)] {
        let always = |lab: &Lab| lab.server.sysctl("net/ipv4/tcp_syncookies", "2");
        let counts = contrast(source, always, 24, 1, |scene| {
            let mut all = Vec::new();
            for _ in 0..8 {
                let begun = reset_in_the_handshake(scene, Dropped::LastRule);
                for _ in 1..times {
                    begun.iter().for_each(|conn| conn.rst(0));
                    thread::sleep(Duration::from_millis(20).max(scene.pause));
                }
                all.extend(begun);
            }
            all.iter().for_each(RawConn::ack);
        });
        assert_bounded(&format!("cookies, RSTs: {times}"), &counts, 24);
    }
}

/// What ends by an RST can be opened once more by the ACK that ended its handshake: its SYN cookie is good for
/// minutes, and the limit sees no SYN.
#[test]
fn a_cookie_that_is_good_still_opens_no_connection_past_the_limit() {
    for source in [ATTACKER, ATTACKER6] {
        let always = |lab: &Lab| lab.server.sysctl("net/ipv4/tcp_syncookies", "2");
        let counts = contrast(source, always, 24, 8, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let new = scene.attacker.complete(begun, Duration::from_millis(50));
            new.iter().for_each(|conn| conn.rst(0));
            thread::sleep(Duration::from_millis(20).max(scene.pause));
            new.iter().for_each(RawConn::ack);
            scene.held.extend(new);
            thread::sleep(Duration::from_millis(20));
        });
        assert_bounded("a cookie once more", &counts, 24);
    }
}

/// The RST closes the entry, a SYN on the same tuple begins another, and since TCP has just answered one
/// of those, no packet of the server makes it one that has had an answer; then an RST closes that.
#[test]
fn a_syn_on_the_tuple_of_a_closed_entry_frees_no_slot() {
    const APART: Duration = Duration::from_millis(5);
    for (source, wait) in [(ATTACKER, 20), (ATTACKER6, 2)] {
        let rst = match source {
            ATTACKER => Dropped::SourceRoute,
            _ => Dropped::RoutingHeader,
        };
        let counts = contrast(
            source,
            |_| {},
            15,
            8,
            |scene| {
                scene.held.iter().for_each(RawConn::syn);
                thread::sleep(APART);
                for conn in &scene.held {
                    scene.attacker.send_packet(&rst.rst(conn));
                    conn.syn();
                }
                thread::sleep(Duration::from_millis(wait));
                for conn in &scene.held {
                    conn.rst_at(100_000);
                    scene.attacker.send_packet(&rst.rst(conn));
                }
                let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
                let new = scene.attacker.complete(begun, APART);
                scene.held.extend(new);
                thread::sleep(LONG_PAUSE / 3);
            },
        );
        assert_bounded(&format!("a SYN on the same tuple, {wait} ms"), &counts, 15);
    }
}

/// Conntrack ignores a SYN of the connection, and takes what says to be the server's answer to it for the
/// beginning of another handshake, whose entry is soon forgotten.
#[test]
fn an_answer_of_an_impostor_to_a_syn_frees_no_slot() {
    // The kernel's own is 60 s, two deep sweeps.
    const TIMEOUT: &str = "net/netfilter/nf_conntrack_tcp_timeout_syn_recv";
    let counts = contrast(
        ATTACKER,
        |lab| lab.server.sysctl(TIMEOUT, "1"),
        9,
        4,
        |scene| {
            // TCP answers the first; behind an answer conntrack has forgotten the SYN.
            scene.held.iter().for_each(RawConn::syn);
            thread::sleep(Duration::from_millis(5));
            for conn in &scene.held {
                conn.syn();
                let Segment { seq, .. } = conn.segment(lab::SYN, 100_000);
                let (source, destination) = (conn.server, conn.client);
                let (ack, flags) = (seq.wrapping_add(1), lab::SYN | lab::ACK);
                let answer =
                    Segment { source, destination, seq: 1, ack, flags, payload: Vec::new() };
                scene.attacker.send_packet(&answer.to_packet());
            }
            thread::sleep(Duration::from_millis(1100));
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let new = scene.attacker.complete(begun, Duration::from_millis(5));
            scene.held.extend(new);
        },
    );
    assert_bounded("an impostor's answer to a SYN", &counts, 9);
}
