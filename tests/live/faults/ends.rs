//! Ends of the program and of what it looks at: kills, no memory, no descriptors, a namespace that goes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{OUTSIDE, SOON, in_lanes};
use crate::lab::{self, Daemon, RawConn, holds_within, wait_for};
use crate::scene::{self, CTKEEP, LIMIT, Limiter, Scene};

/// The conntrack timeouts of a connection that is being closed, short: what is left one lease
/// after the end of ctkeep is there because of ctkeep.
fn shorten_timeouts(scene: &Scene) {
    for state in ["fin_wait", "close_wait", "last_ack", "time_wait", "close"] {
        let name = format!("net/netfilter/nf_conntrack_tcp_timeout_{state}");
        scene.lab.server.sysctl(&name, "2");
    }
}

/// Bursts of FINs, stale RSTs and new connections until `until`.
fn attack(scene: &Scene, until: Instant) -> Vec<RawConn> {
    let mut held: Vec<RawConn> = Vec::new();
    while Instant::now() < until {
        held.iter().for_each(|conn| conn.rst(-5));
        let begun = (0..LIMIT).map(|_| scene.peer.syn_only(scene::PORT)).collect();
        let mut new = scene.peer.complete(begun, Duration::from_millis(5));
        new.iter_mut().for_each(RawConn::fin);
        held.extend(new);
    }
    held
}

/// Nothing of a dead instance is left: neither device nor table.
fn assert_no_remains(scene: &Scene, what: &str) {
    let remains = || {
        let links = scene.lab.server.output("ip -o link show");
        let tables = scene.lab.server.output("nft list tables");
        (links + &tables).lines().filter(|line| line.contains("ctkeep")).count()
    };
    wait_for(&format!("end of its devices and tables, {what}"), SOON, || remains() == 0);
}

/// Ends the server in silence: its RSTs do not leave the host, so conntrack learns nothing.
fn end_in_silence(scene: &mut Scene) {
    scene.lab.server.run("iptables -t raw -A OUTPUT -p tcp --sport 80 -j DROP");
    let next = scene.lab.serve("[::]:81");
    std::mem::replace(&mut scene.server, next).kill();
    wait_for("end of the sockets", SOON, || scene.open_sockets() == 0);
    scene.lab.server.run("iptables -t raw -F OUTPUT");
    let next = scene.lab.serve("[::]:80");
    drop(std::mem::replace(&mut scene.server, next));
}

