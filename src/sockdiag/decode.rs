//! Reads `struct inet_diag_msg`.

use std::time::Duration;

use netlink_packet_core::{DecodeError, Parseable};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{InetResponse, InetResponseHeader};

use super::opener::{Octets, Opener};
use super::request::{SOCK_DIAG_BY_FAMILY, TCPDIAG_GETSOCK};
use super::silence::{Silence, SocketSilence};
use super::socket::{Cookie, Socket, State};
use crate::flow::{Connection, Endpoint};
use crate::netlink::Frame;

/// Offsets in `struct tcp_info`.
const TCPI_LAST_DATA_SENT: usize = 44;
const TCPI_LAST_DATA_RECV: usize = 52;
const TCPI_LAST_ACK_RECV: usize = 56;
const TCPI_BYTES_ACKED: usize = 120;
const TCPI_NOTSENT_BYTES: usize = 144;
const TCPI_BYTES_SENT: usize = 200;
const TCPI_BYTES_RETRANS: usize = 208;

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
    Ok(from_header(&header))
}

/// Which side opened the connection of the socket in a message, where that is known.
///
/// # Errors
/// Another message type, or one too short.
pub(super) fn opener(frame: Frame<'_>) -> Result<Option<(Connection, Opener)>, DecodeError> {
    let Some(socket) = socket(frame)? else { return Ok(None) };
    let octets = tcp_info(frame)?.and_then(|info| {
        let u64_at = |at: usize| info.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
        let u32_at = |at: usize| info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        Some(Octets {
            acked: u64_at(TCPI_BYTES_ACKED)?,
            sent: u64_at(TCPI_BYTES_SENT)?,
            sent_again: u64_at(TCPI_BYTES_RETRANS)?,
            unsent: u32_at(TCPI_NOTSENT_BYTES)?.into(),
            queued: socket.send_queue.into(),
        })
    });
    let opener = octets.and_then(|octets| Opener::of(socket.state, octets));
    Ok(opener.map(|opener| (socket.connection(), opener)))
}

/// The socket in a message, and for how long it has been silent, where TCP says so.
///
/// # Errors
/// Another message type, or one too short.
pub(super) fn silence(
    frame: Frame<'_>,
) -> Result<Option<(Connection, SocketSilence)>, DecodeError> {
    let Some(socket) = socket(frame)?.filter(|socket| socket.state != State::Listen) else {
        return Ok(None);
    };
    let silence = tcp_info(frame)?.and_then(|info| {
        let time_at = |at: usize| {
            let millis = info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)?;
            Some(Duration::from_millis(millis.into()))
        };
        Some(Silence {
            sent: time_at(TCPI_LAST_DATA_SENT)?,
            received: time_at(TCPI_LAST_DATA_RECV)?,
            acked: time_at(TCPI_LAST_ACK_RECV)?,
        })
    });
    Ok(Some((socket.connection(), (socket, silence))))
}

/// `struct tcp_info` of a message; later kernels have longer ones.
fn tcp_info(frame: Frame<'_>) -> Result<Option<Vec<u8>>, DecodeError> {
    let response = InetResponse::parse(frame.payload)?;
    Ok(response.nlas.into_iter().find_map(|nla| match nla {
        Nla::TcpInfo(info) => Some(info),
        _ => None,
    }))
}

fn from_header(header: &InetResponseHeader) -> Option<Socket> {
    let id = &header.socket_id;
    State::from_kernel(header.state).map(|state| Socket {
        local: Endpoint::new(id.source_address, id.source_port),
        remote: Endpoint::new(id.destination_address, id.destination_port),
        state,
        inode: header.inode,
        uid: header.uid,
        cookie: Cookie(u64::from_ne_bytes(id.cookie)),
        interface: id.interface_id,
        recv_queue: header.recv_queue,
        send_queue: header.send_queue,
    })
}
