//! TCP segments as values: built for the wire on the way out, read leniently on the way in.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use etherparse::{IpNumber, LaxIpSlice, PacketBuilder, TcpHeader, TcpOptionElement, TcpSlice};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

/// A segment to send.
#[derive(Clone, Debug)]
pub struct Segment {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub payload: Vec<u8>,
}

impl Segment {
    /// The IP packet, checksums included. A SYN carries the one option that every TCP sends, its
    /// maximum segment size; no timestamps and no window scale, so that sequence numbers are all
    /// there is to know.
    pub fn to_packet(&self) -> Vec<u8> {
        const WINDOW: u16 = 64_240;
        const HOPS: u8 = 64;
        let builder = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                PacketBuilder::ipv4(source.octets(), destination.octets(), HOPS)
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                PacketBuilder::ipv6(source.octets(), destination.octets(), HOPS)
            }
            _ => panic!("a segment between families: {self:?}"),
        };
        let mut tcp = TcpHeader::new(self.source.port(), self.destination.port(), self.seq, WINDOW);
        tcp.acknowledgment_number = self.ack;
        tcp.fin = self.flags & FIN != 0;
        tcp.syn = self.flags & SYN != 0;
        tcp.rst = self.flags & RST != 0;
        tcp.psh = self.flags & PSH != 0;
        tcp.ack = self.flags & ACK != 0;
        if tcp.syn {
            let options = [TcpOptionElement::MaximumSegmentSize(1460)];
            tcp.set_options(&options).expect("one short option");
        }
        let mut packet = Vec::new();
        let written = builder.tcp_header(tcp).write(&mut packet, &self.payload);
        written.expect("a small packet");
        packet
    }
}

/// An IP packet without options of its own, with these more in its TCP header: whole words.
pub fn with_tcp_options(packet: &[u8], options: &[u8]) -> Vec<u8> {
    if options.is_empty() {
        return packet.to_vec();
    }
    with_tcp_header(packet, |tcp| {
        let all = [tcp.options.as_slice(), options].concat();
        tcp.set_options_raw(&all).expect("few options");
    })
}

/// An IP packet without options of its own, with this in its TCP header's urgent pointer, and the
/// flag that says so or not.
pub fn with_urgent_pointer(packet: &[u8], pointer: u16, flag: bool) -> Vec<u8> {
    with_tcp_header(packet, |tcp| (tcp.urgent_pointer, tcp.urg) = (pointer, flag))
}

fn with_tcp_header(packet: &[u8], change: impl FnOnce(&mut TcpHeader)) -> Vec<u8> {
    let (ip, _) = LaxIpSlice::from_slice(packet).expect("an IP packet");
    let payload = ip.payload().payload;
    let (mut tcp, data) = TcpHeader::from_slice(payload).expect("a TCP header");
    change(&mut tcp);
    let builder = match ip {
        LaxIpSlice::Ipv4(ip) => {
            let ip = ip.header();
            PacketBuilder::ipv4(ip.source(), ip.destination(), ip.ttl())
        }
        LaxIpSlice::Ipv6(ip) => {
            let ip = ip.header();
            PacketBuilder::ipv6(ip.source(), ip.destination(), ip.hop_limit())
        }
    };
    let mut packet = Vec::new();
    builder.tcp_header(tcp).write(&mut packet, data).expect("a small packet");
    packet
}

/// A packet that came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Port 0 for ICMP.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp {
        flags: u8,
        seq: u32,
        ack: u32,
        payload: usize,
    },
    /// An error names the TCP packet that it is about by its source and destination.
    Icmp {
        kind: u8,
        code: u8,
        about: Option<(SocketAddr, SocketAddr)>,
    },
}

impl Frame {
    /// Reads an IP packet; `None` for anything but TCP and ICMP, and for what is cut short.
    ///
    /// Checksums are not looked at: between two ends of a veth they are left to be computed by a
    /// card that is not there.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        let (ip, _) = LaxIpSlice::from_slice(packet).ok()?;
        let payload = ip.payload();
        let (kind, source_port, destination_port) = match payload.ip_number {
            IpNumber::TCP => {
                let tcp = TcpSlice::from_slice(payload.payload).ok()?;
                let kind = Kind::Tcp {
                    flags: *tcp.header_slice().get(13)?,
                    seq: tcp.sequence_number(),
                    ack: tcp.acknowledgment_number(),
                    payload: tcp.payload().len(),
                };
                (kind, tcp.source_port(), tcp.destination_port())
            }
            IpNumber::ICMP | IpNumber::IPV6_ICMP => {
                let (&[kind, code, ..], quote) = payload.payload.split_first_chunk::<8>()?;
                (Kind::Icmp { kind, code, about: quoted(quote) }, 0, 0)
            }
            _ => return None,
        };
        Some(Self {
            source: SocketAddr::new(ip.source_addr(), source_port),
            destination: SocketAddr::new(ip.destination_addr(), destination_port),
            kind,
        })
    }

    /// Neighbour and router discovery, multicast listener reports (RFC 4861, RFC 3810).
    pub fn is_housekeeping(&self) -> bool {
        self.source.is_ipv6() && matches!(self.kind, Kind::Icmp { kind: 130..=137 | 143, .. })
    }
}

impl fmt::Display for Frame {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} > {} ", self.source, self.destination)?;
        match &self.kind {
            Kind::Tcp { flags, payload, .. } => {
                let names = [(SYN, 'S'), (FIN, 'F'), (RST, 'R'), (PSH, 'P'), (ACK, '.')];
                let set = names.iter().filter(|(flag, _)| flags & flag != 0);
                let text: String = set.map(|(_, name)| name).collect();
                write!(out, "tcp [{text}] {payload} bytes")
            }
            Kind::Icmp { kind, code, .. } => write!(out, "icmp type {kind} code {code}"),
        }
    }
}

/// Source and destination of the TCP packet that an ICMP error quotes; a quote may end right
/// behind the ports.
fn quoted(packet: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (ip, _) = LaxIpSlice::from_slice(packet).ok()?;
    let payload = ip.payload();
    let (&[a, b, c, d], _) = payload.payload.split_first_chunk()?;
    (payload.ip_number == IpNumber::TCP).then_some((
        SocketAddr::new(ip.source_addr(), u16::from_be_bytes([a, b])),
        SocketAddr::new(ip.destination_addr(), u16::from_be_bytes([c, d])),
    ))
}