/// Whichever moment of an attack it dies at: what has no socket is gone one lease later or with
/// the next start, so nobody honest is refused; what has one is counted again with the next start.
#[test]
fn killed_at_any_moment_it_leaves_nothing_that_lasts() {
    const LEASE: Duration = Duration::from_secs(5);
    /// Attacks last up to this long before the kill.
    const LONGEST: Duration = Duration::from_millis(700);
    /// Steps of the golden ratio visit an interval evenly.
    const GOLDEN: f64 = 0.618_033_988_75;
    if !lab::require() {
        return;
    }
    let count = std::env::var("CTKEEP_KILLS").ok().map_or(8, |n| n.parse().expect("a number"));
    let guard = ["--port", "80", "--lease", "5s", "--sweep-interval", "200ms"];
    let late = AtomicUsize::new(0);
    in_lanes(4, count, |work| {
        for number in work {
            let mut scene = Scene::new(Limiter::Connlimit).expect("a scene");
            shorten_timeouts(&scene);
            // Somebody whose entry stays: a port of which nothing is tracked is none to guard.
            let honest = scene.lab.peer("198.51.100.8").hold(scene::PORT, 1);
            scene.guard(&guard);
            let number_f = f64::from(u32::try_from(number).expect("a small number"));
            let moment = LONGEST.mul_f64((number_f * GOLDEN).fract());
            let what = format!("kill {number} after {moment:?}");
            let began = Instant::now();
            let held = thread::scope(|scope| {
                let attacker = scope.spawn(|| attack(&scene, began + LONGEST));
                thread::sleep(moment.saturating_sub(began.elapsed()));
                scene.daemon().signal(Signal::SIGKILL);
                attacker.join().expect("an attacker")
            });
            scene.daemon = None;
            assert_no_remains(&scene, &what);
            if number % 2 == 0 {
                end_in_silence(&mut scene);
                thread::sleep(LEASE);
                scene.guard(&guard);
                let free = || scene.open(LIMIT).len();
                let freed = holds_within(SOON, || held.iter().all(|conn| !scene.is_counted(conn)));
                assert!(
                    freed,
                    "{}\n{what}: without a socket: {:?}",
                    scene.daemon().log(),
                    scene.lab.entries()
                );
                assert_eq!(free(), LIMIT, "{what}: an honest client is refused");
            } else {
                // Longer than a lease: what the dead one held has expired, or been refreshed.
                thread::sleep(LEASE);
                let open = scene.open_sockets() - honest.len();
                late.fetch_add(open.saturating_sub(LIMIT), Ordering::Relaxed);
                scene.guard(&guard);
                let open = |conn: &&RawConn| scene.lab.socket_state(conn).is_some();
                let alive: Vec<_> = held.iter().filter(open).collect();
                assert!(alive.len() >= LIMIT, "{what}: no attack");
                let counted =
                    holds_within(SOON, || alive.iter().all(|conn| scene.is_counted(conn)));
                let lost = || alive.iter().filter(|conn| !scene.is_counted(conn)).count();
                let log = || scene.daemon().log();
                assert!(counted, "{}\n{what}: {} of {} uncounted", log(), lost(), alive.len());
                let refused = holds_within(SOON, || scene.open(LIMIT).is_empty());
                assert!(refused, "{}\n{what}: the limit lets more in", log());
            }
            assert!(!scene.daemon().logged("panicked"), "{what}");
        }
    });
    eprintln!(
        "{count} kills, {} connections above the limits while it was dead",
        late.into_inner()
    );
}

