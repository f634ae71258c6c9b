//! Sockets that end, as the kernel reports it (`SKNLGRP_INET_TCP_DESTROY`, since 4.2): when the object is
//! freed, which is a hint to look and never evidence.
//!
//! Every TCP socket of the namespace that ends is reported, so it is listened to only while there is
//! somebody to wait for.

use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::{Cookie, decode};
use crate::error::{Op, Result};
use crate::netlink::{Drained, KernelSocket, drain};

/// `enum sknetlink_groups`: of IPv4, and of IPv6.
const SKNLGRP_INET_TCP_DESTROY: u32 = 1;
const SKNLGRP_INET6_TCP_DESTROY: u32 = 3;

/// Some 4 000 messages, of sockets that end between two looks.
const BUFFER: usize = 4 << 20;

/// Datagrams read before their contents are acted upon.
const DRAIN: usize = 4096;

/// Listens to the ends of sockets in one network namespace.
#[derive(Debug)]
pub struct Ends {
    socket: KernelSocket,
    datagram: Vec<u8>,
}

impl Ends {
    /// Begins to listen in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no such groups, or does not let us join them.
    pub fn open() -> Result<Self> {
        let op = Op::new("listen to the ends of sockets");
        let mut socket = KernelSocket::open(op, NETLINK_SOCK_DIAG)?;
        socket.grow_receive_buffer(BUFFER).map_err(|error| op.io(error))?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        for group in [SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY] {
            socket.join(group).map_err(|error| op.io(error))?;
        }
        Ok(Self { socket, datagram: Vec::new() })
    }

    /// Hands the cookie of every socket that has ended to `take`. The tuple of one that was reset is
    /// zeroed by then.
    ///
    /// # Errors
    /// The socket is broken. Lost and unreadable messages are not errors but in [`Drained`].
    pub fn drain(&mut self, mut take: impl FnMut(Cookie)) -> Result<Drained> {
        let op = Op::new("receive the ends of sockets");
        drain(&mut self.socket, &mut self.datagram, DRAIN, op, |frame| {
            if let Some(socket) = decode::socket(frame)? {
                take(socket.cookie);
            }
            Ok(())
        })
    }
}

impl AsFd for Ends {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
