//! Where kernels differ, in one place: what a test expects that depends on the version stands here,
//! with the fact, and nowhere else. Measured by `make test-kernels`; docs/kernels.md has the table.

// A release of other than two numbers ends the test.
#![allow(clippy::indexing_slicing)]

use std::sync::LazyLock;

use super::process::NET_ADMIN_AND_RAW;

/// Major and minor number of the running kernel.
static VERSION: LazyLock<(u32, u32)> = LazyLock::new(|| {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let numbers = numbers(&release);
    (numbers[0], numbers[1])
});

/// The third number, which some releases of Debian's (6.1.0-47) do not have: then it is that of the
/// package.
static PATCH: LazyLock<u32> = LazyLock::new(|| {
    let version = std::fs::read_to_string("/proc/version").expect("a version");
    let (major, minor) = *VERSION;
    let all = version.split([' ', '(', ')']).map(numbers);
    let of_this = all.filter(|it| it.len() >= 3 && (it[0], it[1]) == (major, minor));
    of_this.map(|it| it[2]).max().unwrap_or(0)
});

fn numbers(text: &str) -> Vec<u32> {
    text.split(['.', '-', '+']).map_while(|word| word.parse().ok()).collect()
}

/// Since 6.1 (5.10 does not) conntrack checks no sequence number of an RST once a FIN has passed.
fn believes_any_rst_after_a_fin() -> bool {
    *VERSION >= (6, 1)
}

/// Whether conntrack believes an RST at this offset from an acknowledged FIN.
///
/// 5.10 judges one INVALID that lies before what the server has acknowledged, the FIN's own number
/// included, although TCP accepts that one; and one that lies outside of the window.
pub fn believes_rst(offset: i64) -> bool {
    believes_any_rst_after_a_fin() || (1..=1000).contains(&offset)
}

/// Offset of an RST that TCP ignores and conntrack believes: behind the FIN on 5.10, before it
/// elsewhere.
pub fn stale_rst() -> i64 {
    if believes_rst(-5) { -5 } else { 6 }
}

/// 5.10 does not believe an RST in the window of a connection of TCP Fast Open before its handshake ends.
pub fn believes_rst_before_the_handshake_ends() -> bool {
    *VERSION >= (6, 1)
}

/// Since 5.12 an nftables table can belong to a process and be gone with it, however that ends.
pub fn tables_have_owners() -> bool {
    *VERSION >= (5, 12)
}

/// Debian's 5.10 is built without Multipath TCP.
pub fn may_lack_mptcp() -> bool {
    *VERSION < (6, 1)
}

/// Since 5.13 a veth can be told to poll as hardware does; before, it does for a program of its
/// driver (XDP) alone.
pub fn veths_poll() -> bool {
    *VERSION >= (5, 13)
}

/// Capabilities of a daemon with a shield: `CAP_NET_ADMIN` and `CAP_NET_RAW`; before 6.6 `CAP_BPF`,
/// too, without which no map can be read.
pub fn kept_under_the_shield() -> u64 {
    const BPF: u64 = 1 << 39;
    if *VERSION >= (6, 6) { NET_ADMIN_AND_RAW } else { NET_ADMIN_AND_RAW | BPF }
}

/// A nudge by loopback is confirmed when it leaves, before it meets the rules. Kernels from December 2025 on
/// counted no packet of a confirmed entry, not even such a one at first: seen on 6.12.73 and 6.18.5, where
/// `ctkeep` says so; on 5.10.262, 6.1.170, 6.12.95 and 6.18.15 it is counted.
pub fn limits_count_nudges_by_loopback() -> bool {
    match *VERSION {
        (6, 12) => !(63..=94).contains(&*PATCH),
        (6, 18) => !(2..=14).contains(&*PATCH),
        _ => true,
    }
}

/// How many of three connections that were thrown out, and that nothing has taken back, a limit lacks
/// at least: the lists of nf_tables lack one on 6.1.170, 6.12.73, 6.12.95, 6.18.5 and 6.18.15; and all on
/// 5.10.262, 6.12.118, 6.18.44 and 7.3.4.
pub fn lacking_at_least() -> usize {
    match *VERSION {
        (6, 1) => 1,
        (6, 12) if *PATCH < 97 => 1,
        (6, 18) if *PATCH < 40 => 1,
        _ => 3,
    }
}
