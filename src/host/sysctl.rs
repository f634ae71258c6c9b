//! Settings below `/proc/sys/net/netfilter`, of the namespace that the calling thread is in.

use std::fs;
use std::path::Path;

/// A conntrack setting by its name (`nf_conntrack_tcp_loose`) as a number.
///
/// `None` where the kernel has no such setting, or it is no number.
pub fn conntrack(name: &str) -> Option<u64> {
    let path = Path::new("/proc/sys/net/netfilter").join(name);
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
