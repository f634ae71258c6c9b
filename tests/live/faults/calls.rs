//! Calls that `strace` makes fail: each of a repair, now and then those of a daemon.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::{Failing, OUTSIDE, SOON, has_strace, in_lanes};
use crate::lab::{RawConn, holds_within, wait_for};
use crate::scene::{CTKEEP, LIMIT, Limiter, Scene};

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
