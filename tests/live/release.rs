//! When the socket ends, so does the entry: the client is welcome again at once. And when ctkeep
//! ends, nothing of it is left behind.

use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{RawConn, Server, holds_within, kernel, wait_for};
use crate::scene::{CTKEEP, LIMIT, Limiter, SOON, Scene};

/// From the end of the sockets to a free limit.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Drops the server's RSTs before conntrack sees them: then nothing tells it that a connection is
/// over.
const MUTE: &str = "iptables -t raw -A OUTPUT -p tcp --sport 80 --tcp-flags RST RST -j DROP";

/// Half-closed connections whose entries are held: each has been revived.
fn held(limiter: Limiter, args: &[&str]) -> Option<(Scene, Vec<RawConn>)> {
    let mut scene = Scene::new(limiter)?;
    scene.guard(args);
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    assert_eq!(scene.admitted(), 0, "a full limit");
    Some((scene, conns))
}

/// Waits until nothing is counted any more, at most as long as the issue allows; then a whole
/// limit's worth must be admitted.
fn assert_welcome(scene: &Scene, conns: &[RawConn], closed: Instant) {
    let free = || conns.iter().all(|conn| !scene.is_counted(conn));
    assert!(holds_within(AT_ONCE, free), "still counted: {:#?}", scene.lab.entries());
    assert_eq!(scene.admitted(), LIMIT, "after {:?}", closed.elapsed());
}

/// The client's side of an orderly close: without its ACK the server's sockets stay in LAST_ACK,
/// and conntrack rightly believes the same.
fn agree(conns: &mut [RawConn]) {
    for conn in conns {
        assert!(conn.await_fin(), "no FIN to {}", conn.client);
        conn.ack_all();
    }
}

#[test]
fn connections_that_the_server_closes_are_released() {
    for limiter in [Limiter::Connlimit, Limiter::NftSet] {
        let Some((mut scene, mut conns)) = held(limiter, &[]) else { return };
        let closed = Instant::now();
        scene.server.close_all();
        agree(&mut conns);
        assert_welcome(&scene, &conns, closed);
    }
}

#[test]
fn connections_that_the_server_resets_are_released() {
    for limiter in [Limiter::Connlimit, Limiter::NftSet] {
        let Some((mut scene, conns)) = held(limiter, &[]) else { return };
        let closed = Instant::now();
        scene.server.reset_all();
        assert_welcome(&scene, &conns, closed);
    }
}

#[test]
fn connections_of_a_killed_server_are_released() {
    let Some((mut scene, mut conns)) = held(Limiter::Connlimit, &[]) else { return };
    let next = Server::start(&scene.lab.client, "192.0.2.2:8080");
    let closed = Instant::now();
    std::mem::replace(&mut scene.server, next).kill();
    agree(&mut conns);
    scene.server = scene.lab.serve("[::]:80");
    assert_welcome(&scene, &conns, closed);
}

/// With data that it never read the killed server's kernel sends RSTs.
#[test]
fn connections_of_a_killed_server_with_unread_data_are_released() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&[]);
    let mut conns = scene.established();
    for conn in &mut conns {
        conn.send(b"GET / HTTP/1.0\r\n\r\n");
        scene.lab.half_close(conn);
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    assert_eq!(scene.admitted(), 0, "a full limit");
    let next = Server::start(&scene.lab.client, "192.0.2.2:8080");
    let closed = Instant::now();
    std::mem::replace(&mut scene.server, next).kill();
    scene.server = scene.lab.serve("[::]:80");
    assert_welcome(&scene, &conns, closed);
}

/// No packet tells conntrack of the end, and no sweep comes: the kernel's word that the sockets have ended does.
#[test]
fn connections_that_end_unseen_are_released_as_the_kernel_tells_of_it() {
    let args = ["--sweep-interval", "15s", "--deep-interval", "10m"];
    let Some((mut scene, conns)) = held(Limiter::Connlimit, &args) else { return };
    scene.lab.server.run(MUTE);
    // Rules that have changed are read by then.
    thread::sleep(Duration::from_secs(4));
    scene.server.reset_all();
    let free = || conns.iter().all(|conn| !scene.is_counted(conn));
    assert!(holds_within(Duration::from_secs(1), free), "{}", scene.daemon().log());
}

