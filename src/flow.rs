//! The vocabulary that both kernel tables share: endpoints, directed four-tuples of packets and
//! entries, connections as their sockets see them. No I/O.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// A TCP endpoint. Its address is canonical: an IPv4 address never hides in `::ffff:a.b.c.d`.
///
/// A dual-stack socket reports its IPv4 peers as v4-mapped while conntrack has plain IPv4; both
/// must compare equal here.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    addr: IpAddr,
    port: u16,
}

impl Endpoint {
    /// An endpoint with its address made canonical.
    pub fn new(addr: IpAddr, port: u16) -> Self {
        Self { addr: addr.to_canonical(), port }
    }

    /// The canonical address.
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// The TCP port in host byte order.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// IPv4 first, then by address and port.
impl Ord for Endpoint {
    fn cmp(&self, other: &Self) -> Ordering {
        let place = |end: &Self| match end.addr {
            IpAddr::V4(addr) => (false, addr.to_bits().into(), end.port),
            IpAddr::V6(addr) => (true, addr.to_bits(), end.port),
        };
        place(self).cmp(&place(other))
    }
}

impl PartialOrd for Endpoint {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// In one or two steps, not five: every entry of a table is looked for by its tuples.
impl Hash for Endpoint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match self.addr {
            IpAddr::V4(addr) => {
                state.write_u64(u64::from(addr.to_bits()) << 16 | u64::from(self.port));
            }
            IpAddr::V6(addr) => {
                state.write_u128(addr.to_bits());
                state.write_u16(self.port);
            }
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.addr, self.port).fmt(f)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Endpoint {
    type Err = std::net::AddrParseError;

    /// Reads `192.0.2.1:80` or `[2001:db8::1]:80`.
    ///
    /// # Errors
    /// Anything else.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let addr: SocketAddr = text.parse()?;
        Ok(Self::new(addr.ip(), addr.port()))
    }
}

/// A directed TCP four-tuple: who sends to whom.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FourTuple {
    /// The sender.
    pub src: Endpoint,
    /// The receiver.
    pub dst: Endpoint,
}

impl FourTuple {
    /// The tuple from `src` to `dst`.
    pub fn new(src: Endpoint, dst: Endpoint) -> Self {
        Self { src, dst }
    }

    /// The same pair seen from the other side.
    #[must_use]
    pub fn inverse(self) -> Self {
        Self { src: self.dst, dst: self.src }
    }

    /// Whether both addresses are IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.src.addr.is_ipv4() && self.dst.addr.is_ipv4()
    }

    /// Address family as both netlink families spell it: `AF_INET` (2) or `AF_INET6` (10).
    pub fn family(&self) -> u8 {
        if self.is_ipv4() { AF_INET } else { AF_INET6 }
    }
}

/// A TCP connection as its socket sees it, in the words of `ss`. Packets and conntrack entries have a
/// [`FourTuple`] for each way; which of them it is stands in the name of the call.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// The socket's own side.
    pub local: Endpoint,
    /// The peer.
    pub remote: Endpoint,
}

impl Connection {
    /// The connection of `local` with `remote`.
    pub fn new(local: Endpoint, remote: Endpoint) -> Self {
        Self { local, remote }
    }

    /// That of the socket whose packets have this tuple.
    pub fn of_sender(flow: FourTuple) -> Self {
        Self::new(flow.src, flow.dst)
    }

    /// That of the socket that packets with this tuple are for.
    pub fn of_receiver(flow: FourTuple) -> Self {
        Self::new(flow.dst, flow.src)
    }

    /// The tuple of what the socket sends: the reply tuple of its entry, where the peer opened it.
    pub fn sent(self) -> FourTuple {
        FourTuple::new(self.local, self.remote)
    }

    /// The tuple of what the socket gets.
    pub fn received(self) -> FourTuple {
        FourTuple::new(self.remote, self.local)
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.sent(), f)
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `AF_INET` as it stands in netlink messages.
pub const AF_INET: u8 = 2;
/// `AF_INET6` as it stands in netlink messages.
pub const AF_INET6: u8 = 10;

impl fmt::Display for FourTuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}", self.src, self.dst)
    }
}

impl fmt::Debug for FourTuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_v4_mapped_endpoint_equals_the_plain_one() {
        let mapped: Endpoint = "[::ffff:192.0.2.1]:80".parse().unwrap();
        let plain: Endpoint = "192.0.2.1:80".parse().unwrap();
        assert_eq!(mapped, plain);
        assert_eq!(mapped.to_string(), "192.0.2.1:80");
    }

    #[test]
    fn ipv6_endpoints_are_written_with_brackets() {
        let end: Endpoint = "[2001:db8::1]:443".parse().unwrap();
        assert_eq!(end.to_string(), "[2001:db8::1]:443");
        assert!("2001:db8::1".parse::<Endpoint>().is_err());
    }
}
