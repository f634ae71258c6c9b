//! Faults of the real kernel: each call of a repair fails once, in each way; then the program is
//! killed in mid-attack, runs out of memory and of descriptors.
//!
//! `strace` injects the failures. Whatever fails: nothing outside the scope changes, an error says
//! what failed, and the next healthy pass repairs, which a refused connection proves.
//!
//! `CTKEEP_FAULTS=all` tries every call with every error (by default every third call, with one of
//! them in turn), and `CTKEEP_KILLS` says how many daemons are killed (by default 8): `make faults`.

use crate::lab;
use crate::scene;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Daemon, RawConn, holds_within, wait_for};
use crate::scene::{CTKEEP, LIMIT, Limiter, Scene};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For what takes milliseconds, or one sweep, unless the machine is overloaded.
const SOON: Duration = Duration::from_secs(20);
/// A port that has the same clients, and is not in scope.
const OUTSIDE: u16 = 81;

/// The calls of netlink and of the recount's devices, and what may come of them. `retval=16` is a
/// short read: no more than the header of a message.
const CALLS: [(&str, &[&str]); 7] = [
    ("sendto", &["error=EPERM", "error=EINTR", "error=ENOMEM", "error=ENOBUFS"]),
    ("recvfrom", &["error=ENOBUFS", "error=ENOMEM", "retval=16", "error=EPERM", "error=EINTR"]),
    ("socket", &["error=EMFILE", "error=EPERM", "error=ENOMEM"]),
    ("bind", &["error=EPERM", "error=ENOMEM"]),
    ("connect", &["error=EPERM", "error=ENOMEM"]),
    ("setsockopt", &["error=EPERM", "error=ENOMEM"]),
    ("ioctl", &["error=EPERM", "error=ENOMEM", "error=EBUSY"]),
];

/// One call, counted from 1, and what becomes of it.
#[derive(Clone, Debug)]
struct Fault {
    call: &'static str,
    number: usize,
    effect: &'static str,
}

/// Half-closed connections that the limiter counts, of which each fault starts anew.
struct Stage {
    scene: Scene,
    conns: Vec<RawConn>,
    outside: Vec<RawConn>,
    trace: PathBuf,
    _directory: tempfile::TempDir,
}

impl Stage {
    fn new() -> Option<Self> {
        let scene = Scene::new(Limiter::Connlimit)?;
        let second = scene.lab.serve("[::]:81");
        // It serves as long as the stage stands.
        std::mem::forget(second);
        let conns = scene.half_closed();
        let mut outside = scene.peer.hold(OUTSIDE, LIMIT);
        outside.iter_mut().for_each(|conn| scene.lab.half_close(conn));
        outside.iter().for_each(|conn| conn.rst(-5));
        let directory = tempfile::tempdir().expect("a directory");
        let trace = directory.path().join("trace");
        let this = Self { scene, conns, outside, trace, _directory: directory };
        // Closed entries of ports out of scope last as long as the test.
        this.set(&this.outside, "CLOSE");
        Some(this)
    }

    fn set(&self, conns: &[RawConn], state: &str) {
        for conn in conns {
            let (client, server) = (conn.client, conn.server);
            self.scene.lab.server.run(&format!(
                "conntrack -U -p tcp -s {} -d {} --sport {} --dport {} --state {state} -t 6000",
                client.ip(),
                server.ip(),
                client.port(),
                server.port(),
            ));
        }
    }

    /// What a stale RST does: the entries are closed, the sockets live.
    fn fool(&self) {
        self.set(&self.conns, "CLOSE");
        assert!(self.conns.iter().all(|conn| !self.scene.is_counted(conn)), "not fooled");
    }

    /// The entries out of scope, and whether they have the long timeout they were given.
    fn untouched(&self) -> Vec<(String, bool)> {
        let entries = self.outside.iter().map(|conn| self.scene.lab.entry(conn));
        entries.flatten().map(|entry| (entry.line, entry.timeout > 5000)).collect()
    }

    fn traced(&self, words: &[&str]) -> (i32, String, String) {
        let trace = self.trace.to_str().expect("a path in UTF-8");
        let mut args = vec!["-f", "-qq", "-o", trace, "-e", "trace=network,ioctl"];
        args.extend(words);
        args.extend(["--", CTKEEP, "reconcile", "--port", "80"]);
        self.scene.lab.ctkeep("strace", &args)
    }

