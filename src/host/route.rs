//! Asks the kernel's routing tables by rtnetlink.

use std::net::IpAddr;

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;

use crate::error::{Op, Result};
use crate::netlink::{Connection, KernelSocket, Request, Transport};

const RTM_GETROUTE: u16 = 26;

/// The routing tables of one network namespace.
#[derive(Debug)]
pub struct Routes<T = KernelSocket> {
    connection: Connection<T>,
}

impl Routes<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The process may not open sockets.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open route netlink"), NETLINK_ROUTE)?;
        Ok(Self { connection: Connection::new(socket) })
    }
}

impl<T: Transport> Routes<T> {
    /// Whether packets to `addr` are delivered on this host. Equivalent: `ip route get ADDR`.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn is_local(&mut self, addr: IpAddr) -> Result<bool> {
        let request = query(addr);
        let mut local = false;
        let answer = self.connection.query(&request, |frame| {
            let route = RouteMessage::parse(frame.payload).map_err(|e| request.op.malformed(e))?;
            local = route.header.kind == RouteType::Local;
            Ok(())
        });
        match answer {
            // No route, or one that forbids: not local.
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
                Ok(false)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(local),
        }
    }
}

fn query(addr: IpAddr) -> Request {
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
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    Request { op: Op::new("route look-up"), kind: RTM_GETROUTE, flags: 0, body, joined: false }
}
