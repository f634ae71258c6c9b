//! Asks the kernel's neighbour tables by rtnetlink.

use std::net::IpAddr;

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourHeader, NeighbourMessage,
};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request, Transport};

const RTM_GETNEIGH: u16 = 30;

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
            let found =
                NeighbourMessage::parse(frame.payload).map_err(|e| request.op.malformed(e))?;
            mac = found.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
                _ => None,
            });
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
    let (family, destination) = match addr {
        IpAddr::V4(addr) => (AddressFamily::Inet, NeighbourAddress::Inet(addr)),
        IpAddr::V6(addr) => (AddressFamily::Inet6, NeighbourAddress::Inet6(addr)),
    };
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader { family, ifindex: index, ..NeighbourHeader::default() };
    message.attributes = vec![NeighbourAttribute::Destination(destination)];
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    Request { op: Op::new("neighbour look-up"), kind: RTM_GETNEIGH, flags: 0, body, joined: false }
}
