//! `struct nfgenmsg`, which begins each message of netfilter.

/// Its length. The attributes of a message stand behind it.
pub const NFGENMSG_LEN: usize = 4;

/// One of this address family and resource: the subsystem of a batch, the group of a packet log, else 0.
pub fn nfgenmsg(family: u8, resource: u16) -> [u8; NFGENMSG_LEN] {
    let [high, low] = resource.to_be_bytes();
    // NFNETLINK_V0
    [family, 0, high, low]
}
