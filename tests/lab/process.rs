//! What the kernel tells of a running process.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

/// What every daemon keeps.
pub const NET_ADMIN_AND_RAW: u64 = 1 << 12 | 1 << 13;

/// `/proc/PID/status` as the kernel writes it.
pub fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// A field of it in KiB, for example `VmRSS`.
pub fn status_kib(pid: u32, field: &str) -> u64 {
    let text = status(pid).remove(field).expect("a field");
    text.trim_end_matches(" kB").parse().expect("a number")
}

/// The time of processors that it has taken so far.
pub fn cpu_time(pid: u32) -> Duration {
    /// `USER_HZ`
    const TICK: Duration = Duration::from_millis(10);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let (_, fields) = stat.rsplit_once(") ").expect("a name");
    // utime and stime, proc_pid_stat(5); the first field here is the third there.
    let ticks = fields.split(' ').skip(11).take(2).map(|field| field.parse::<u32>());
    TICK * ticks.map(|ticks| ticks.expect("a number")).sum::<u32>()
}

/// One of its sets of capabilities, for example `CapEff`.
pub fn capabilities(pid: u32, set: &str) -> u64 {
    let mask = status(pid).remove(set).expect("a mask");
    u64::from_str_radix(&mask, 16).expect("a mask in hexadecimal digits")
}

/// Open descriptors.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Open descriptors at rest, the least of half a second: who reads rules or looks at processes has
/// more for a moment.
pub fn descriptors_at_rest(pid: u32) -> usize {
    let samples = (0..50).map(|_| {
        thread::sleep(Duration::from_millis(10));
        descriptors(pid)
    });
    samples.min().expect("samples")
}
