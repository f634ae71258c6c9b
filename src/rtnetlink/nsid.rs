//! By which number the kernel calls other network namespaces in this one, by rtnetlink.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_ROUTE;

use super::{body, split};
use crate::error::{Op, Result};
use crate::netlink::attribute::nla;
use crate::netlink::{Conversation, KernelSocket, Request};

const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// Words of `struct rtgenmsg { u8 family }`.
const HEAD: usize = 1;

/// Asks for the numbers that the namespace of the thread that opened it has for others.
#[derive(Debug)]
pub struct Numbers {
    conversation: Conversation<KernelSocket>,
}

impl Numbers {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The process may not open sockets.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open route netlink"), NETLINK_ROUTE)?;
        Ok(Self { conversation: Conversation::new(socket) })
    }

    /// The number of the namespace that this file stands for; `None` where it has none here.
    /// Equivalent: `ip netns list-id`.
    ///
    /// # Errors
    /// It is no namespace, or a broken conversation.
    pub fn of(&mut self, namespace: BorrowedFd<'_>) -> Result<Option<i32>> {
        let op = Op::new("number of a network namespace");
        let fd = u32::try_from(namespace.as_raw_fd()).map_err(|error| op.malformed(error))?;
        let body = body([0], &[nla(NETNSA_FD, &fd.to_ne_bytes())]);
        let request = Request { op, kind: RTM_GETNSID, flags: 0, body, joined: false };
        let mut number = None;
        self.conversation.query(&request, |frame| {
            let (_, attributes) = split::<HEAD>(op, frame.payload)?;
            // -1: it has none.
            number = attributes.native(NETNSA_NSID).map(u32::cast_signed).filter(|it| *it >= 0);
            Ok(())
        })?;
        Ok(number)
    }
}
