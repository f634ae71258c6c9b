//! Connections that this host and its containers opened: kept with their translation for as long as
//! the socket is half-closed, and not longer.

mod scene;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{self, Entry, passing, wait_for};
use scene::{CLOSE_WAIT, Dialled, EXTEND, FAR, SOON, Scene};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
/// kube-proxy's and Docker's way: a port by chance.
#[test]
fn what_a_container_writes_long_after_the_far_side_has_closed_arrives() {
    let play = |is_kept: bool| {
        let scene = Scene::new("-j MASQUERADE --random-fully")?;
        let daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut dialled = scene.dial();
        let before = scene.entry(&dialled).expect("an entry");
        scene.outlive(&dialled, is_kept);
        let delivers = if is_kept {
            let after = scene.entry(&dialled).expect("an entry");
            assert_eq!((after.orig, after.reply), (before.orig, before.reply));
            dialled.delivers()
        } else {
            dialled.near.write_all(b"late").expect("a socket that is open");
            assert!(dialled.is_reset(), "the control");
            false
        };
        let local = dialled.near.local_addr().expect("an address");
        drop(dialled);
        wait_for("the end of the entry", SOON, || {
            let entries = scene.lab.entries();
            let open = |entry: &&Entry| entry.orig.0 == local && entry.state == "CLOSE_WAIT";
            entries.iter().find(open).is_none()
        });
        let (status, log) = daemon.term();
        assert!(status.success() && !log.contains("ERROR"), "{log}");
        Some(delivers)
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (false, Some(true)));
}

/// Of a range with one port the second connection gets none as long as the first has it.
#[test]
fn a_port_is_not_given_away_while_its_socket_is_open() {
    let play = |is_kept: bool| {
        let scene = Scene::new("-j SNAT --to-source 192.0.2.1:61000-61000")?;
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut first = scene.dial();
        scene.outlive(&first, is_kept);
        let second = scene.dial_from(&scene.guest.namespace);
        if is_kept {
            assert!(first.delivers(), "the first one's");
        }
        Some(second.is_some())
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (true, Some(false)));
}

#[test]
fn one_of_a_pool_of_addresses_keeps_its_own() {
    let Some(scene) = Scene::new("-j SNAT --to-source 192.0.2.10-192.0.2.13 --random") else {
        return;
    };
    for last in 10..14 {
        scene.lab.server.run(&format!("ip addr add 192.0.2.{last}/32 dev eth0"));
    }
    let daemon = scene.daemon(EXTEND);
    let mut all: Vec<_> = (0..8).map(|_| scene.dial()).collect();
    let replies = |all: &[Dialled]| -> Vec<_> {
        all.iter().map(|one| scene.entry(one).map(|entry| entry.reply)).collect()
    };
    let before = replies(&all);
    all.iter().for_each(|one| scene.outlive_lease(one));
    // As a full table or an administrator would.
    scene.lab.server.run("conntrack -D -p tcp --state CLOSE_WAIT");
    wait_for("put back", SOON * 2, || replies(&all) == before);
    assert!(all.iter_mut().all(Dialled::delivers), "{}", daemon.log());
}

#[test]
fn the_hosts_own_connections_are_kept_too() {
    let play = |is_kept: bool| {
        let scene = Scene::new("")?;
        // Without an entry of its own what comes is INVALID, and dropped.
        scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut dialled = scene.half_closed_from(&scene.lab.server);
        scene.outlive(&dialled, is_kept);
        dialled.near.write_all(b"late").expect("a socket that is open");
        let mut late = [0; 4];
        dialled.far.read_exact(&mut late).expect("what was written");
        // Its ACK is INVALID without an entry, so it is sent again and again.
        let unacked = || {
            let local = dialled.near.local_addr().expect("an address");
            let line = scene.lab.server.output(&format!("ss -Htn sport = :{}", local.port()));
            line.split_whitespace().nth(2).map(str::to_owned)
        };
        thread::sleep(Duration::from_secs(1));
        Some(unacked().as_deref() == Some("0"))
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (false, Some(true)));
}

/// The process holds its socket for as long as it likes; it ends when TCP gives up.
#[test]
fn of_a_far_side_that_is_gone_the_entry_goes_with_the_socket() {
    let Some(scene) = Scene::new("-j MASQUERADE") else { return };
    let daemon = scene.daemon(EXTEND);
    let dialled = scene.dial();
    scene.outlive(&dialled, true);
    scene.lab.client.run("ip link set eth0 down");
    let local = dialled.near.local_addr().expect("an address");
    let lives = |entry: &Entry| entry.orig.0 == local && entry.state == "CLOSE_WAIT";
    thread::sleep(CLOSE_WAIT * 2);
    assert!(scene.lab.entries().iter().any(&lives), "as long as the socket: {}", daemon.log());
    // Without a word to anybody.
    scene.guest.namespace.run(&format!("ss -K sport = :{}", local.port()));
    wait_for("the release", SOON, || !scene.lab.entries().iter().any(&lives));
}

