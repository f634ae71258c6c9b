//! Which families of addresses the namespace of the calling thread can be reached by.

use std::fs;

/// Whether it has an address of IPv6 of global scope, which others can route to.
pub fn has_global_ipv6() -> bool {
    // Address, number of the device, length of the prefix, scope, flags, device (`if6_seq_show()`).
    let all = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
    all.lines().any(|line| line.split_ascii_whitespace().nth(3) == Some("00"))
}
