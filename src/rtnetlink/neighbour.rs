//! Asks the kernel's neighbour tables by rtnetlink.

use std::net::IpAddr;

use netlink_sys::protocols::NETLINK_ROUTE;

use super::{address, body, split};
use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request, Transport};

const RTM_GETNEIGH: u16 = 30;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// Words of `struct ndmsg { u8 family, .., int index, u16 state, u8 flags, u8 type }`.
const HEAD: usize = 3;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The neighbour tables of one network namespace.
#[derive(Debug)]
pub struct Neighbours<T = KernelSocket> {
    conversation: Conversation<T>,
}

impl Neighbours<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The process may not open sockets.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open neighbour netlink"), NETLINK_ROUTE)?;
        Ok(Self { conversation: Conversation::new(socket) })
    }
}

impl<T: Transport> Neighbours<T> {
    /// The Ethernet address of `addr` at the interface `index`; `None` where it is not known or
    /// has none. Equivalent: `ip neigh get ADDR dev INTERFACE`.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn mac(&mut self, index: u32, addr: IpAddr) -> Result<Option<Mac>> {
        let request = query(index, addr);
        let mut mac = None;
        let asked = self.conversation.ask(&request, |frame| {
            let (_, attributes) = split::<HEAD>(request.op, frame.payload)?;
            mac = attributes.value(NDA_LLADDR).and_then(|bytes| bytes.try_into().ok());
            Ok(())
        });
        match asked {
            // Not known, or an interface without neighbours.
            Err(error) if error.errno().is_some() => Ok(None),
            Err(error) => Err(error),
            Ok(()) => Ok(mac),
        }
    }
}

fn query(index: u32, addr: IpAddr) -> Request {
    let (family, destination) = address(NDA_DST, addr);
    let body = body([family.into(), index, 0], &[destination]);
    Request { op: Op::new("neighbour look-up"), kind: RTM_GETNEIGH, flags: 0, body, joined: false }
}
