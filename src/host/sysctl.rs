//! Settings below `/proc/sys`, of the namespace that the calling thread is in.

use std::fs;
use std::path::Path;

/// A setting by its dotted name (`net.ipv4.tcp_syncookies`) as a number.
///
/// `None` where the kernel has no such setting, or it is no number.
pub fn number(name: &str) -> Option<u64> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A conntrack setting by its name (`nf_conntrack_tcp_loose`) as a number.
pub fn conntrack(name: &str) -> Option<u64> {
    number(&format!("net.netfilter.{name}"))
}
