//! What is none of ctkeep's business stays as it is, byte for byte, whatever happens beside it.

use crate::lab;
use crate::scene;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use crate::lab::{ACK, Entry, FIN, Lab, RST, RawConn, SYN, Server, wait_for};
use crate::scene::{CLIENT, CTKEEP, LIMIT, Limiter, PORT, SOON, Scene, TRIES, host};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// With [`EAGER`] time for many sweeps; timeouts show that a second has passed.
const A_WHILE: Duration = Duration::from_millis(1300);

/// Looks at everything as often as it can.
const EAGER: [&str; 4] = ["--sweep-interval", "100ms", "--deep-interval", "300ms"];

const OTHER: &str = "203.0.113.9";

/// Makes entries tell what a delete and a new insert would lose: packets and bytes.
fn enable_accounting(lab: &Lab) {
    lab.server.sysctl("net/netfilter/nf_conntrack_acct", "1");
}

/// The entry of one connection; its line is all of it but the timeout.
fn look(lab: &Lab, conn: (SocketAddr, SocketAddr)) -> Option<Entry> {
    lab.entries().into_iter().find(|entry| entry.orig == conn)
}

fn of(conn: &RawConn) -> (SocketAddr, SocketAddr) {
    (conn.client, conn.server)
}

fn of_all(conns: &[RawConn]) -> Vec<(SocketAddr, SocketAddr)> {
    conns.iter().map(of).collect()
}

/// The entries of these connections now and a while later are the same, and their timeouts have
/// run on.
fn assert_untouched(lab: &Lab, conns: &[(SocketAddr, SocketAddr)]) {
    let look = || -> Vec<Entry> {
        let ours = |entry: &Entry| conns.contains(&entry.orig);
        let mut entries: Vec<_> = lab.entries().into_iter().filter(ours).collect();
        entries.sort_by_key(|entry| entry.orig);
        entries
    };
    let before = look();
    assert_eq!(before.len(), conns.len(), "an entry each: {before:#?}");
    thread::sleep(A_WHILE);
    let after = look();
    let lines = |entries: &[Entry]| -> Vec<String> {
        entries.iter().map(|entry| entry.line.clone()).collect()
    };
    assert_eq!(lines(&after), lines(&before));
    let run_on = before.iter().zip(&after).all(|(before, after)| after.timeout < before.timeout);
    assert!(run_on, "{after:#?} was {before:#?}");
}

/// A scene in which a held connection shows that ctkeep is at work.
fn busy_scene(args: &[&str]) -> Option<(Scene, RawConn)> {
    let mut scene = Scene::new(Limiter::Connlimit)?;
    enable_accounting(&scene.lab);
    scene.guard(&[&EAGER[..], args].concat());
    let mut conn = scene.open(1).pop().expect("a connection");
    scene.lab.half_close(&mut conn);
    assert!(conn.await_ack());
    Some((scene, conn))
}

/// The positive control: of this one ctkeep takes care.
fn assert_at_work(scene: &Scene, conn: &RawConn) {
    conn.stale_rst();
    scene.await_repair("revive", std::slice::from_ref(conn));
}

#[test]
fn ordinary_established_connections_are_never_touched() {
    let Some((scene, held)) = busy_scene(&[]) else { return };
    let mut conns = scene.lab.peer(OTHER).open_promptly(PORT, LIMIT);
    for conn in &mut conns {
        conn.send(b"GET / HTTP/1.0\r\n");
        assert!(conn.await_ack());
    }
    assert_at_work(&scene, &held);
    assert_untouched(&scene.lab, &of_all(&conns));
}

/// Sixty seconds are more than half of the lease: there is no need to touch it yet.
#[test]
fn a_half_closed_connection_with_time_left_is_not_touched() {
    let Some((scene, held)) = busy_scene(&["--lease", "20s"]) else { return };
    assert_untouched(&scene.lab, &[of(&held)]);
    assert_at_work(&scene, &held);
}

#[test]
fn another_port_is_never_touched() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(PORT, 3);
    lab.connlimit(443, 3);
    enable_accounting(&lab);
    let server = lab.serve("[::]:80 [::]:443");
    let peer = lab.peer(CLIENT);
    let mut scene = Scene { lab, server, peer, daemon: None };
    scene.guard(&[&EAGER[..], &["--port", "80"]].concat());
    let mut held = scene.open(1).pop().expect("a connection");
    scene.lab.half_close(&mut held);

    let mut conns = scene.peer.open_promptly(443, LIMIT);
    for conn in &mut conns {
        scene.lab.half_close(conn);
        conn.stale_rst();
        scene.await_forgotten(conn);
    }
    assert_at_work(&scene, &held);
    assert_untouched(&scene.lab, &of_all(&conns));
    assert_eq!(scene.peer.open_promptly(443, TRIES).len(), LIMIT, "nobody counts these");
    assert_eq!(scene.open(TRIES).len(), LIMIT - 1, "but that one");
}

