//! What listeners are besides their addresses: of Multipath TCP, or transparent (TPROXY).

use netlink_packet_core::DecodeError;

use super::request;
use super::socket::Socket;
use super::{State, States, decode};
use crate::error::Result;
use crate::netlink::attribute::Attributes;
use crate::netlink::{Conversation, Frame, Transport};

/// `INET_DIAG_ULP_INFO`, and `INET_ULP_INFO_NAME` in it: what stands upon TCP.
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_ULP_INFO_NAME: u16 = 1;
const MPTCP: &str = "mptcp";
/// `INET_DIAG_SOCKOPT` (`struct inet_diag_sockopt`), in kernels since 5.10, and the bit in its first
/// byte of a socket that takes what is for other hosts.
const INET_DIAG_SOCKOPT: u16 = 22;
const TRANSPARENT: u8 = 1 << 5;

/// A listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listener {
    pub(super) socket: Socket,
    pub(super) family: u8,
    pub(super) is_mptcp: bool,
    pub(super) is_transparent: bool,
}

/// All listeners.
///
/// # Errors
/// A broken conversation.
pub(super) fn listeners<T: Transport>(all: &mut Conversation<T>) -> Result<Vec<Listener>> {
    let request = request::with_attributes(States::from_iter([State::Listen]));
    all.dump(&request, |all: &mut Vec<_>, frame| {
        let Some(socket) = decode::socket(frame).map_err(|error| request.op.malformed(error))?
        else {
            return Ok(());
        };
        let attributes = decode::attributes(frame);
        let upon = attributes.nest(INET_DIAG_ULP_INFO);
        all.push(Listener {
            socket,
            family: frame.payload.first().copied().unwrap_or_default(),
            is_mptcp: upon.and_then(|it| it.text(INET_ULP_INFO_NAME)).as_deref() == Some(MPTCP),
            is_transparent: is_transparent(attributes),
        });
        Ok(())
    })
}

/// The socket in a message, if it takes what is for other hosts: one that was accepted is as its
/// listener was.
///
/// # Errors
/// As [`decode::socket`].
pub(super) fn transparent(frame: Frame<'_>) -> std::result::Result<Option<Socket>, DecodeError> {
    Ok(decode::socket(frame)?.filter(|_| is_transparent(decode::attributes(frame))))
}

fn is_transparent(attributes: Attributes<'_>) -> bool {
    let options = attributes.value(INET_DIAG_SOCKOPT);
    options.and_then(<[u8]>::first).is_some_and(|first| first & TRANSPARENT != 0)
}
