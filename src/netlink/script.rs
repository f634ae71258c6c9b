//! A [`Transport`] that plays a conversation: a function from request bytes to reply datagrams.
//!
//! For tests: it splits replies, loses them, lies in them, exactly where a test wants it.

use std::collections::VecDeque;
use std::io;

use nix::libc;

use super::transport::Transport;

/// What the played kernel does next.
#[derive(Clone, Debug)]
pub enum Reply {
    /// One datagram arrives.
    Datagram(Vec<u8>),
    /// Receiving fails with this errno.
    Errno(i32),
    /// The datagram does not fit into the receive buffer.
    Truncated,
}

/// Plays the kernel by a function that answers each datagram sent.
#[derive(Debug)]
pub struct Script<F> {
    kernel: F,
    replies: VecDeque<Reply>,
}

impl<F: FnMut(&[u8]) -> Vec<Reply>> Script<F> {
    /// A kernel that answers every datagram sent to it by `kernel`.
    pub fn new(kernel: F) -> Self {
        Self { kernel, replies: VecDeque::new() }
    }
}

impl<F: FnMut(&[u8]) -> Vec<Reply>> Transport for Script<F> {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.replies.extend((self.kernel)(datagram));
        Ok(())
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        match self.replies.pop_front() {
            Some(Reply::Datagram(bytes)) => {
                *datagram = bytes;
                Ok(())
            }
            Some(Reply::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Reply::Truncated) => Err(io::Error::from(io::ErrorKind::InvalidData)),
            None => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
        }
    }
}
