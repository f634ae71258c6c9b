//! By which number the kernel calls other network namespaces in this one, by rtnetlink.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request};

const RTM_GETNSID: u16 = 90;

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
        let mut message = NsidMessage::default();
        message.attributes = vec![NsidAttribute::Fd(fd)];
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        let request = Request { op, kind: RTM_GETNSID, flags: 0, body, joined: false };
        let mut number = None;
        self.conversation.query(&request, |frame| {
            let message = NsidMessage::parse(frame.payload).map_err(|error| op.malformed(error))?;
            number = message.attributes.iter().find_map(|attribute| match attribute {
                // -1: it has none.
                NsidAttribute::Id(number) => u32::try_from(*number).ok().map(|_| *number),
                _ => None,
            });
            Ok(())
        })?;
        Ok(number)
    }
}
