//! nf_tables' own notifications: `nft monitor`.

use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::DecodeError;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::Heard;
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Frame, KernelSocket, NFGENMSG_LEN, Transport, drain};

/// `linux/netfilter/nfnetlink.h`
const NFNLGRP_NFTABLES: u32 = 7;
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// `enum nf_tables_msg_types`: what is told of, beside what is asked.
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_DELRULE: u16 = 8;
const NFT_MSG_NEWSET: u16 = 9;
const NFT_MSG_DELSET: u16 = 11;
const NFT_MSG_NEWSETELEM: u16 = 12;
const NFT_MSG_DELSETELEM: u16 = 14;

/// The table's name has this number in the messages of tables, chains, rules, sets and elements.
const NFTA_TABLE: u16 = 1;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;

/// Asked for. A reload of 20 000 rules is some 10 MB of messages, of which the kernel packs a page
/// or two into each datagram; what does not fit is an overrun, and costs a look at all limits.
const BUFFER: usize = 8 << 20;

/// Datagrams read before the caller has a turn.
const DRAIN: usize = 16_384;

/// So many rules that went are remembered by their numbers; more count as lost.
const RULES: usize = 65_536;

/// Receives the notifications of one network namespace.
#[derive(Debug)]
pub struct Listener<T = KernelSocket> {
    transport: T,
    datagram: Vec<u8>,
}

impl Listener<KernelSocket> {
    /// Listens in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` is missing, or the kernel lacks nf_tables.
    pub fn open() -> Result<Self> {
        let op = Op::new("open nftables notifications");
        let mut socket = KernelSocket::open(op, NETLINK_NETFILTER)?;
        socket.grow_receive_buffer(BUFFER).map_err(|error| op.io(error))?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        socket.join(NFNLGRP_NFTABLES).map_err(|error| op.io(error))?;
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

    /// Adds all that is queued to `heard`, but for changes of tables whose name begins with `own`.
    ///
    /// # Errors
    /// The socket is broken. What was lost or unreadable is in `heard`.
    pub fn drain(&mut self, own: &str, heard: &mut Heard) -> Result<()> {
        let op = Op::new("receive nftables notifications");
        let lost = drain(&mut self.transport, &mut self.datagram, DRAIN, op, |frame| {
            take(frame, own, heard)
        })?;
        heard.lost |= lost.overrun || lost.malformed > 0;
        Ok(())
    }
}

fn take(frame: Frame<'_>, own: &str, heard: &mut Heard) -> std::result::Result<(), DecodeError> {
    if frame.kind >> 8 != NFNL_SUBSYS_NFTABLES {
        return Ok(());
    }
    let kind = frame.kind & 0xff;
    if !matches!(
        kind,
        NFT_MSG_NEWTABLE
            | NFT_MSG_DELTABLE
            | NFT_MSG_NEWCHAIN
            | NFT_MSG_DELCHAIN
            | NFT_MSG_NEWRULE
            | NFT_MSG_DELRULE
            | NFT_MSG_NEWSET
            | NFT_MSG_DELSET
            | NFT_MSG_NEWSETELEM
            | NFT_MSG_DELSETELEM
    ) {
        return Ok(());
    }
    let nameless = || DecodeError::from("a notification that names no table");
    let family = *frame.payload.first().ok_or_else(nameless)?;
    let attributes = Attributes(frame.payload.get(NFGENMSG_LEN..).ok_or_else(nameless)?);
    let table = attributes.text(NFTA_TABLE).ok_or_else(nameless)?;
    if table.starts_with(own) {
        return Ok(());
    }
    let set = || {
        let set = attributes.text(NFTA_SET_ELEM_LIST_SET);
        set.ok_or_else(|| DecodeError::from("elements that name no set"))
    };
    match kind {
        NFT_MSG_NEWSETELEM => {
            heard.grown.insert((family, table, set()?));
        }
        NFT_MSG_DELSETELEM => {
            heard.emptied.insert((family, table, set()?));
        }
        NFT_MSG_DELRULE => {
            heard.rules += 1;
            let handle = attributes.value(NFTA_RULE_HANDLE).and_then(|value| value.try_into().ok());
            let number = handle
                .map(u64::from_be_bytes)
                .ok_or_else(|| DecodeError::from("a rule without a number"))?;
            if heard.deleted.len() < RULES {
                heard.deleted.insert((family, table, number));
            } else {
                heard.lost = true;
            }
        }
        _ => heard.rules += 1,
    }
    Ok(())
}