/// A program that is `preparation` and then ctkeep.
fn prepared(directory: &Path, preparation: &str) -> String {
    let path = directory.join("ctkeep");
    fs::write(&path, format!("#!/bin/sh\n{preparation}\nexec {CTKEEP} \"$@\"\n"))
        .expect("a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a program");
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// With the fewest descriptors that anybody gives, and clients of the metrics that keep theirs.
#[test]
fn few_descriptors_and_many_idle_clients_stop_no_repair() {
    const LISTEN: &str = "127.0.0.1:9815";
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let program = prepared(directory.path(), "ulimit -n 64");
    scene.daemon = Some(scene.lab.daemon(&program, &["--port", "80"]));
    let conns = scene.half_closed();
    let idle: Vec<_> =
        (0..200).map_while(|_| lab::http::connect(&scene.lab.server, LISTEN)).collect();
    assert!(idle.len() > 64, "only {} idle clients", idle.len());
    conns.iter().for_each(|conn| conn.rst(-5));
    scene.await_repair("action=", &conns);
    assert_eq!(scene.open(LIMIT).len(), 0, "the limit lets more in");
    scene.lab.server.run("conntrack -F");
    wait_for("new entries", SOON, || conns.iter().all(|conn| scene.is_counted(conn)));
    let health = lab::http::ask(&scene.lab.server, LISTEN, "GET /healthz", "");
    assert_eq!(health.expect("an answer").status, 200);
    assert!(!scene.daemon().logged("panicked"));
}

/// A control group of version 1 or 2, removed with this.
struct Group {
    path: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

impl Group {
    /// `None` where this process may not make one.
    fn new() -> Option<Self> {
        let name = format!("ctkeep-faults-{}", std::process::id());
        let (parent, limit, usage) = if Path::new("/sys/fs/cgroup/memory").exists() {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        } else {
            ("/sys/fs/cgroup", "memory.max", "memory.current")
        };
        let path = Path::new(parent).join(name);
        let made = fs::create_dir(&path);
        let this = Self { path, limit, usage };
        if let Err(error) = made {
            lab::skip(&format!("no control group of memory: {error}"));
            return None;
        }
        if !this.path.join(limit).exists() {
            lab::skip("no control of memory in the root group");
            return None;
        }
        Some(this)
    }

    /// Allows `more` bytes than are used now.
    fn allow(&self, more: u64) {
        let usage = fs::read_to_string(self.path.join(self.usage)).expect("usage");
        let most = usage.trim().parse::<u64>().expect("bytes") + more;
        fs::write(self.path.join(self.limit), most.to_string()).expect("a limit");
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The last process may still be on its way out.
        holds_within(SOON, || fs::remove_dir(&self.path).is_ok() || !self.path.exists());
    }
}

/// The kernel kills what exceeds its group's memory, in the midst of a repair of thousands; the
/// next instance, with enough of it, takes up all that the first had begun.
#[test]
fn out_of_memory_is_an_end_like_any_other() {
    const MANY: usize = 4000;
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let Some(group) = Group::new() else { return };
    let _second = scene.lab.serve("[::]:81");
    let directory = tempfile::tempdir().expect("a directory");
    let enter = format!("echo $$ >{}", group.path.join("cgroup.procs").display());
    let program = prepared(directory.path(), &enter);
    let args = ["--port", "80", "--port", "81"];
    scene.daemon = Some(scene.lab.daemon(&program, &args));
    let mut conns = scene.half_closed();
    group.allow(512 * 1024);
    // On a port without a limit.
    let mut many = scene.peer.hold(OUTSIDE, MANY);
    many.iter_mut().for_each(RawConn::fin);
    many.iter().for_each(|conn| conn.rst(-5));
    conns.iter().for_each(|conn| conn.rst(-5));
    let ended = holds_within(SOON, || scene.daemon.as_mut().is_some_and(Daemon::has_ended));
    assert!(ended, "there was memory enough");
    scene.daemon = None;
    assert_no_remains(&scene, "out of memory");
    scene.guard(&args);
    conns.extend(many);
    let counted = || {
        let entries = scene.lab.entries();
        let alive = |e: &&lab::Entry| e.state != "CLOSE" && e.state != "TIME_WAIT";
        entries.iter().filter(alive).count() >= conns.len()
    };
    wait_for("repair of all", SOON, counted);
    assert_eq!(scene.open(LIMIT).len(), 0, "the limit lets more in");
}

/// A container ends under the daemon: its namespace goes away with it, and the others are guarded
/// as before.
#[test]
fn a_namespace_that_is_deleted_is_let_go() {
    let Some(dying) = Scene::new(Limiter::Connlimit) else { return };
    let Some(mut living) = Scene::new(Limiter::Connlimit) else { return };
    let paths = [dying.lab.server.path(), living.lab.server.path()];
    let args: Vec<_> = paths.iter().flat_map(|path| ["--netns", path]).collect();
    living.daemon = Some(Daemon::start(&living.lab.client, CTKEEP, &args, &[]));
    for scene in [&dying, &living] {
        let conns = scene.half_closed();
        conns.iter().for_each(|conn| conn.rst(-5));
        wait_for("repair", SOON, || conns.iter().all(|conn| scene.is_counted(conn)));
        // The kernel keeps a namespace as long as a socket of it is closing.
        conns.iter().for_each(|conn| conn.rst(0));
        wait_for("end of the sockets", SOON, || scene.open_sockets() == 0);
    }
    let Scene { lab: lab::Lab { server, client, .. }, server: process, .. } = dying;
    process.kill();
    drop(server);
    // The kernel takes a cable away with either of its ends.
    wait_for("end of the namespace", SOON, || !client.output("ip -o link").contains("eth0"));
    living.peer = living.lab.peer("198.51.100.9");
    let conns = living.half_closed();
    conns.iter().for_each(|conn| conn.rst(-5));
    living.await_repair("action=", &conns);
    assert_eq!(living.open(LIMIT).len(), 0, "the limit lets more in");
    assert!(living.daemon().logged("a namespace has come or gone"), "{}", living.daemon().log());
}