/// No packet tells conntrack of the end, so only ctkeep can give the places back before the lease
/// ends; while it is frozen they stay taken. The same ports are free too.
#[test]
fn connections_that_end_unseen_are_released_by_the_sweep() {
    for frozen in [true, false] {
        let Some((mut scene, mut conns)) = held(Limiter::Connlimit, &[]) else { return };
        scene.lab.server.run(MUTE);
        if frozen {
            scene.freeze();
        }
        let closed = Instant::now();
        scene.server.reset_all();
        wait_for("end of the sockets", SOON, || scene.open_sockets() == 0);
        if frozen {
            thread::sleep(AT_ONCE);
            assert_eq!(scene.admitted(), 0, "the positive control");
        } else {
            let free = || conns.iter().all(|conn| !scene.is_counted(conn));
            assert!(holds_within(AT_ONCE, free), "still counted: {:#?}", scene.lab.entries());
            let welcome = conns.iter_mut().filter_map(|conn| conn.reopen().then_some(())).count();
            assert_eq!(welcome, LIMIT, "after {:?}", closed.elapsed());
        }
    }
}

/// The kernel tells the end of a socket, whatever packets there were: no sweep is needed.
#[test]
fn connections_that_end_unseen_are_released_when_the_kernel_tells_their_end() {
    let sweeps = ["--sweep-interval", "20s", "--deep-interval", "5m"];
    let Some((mut scene, conns)) = held(Limiter::Connlimit, &sweeps) else { return };
    scene.lab.server.run(MUTE);
    scene.server.reset_all();
    let closed = Instant::now();
    let free = || conns.iter().all(|conn| !scene.is_counted(conn));
    assert!(holds_within(AT_ONCE, free), "still counted: {:#?}", scene.lab.entries());
    assert_eq!(scene.admitted(), LIMIT, "after {:?}", closed.elapsed());
}

/// Nobody looks at a socket that closes while ctkeep is frozen; the next sweep makes up for it.
#[test]
fn connections_that_ended_meanwhile_are_released_and_not_revived() {
    let Some((mut scene, mut conns)) = held(Limiter::Connlimit, &[]) else { return };
    scene.freeze();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.server.close_all();
    agree(&mut conns);
    wait_for("end of the sockets", SOON, || scene.open_sockets() == 0);
    scene.thaw();
    assert_welcome(&scene, &conns, Instant::now());
}

/// A client that never answers the server's FIN: the socket is no longer the application's, and
/// the entry ends with the kernel's own timeouts.
#[test]
fn a_connection_that_waits_for_its_last_ack_is_left_to_the_kernel() {
    let sysctl = "net/netfilter/nf_conntrack_tcp_timeout_last_ack";
    let Some((mut scene, conns)) = held(Limiter::Connlimit, &[]) else { return };
    scene.lab.server.sysctl(sysctl, "2");
    scene.server.close_all();
    wait_for("LAST_ACK", SOON, || scene.lab.sockets("last-ack") == LIMIT);
    let gone = || conns.iter().all(|conn| !scene.is_counted(conn));
    // The server repeats its FIN a few times, and each one prolongs the entry.
    assert!(holds_within(Duration::from_secs(30), gone), "{:#?}", scene.lab.entries());
    assert_eq!(scene.admitted(), LIMIT);
}