    /// How many of each call a repair makes.
    fn calls(&self) -> HashMap<String, usize> {
        self.fool();
        let (code, _, stderr) = self.traced(&[]);
        assert_eq!(code, 0, "{stderr}");
        let mut calls = HashMap::new();
        let trace = fs::read_to_string(&self.trace).expect("the trace");
        for line in trace.lines() {
            let words = line.split_whitespace().nth(1).unwrap_or_default();
            *calls.entry(words.split('(').next().unwrap_or_default().to_owned()).or_default() += 1;
        }
        calls
    }

    /// Whether the pass said that something was wrong.
    fn survive(&self, fault: &Fault) -> bool {
        let Fault { call, number, effect } = fault;
        self.fool();
        let before = self.untouched();
        let inject = format!("inject={call}:{effect}:when={number}");
        let (code, stdout, stderr) = self.traced(&["-e", &inject]);
        let told = format!("{fault:?}: exit code {code}\n{stdout}{stderr}");
        assert!(matches!(code, 0 | 3 | 4 | 70), "{told}");
        assert!(!stderr.contains("panicked"), "{told}");
        assert!(code == 0 || !stderr.is_empty() || !stdout.is_empty(), "in silence: {told}");
        let healthy = self.scene.lab.ctkeep(CTKEEP, &["reconcile", "--port", "80"]);
        assert_eq!(healthy.0, 0, "after {told}: {}{}", healthy.1, healthy.2);
        assert!(self.conns.iter().all(|conn| self.scene.is_counted(conn)), "after {told}");
        assert_eq!(self.scene.open(LIMIT).len(), 0, "after {told}: let in");
        assert_eq!(self.untouched(), before, "outside the scope: {told}");
        code != 0
    }
}

/// Whether a program of the tests is here.
pub fn has_strace() -> bool {
    let found = Command::new("strace")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        lab::skip("no strace");
    }
    found
}

/// Some lanes side by side, each with a stage of its own, take the work one after another. One
/// test at a time: a daemon that waits for the processor behind many others loses its leases.
fn in_lanes(lanes: usize, work: usize, lane: impl Fn(&mut dyn Iterator<Item = usize>) + Sync) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(|| {
                let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < work);
                lane(&mut std::iter::from_fn(take));
            });
        }
    });
}

/// So many calls are passed over for one that fails, where not all do.
const SAMPLE: usize = 3;

#[test]
fn any_call_of_a_repair_may_fail() {
    if !has_strace() {
        return;
    }
    let Some(stage) = Stage::new() else { return };
    stage.fool();
    let fooled = stage.scene.open(1);
    assert_eq!(fooled.len(), 1, "no bypass to be mended");
    stage.scene.end(&fooled);
    let counted = stage.calls();
    let all = std::env::var("CTKEEP_FAULTS").is_ok_and(|value| value == "all");
    let mut faults = Vec::new();
    for (call, effects) in CALLS {
        let count = *counted.get(call).unwrap_or_else(|| panic!("no {call} in {counted:?}"));
        for number in 1..=count {
            for (index, effect) in effects.iter().enumerate() {
                if all || (number - 1) % effects.len() == index {
                    faults.push(Fault { call, number, effect });
                }
            }
        }
    }
    if !all {
        faults = faults.into_iter().step_by(SAMPLE).collect();
    }
    drop(stage);
    let told = AtomicUsize::new(0);
    in_lanes(4, faults.len(), |work| {
        let stage = Stage::new().expect("a stage");
        for fault in work.map(|index| faults.get(index).expect("a fault")) {
            told.fetch_add(usize::from(stage.survive(fault)), Ordering::Relaxed);
        }
    });
    let told = told.into_inner();
    eprintln!("{} faults survived, {told} of them told of by the exit code", faults.len());
    assert!(told > 0, "no fault was noticed: was any injected?");
}

