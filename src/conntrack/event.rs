//! Conntrack events: what the kernel did to which entry, as it happens.
//!
//! Events make a repair fast; they prove nothing. They can be lost, and entries made while nobody
//! listened never send any (`nf_conntrack_events=2`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::NLM_F_CREATE;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc;

use super::decode;
use super::entry::Entry;
use super::uapi::{
    IPCTNL_MSG_CT_DELETE, IPCTNL_MSG_CT_NEW, NFNLGRP_CONNTRACK_DESTROY, NFNLGRP_CONNTRACK_UPDATE,
};
use crate::error::{Op, Result};
use crate::netlink::{KernelSocket, Transport, frames};

/// Asked for; 13 000 events queue in 8 MiB, the default buffer holds 166.
const EVENT_BUFFER: usize = 8 << 20;

/// What happened to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Its state, status, mark, ... changed.
    Update,
    /// It is gone.
    Destroy,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The entry after it.
    pub entry: Entry,
    /// Netlink port of the request that caused it; 0 for packets and timeouts.
    pub port: u32,
}

/// What a call to [`Listener::drain`] met beside events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// The kernel dropped events: look at everything.
    pub overrun: bool,
    /// Messages that could not be read: look at everything.
    pub malformed: u32,
}

/// Receives the events of one network namespace.
#[derive(Debug)]
pub struct Listener<T = KernelSocket> {
    transport: T,
    datagram: Vec<u8>,
}

impl Listener<KernelSocket> {
    /// Listens to UPDATE and DESTROY in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` is missing, or the kernel has no ctnetlink.
    pub fn open() -> Result<Self> {
        let op = Op::new("open conntrack events");
        let mut socket = KernelSocket::open(op, NETLINK_NETFILTER)?;
        socket.grow_receive_buffer(EVENT_BUFFER).map_err(|error| op.io(error))?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        for group in [NFNLGRP_CONNTRACK_UPDATE, NFNLGRP_CONNTRACK_DESTROY] {
            socket.join(group).map_err(|error| op.io(error))?;
        }
        Ok(Self::new(socket))
    }

    /// Receive buffer in bytes, as granted.
    pub fn receive_buffer(&self) -> usize {
        self.transport.receive_buffer()
    }
}

impl AsFd for Listener<KernelSocket> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

impl<T: Transport> Listener<T> {
    /// Listens on any non-blocking transport.
    pub fn new(transport: T) -> Self {
        Self { transport, datagram: Vec::new() }
    }

    /// Hands every queued TCP event to `take`, until none is left or `limit` datagrams were read.
    ///
    /// # Errors
    /// The socket is broken. Lost and unreadable events are not errors but in [`Drained`].
    pub fn drain(&mut self, limit: usize, mut take: impl FnMut(Event)) -> Result<Drained> {
        let mut drained = Drained::default();
        for _ in 0..limit {
            match self.transport.recv(&mut self.datagram) {
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
                Err(error) => return Err(Op::new("receive conntrack events").io(error)),
            }
            for frame in frames(&self.datagram) {
                let Ok(frame) = frame else {
                    drained.malformed += 1;
                    break;
                };
                let kind = match frame.kind {
                    IPCTNL_MSG_CT_NEW if frame.flags & NLM_F_CREATE == 0 => EventKind::Update,
                    IPCTNL_MSG_CT_DELETE => EventKind::Destroy,
                    _ => continue,
                };
                match decode::entry(frame.payload) {
                    Ok(Some(entry)) => take(Event { kind, entry, port: frame.port }),
                    Ok(None) => {}
                    Err(_) => drained.malformed += 1,
                }
            }
        }
        Ok(drained)
    }
}
