//! Makes the limiter take a connection back that it has thrown out.
//!
//! connlimit and `ct count` keep lists of tuples; a tuple gets onto a list only when a packet of
//! an entry that is not yet assured reaches the rule. So a repaired entry is first inserted
//! unassured, then a *nudge* passes the rules: a SYN of the connection's own tuple that TCP drops
//! in silence. docs/recount.md draws the path.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use etherparse::PacketBuilder;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::conntrack::Entry;
use crate::error::{Cause, Op, Result};
use crate::flow::FourTuple;
use crate::host::route::Routes;

/// `IPPROTO_RAW`: the sender writes the IP header itself.
const IPPROTO_RAW: i32 = 255;
/// Where the checksum stands in a TCP header.
const TCP_CHECKSUM: usize = 16;
/// Any; nothing but this host ever sees the packet.
const TTL: u8 = 64;

/// How the limiter is made to count again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// By the best route there is.
    #[default]
    Auto,
    /// By the loopback device.
    Loopback,
    /// Not at all: entries are repaired in place.
    Off,
}

/// The way that a nudge takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// Out of a raw socket and in by the loopback device.
    Loopback,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loopback => "loopback",
        })
    }
}

/// Sends nudges in one network namespace.
#[derive(Debug)]
pub struct Recounter {
    ipv4: Socket,
    ipv6: Option<Socket>,
    routes: Routes,
    local: HashMap<IpAddr, bool>,
}

impl Recounter {
    /// Opens what the mode needs, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `CAP_NET_RAW` is missing.
    pub fn open(mode: Mode) -> Result<Option<Self>> {
        if mode == Mode::Off {
            return Ok(None);
        }
        let op = Op::new("open raw socket for recount");
        let ipv4 = raw_socket(Domain::IPV4).map_err(|error| op.io(error))?;
        // A kernel without IPv6 has no connections that would need this one.
        let ipv6 = raw_socket(Domain::IPV6).ok();
        Ok(Some(Self { ipv4, ipv6, routes: Routes::open()?, local: HashMap::new() }))
    }

    /// Forgets which addresses are local; they are asked for again.
    pub fn refresh(&mut self) {
        self.local.clear();
    }

    /// Sends one nudge for the connection of `entry`, which a look-up has just shown to be alive.
    ///
    /// # Errors
    /// The connection's first destination is not an address of this host (it is translated to
    /// another one, or routed through), or the send failed.
    pub(super) fn nudge(&mut self, entry: &Entry) -> Result<Route> {
        let op = Op::on("recount", entry.orig);
        let to = entry.orig.dst.addr();
        // Anything else would leave this host.
        if !self.is_local(to)? {
            return Err(op.failed(Cause::Unavailable(format!(
                "{to} is no address of this host: the loopback route does not reach its rules"
            ))));
        }
        let socket = match to {
            IpAddr::V4(_) => &self.ipv4,
            IpAddr::V6(_) => self
                .ipv6
                .as_ref()
                .ok_or_else(|| op.failed(Cause::Unavailable("no raw IPv6 socket".to_owned())))?,
        };
        let packet = nudge_packet(entry.orig).map_err(|error| op.malformed(error))?;
        let address = SockAddr::from(SocketAddr::new(to, 0));
        socket.send_to(&packet, &address).map_err(|error| op.io(error))?;
        Ok(Route::Loopback)
    }

    fn is_local(&mut self, addr: IpAddr) -> Result<bool> {
        if let Some(local) = self.local.get(&addr) {
            return Ok(*local);
        }
        let local = self.routes.is_local(addr)?;
        self.local.insert(addr, local);
        Ok(local)
    }
}

fn raw_socket(domain: Domain) -> std::io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?;
    match domain {
        Domain::IPV4 => socket.set_header_included_v4(true)?,
        _ => socket.set_header_included_v6(true)?,
    }
    // Nothing is ever read from it.
    socket.shutdown(std::net::Shutdown::Read).ok();
    Ok(socket)
}

/// A SYN with a wrong TCP checksum: conntrack does not verify local output, TCP drops it without
/// an answer (`TcpInCsumErrors`).
fn nudge_packet(flow: FourTuple) -> std::result::Result<Vec<u8>, String> {
    let (src, dst) = (flow.src, flow.dst);
    let ip = match (src.addr(), dst.addr()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => PacketBuilder::ipv4(src.octets(), dst.octets(), TTL),
        (IpAddr::V6(src), IpAddr::V6(dst)) => PacketBuilder::ipv6(src.octets(), dst.octets(), TTL),
        _ => return Err("addresses of two families".to_owned()),
    };
    let builder = ip.tcp(src.port(), dst.port(), 0, u16::MAX).syn();
    let mut packet = Vec::with_capacity(builder.size(0));
    builder.write_to_vec(&mut packet, &[]).map_err(|error| error.to_string())?;
    let header = packet.len() - 20;
    if let Some(byte) = packet.get_mut(header + TCP_CHECKSUM) {
        *byte ^= 0x55;
    }
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{SlicedPacket, TransportSlice};

    #[test]
    fn a_nudge_is_a_bare_syn_with_a_wrong_checksum() {
        for (src, dst) in
            [("198.51.100.7:4000", "192.0.2.1:80"), ("[2001:db8:1::7]:4000", "[2001:db8::1]:80")]
        {
            let flow = FourTuple::new(src.parse().unwrap(), dst.parse().unwrap());
            let packet = nudge_packet(flow).unwrap();
            let sliced = SlicedPacket::from_ip(&packet).unwrap();
            let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else { panic!("no TCP") };
            assert!(tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin());
            assert_eq!((tcp.source_port(), tcp.destination_port()), (4000, 80));
            let right = match (flow.src.addr(), flow.dst.addr()) {
                (IpAddr::V4(src), IpAddr::V4(dst)) => {
                    tcp.calc_checksum_ipv4_raw(src.octets(), dst.octets()).unwrap()
                }
                (IpAddr::V6(src), IpAddr::V6(dst)) => {
                    tcp.calc_checksum_ipv6_raw(src.octets(), dst.octets()).unwrap()
                }
                _ => unreachable!(),
            };
            assert_ne!(tcp.checksum(), right);
        }
    }
}
