//! The questions that `sock_diag` is asked.

use std::net::IpAddr;

use super::{Lookup, Socket, States};
use crate::error::Op;
use crate::flow::Connection;
use crate::netlink::Request;

/// `TCPDIAG_GETSOCK`: the older question, and the only one that is about both families at once. A
/// dump walks the sockets of the whole machine, so one for each family would cost twice.
pub(super) const TCPDIAG_GETSOCK: u16 = 18;
/// `SOCK_DIAG_BY_FAMILY`.
pub(super) const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// `SOCK_DESTROY`, since Linux 4.5.
const SOCK_DESTROY: u16 = 21;
/// `struct inet_diag_req`: its length, and where `idiag_ext` and `idiag_states` are in it.
const INET_DIAG_REQ_LEN: usize = 60;
const IDIAG_EXT: usize = 3;
const IDIAG_STATES: usize = 52;
const IPPROTO_TCP: u8 = 6;
/// `1 << (INET_DIAG_INFO - 1)`: with what the protocol has counted.
pub(super) const INFO: u8 = 1 << 1;
/// Length of `struct inet_diag_sockid`.
pub(super) const INET_DIAG_SOCKID_LEN: usize = 48;
/// `INET_DIAG_NOCOOKIE` in both halves: match by tuple alone.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// All sockets in `states`.
pub(super) fn dump(states: States) -> Request {
    let mut body = vec![0; INET_DIAG_REQ_LEN];
    if let Some(place) = body.get_mut(IDIAG_STATES..IDIAG_STATES + 4) {
        place.copy_from_slice(&states.mask().to_ne_bytes());
    }
    let op = Op::new("dump of TCP sockets");
    Request { op, kind: TCPDIAG_GETSOCK, flags: 0, body, joined: false }
}

/// All sockets in `states`, with what stands upon TCP there.
pub(super) fn with_attributes(states: States) -> Request {
    let mut request = dump(states);
    if let Some(extensions) = request.body.get_mut(IDIAG_EXT) {
        *extensions = INFO;
    }
    request
}

/// The one socket of a tuple.
pub(super) fn lookup(lookup: &Lookup) -> Request {
    one(lookup, 0)
}

/// The same, with what TCP has counted of it.
pub(super) fn info(lookup: &Lookup) -> Request {
    one(lookup, INFO)
}

/// Closes this socket, and no other that has its tuple by now: the kernel compares the cookie.
pub(super) fn destroy(socket: &Socket) -> Request {
    let cookie = socket.cookie.0.to_ne_bytes();
    let op = Op::on("close socket", socket.connection().sent());
    Request { op, kind: SOCK_DESTROY, ..named(&socket.into(), 0, cookie) }
}

fn one(lookup: &Lookup, extensions: u8) -> Request {
    named(lookup, extensions, NO_COOKIE)
}

fn named(lookup: &Lookup, extensions: u8, cookie: [u8; 8]) -> Request {
    let Connection { local, remote } = lookup.connection;
    // struct inet_diag_req_v2 { u8 family, protocol, ext, pad, u32 states, struct inet_diag_sockid id }
    let mut body = vec![lookup.connection.sent().family(), IPPROTO_TCP, extensions, 0];
    body.extend([0; 4]);
    body.extend([local, remote].map(|end| end.port().to_be_bytes()).as_flattened());
    body.extend([local, remote].map(|end| padded(end.addr())).as_flattened());
    body.extend(lookup.interface.to_ne_bytes());
    body.extend(cookie);
    let op = Op::on("socket look-up", lookup.connection.sent());
    Request { op, kind: SOCK_DIAG_BY_FAMILY, flags: 0, body, joined: false }
}

/// An address in the room of the longest.
fn padded(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V6(addr) => addr.octets(),
        IpAddr::V4(addr) => {
            let mut room = [0; 16];
            for (byte, octet) in room.iter_mut().zip(addr.octets()) {
                *byte = octet;
            }
            room
        }
    }
}
