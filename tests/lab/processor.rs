//! Whether a program gets a processor when it wants one.

use std::thread;
use std::time::{Duration, Instant};

use procfs::process::{ProcState, Process, Task, all_processes};

/// A program's threads, and those that carry packets where processors are busy (`ksoftirqd`).
pub struct Runners(Vec<Process>);

impl Runners {
    pub fn of(pid: u32) -> Self {
        let pid = i32::try_from(pid).expect("a process id");
        let is_one = |it: &Process| {
            it.pid == pid || it.stat().is_ok_and(|stat| stat.comm.starts_with("ksoftirqd/"))
        };
        Self(all_processes().expect("/proc").flatten().filter(is_one).collect())
    }

    /// Returns when they have had `time` without waiting for a processor more than a tenth of it, or when
    /// `most` is over.
    pub fn rest(&self, time: Duration, most: Duration) {
        let end = Instant::now() + most;
        loop {
            let before = self.waited();
            thread::sleep(time);
            let was_served = !self.are_waiting() && self.waited() - before <= time / 10;
            if was_served || Instant::now() >= end {
                return;
            }
        }
    }

    /// For how long they have waited for a processor; that of a thread that still waits is not in it.
    fn waited(&self) -> Duration {
        let waited = self.tasks().filter_map(|it| it.schedstat().ok()).map(|it| it.run_delay);
        Duration::from_nanos(waited.sum())
    }

    fn are_waiting(&self) -> bool {
        self.tasks()
            .any(|it| it.stat().is_ok_and(|it| matches!(it.state(), Ok(ProcState::Running))))
    }

    fn tasks(&self) -> impl Iterator<Item = Task> + '_ {
        self.0.iter().filter_map(|it| it.tasks().ok()).flatten().flatten()
    }
}