/// The far side has not had the ACK of its FIN, it seems.
#[test]
fn a_fin_that_comes_again_does_not_end_it() {
    let play = |is_kept: bool| {
        let scene = Scene::new("-j MASQUERADE --random-fully")?;
        for (state, seconds) in [("last_ack", "5"), ("time_wait", "5")] {
            let name = format!("net/netfilter/nf_conntrack_tcp_timeout_{state}");
            scene.lab.server.sysctl(&name, seconds);
        }
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut dialled = scene.dial_from(&scene.guest.namespace).expect("a connection");
        scene.lab.client.run("iptables -I INPUT -p tcp --dport 443 -j DROP");
        dialled.far.shutdown(Shutdown::Write).expect("a FIN");
        wait_for("the second FIN", SOON, || {
            scene.entry(&dialled).is_some_and(|entry| entry.state == "TIME_WAIT")
        });
        scene.lab.client.run("iptables -D INPUT -p tcp --dport 443 -j DROP");
        scene.outlive(&dialled, is_kept);
        match is_kept {
            true => Some(dialled.delivers()),
            false => {
                dialled.near.write_all(b"late").expect("a socket that is open");
                Some(!dialled.is_reset())
            }
        }
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (false, Some(true)));
}

#[test]
fn a_port_that_was_given_away_is_said() {
    let Some(scene) = Scene::new("-j SNAT --to-source 192.0.2.1:61000-61000") else { return };
    let daemon = scene.daemon(EXTEND);
    let first = scene.dial();
    scene.outlive_lease(&first);
    daemon.stop();
    scene.lab.server.run("conntrack -D -p tcp --state CLOSE_WAIT");
    let second = scene.dial_from(&scene.guest.namespace).expect("the port is free");
    let entry = scene.entry(&second).expect("an entry").line;
    daemon.cont();
    wait_for("the loss", SOON * 2, || daemon.logged("has lost its entry"));
    let log = daemon.log();
    assert!(log.contains("another connection has its address and port now"), "{log}");
    assert_eq!(scene.entry(&second).expect("an entry").line, entry);
}

/// Both of them before and after: as a container's that nobody keeps, and as one that is kept.
#[test]
fn audit_explain_doctor_and_metrics_show_them_apart() {
    let Some(scene) = Scene::new("-j MASQUERADE") else { return };
    let dialled = scene.dial();
    let local = dialled.near.local_addr().expect("an address").to_string();
    let audit = || {
        let (_, out, err) = scene.lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
        let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
        (report["outgoing"].clone(), format!("{report:#}{err}"))
    };
    let shown = |args: &[&str], words: &[&str]| {
        let (_, out, err) = scene.lab.ctkeep(CTKEEP, args);
        let words: Vec<_> = words.iter().filter(|word| !out.contains(**word)).collect();
        assert!(words.is_empty(), "{words:?}: {out}{err}");
    };
    let (summary, report) = audit();
    let wanted = serde_json::json!({
        "sockets": 1, "translated": 1, "closing": 0, "without_entry": 0, "held": null, "lost": null,
    });
    assert_eq!(summary, wanted, "{report}");
    shown(&["explain", &local, FAR], &["this host opened it", "ctkeep run does not keep it"]);
    shown(&["doctor"], &["1 half-closed connections that this host opened, 1 behind", "extend"]);

    let address = "127.0.0.1:9815";
    let args = ["--outgoing", "extend", "--metrics-listen", address];
    let daemon = scene.daemon(&args);
    wait_for("a lease", SOON, || scene.is_extended(&dialled));
    let (summary, report) = audit();
    assert_eq!((&summary["held"], &summary["lost"]), (&1.into(), &0.into()), "{report}");
    shown(&["explain", &local, FAR], &["kept        by ctkeep run for", "as long as its socket"]);
    shown(&["doctor"], &["1 half-closed connections that this host opened, 1 entries kept"]);
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600");
    shown(&["doctor"], &["3600 s for all are needed no more", "timeout_close_wait=60"]);
    let answer = lab::http::ask(&scene.lab.server, address, "GET /metrics", "");
    let metrics = lab::http::samples(&answer.expect("metrics").body);
    for (name, wanted) in [
        ("ctkeep_outgoing_sockets", 1.0),
        ("ctkeep_outgoing_held_entries", 1.0),
        ("ctkeep_outgoing_lost_entries", 0.0),
        ("ctkeep_outgoing_lost_total{reason=\"taken\"}", 0.0),
    ] {
        assert_eq!(metrics.get(name), Some(&wanted), "{name}: {}", daemon.log());
    }
    let extended = metrics.get("ctkeep_outgoing_actions_total{action=\"extend\"}");
    assert!(extended.is_some_and(|count| *count >= 1.0));
    // None of it is a connection of the scope.
    assert_eq!(metrics.get("ctkeep_actions_total{action=\"extend\"}"), Some(&0.0));
    assert_eq!(metrics.get("ctkeep_held_connections{family=\"ipv4\"}"), Some(&0.0));
}

