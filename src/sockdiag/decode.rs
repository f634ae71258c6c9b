//! Reads `struct inet_diag_msg`.

use netlink_packet_core::{DecodeError, Parseable};
use netlink_packet_sock_diag::inet::InetResponseHeader;

use super::request::{SOCK_DIAG_BY_FAMILY, TCPDIAG_GETSOCK};
use super::socket::{Cookie, Socket, State};
use crate::flow::Endpoint;
use crate::netlink::Frame;

/// The socket in a message; `None` for a state that this program does not know (newer kernels
/// have some for sockets without a peer).
///
/// # Errors
/// Another message type, or one too short.
pub(super) fn socket(frame: Frame<'_>) -> Result<Option<Socket>, DecodeError> {
    if ![SOCK_DIAG_BY_FAMILY, TCPDIAG_GETSOCK].contains(&frame.kind) {
        return Err(DecodeError::from(format!("message type {} for a socket", frame.kind)));
    }
    let header = InetResponseHeader::parse(frame.payload)?;
    let id = &header.socket_id;
    Ok(State::from_kernel(header.state).map(|state| Socket {
        local: Endpoint::new(id.source_address, id.source_port),
        remote: Endpoint::new(id.destination_address, id.destination_port),
        state,
        inode: header.inode,
        uid: header.uid,
        cookie: Cookie(u64::from_ne_bytes(id.cookie)),
        interface: id.interface_id,
        recv_queue: header.recv_queue,
        send_queue: header.send_queue,
    }))
}
