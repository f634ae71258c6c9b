//! Faults of the real kernel: each call of a repair fails once, in each way; then the program is
//! killed in mid-attack, runs out of memory and of descriptors.
//!
//! `strace` injects the failures. Whatever fails: nothing outside the scope changes, an error says
//! what failed, and the next healthy pass repairs, which a refused connection proves.
//!
//! `CTKEEP_FAULTS=all` tries every call with every error (by default every third call, with one of
//! them in turn), and `CTKEEP_KILLS` says how many daemons are killed (by default 8): `make faults`.

mod calls;
mod ends;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{self, wait_for};

/// For what takes milliseconds, or one sweep, unless the machine is overloaded.
const SOON: Duration = Duration::from_secs(20);
/// A port that has the same clients, and is not in scope.
const OUTSIDE: u16 = 81;

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

/// A daemon whose calls fail.
pub struct Failing {
    strace: Child,
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