/// Stale RSTs of `peers`; those of which the flag says so are revived, the others are left alone.
fn assert_sources_are_told_apart(args: &[&str], peers: &[(&str, bool)]) {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    enable_accounting(&scene.lab);
    scene.guard(&[&EAGER[..], args].concat());
    let mut conns = Vec::new();
    for (source, guarded) in peers {
        let peer = scene.lab.peer(source);
        let mut ours = peer.open_promptly(PORT, LIMIT);
        assert_eq!(ours.len(), LIMIT, "{source}");
        for conn in &mut ours {
            scene.lab.half_close(conn);
            conn.stale_rst();
        }
        conns.push((peer, ours, *guarded));
    }
    for (_, ours, guarded) in &conns {
        if *guarded {
            scene.await_repair("revive", ours);
        }
    }
    let alone: Vec<_> = conns.iter().filter(|(.., guarded)| !guarded).collect();
    let tuples: Vec<_> = alone.iter().flat_map(|(_, ours, _)| of_all(ours)).collect();
    assert_untouched(&scene.lab, &tuples);
    for (peer, ours, guarded) in &conns {
        let expected = if *guarded { 0 } else { LIMIT };
        assert_eq!(peer.open_promptly(PORT, TRIES).len(), expected, "{:?}", of_all(ours));
    }
}

#[test]
fn exempt_sources_are_never_touched() {
    assert_sources_are_told_apart(
        &["--exempt", "203.0.113.0/24,2001:db8:1::/64"],
        &[(CLIENT, true), (OTHER, false), ("2001:db8:1::7", false)],
    );
}

#[test]
fn only_the_sources_that_are_named_are_touched() {
    assert_sources_are_told_apart(
        &["--source", &host(CLIENT), "--source", "2001:db8:1::/64"],
        &[(CLIENT, true), (OTHER, false), ("2001:db8:1::7", true)],
    );
}

#[test]
fn exempt_wins_over_source() {
    assert_sources_are_told_apart(
        &["--source", "0.0.0.0/0", "--exempt", OTHER],
        &[(CLIENT, true), (OTHER, false)],
    );
}

#[test]
fn with_close_wait_alone_an_established_socket_is_left_alone() {
    let Some((scene, held)) = busy_scene(&["--states", "close-wait"]) else { return };
    let conn = scene.open(1).pop().expect("a connection");
    scene.peer.send(&conn.segment(lab::FIN | lab::ACK, 1));
    scene.peer.send(&conn.segment(lab::RST, -5));
    scene.await_forgotten(&conn);
    assert_untouched(&scene.lab, &[of(&conn)]);
    assert_at_work(&scene, &held);
}

/// A connection that the server's host opened, from a port that is in scope, and that the other
/// end has closed: in CLOSE_WAIT too, and none of the limiter's business.
#[test]
fn connections_that_this_host_opened_are_never_touched() {
    const FROM: u16 = 8080;
    let Some((scene, held)) = busy_scene(&["--port", "80,8080", "--lease", "5m"]) else { return };
    let mut remote = Server::start(&scene.lab.client, "192.0.2.2:8443");
    let (from, to) = (format!("192.0.2.1:{FROM}"), "192.0.2.2:8443");
    let stream = scene.lab.server.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
        socket.set_reuse_address(true).expect("reuse address");
        let [from, to] = [from.as_str(), to].map(|text| text.parse::<SocketAddr>().expect("parse"));
        socket.bind(&from.into()).expect("bind");
        socket.connect(&to.into()).expect("connect");
        TcpStream::from(socket)
    });
    let tuple = (stream.local_addr().expect("local"), stream.peer_addr().expect("peer"));
    wait_for("acceptance", SOON, || remote.held() == 1);
    remote.close_all();
    wait_for("CLOSE_WAIT", SOON, || scene.lab.sockets("close-wait") == 2);
    wait_for("CLOSE_WAIT", SOON, || {
        look(&scene.lab, tuple).is_some_and(|entry| entry.state == "CLOSE_WAIT")
    });
    assert_untouched(&scene.lab, &[tuple]);
    assert_at_work(&scene, &held);

    // Not even when its entry is lost.
    scene.lab.server.run("conntrack -F");
    scene.await_repair("reinsert", std::slice::from_ref(&held));
    thread::sleep(A_WHILE);
    assert_eq!(look(&scene.lab, tuple), None);
    assert_eq!(look(&scene.lab, (tuple.1, tuple.0)), None);
}

