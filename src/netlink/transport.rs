//! The one seam between this program and the kernel: datagrams out, datagrams in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use socket2::{SockFilter, SockRef};

use crate::error::{Cause, Op, Result};

/// How long a reply may take. The kernel answers inside `send`; only a dump works later.
pub(super) const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Room for one datagram. The kernel builds dump datagrams of at most 32 KiB.
const DATAGRAM: usize = 64 * 1024;

/// Asked for on request sockets: 64 answers of a batch must always fit.
const REQUEST_BUFFER: usize = 1 << 20;

/// Sends and receives whole netlink datagrams.
pub trait Transport {
    /// Sends one datagram, which may hold many messages.
    ///
    /// # Errors
    /// The system call's error.
    fn send(&mut self, datagram: &[u8]) -> io::Result<()>;

    /// Replaces `datagram` by the next one received.
    ///
    /// # Errors
    /// `WouldBlock` after the timeout, `ENOBUFS` when the kernel dropped answers,
    /// `InvalidData` when the datagram did not fit.
    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()>;
}

/// A netlink socket of the running kernel, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct KernelSocket {
    socket: Socket,
    port: u32,
    receive_buffer: usize,
}

impl KernelSocket {
    /// Opens a socket of a netlink family (`NETLINK_NETFILTER`, `NETLINK_SOCK_DIAG`, ...) for
    /// requests, with extended acknowledgements.
    ///
    /// # Errors
    /// The kernel lacks the family, or the process may not open sockets.
    pub fn open(op: Op, family: isize) -> Result<Self> {
        let mut socket = Socket::new(family).map_err(|error| op.io(error))?;
        let port = socket.bind_auto().map_err(|error| op.io(error))?.port_number();
        socket.connect(&SocketAddr::new(0, 0)).map_err(|error| op.io(error))?;
        // Old kernels lack these two; then errors come without the kernel's sentence.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        let timeout = TimeVal::new(5, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).map_err(|e| op.io(e.into()))?;
        let mut this = Self { socket, port, receive_buffer: 0 };
        this.grow_receive_buffer(REQUEST_BUFFER).map_err(|error| op.io(error))?;
        Ok(this)
    }

    /// Asks for a receive buffer of `bytes`, beyond `net.core.rmem_max` where permitted, and
    /// keeps what it got.
    ///
    /// # Errors
    /// The system call's error; a smaller buffer than asked for is not one.
    pub fn grow_receive_buffer(&mut self, bytes: usize) -> io::Result<()> {
        if setsockopt(&self.socket, sockopt::RcvBufForce, &bytes).is_err() {
            setsockopt(&self.socket, sockopt::RcvBuf, &bytes)?;
        }
        // The kernel doubles the value for its own book-keeping.
        self.receive_buffer = self.socket.get_rx_buf_sz()? / 2;
        Ok(())
    }

    /// Lets the kernel queue only datagrams that pass a classic BPF program.
    ///
    /// # Errors
    /// The program is none.
    pub fn attach_filter(&self, program: &[SockFilter]) -> io::Result<()> {
        SockRef::from(&self.socket).attach_filter(program)
    }

    /// Joins a multicast group.
    ///
    /// # Errors
    /// The group does not exist or is not permitted.
    pub fn join(&self, group: u32) -> io::Result<()> {
        self.socket.add_membership(group)
    }

    /// Makes [`Transport::recv`] return `WouldBlock` at once when nothing is queued.
    ///
    /// # Errors
    /// The system call's error.
    pub fn set_non_blocking(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)
    }

    /// The socket's netlink port: `nlmsg_pid` of what its requests cause.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Receive buffer in bytes, as granted.
    pub fn receive_buffer(&self) -> usize {
        self.receive_buffer
    }
}

impl AsFd for KernelSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Transport for KernelSocket {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        loop {
            match self.socket.send(datagram, 0) {
                Ok(sent) if sent == datagram.len() => return Ok(()),
                Ok(_) => return Err(io::Error::from(io::ErrorKind::WriteZero)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        loop {
            datagram.clear();
            datagram.reserve(DATAGRAM);
            match self.socket.recv_from(datagram, libc::MSG_TRUNC) {
                Ok((length, _)) if length > datagram.len() => {
                    return Err(io::Error::from(io::ErrorKind::InvalidData));
                }
                // Another process can address this socket; only the kernel is port 0.
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What a failed receive means for the operation that waited.
pub(super) fn receive_failure(error: io::Error) -> Cause {
    match error.kind() {
        io::ErrorKind::WouldBlock => Cause::Late { seconds: REPLY_TIMEOUT.as_secs() },
        io::ErrorKind::InvalidData => Cause::Truncated,
        _ if error.raw_os_error() == Some(libc::ENOBUFS) => Cause::Overrun,
        _ => Cause::Io(error),
    }
}
