//! A conntrack table without a free place: ctkeep makes nothing worse, says so once, and goes on
//! when there is room again.

use crate::lab;
use std::fs;
use std::thread;
use std::time::Duration;

use crate::lab::{RawConn, passing, wait_for};
use crate::scene::{LIMIT, Limiter, SOON, Scene};

/// The maximum is the machine's and cannot be lowered in a namespace, so a table is filled with
/// as much as that; beyond this it would take too long, and too much memory.
const AFFORDABLE: usize = 300_000;

fn maximum() -> usize {
    let text = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max").expect("a sysctl");
    text.trim().parse().expect("a number")
}

/// Three half-closed connections: one has its entry still, and is closed; the entries of the others are
/// gone, and there is no place for new ones.
///
/// `None` where the kernel itself has dropped the first: it does so with what closes, now and then, in a
/// table that is nearly full.
fn without_place(scene: &Scene, maximum: usize) -> Option<(Vec<RawConn>, Vec<RawConn>)> {
    let mut conns = scene.half_closed();
    thread::sleep(Duration::from_millis(500));
    scene.freeze();
    let gone = conns.split_off(1);
    for conn in &gone {
        let (src, sport) = (conn.client.ip(), conn.client.port());
        scene.lab.server.run(&format!("conntrack -D -p tcp --orig-src {src} --sport {sport}"));
    }
    passing::fill_up(&scene.lab, maximum);
    conns.iter().for_each(|conn| conn.stale_rst());
    conns.iter().all(|conn| scene.lab.entry(conn).is_some()).then_some((conns, gone))
}

fn assert_patient(defence: &str, words: &str) {
    let maximum = maximum();
    if maximum > AFFORDABLE {
        lab::skip(&format!("a table of {maximum} entries takes too long to fill"));
        return;
    }
    let made = (0..3).find_map(|_| {
        let mut scene = Scene::new(Limiter::Connlimit)?;
        scene.guard(&["--defence", defence, "--sweep-interval", "100ms"]);
        without_place(&scene, maximum).map(|conns| (scene, conns))
    });
    let Some((mut scene, (closed, gone))) = made else {
        lab::skip("the kernel drops every connection that closes from a full table");
        return;
    };
    scene.thaw();
    assert_inserts_wait(&mut scene, words, &closed, &gone);
}

fn assert_inserts_wait(scene: &mut Scene, words: &str, closed: &[RawConn], gone: &[RawConn]) {
    // What needs no room is done.
    scene.await_repair("revive", closed);
    lab::wait_for(words, SOON, || scene.daemon().logged(words));
    thread::sleep(Duration::from_secs(2));
    let log = scene.daemon().log();
    assert_eq!(log.matches(words).count(), 1, "said once: {log}");
    assert!(gone.iter().all(|conn| scene.told("reinsert", conn) == 0), "{log}");
    assert!(!log.contains("ERROR"), "{log}");
    // That a repair fails is no offence. Of these nothing is hidden; the kernel drops what they send, as it
    // drops all that has no entry while there is no place for one.
    let rules = scene.lab.server.output("nft list ruleset");
    let sets: Vec<_> = rules.split("set ").collect();
    let hidden = |port: u16| {
        let sets = sets.iter().filter(|set| set.starts_with("fins") || set.starts_with("rsts"));
        sets.into_iter().any(|set| set.contains(&format!(" {port} ")))
    };
    let names = "no set of what is hidden";
    assert!(closed.iter().all(|conn| hidden(conn.client.port())), "{names}: {rules}");
    assert!(!gone.iter().any(|conn| hidden(conn.client.port())), "{rules}");

    scene.lab.server.run("conntrack -F");
    scene.await_repair("reinsert", gone);
    let (over, _) = gone.split_at(1);
    over.iter().for_each(|conn| conn.rst(0));
    let has_ended = || over.iter().all(|conn| scene.lab.socket_state(conn).is_none());
    wait_for("the end of a socket whose repair failed", SOON, has_ended);
    assert_eq!(scene.admitted(), over.len());
    assert_eq!(scene.lab.sockets("close-wait"), LIMIT - over.len());
    let (status, log) = scene.daemon.take().expect("a daemon").term();
    assert!(status.success(), "{log}");
}

#[test]
fn a_full_table_is_told_of_once_and_inserts_are_retried() {
    assert_patient("0", "table full");
}

#[test]
fn a_nearly_full_table_raises_the_defence_and_gets_no_inserts() {
    assert_patient("auto", "defence level changed");
}
