//! What systemd allows the service: its control group, and the limits of its process.

use std::fs;
use std::path::{Path, PathBuf};

use procfs::process::Process;

/// Where the unit's control group is, by the unified hierarchy.
const UNIT: &str = "/sys/fs/cgroup/system.slice/ctkeep.service";

/// The bounds of a service. `None`: none, or not to be seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unit {
    /// Of which process; that of the caller where the service does not run.
    pub pid: i32,
    /// `TasksMax`.
    pub tasks: Option<u64>,
    /// The lower of `MemoryHigh` and `MemoryMax`, in bytes.
    pub memory: Option<u64>,
    /// `CPUQuota`, in percent of one processor.
    pub cpu: Option<u64>,
    /// `LimitNOFILE`, the soft one.
    pub files: Option<u64>,
}

impl Unit {
    /// The running service; without one, the calling process: started by `systemd-run` with the
    /// unit's settings it sees the same.
    pub fn read() -> Option<Self> {
        let service = Path::new(UNIT);
        let main = fs::read_to_string(service.join("cgroup.procs")).ok();
        let main = main.and_then(|pids| pids.lines().next()?.parse().ok());
        let process = match main {
            Some(pid) => Process::new(pid).ok()?,
            None => Process::myself().ok()?,
        };
        let group = if main.is_some() { service.to_owned() } else { own_group(&process)? };
        let limits = process.limits().ok();
        Some(Self {
            pid: process.pid,
            tasks: bound(&group, "pids.max"),
            memory: bound(&group, "memory.high")
                .into_iter()
                .chain(bound(&group, "memory.max"))
                .min(),
            cpu: fs::read_to_string(group.join("cpu.max")).ok().and_then(|text| percent(&text)),
            files: limits.and_then(|limits| match limits.max_open_files.soft_limit {
                procfs::process::LimitValue::Value(files) => Some(files),
                procfs::process::LimitValue::Unlimited => None,
            }),
        })
    }
}

fn own_group(process: &Process) -> Option<PathBuf> {
    let groups = process.cgroups().ok()?;
    let unified = groups.into_iter().find(|group| group.hierarchy == 0)?;
    Some(Path::new("/sys/fs/cgroup").join(unified.pathname.trim_start_matches('/')))
}

fn bound(group: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(group.join(name)).ok()?.trim().parse().ok()
}

/// `20000 100000`: microseconds of each period.
fn percent(text: &str) -> Option<u64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
    quota.checked_mul(100)?.checked_div(period)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_a_share_of_one_processor() {
        assert_eq!(percent("20000 100000\n"), Some(20));
        assert_eq!(percent("max 100000\n"), None);
    }
}
