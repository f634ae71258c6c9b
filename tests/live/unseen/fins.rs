//! FINs that conntrack believes and TCP does not take: with a hole before them, of an impostor.

use std::thread;
use std::time::Duration;

use super::dropped::Dropped;
use super::{ATTACKER, ATTACKER6, Attack, PORT, Scene, assert_bounded, contrast};
use crate::lab::RawConn;

/// TCP keeps a FIN with a hole before it, and asks for what is missing each time; between the two the sweeps
/// look for connections that the first has closed, and there are none.
#[test]
fn a_fin_that_comes_again_behind_a_hole_after_some_sweeps_frees_no_slot() {
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(
            source,
            |_| {},
            9,
            3,
            |scene| {
                scene.held.iter().for_each(|conn| conn.fin_at(50));
                thread::sleep(Duration::from_millis(1200));
                scene.held.iter().for_each(|conn| conn.fin_at(50));
                thread::sleep(Duration::from_millis(20));
                let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
                let new = scene.attacker.complete(begun, Duration::from_millis(5));
                scene.held.extend(new);
            },
        );
        assert_bounded("a FIN twice behind a hole", &counts, 9);
    }
}

/// A FIN that says to be the server's, then one of the client's that has a hole before it: to
/// conntrack both sides have closed, and the server's next ACK ends it.
#[test]
fn a_fin_of_an_impostor_frees_no_slot() {
    let play = |args: Option<&[&str]>| {
        let (dropped, source, limit) = (Dropped::SpoofedAnswer, ATTACKER, 3);
        let scene = Scene::new(Attack { dropped, half_closed: false, source, limit }, args)?;
        let conns = scene.attacker.hold(PORT, limit);
        thread::sleep(Duration::from_millis(30));
        conns.iter().for_each(|conn| scene.attacker.send_packet(&dropped.fin(conn, 0)));
        thread::sleep(Duration::from_millis(100));
        conns.iter().for_each(|conn| conn.fin_at(50));
        thread::sleep(Duration::from_millis(100));
        let admitted = scene.attacker.open_promptly(PORT, limit + 2).len();
        assert_eq!(scene.sockets(), limit + admitted, "a socket has ended");
        Some(admitted)
    };
    let Some(stock) = play(None) else { return };
    assert_eq!((stock, play(Some(&["--events", "nflog"]))), (3, Some(0)));
}

/// The same before the handshake ends.
#[test]
fn a_fin_of_an_impostor_in_the_handshake_frees_no_slot() {
    const LATER: Duration = Duration::from_millis(100);
    let play = |args: Option<&[&str]>| {
        let (dropped, source, limit) = (Dropped::SpoofedAnswer, ATTACKER, 3);
        let scene = Scene::new(Attack { dropped, half_closed: false, source, limit }, args)?;
        let begun = (0..limit).map(|_| scene.attacker.syn_only(PORT)).collect();
        let conns = scene.attacker.half_open(begun, LATER);
        conns.iter().for_each(|conn| scene.attacker.send_packet(&dropped.fin(conn, 0)));
        thread::sleep(LATER);
        conns.iter().for_each(RawConn::ack);
        thread::sleep(LATER);
        conns.iter().for_each(|conn| conn.fin_at(50));
        thread::sleep(LATER);
        let admitted = scene.attacker.open_promptly(PORT, limit + 2).len();
        assert_eq!(scene.sockets(), limit + admitted, "a socket has ended");
        Some(admitted)
    };
    let Some(stock) = play(None) else { return };
    assert_eq!((stock, play(Some(&["--events", "nflog"]))), (3, Some(0)));
}
