//! The loopback route: out of a raw socket, through OUTPUT, and in by `lo`.
//!
//! Needs `CAP_NET_RAW` and nothing else. Rules that accept `-i lo` first, or are bound to another
//! interface, do not see it as the client's packet.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::error::{Op, Result};

/// `IPPROTO_RAW`: the sender writes the IP header itself.
const IPPROTO_RAW: i32 = 255;

/// Raw sockets of both families.
#[derive(Debug)]
pub(super) struct RawSockets {
    ipv4: Socket,
    ipv6: Option<Socket>,
}

impl RawSockets {
    /// Opens both in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `CAP_NET_RAW` is missing.
    pub(super) fn open() -> Result<Self> {
        let op = Op::new("open raw socket for recount");
        Ok(Self {
            ipv4: raw_socket(Domain::IPV4).map_err(|error| op.io(error))?,
            // A kernel without IPv6 has no connections that would need this one.
            ipv6: raw_socket(Domain::IPV6).ok(),
        })
    }

    /// Sends a whole IP packet by the routing table.
    ///
    /// # Errors
    /// The system call's error.
    pub(super) fn send(&self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        let socket = match to {
            IpAddr::V4(_) => &self.ipv4,
            IpAddr::V6(_) => self.ipv6.as_ref().ok_or(io::ErrorKind::Unsupported)?,
        };
        // The port of a raw destination would be a protocol number.
        socket.send_to(packet, &SockAddr::from(SocketAddr::new(to, 0))).map(drop)
    }
}

fn raw_socket(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?;
    match domain {
        Domain::IPV4 => socket.set_header_included_v4(true)?,
        _ => socket.set_header_included_v6(true)?,
    }
    Ok(socket)
}
