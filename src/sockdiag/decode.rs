//! Reads `struct inet_diag_msg`.

use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::DecodeError;

use super::opener::{Octets, Opener};
use super::request::{SOCK_DIAG_BY_FAMILY, TCPDIAG_GETSOCK};
use super::silence::{Silence, SocketSilence};
use super::socket::{Cookie, Socket, State};
use crate::flow::{AF_INET, AF_INET6, Connection, Endpoint};
use crate::netlink::{Attributes, Frame};

/// Bytes of `struct inet_diag_msg`, behind which attributes stand.
const INET_DIAG_MSG_LEN: usize = 72;
/// Offsets in it.
const IDIAG_FAMILY: usize = 0;
const IDIAG_STATE: usize = 1;
const IDIAG_SPORT: usize = 4;
const IDIAG_DPORT: usize = 6;
const IDIAG_SRC: usize = 8;
const IDIAG_DST: usize = 24;
const IDIAG_IF: usize = 40;
const IDIAG_COOKIE: usize = 44;
const IDIAG_RQUEUE: usize = 56;
const IDIAG_WQUEUE: usize = 60;
const IDIAG_UID: usize = 64;
const IDIAG_INODE: usize = 68;
/// `INET_DIAG_INFO`: `struct tcp_info`, or `struct mptcp_info`.
const INET_DIAG_INFO: u16 = 2;

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
    let message: &[u8; INET_DIAG_MSG_LEN] =
        frame.payload.first_chunk().ok_or_else(|| DecodeError::from("half a socket"))?;
    let family = message[IDIAG_FAMILY];
    if ![AF_INET, AF_INET6].contains(&family) {
        return Err(DecodeError::from(format!("a socket of address family {family}")));
    }
    Ok(read(message))
}

fn read(message: &[u8; INET_DIAG_MSG_LEN]) -> Option<Socket> {
    let word = |at| bytes_at(message, at).map(u32::from_ne_bytes);
    let endpoint = |addr, port| {
        let port = u16::from_be_bytes(bytes_at(message, port)?);
        let v6: [u8; 16] = bytes_at(message, addr)?;
        let v4: [u8; 4] = bytes_at(message, addr)?;
        let is_ipv4 = message[IDIAG_FAMILY] == AF_INET;
        let addr = if is_ipv4 { IpAddr::from(v4) } else { IpAddr::from(v6) };
        Some(Endpoint::new(addr, port))
    };
    Some(Socket {
        local: endpoint(IDIAG_SRC, IDIAG_SPORT)?,
        remote: endpoint(IDIAG_DST, IDIAG_DPORT)?,
        state: State::from_kernel(message[IDIAG_STATE])?,
        inode: word(IDIAG_INODE)?,
        uid: word(IDIAG_UID)?,
        cookie: Cookie(bytes_at(message, IDIAG_COOKIE).map(u64::from_ne_bytes)?),
        interface: word(IDIAG_IF)?,
        recv_queue: word(IDIAG_RQUEUE)?,
        send_queue: word(IDIAG_WQUEUE)?,
    })
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Which side opened the connection of the socket in a message, where that is known.
///
/// # Errors
/// Another message type, or one too short.
pub(super) fn opener(frame: Frame<'_>) -> Result<Option<(Connection, Opener)>, DecodeError> {
    let Some(socket) = socket(frame)? else { return Ok(None) };
    let octets = info(frame).and_then(|info| {
        let u64_at = |at| bytes_at(info, at).map(u64::from_ne_bytes);
        let u32_at = |at| bytes_at(info, at).map(u32::from_ne_bytes);
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
    let silence = info(frame).and_then(|info| {
        let time_at = |at| {
            let millis = bytes_at(info, at).map(u32::from_ne_bytes)?;
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

/// What stands behind a socket.
pub(super) fn attributes(frame: Frame<'_>) -> Attributes<'_> {
    Attributes(frame.payload.get(INET_DIAG_MSG_LEN..).unwrap_or_default())
}

/// `struct tcp_info` of a message, or `struct mptcp_info`; later kernels have longer ones.
pub(super) fn info(frame: Frame<'_>) -> Option<&[u8]> {
    attributes(frame).value(INET_DIAG_INFO)
}
