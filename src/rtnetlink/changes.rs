//! What others change about devices and their traffic control, as it happens.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{DecodeError, parse_u32};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;

use crate::error::{Op, Result};
use crate::netlink::{Frame, KernelSocket, drain};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_DELQDISC: u16 = 37;
const RTM_DELTFILTER: u16 = 45;
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_TC: u32 = 4;
/// Datagrams read at one look.
const LIMIT: usize = 4096;

/// Hears of changes in one network namespace.
#[derive(Debug)]
pub struct Listener {
    socket: KernelSocket,
    datagram: Vec<u8>,
}

/// What has changed since the last look, by the numbers of interfaces.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Gone, or set down.
    pub down: HashSet<u32>,
    /// Some device has come, gone, or changed.
    pub any: bool,
    /// A queueing discipline or a filter was taken away.
    pub stripped: HashSet<u32>,
    /// More than could be read: anything may have changed.
    pub unknown: bool,
}

impl Listener {
    /// Listens in the network namespace of the calling thread.
    ///
    /// # Errors
    /// No socket is to be had.
    pub fn open() -> Result<Self> {
        let op = Op::new("listen to changes of devices");
        let socket = KernelSocket::open(op, NETLINK_ROUTE)?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        for group in [RTNLGRP_LINK, RTNLGRP_TC] {
            socket.join(group).map_err(|error| op.io(error))?;
        }
        Ok(Self { socket, datagram: Vec::new() })
    }

    /// What has changed since the last call. Nothing waits: one system call where nothing has.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn changes(&mut self) -> Result<Changes> {
        let mut changes = Changes::default();
        let op = Op::new("read changes of devices");
        let drained = drain(&mut self.socket, &mut self.datagram, LIMIT, op, |frame| {
            note(&mut changes, frame)
        })?;
        changes.unknown = drained.overrun || drained.malformed > 0;
        Ok(changes)
    }
}

/// Readable when something has changed.
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn note(changes: &mut Changes, frame: Frame<'_>) -> std::result::Result<(), DecodeError> {
    // struct ifinfomsg { u8, u8, u16, int index, unsigned flags, .. }, struct tcmsg { u8, .., int
    // ifindex, .. }
    let word = |at: usize| {
        let bytes = frame.payload.get(at..at + 4);
        bytes.ok_or_else(|| DecodeError::from("cut short")).and_then(parse_u32)
    };
    changes.any |= matches!(frame.kind, RTM_NEWLINK | RTM_DELLINK);
    match frame.kind {
        RTM_DELLINK => drop(changes.down.insert(word(4)?)),
        RTM_NEWLINK if word(8)? & libc::IFF_UP as u32 == 0 => drop(changes.down.insert(word(4)?)),
        RTM_DELQDISC | RTM_DELTFILTER => drop(changes.stripped.insert(word(4)?)),
        _ => {}
    }
    Ok(())
}
