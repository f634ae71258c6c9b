//! The packet log: what it reports, when it has no room left, and where it keeps out.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Lab, RawConn, holds_within, wait_for};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use ctkeep::watch::Memory;
use ctkeep::watch::nflog::Watch;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(10);
const SOURCE: &str = "198.51.100.7";

const TIME: Duration = Duration::from_secs(3);
/// A few of the kernel's clock, at a hundred a second.
const TICKS: Duration = Duration::from_millis(30);
const MEMORY: Memory = Memory { most: 16, time: TIME };

/// Every closing connection beyond what is remembered would be one that nobody hears of. These were there
/// before the watch, so their entries have no room for a label.
#[test]
fn a_table_of_closing_connections_that_is_full_says_so() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 1000);
    let _server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(SOURCE);
    let conns = peer.hold(80, 60);
    let mut watch = lab.server.within(|| {
        let ports = HashSet::from([80]);
        Watch::open("ctkeep-test", 4711, &ports, MEMORY).expect("a packet log")
    });
    // Behind a hole: each connection can send many.
    let fins = |conns: &[RawConn]| conns.iter().for_each(|conn| conn.fin_at(50));
    let (some, others) = conns.split_at(10);
    fins(some);
    let drained = watch.drain(1000, |_| {}).expect("the log");
    assert!(!drained.full && drained.logged == 0, "room is left: {drained:?}");
    fins(others);
    let drained = watch.drain(1000, |_| {}).expect("the log");
    assert!(drained.full, "full, and not a word of it: {drained:?}");
    // What is known already is logged all the same; of the rest one FIN a second.
    let began = Instant::now();
    fins(&conns);
    let mut logged = HashSet::new();
    let mut note = |flow| logged.insert(flow);
    watch.drain(1000, |suspect| _ = note(suspect.connection)).expect("the log");
    let most = 16 + usize::try_from(began.elapsed().as_secs()).expect("seconds") + 2;
    assert!((16..=most).contains(&logged.len()), "{} FINs were logged", logged.len());
    let holds = holds_within(SOON, || {
        fins(some);
        let drained = watch.drain(1000, |_| {}).expect("the log");
        thread::sleep(Duration::from_secs(1));
        !drained.full
    });
    assert!(holds, "it stays full when the old ones are forgotten");
}

/// The entry itself remembers: no number of closing connections is too many.
#[test]
fn connections_that_began_under_the_watch_are_all_remembered() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 1000);
    let _server = lab.serve("0.0.0.0:80");
    let mut watch = lab.server.within(|| {
        Watch::open("ctkeep-test", 4711, &HashSet::from([80]), MEMORY).expect("a packet log")
    });
    let conns = lab.peer(SOURCE).hold(80, 60);
    // Behind a hole: each connection can send many.
    conns.iter().for_each(|conn| conn.fin_at(50));
    let drained = watch.drain(1000, |_| {}).expect("the log");
    assert!(!drained.full && drained.logged == 0, "first FINs: {drained:?}");
    // Longer than what is remembered by tuples.
    thread::sleep(TIME + Duration::from_secs(1));
    conns.iter().for_each(|conn| conn.fin_at(60));
    let mut logged = HashSet::new();
    wait_for("all second FINs", SOON, || {
        watch.drain(1000, |suspect| _ = logged.insert(suspect.connection)).expect("the log");
        logged.len() == conns.len()
    });
}

/// The log of packets needs conntrack; a namespace that lives without is not made to have it.
#[test]
fn conntrack_is_not_switched_on_by_the_watch() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("0.0.0.0:80");
    // Sweeps are so rare that none comes before the event.
    let daemon =
        lab.daemon(CTKEEP, &["--port", "80", "--events", "nflog", "--sweep-interval", "1s"]);
    let peer = lab.peer(SOURCE);
    let conns = peer.hold(80, 3);
    thread::sleep(Duration::from_secs(2));
    assert!(conns.iter().all(|conn| lab.entry(conn).is_none()), "{}", daemon.log());
    // Once it is there the watch follows.
    lab.connlimit(80, 3);
    let peer = lab.peer("198.51.100.8");
    let mut conns = peer.hold(80, 3);
    let is_watching = || lab.server.output("nft list ruleset").contains("chain watch");
    wait_for("the watch", SOON, is_watching);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    conns.iter().for_each(RawConn::stale_rst);
    wait_for("repairs by event", SOON, || daemon.logged("trigger=Event"));
    let repaired = || daemon.log().matches("action=\"revive\"").count();
    wait_for("all of them", SOON, || repaired() >= conns.len());
    assert_eq!(peer.admitted(80, 3), 0, "{}", daemon.log());
}

/// Two instances in one namespace, each with containers of its own; or another program's log.
#[test]
fn a_group_that_is_taken_stands_in_nobodys_way() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 1000);
    let _server = lab.serve("0.0.0.0:80");
    let conns = lab.peer(SOURCE).hold(80, 3);
    let watch = |name| {
        let ports = HashSet::from([80]);
        lab.server.within(|| Watch::open(name, 4711, &ports, MEMORY))
    };
    let watches = ["ctkeep-one", "ctkeep-two"].map(|name| watch(name).expect("a packet log"));
    conns.iter().for_each(|conn| conn.rst(0));
    for mut watch in watches {
        let mut logged = HashSet::new();
        wait_for("three RSTs", SOON, || {
            watch.drain(1000, |suspect| _ = logged.insert(suspect.connection)).expect("the log");
            logged.len() == 3
        });
    }
}

/// A proxy before the server uses each of its tuples again within seconds, and the kernel gives the entry the
/// number of the last: its first FIN is none that follows another.
#[test]
fn a_connection_that_follows_another_on_its_tuple_is_logged_as_any_other() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 1000);
    let mut server = lab.serve("0.0.0.0:80");
    let memory = Memory { most: 16, time: SOON * 6 };
    let mut watch = lab.server.within(|| {
        Watch::open("ctkeep-test", 4711, &HashSet::from([80]), memory).expect("a packet log")
    });
    let mut conns = lab.peer(SOURCE).hold(80, 1);
    let conn = conns.first_mut().expect("a connection");
    let mut logged = |what: &str, most: u64| {
        let drained = watch.drain(1000, |_| {}).expect("the log");
        assert!(drained.logged <= most && !drained.full, "{what}: {drained:?}");
        drained.logged
    };
    // An entry that has gone leaves its place to the next one that is made by the same processor.
    let mut one = CpuSet::new();
    one.set(sched_getcpu().expect("a processor")).expect("a processor");
    sched_setaffinity(Pid::from_raw(0), &one).expect("on one processor");
    for turn in 0..6 {
        lab.half_close(conn);
        server.close_all();
        assert!(conn.await_fin(), "the server's FIN");
        conn.ack_all();
        wait_for("the end of the socket", SOON, || lab.socket_state(conn).is_none());
        logged(&format!("turn {turn}"), 0);
        assert!(conn.reopen(), "the same tuple again");
        thread::sleep(TICKS);
    }
    // What follows a FIN of its own is logged.
    conn.fin_at(50);
    logged("a first FIN", 1);
    conn.fin_at(60);
    let is_logged = holds_within(SOON, || logged("a second FIN", 1) > 0);
    assert!(is_logged, "nothing of the second FIN");
}
