//! What the kernel sends without being asked: events and logged packets.

use std::io;

use netlink_packet_core::DecodeError;
use nix::libc;

use super::frame::{Frame, frames};
use super::transport::Transport;
use crate::error::{Op, Result};

/// Messages that were lost on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// The kernel dropped some: look at everything.
    pub overrun: bool,
    /// Messages that could not be read: look at everything.
    pub malformed: u32,
}

/// Hands every queued message of a non-blocking `transport` to `take`, until none is left or
/// `limit` datagrams were read into `datagram`. A message that `take` cannot read is counted, and
/// the next one is handed on.
///
/// # Errors
/// The socket is broken. Lost and unreadable messages are not errors but in [`Drained`].
pub fn drain<T: Transport>(
    transport: &mut T,
    datagram: &mut Vec<u8>,
    limit: usize,
    op: Op,
    mut take: impl FnMut(Frame<'_>) -> std::result::Result<(), DecodeError>,
) -> Result<Drained> {
    let mut drained = Drained::default();
    for _ in 0..limit {
        match transport.recv(datagram) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                drained.overrun = true;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                drained.malformed += 1;
                continue;
            }
            Err(error) => return Err(op.io(error)),
        }
        // Behind a frame that lies about its length nothing follows.
        for frame in frames(datagram) {
            drained.malformed += u32::from(frame.and_then(&mut take).is_err());
        }
    }
    Ok(drained)
}