/// Connections from a port that is in scope to another host, whose entries are gone before ctkeep has
/// seen one, and another that conntrack picks up in its middle. An entry for the wrong side would take
/// the peer's places: one over its limit would be refused.
#[test]
fn what_this_host_opened_is_known_from_its_socket_alone() {
    const FROM: u16 = 8080;
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.lab.connlimit(FROM, 3);
    let mut remote = Server::start(&scene.lab.client, "192.0.2.2:8443");
    let mut more = Server::start(&scene.lab.client, "192.0.2.2:8444");
    let mut last = Server::start(&scene.lab.client, "192.0.2.2:8445");
    let dial = |to: &str| {
        scene.lab.server.within(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
            socket.set_reuse_address(true).expect("reuse address");
            let from = format!("192.0.2.1:{FROM}");
            let [from, to] = [&from, to].map(|text| text.parse::<SocketAddr>().expect("parse"));
            socket.bind(&from.into()).expect("bind");
            socket.connect(&to.into()).expect("connect");
            TcpStream::from(socket)
        })
    };
    let mut streams = ["192.0.2.2:8443", "192.0.2.2:8444", "192.0.2.2:8445"].map(dial);
    wait_for("acceptance", SOON, || remote.held() + more.held() + last.held() == 3);
    let _listener = scene.lab.serve(&format!("0.0.0.0:{FROM}"));
    remote.close_all();
    wait_for("CLOSE_WAIT", SOON, || scene.lab.sockets("close-wait") == 1);
    scene.lab.server.run("conntrack -F");
    // The last one is picked up at a byte of its far side: as if that had opened it.
    last.send_all(b"x");
    wait_for("pick-up", SOON, || scene.lab.entries().len() == 1);

    // A sibling by which the port is known as tracked.
    let peer = scene.lab.peer("198.51.100.9");
    let inbound = peer.connect(FROM).expect("gets in");
    let before = scene.lab.entries();
    scene.guard(&[&EAGER[..], &["--port", "80,8080", "--lease", "5m"]].concat());
    scene.lab.server.run(&format!("conntrack -D -p tcp --orig-src 198.51.100.9 --dport {FROM}"));
    // By a reinsert, or by the recount of the start where that was under way.
    wait_for("entry", SOON, || look(&scene.lab, of(&inbound)).is_some());
    thread::sleep(A_WHILE);
    let tuples = |entries: Vec<Entry>| {
        let mut all: Vec<_> = entries.into_iter().map(|entry| entry.orig).collect();
        all.sort();
        all
    };
    assert_eq!(tuples(scene.lab.entries()), tuples(before));
    let (_, report, _) = scene.ctkeep(&["audit", "--format", "json", "--port", "8080"]);
    let report: Value = serde_json::from_str(&report).expect("a report");
    assert_eq!(report["summary"]["classes"]["agree"], 4, "{report:#}");
    let to = SocketAddr::from(([192, 0, 2, 1], FROM));
    let open = || scene.lab.client.within(|| TcpStream::connect_timeout(&to, SOON)).ok();
    let admitted: Vec<_> = (0..3).filter_map(|_| open()).collect();
    assert_eq!(admitted.len(), 3, "the far side has all its places");
    streams.iter_mut().for_each(|stream| drop(stream.shutdown(std::net::Shutdown::Both)));
}

/// Two connections that ask for a repair, and two that do not.
fn drifted() -> Option<(Scene, [RawConn; 4])> {
    let scene = Scene::new(Limiter::Connlimit)?;
    enable_accounting(&scene.lab);
    let mut conns = scene.half_closed();
    conns.extend(scene.lab.peer(OTHER).open_promptly(PORT, 1));
    let conns: [RawConn; 4] = conns.try_into().ok().expect("four connections");
    let [closed, finished, ..] = &conns;
    closed.stale_rst();
    finished.fin_again();
    scene.await_forgotten(closed);
    scene.await_forgotten(finished);
    Some((scene, conns))
}

/// Looks on while `action` runs: nothing in the table changes.
fn assert_changes_nothing(scene: &Scene, action: impl FnOnce()) {
    let lines = || -> Vec<String> {
        let mut lines: Vec<_> = scene.lab.entries().into_iter().map(|entry| entry.line).collect();
        lines.sort();
        lines
    };
    let rules = || scene.lab.server.output("nft -s list ruleset");
    let before = (lines(), rules(), scene.lab.server.output("ip -o link"));
    let frames = scene.lab.client_sees(action);
    assert_eq!((lines(), rules(), scene.lab.server.output("ip -o link")), before);
    assert!(frames.is_empty(), "on the wire: {frames:?}");
}

