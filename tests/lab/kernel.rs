//! Where kernels differ, in one place: what a test expects that depends on the version stands here,
//! with the fact, and nowhere else. Measured by `make test-kernels`; docs/kernels.md has the table.

use std::sync::LazyLock;

use super::process::NET_ADMIN_AND_RAW;

/// Major and minor number of the running kernel.
static VERSION: LazyLock<(u32, u32)> = LazyLock::new(|| {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse().ok());
    (numbers.next().expect("a major number"), numbers.next().expect("a minor number"))
});

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

/// Since 5.12 an nftables table can belong to a process and be gone with it, however that ends.
pub fn tables_have_owners() -> bool {
    *VERSION >= (5, 12)
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