/// Every third call of a running daemon fails, and then none any more.
#[test]
fn a_daemon_outlives_calls_that_fail_now_and_then() {
    if !has_strace() {
        return;
    }
    let all: Vec<_> = CALLS
        .iter()
        .take_while(|(call, _)| *call != "socket")
        .flat_map(|(call, effects)| effects.iter().map(move |effect| (*call, *effect)))
        .chain([("poll", "error=EINTR")])
        .collect();
    in_lanes(2, all.len(), |work| {
        for (call, effect) in work.map(|index| all.get(index).expect("a failure")) {
            let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
            scene.guard(&["--port", "80", "--sweep-interval", "200ms", "--deep-interval", "1s"]);
            let conns = scene.half_closed();
            let pid = scene.daemon().pid();
            let failing = Failing::attach(pid, call, effect);
            let until = Instant::now() + Duration::from_secs(2);
            while Instant::now() < until {
                conns.iter().for_each(|conn| conn.rst(-5));
                thread::sleep(Duration::from_millis(50));
            }
            failing.detach();
            let what = format!("{call} {effect}");
            let repaired = holds_within(SOON, || conns.iter().all(|conn| scene.is_counted(conn)));
            let entries = || scene.lab.entries();
            let (log, threads) = (scene.daemon().log(), threads(pid));
            assert!(repaired, "{log}\n{:?}\n{threads}\nno repair after {what}", entries());
            // What is late is counted again by the second look, or by the next sweep.
            let refused = holds_within(SOON, || {
                let admitted = scene.open(LIMIT);
                scene.end(&admitted);
                admitted.is_empty()
            });
            assert!(refused, "{}\n{what}: the limit lets more in", scene.daemon().log());
            assert!(!scene.daemon().logged("panicked"), "{what}");
        }
    });
}

/// What the threads of a process are at: a tracer can leave one stopped.
fn threads(pid: u32) -> String {
    let tasks = Path::new("/proc").join(pid.to_string()).join("task");
    let tasks = fs::read_dir(tasks).into_iter().flatten().flatten();
    let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).ok();
    tasks.filter_map(stat).collect()
}

/// Without events it sweeps, and it tries to have them again.
#[test]
fn an_event_source_that_cannot_be_opened_anew_is_tried_again() {
    if !has_strace() {
        return;
    }
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("ctkeep.toml");
    let every = |interval: &str| {
        fs::write(&file, format!("sweep-interval = \"{interval}\"\n")).expect("the file");
    };
    every("1s");
    let path = file.to_str().expect("a path in UTF-8").to_owned();
    scene.guard(&["--port", "80", "--events", "nflog", "--config", &path]);
    let conns = scene.half_closed();
    for (effect, conn) in ["error=ENOMEM", "error=EPERM"].into_iter().zip(&conns) {
        let seen = scene.daemon().log().len();
        let says = |scene: &Scene, text: &str| {
            let log = scene.daemon().log();
            log.get(seen..).is_some_and(|new| new.contains(text))
        };
        // What is remembered of closing connections goes by the interval, so the source is opened
        // anew.
        let failing = Failing::attach_to_each(scene.daemon().pid(), "socket", effect);
        every(if effect.ends_with("EPERM") { "500ms" } else { "400ms" });
        scene.daemon().signal(Signal::SIGHUP);
        wait_for("failure", SOON, || says(&scene, "no event source, sweeps alone"));
        failing.detach();
        wait_for("events", SOON, || says(&scene, "listening"));
        conn.rst(-5);
        wait_for("repair by event", SOON, || says(&scene, "trigger=Event"));
    }
    assert_eq!(scene.open(LIMIT).len(), 0, "{}", scene.daemon().log());
}

/// A daemon whose calls fail.
pub struct Failing {
    strace: std::process::Child,
}

impl Failing {
    /// Every third call fails from when this returns.
    fn attach(pid: u32, call: &str, effect: &str) -> Self {
        Self::inject(pid, &format!("{call}:{effect}:when=3+3"))
    }

    /// Each call fails from when this returns.
    pub fn attach_to_each(pid: u32, call: &str, effect: &str) -> Self {
        Self::inject(pid, &format!("{call}:{effect}"))
    }

    fn inject(pid: u32, what: &str) -> Self {
        let strace = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e"])
            .arg(format!("inject={what}"))
            .args(["-p", &pid.to_string()])
            .spawn()
            .expect("strace");
        let status = Path::new("/proc").join(pid.to_string()).join("status");
        let untraced = "TracerPid:\t0";
        wait_for("strace", SOON, || {
            fs::read_to_string(&status).is_ok_and(|status| !status.contains(untraced))
        });
        Self { strace }
    }

    pub fn detach(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.strace.id()).expect("a process id"));
        kill(pid, Signal::SIGTERM).expect("strace");
        self.strace.wait().expect("strace");
    }
}

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