#[test]
fn looking_changes_nothing() {
    let Some((scene, conns)) = drifted() else { return };
    let (local, remote) = (conns[0].server.to_string(), conns[0].client.to_string());
    for args in [
        &["audit"][..],
        &["audit", "--all", "--format", "json"],
        &["explain", &local, &remote],
        &["reconcile", "--dry-run"],
        &["reconcile", "--dry-run", "--force", "--recount", "loopback"],
    ] {
        assert_changes_nothing(&scene, || {
            let (code, out, err) = scene.ctkeep(args);
            assert_eq!(code, 1, "{args:?} finds something: {out}{err}");
        });
    }
    // The positive control: there was something to change.
    let (code, out, err) = scene.ctkeep(&["reconcile"]);
    assert_eq!((code, out.matches("revive").count()), (0, 2), "{out}{err}");
}

#[test]
fn a_dry_run_changes_nothing_and_says_what_it_would_do() {
    let Some((scene, conns)) = drifted() else { return };
    assert_changes_nothing(&scene, || {
        let daemon = scene.lab.daemon(CTKEEP, &[&EAGER[..], &["--dry-run"]].concat());
        for conn in &conns[..2] {
            let client = conn.client.to_string();
            wait_for("its intention", SOON, || {
                let log = daemon.log();
                log.lines().any(|line| line.contains("revive") && line.contains(&client))
            });
        }
        thread::sleep(A_WHILE);
        let (status, log) = daemon.term();
        assert!(status.success(), "{log}");
        assert!(!log.contains(&conns[3].client.to_string()), "nothing about this one: {log}");
    });
    assert_eq!(scene.open(TRIES).len(), LIMIT - 1, "the limit is bypassed as ever");
}

/// The program runs in one namespace and works in another, by its path.
#[test]
fn another_namespace_is_guarded_from_outside() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let path = scene.lab.server.path();
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
        scene.await_forgotten(conn);
    }
    let newcomers = scene.open(TRIES);
    assert_eq!(newcomers.len(), LIMIT, "the positive control");

    let audit = [CTKEEP, "audit", "--netns", &path].join(" ");
    let (code, out) = outside(&scene, &audit);
    assert_eq!((code, out.matches("entry-closed").count()), (1, LIMIT + 1), "{out}");
    let (code, out) = outside(&scene, &[CTKEEP, "audit"].join(" "));
    assert_eq!((code, out.matches(CLIENT).count()), (0, 0), "its own has nothing: {out}");

    scene.daemon = Some(lab::Daemon::start(&scene.lab.client, CTKEEP, &["--netns", &path], &[]));
    scene.await_repair("revive", &conns);
    scene.end(&newcomers);
    assert_eq!(scene.admitted(), 0);
    let (status, log) = scene.daemon.take().expect("a daemon").term();
    assert!(status.success(), "{log}");
}

/// Runs a command line in the client's namespace: exit code and stdout.
fn outside(scene: &Scene, line: &str) -> (i32, String) {
    let echo = format!("{line}; echo code $?");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &echo]);
    let child = scene.lab.client.spawn_with(&command, |command| {
        command.stdout(std::process::Stdio::piped());
    });
    let output = child.expect("a shell").wait_with_output().expect("its end");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (text, code) = text.rsplit_once("code ").expect("the exit code");
    (code.trim().parse().expect("a number"), text.to_owned())
}

/// A flood of segments from addresses that never opened a connection: with ctkeep the server sends
/// what it would send without it, and its table holds the same.
#[test]
fn spoofed_peers_make_ctkeep_send_and_hold_nothing() {
    const SPOOFED: u8 = 50;
    const FLAGS: [u8; 6] = [FIN | ACK, FIN | ACK, RST, ACK, SYN | ACK, RST | ACK];
    let seen = scene::contrast(Limiter::Connlimit, CLIENT, &EAGER, |scene| {
        let held = scene.half_closed();
        let frames = scene.lab.client_sees(|| {
            for number in 0..SPOOFED {
                for (conn, flags) in held.iter().cycle().zip(FLAGS) {
                    let mut segment = conn.segment(flags, 0);
                    segment.source.set_ip(IpAddr::from([203, 0, 113, number]));
                    scene.peer.send(&segment);
                }
            }
            thread::sleep(A_WHILE);
        });
        let spoofed = scene
            .lab
            .entries()
            .into_iter()
            .filter(|entry| held.iter().all(|conn| entry.orig != of(conn)));
        let mut entries: Vec<_> = spoofed.map(|entry| (entry.orig, entry.state)).collect();
        entries.sort();
        if let Some(daemon) = &scene.daemon {
            assert!(!daemon.logged(" > 192.0.2.1:80 reason"), "{}", daemon.log());
        }
        (frames.len(), entries)
    });
    let Some(seen) = seen else { return };
    assert!(seen.without.0 >= usize::from(SPOOFED), "the server answers: {}", seen.without.0);
    assert_eq!(seen.with, seen.without);
}