/// What is lost waits for room, and what is there goes on.
#[test]
fn a_full_table_is_said_and_the_lost_ones_are_back_when_there_is_room() {
    let maximum = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
    let maximum: usize = maximum.expect("a sysctl").trim().parse().expect("a number");
    if maximum > 300_000 {
        lab::skip(&format!("a table of {maximum} entries takes too long to fill"));
        return;
    }
    let Some(scene) = Scene::new("-j MASQUERADE --random-fully") else { return };
    let daemon = scene.daemon(&["--outgoing", "extend", "--defence", "0"]);
    let mut all: Vec<_> = (0..3).map(|_| scene.dial()).collect();
    all.iter().for_each(|one| scene.outlive_lease(one));
    let replies = |all: &[Dialled]| -> Vec<_> {
        all.iter().map(|one| scene.entry(one).map(|entry| entry.reply)).collect()
    };
    let before = replies(&all);
    daemon.stop();
    scene.lab.server.run("conntrack -D -p tcp --state CLOSE_WAIT");
    passing::fill_up(&scene.lab, maximum);
    daemon.cont();
    wait_for("the word", SOON * 2, || daemon.logged("conntrack table full"));
    scene.lab.server.run("conntrack -F");
    wait_for("put back", SOON * 2, || replies(&all) == before);
    assert_eq!(daemon.log().matches("conntrack table full").count(), 1, "{}", daemon.log());
    assert!(all.iter_mut().all(Dialled::delivers), "{}", daemon.log());
}

/// The figures of docs/outgoing.md: the same traffic by the timeout of kube-proxy, by the kernel's, and by the
/// kernel's with ctkeep. A container closes 25 connections a second whose far side never does, and holds 50
/// that the far side has closed, and upon which it writes when 100 s are over.
#[test]
#[ignore = "two minutes, for figures"]
fn figures_of_three_ways() {
    const HELD: usize = 50;
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files).expect("limits");
    nix::sys::resource::setrlimit(files, most, most).expect("more files");
    let play = |name: &str, timeout: &str, is_kept: bool| -> Option<String> {
        let scene = Scene::new("-j MASQUERADE --random-fully")?;
        let setting = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
        scene.lab.server.sysctl(setting, timeout);
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut held: Vec<_> = (0..HELD).map(|_| scene.dial()).collect();
        let count = || scene.lab.server.output("conntrack -C").trim().to_owned();
        let began = Instant::now();
        let (mut open, mut fill) = (Vec::new(), Vec::new());
        let mut resets = 0;
        for second in 1..=120_u32 {
            for _ in 0..25 {
                let Dialled { near, far } = scene.dial_from(&scene.guest.namespace)?;
                drop(near);
                open.push(far);
            }
            if second == 100 {
                for dialled in &mut held {
                    dialled.near.write_all(b"late").expect("a socket that is open");
                }
                thread::sleep(Duration::from_millis(300));
                resets = held
                    .iter()
                    .filter(|it| it.near.take_error().is_ok_and(|e| e.is_some()))
                    .count();
            }
            if second % 40 == 0 {
                fill.push(format!("{} at {second} s", count()));
            }
            let next = Duration::from_secs(1) * second;
            thread::sleep(next.saturating_sub(began.elapsed()));
        }
        Some(format!("{name}: entries {}; {resets} of {HELD} reset", fill.join(", ")))
    };
    let ways = [("an hour", "3600", false), ("60 s", "60", false), ("60 s and ctkeep", "60", true)];
    thread::scope(|scope| {
        let all = ways.map(|(name, timeout, kept)| scope.spawn(move || play(name, timeout, kept)));
        all.into_iter().for_each(|way| println!("{:?}", way.join().expect("figures")));
    });
}
