//! The two questions that `sock_diag` is asked.

use netlink_packet_core::Emitable;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};

use super::{Lookup, States};
use crate::error::Op;
use crate::flow::AF_INET;
use crate::netlink::Request;

/// `SOCK_DIAG_BY_FAMILY`.
pub(super) const SOCK_DIAG_BY_FAMILY: u16 = 20;
const IPPROTO_TCP: u8 = 6;
/// `INET_DIAG_NOCOOKIE` in both halves: match by tuple alone.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// All sockets of a family in `states`.
pub(super) fn dump(family: u8, states: States) -> Request {
    request(Op::new("dump of TCP sockets"), family, states, empty_id(family))
}

/// The one socket of a tuple.
pub(super) fn lookup(lookup: &Lookup) -> Request {
    let flow = lookup.flow;
    let id = SocketId {
        source_port: flow.src.port(),
        destination_port: flow.dst.port(),
        source_address: flow.src.addr(),
        destination_address: flow.dst.addr(),
        interface_id: lookup.interface,
        cookie: NO_COOKIE,
    };
    request(Op::on("socket look-up", flow), flow.family(), States::default(), id)
}

fn empty_id(family: u8) -> SocketId {
    if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() }
}

fn request(op: Op, family: u8, states: States, socket_id: SocketId) -> Request {
    let message = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::from_bits_retain(states.mask()),
        socket_id,
    };
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    Request { op, kind: SOCK_DIAG_BY_FAMILY, flags: 0, body, joined: false }
}
