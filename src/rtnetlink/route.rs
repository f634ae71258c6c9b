//! Asks the kernel's routing tables by rtnetlink.

use std::net::IpAddr;

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType, RouteVia,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;

use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request, Transport};

const RTM_GETROUTE: u16 = 26;

/// The routing tables of one network namespace.
#[derive(Debug)]
pub struct Routes<T = KernelSocket> {
    pub(super) conversation: Conversation<T>,
}

impl Routes<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The process may not open sockets.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open route netlink"), NETLINK_ROUTE)?;
        Ok(Self { conversation: Conversation::new(socket) })
    }
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// They are delivered on this host.
    Local,
    /// They leave this host.
    Interface {
        /// Number of the interface that they leave by.
        index: u32,
        /// The router that they go to; `None` where the address is on the link.
        gateway: Option<IpAddr>,
    },
    /// There is no way, or it is forbidden.
    Unreachable,
}

impl<T: Transport> Routes<T> {
    /// Where packets to `addr` go, from the address `from` where rules ask for the source.
    /// Equivalent: `ip route get ADDR from FROM`.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn destination(&mut self, addr: IpAddr, from: Option<IpAddr>) -> Result<Destination> {
        match self.ask(addr, from) {
            // A source that is no address of this host is refused: the first destination of a
            // translated connection, the address of a transparent proxy's socket. With EINVAL;
            // since 6.18 with ENETUNREACH (seen there, guarded by
            // `a_source_that_is_not_ours_does_not_hide_the_way`).
            Err(error)
                if from.is_some()
                    && matches!(error.errno(), Some(Errno::EINVAL | Errno::ENETUNREACH)) =>
            {
                self.destination(addr, None)
            }
            Err(error)
                if matches!(
                    error.errno(),
                    Some(
                        Errno::ENETUNREACH
                            | Errno::EHOSTUNREACH
                            | Errno::EACCES
                            | Errno::EINVAL
                            | Errno::ENETDOWN
                    )
                ) =>
            {
                Ok(Destination::Unreachable)
            }
            answer => answer,
        }
    }

    /// Whether packets to `addr` are delivered on this host.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn is_local(&mut self, addr: IpAddr) -> Result<bool> {
        Ok(self.destination(addr, None)? == Destination::Local)
    }

    fn ask(&mut self, addr: IpAddr, from: Option<IpAddr>) -> Result<Destination> {
        let request = query(addr, from);
        let mut destination = Destination::Unreachable;
        self.conversation.ask(&request, |frame| {
            let route = RouteMessage::parse(frame.payload).map_err(|e| request.op.malformed(e))?;
            let (mut out, mut gateway) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(index) => out = Some(*index),
                    RouteAttribute::Gateway(RouteAddress::Inet(addr))
                    | RouteAttribute::Via(RouteVia::Inet(addr)) => gateway = Some((*addr).into()),
                    RouteAttribute::Gateway(RouteAddress::Inet6(addr))
                    | RouteAttribute::Via(RouteVia::Inet6(addr)) => gateway = Some((*addr).into()),
                    _ => {}
                }
            }
            destination = match (route.header.kind, out) {
                (RouteType::Local, _) => Destination::Local,
                (RouteType::Unicast, Some(index)) => Destination::Interface { index, gateway },
                _ => Destination::Unreachable,
            };
            Ok(())
        })?;
        Ok(destination)
    }
}

fn query(addr: IpAddr, from: Option<IpAddr>) -> Request {
    let (family, prefix) = match addr {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family,
        destination_prefix_length: prefix,
        ..RouteHeader::default()
    };
    message.attributes = vec![RouteAttribute::Destination(addr.into())];
    if let Some(from) = from {
        message.header.source_prefix_length = prefix;
        message.attributes.push(RouteAttribute::Source(from.into()));
    }
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    Request { op: Op::new("route look-up"), kind: RTM_GETROUTE, flags: 0, body, joined: false }
}