/// The tuple is used again as soon as the server has closed: the new connection has its own
/// entry and its own socket, and inherits nothing.
#[test]
fn a_port_that_is_used_again_is_a_new_connection() {
    let Some((mut scene, mut conns)) = held(Limiter::Connlimit, &[]) else { return };
    scene.server.close_all();
    agree(&mut conns);
    assert_welcome(&scene, &conns, Instant::now());
    scene.server.reset_all();
    wait_for("end of the sockets", SOON, || scene.open_sockets() == 0);
    for conn in &mut conns {
        assert!(conn.reopen(), "the tuple of {} is free", conn.client);
    }
    thread::sleep(AT_ONCE);
    for conn in &mut conns {
        let entry = scene.lab.entry(conn).expect("an entry");
        assert_eq!(entry.state, "ESTABLISHED");
        assert!(entry.timeout > 60, "the kernel's own timeout: {entry:?}");
        conn.fin();
        assert!(conn.await_ack());
        conn.stale_rst();
    }
    wait_for("two revivals", SOON, || conns.iter().all(|conn| scene.told("revive", conn) >= 2));
    assert_eq!(scene.admitted(), 0);
}

/// Everything in the namespace that ctkeep could leave behind.
fn traces(scene: &Scene) -> String {
    let commands =
        ["nft -s list ruleset", "ip -o link", "ip -o addr", "ip rule", "ip route", "tc qdisc"];
    commands.map(|command| scene.lab.server.output(command)).concat()
}

#[test]
fn after_kill_9_the_entries_live_one_lease_and_nothing_else_remains() {
    const LEASE: Duration = Duration::from_secs(3);
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let before = traces(&scene);
    scene.guard(&["--lease", "3s", "--sweep-interval", "500ms"]);
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    // Through at least one renewal.
    thread::sleep(LEASE);
    assert_eq!(scene.admitted(), 0, "a full limit");
    let killed = Instant::now();
    scene.daemon.take().expect("a daemon").kill();
    assert!(conns.iter().all(|conn| scene.is_counted(conn)), "kept for the rest of the lease");
    wait_for("end of the entries", SOON, || scene.lab.entries().is_empty());
    let lived = killed.elapsed();
    // Whole seconds, and the moment to look.
    assert!(lived < LEASE + Duration::from_secs(2), "{lived:?}");
    assert_eq!(scene.lab.sockets("close-wait"), LIMIT, "nothing ended but ctkeep");
    assert_eq!(scene.admitted(), LIMIT, "the positive control");
    if !kernel::tables_have_owners() {
        // The next run takes them over and, at its end, away.
        let (status, log) = scene.lab.daemon(CTKEEP, &[]).term();
        assert!(status.success(), "{log}");
    }
    wait_for("end of all traces", SOON, || traces(&scene) == before);
}

#[test]
fn sigterm_ends_it_with_code_0_and_leaves_the_lease() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let before = traces(&scene);
    scene.guard(&["--lease", "20s"]);
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    let (status, log) = scene.daemon.take().expect("a daemon").term();
    assert_eq!(status.code(), Some(0), "{log}");
    assert!(log.contains("stopped"), "{log}");
    for conn in &conns {
        let entry = scene.lab.entry(conn).expect("an entry");
        assert!((10..=20).contains(&entry.timeout), "{entry:?}");
    }
    assert_eq!(scene.admitted(), 0, "kept for the rest of the lease");
    assert_eq!(traces(&scene), before);
}

#[test]
fn on_exit_release_gives_entries_the_timeouts_of_the_kernel() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "2");
    scene.guard(&["--on-exit", "release"]);
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    let (status, log) = scene.daemon.take().expect("a daemon").term();
    assert_eq!(status.code(), Some(0), "{log}");
    wait_for("end of the entries", Duration::from_secs(4), || scene.lab.entries().is_empty());
    assert_eq!(scene.admitted(), LIMIT);
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

/// A second daemon finds what the first one held and goes on.
#[test]
fn a_restart_takes_over_what_was_held() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let args = ["--lease", "3s", "--sweep-interval", "500ms"];
    scene.guard(&args);
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    scene.daemon.take().expect("a daemon").kill();
    scene.daemon = Some(scene.lab.daemon(CTKEEP, &args));
    thread::sleep(Duration::from_secs(5));
    assert_eq!(scene.admitted(), 0);
    scene.server.reset_all();
    assert_welcome(&scene, &conns, Instant::now());
}
