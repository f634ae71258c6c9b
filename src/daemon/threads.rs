//! What the threads of the daemon share: how they wait, and what they have cost.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, clock_gettime};
use thread_priority::{
    NormalThreadSchedulePolicy, RealtimeThreadSchedulePolicy, ThreadPriority, ThreadPriorityValue,
    ThreadSchedulePolicy, set_thread_priority_and_policy, thread_native_id,
};

use super::control::Lead;
use crate::error::{Op, Result};

/// Sleeps for so long, or until told to stop.
pub(super) fn sleep(lead: &Lead, time: Duration) -> Result<()> {
    let mut fds = [PollFd::new(lead.as_fd(), PollFlags::POLLIN)];
    wait_for(&mut fds, time)
}

/// Waits until one of these can be read, or for so long.
pub(super) fn wait_for(fds: &mut [PollFd<'_>], time: Duration) -> Result<()> {
    match ppoll(fds, Some(time.into()), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(Op::new("wait for events").io(errno.into())),
    }
}

/// What this thread has cost so far: waiting, and being stopped, cost nothing.
pub(super) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// What processes that this one has started, and that have ended, have cost.
pub(super) fn cpu_time_of_children() -> Duration {
    let micros = |time: TimeVal| {
        let whole = time.tv_sec() * 1_000_000 + time.tv_usec();
        Duration::from_micros(u64::try_from(whole).unwrap_or(0))
    };
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN);
    usage.map_or(Duration::ZERO, |used| micros(used.user_time()) + micros(used.system_time()))
}

/// Asks for SCHED_RR: bursts of traffic then do not put a repair off.
pub(super) fn prefer_realtime() {
    let policy = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin);
    let lowest = ThreadPriorityValue::try_from(1_u8).map(ThreadPriority::Crossplatform);
    let result = lowest.map_err(|error| error.to_string()).and_then(|priority| {
        set_thread_priority_and_policy(thread_native_id(), priority, policy)
            .map_err(|error| format!("{error:?}"))
    });
    match result {
        Ok(()) => tracing::info!("real-time priority"),
        Err(error) => tracing::warn!(error, "no real-time priority; it needs CAP_SYS_NICE"),
    }
}

/// Asks for what bulk work gets: beside a worker of real-time priority, which it would inherit, it
/// would take turns with that one.
pub(super) fn be_patient() {
    let policy = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Batch);
    let set = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, policy);
    if let Err(error) = set {
        tracing::debug!(?error, "a thread for bulk work has the worker's priority");
    }
}
