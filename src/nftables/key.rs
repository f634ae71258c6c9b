//! Keys of sets, and those that are a packet's four-tuple.

use std::net::IpAddr;

use super::{Expr, Header};
use crate::flow::FourTuple;

/// A field of a set's key, with the number that nft gives its type (`enum datatypes` in nft's
/// `datatype.h`). The kernel keeps the number unread; `nft list` cannot print, nor `nft -f` load, a
/// set that has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// An IPv4 address.
    Ipv4Addr = 7,
    /// An IPv6 address.
    Ipv6Addr = 8,
    /// The number of a protocol.
    InetProto = 12,
    /// A port.
    InetService = 13,
    /// The number of a device. Sets of them carry no note of their byte order (`udata`), so nft
    /// prints the bytes as if they were in network order: a number that it loads again anywhere,
    /// where a name would refuse the whole file on a host without that device.
    IfaceIndex = 20,
}

impl Field {
    /// Bytes in a key, padded to whole registers where several fields make one.
    pub(super) const fn length(self) -> u32 {
        match self {
            Self::InetProto => 1,
            Self::InetService => 2,
            Self::Ipv4Addr | Self::IfaceIndex => 4,
            Self::Ipv6Addr => 16,
        }
    }
}

/// Bits of a type in that of a concatenation (`TYPE_BITS` in nft's `datatype.h`).
const TYPE_BITS: u32 = 6;

/// The type of a key, as nft writes it down: those of its fields, the first in the highest bits.
pub(super) fn type_of(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |all, field| all << TYPE_BITS | *field as u32)
}

/// The length of a key in bytes.
pub(super) fn length_of(fields: &[Field]) -> u32 {
    match fields {
        [one] => one.length(),
        several => several.iter().map(|field| field.length().next_multiple_of(4)).sum(),
    }
}

/// One port.
pub(crate) const PORT: &[Field] = &[Field::InetService];
/// Source address and port, destination address and port.
pub(crate) const TUPLE_V4: &[Field] =
    &[Field::Ipv4Addr, Field::InetService, Field::Ipv4Addr, Field::InetService];
/// The same for IPv6.
pub(crate) const TUPLE_V6: &[Field] =
    &[Field::Ipv6Addr, Field::InetService, Field::Ipv6Addr, Field::InetService];

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_of_keys_are_those_of_nft() {
        // As `nft --debug=netlink` shows them for `ipv4_addr . inet_service . ...`.
        assert_eq!(type_of(&[Field::InetService]), 13);
        assert_eq!(type_of(TUPLE_V4), 0x001c_d1cd);
        assert_eq!((length_of(TUPLE_V4), length_of(TUPLE_V6)), (16, 40));
        assert_eq!((length_of(&[Field::InetService]), length_of(&[Field::IfaceIndex])), (2, 4));
    }
}
