//! Set keys that are a packet's four-tuple.

use std::net::IpAddr;

use super::{Expr, Header};
use crate::flow::FourTuple;

/// Lengths of a key: each field padded to 4 bytes.
pub(crate) const KEY_V4: u32 = 16;
/// The same for IPv6.
pub(crate) const KEY_V6: u32 = 40;

const TCP_SOURCE_PORT: u32 = 0;
const TCP_DESTINATION_PORT: u32 = 2;

/// Loads source address, source port, destination address, destination port of an IPv4 packet.
pub(crate) fn load_v4() -> [Expr; 4] {
    load(12, 4)
}

/// The same of an IPv6 packet.
pub(crate) fn load_v6() -> [Expr; 4] {
    load(8, 16)
}

fn load(source_address: u32, length: u32) -> [Expr; 4] {
    let address =
        |offset, register| Expr::Load { header: Header::Network, offset, length, register };
    let port =
        |offset, register| Expr::Load { header: Header::Transport, offset, length: 2, register };
    let words = length / 4;
    [
        address(source_address, 0),
        port(TCP_SOURCE_PORT, words),
        address(source_address + length, words + 1),
        port(TCP_DESTINATION_PORT, 2 * words + 1),
    ]
}

/// The key of a packet of `flow`: as the loads lay it out.
pub(crate) fn of(flow: FourTuple) -> Vec<u8> {
    let mut key = Vec::with_capacity(40);
    for end in [flow.src, flow.dst] {
        match end.addr() {
            IpAddr::V4(addr) => key.extend(addr.octets()),
            IpAddr::V6(addr) => key.extend(addr.octets()),
        }
        key.extend(end.port().to_be_bytes());
        key.extend([0, 0]);
    }
    key
}
