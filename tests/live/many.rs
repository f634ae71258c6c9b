//! Many connections of many sources at once: each source is held at its own limit.

use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Lab, Peer, RawConn, holds_within, wait_for};
use crate::scene::{CTKEEP, Contrast, PORT, SOON};

const SOURCES: usize = 50;
const EACH: usize = 10;
const ALL: usize = SOURCES * EACH;

/// Every source tries at once; how many tries of each were admitted.
fn open_all(peers: &[Peer], each: usize) -> Vec<Vec<RawConn>> {
    thread::scope(|scope| {
        let tries: Vec<_> =
            peers.iter().map(|peer| scope.spawn(|| peer.open_promptly(PORT, each))).collect();
        tries.into_iter().map(|tries| tries.join().expect("no panic")).collect()
    })
}

/// Half-closes all that every source may have, sends a stale RST on each, and tries again.
///
/// Returns what each source was admitted then, and how many sockets are open.
fn play(guarded: bool, trick: impl Fn(&RawConn)) -> Option<(Vec<usize>, usize)> {
    let lab = Lab::new()?;
    lab.connlimit(PORT, EACH.try_into().expect("a small number"));
    let mut server = lab.serve("[::]:80");
    let daemon = guarded.then(|| lab.daemon(CTKEEP, &["--port", "80"]));
    let addresses = (1..=SOURCES).map(|host| {
        let family = if host % 5 == 0 { "2001:db8:1::" } else { "198.51.100." };
        format!("{family}{host}")
    });
    let peers: Vec<_> = addresses.map(|address| lab.peer(&address)).collect();
    let mut conns: Vec<_> = open_all(&peers, EACH).into_iter().flatten().collect();
    assert_eq!(conns.len(), ALL, "connections to begin with");
    conns.iter_mut().for_each(RawConn::fin);
    wait_for("CLOSE_WAIT", SOON, || lab.sockets("close-wait") == ALL);

    let begun = Instant::now();
    conns.iter().for_each(trick);
    let closed = || {
        let entries = lab.entries();
        entries.iter().filter(|entry| entry.state == "CLOSE" || entry.state == "TIME_WAIT").count()
    };
    if let Some(daemon) = &daemon {
        wait_for("all repairs", SOON, || daemon.log().matches("\"revive\"").count() >= ALL);
        wait_for("live entries", SOON, || lab.entries().len() == ALL && closed() == 0);
    } else {
        wait_for("closed entries", SOON, || closed() == ALL);
    }
    println!("guarded {guarded}: settled after {:?}", begun.elapsed());

    let admitted: Vec<_> = open_all(&peers, EACH).iter().map(Vec::len).collect();
    let open = lab.sockets("close-wait") + lab.sockets("established");

    // When the server closes, all of them are welcome again.
    if let Some(daemon) = daemon {
        server.reset_all();
        let free = || lab.entries().iter().all(|entry| entry.state == "CLOSE");
        assert!(holds_within(Duration::from_secs(2), free), "{}", daemon.log());
        let again: usize = open_all(&peers, EACH).iter().map(Vec::len).sum();
        assert_eq!(again, ALL, "after the server has closed");
        let (status, log) = daemon.term();
        assert!(status.success() && !log.contains("ERROR"), "{log}");
    }
    Some((admitted, open))
}

fn assert_each_is_held_at_its_limit(trick: impl Fn(&RawConn)) {
    let Some(without) = play(false, &trick) else { return };
    let with = play(true, &trick).expect("a lab");
    let expected =
        Contrast { without: (vec![EACH; SOURCES], 2 * ALL), with: (vec![0; SOURCES], ALL) };
    assert_eq!(Contrast { without, with }, expected);
}

#[test]
fn five_hundred_stale_rsts_from_fifty_sources_gain_nothing() {
    assert_each_is_held_at_its_limit(|conn| conn.stale_rst());
}

#[test]
fn five_hundred_repeated_fins_from_fifty_sources_gain_nothing() {
    assert_each_is_held_at_its_limit(RawConn::fin_again);
}
