//! Packets that conntrack acts upon and TCP never gets, and rules that make such of ordinary ones.

#![allow(clippy::indexing_slicing)]

use std::net::IpAddr;

use etherparse::{Ipv4Header, Ipv4Options};

use crate::lab::{self, FIN, Lab, RST, RawConn, Segment};

/// Of zeros (RFC 2385), and padding.
const SIGNATURE: [u8; 20] = [19, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1];

/// An RST that ends the connection in conntrack's eyes, and what keeps it from TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// A loose source route (RFC 791): IP drops it, unless `accept_source_route`.
    SourceRoute,
    /// An option without a length: IP drops it.
    MalformedOption,
    /// A signature (RFC 2385) that TCP did not ask for.
    Md5,
    /// A rule of mangle PREROUTING lets two RSTs in a second through.
    RateInPrerouting,
    /// The same in filter INPUT: part of widely copied rule sets.
    RateInInput,
    /// A rule drops what has crossed too many routers.
    FewHops,
    /// IPv6: a routing header of type 0 (RFC 5095).
    RoutingHeader,
    /// IPv6: a destination option that must not be skipped (RFC 8200, 4.2).
    UnknownOption,
    /// It says to be the server's own answer: conntrack takes it for that, and routing drops it.
    SpoofedAnswer,
    /// A program at the server's control group or socket, or a policy: here a rule in the last
    /// place before the socket.
    LastRule,
}

impl Dropped {
    pub const IPV4: [Self; 8] = [
        Self::SourceRoute,
        Self::MalformedOption,
        Self::Md5,
        Self::RateInPrerouting,
        Self::RateInInput,
        Self::FewHops,
        Self::SpoofedAnswer,
        Self::LastRule,
    ];
    pub const IPV6: [Self; 7] = [
        Self::RoutingHeader,
        Self::UnknownOption,
        Self::Md5,
        Self::RateInPrerouting,
        Self::FewHops,
        Self::SpoofedAnswer,
        Self::LastRule,
    ];

    /// The rule that it needs, for packets to this port.
    pub fn install(self, lab: &Lab, port: u16) {
        let rst = format!("-p tcp --dport {port} --tcp-flags RST RST");
        let limit = "-m limit --limit 2/second --limit-burst 2 -j ACCEPT";
        for (program, hops) in [("iptables", "-m ttl --ttl-lt"), ("ip6tables", "-m hl --hl-lt")] {
            let run = |rule: &str| lab.server.run(&format!("{program} {rule}"));
            match self {
                Self::RateInPrerouting => {
                    run(&format!("-t mangle -A PREROUTING {rst} {limit}"));
                    run(&format!("-t mangle -A PREROUTING {rst} -j DROP"));
                }
                Self::RateInInput => {
                    run(&format!("-A INPUT {rst} {limit}"));
                    run(&format!("-A INPUT {rst} -j DROP"));
                }
                Self::FewHops => run(&format!("-t mangle -A PREROUTING {hops} 5 -j DROP")),
                Self::LastRule => run(&format!("-t security -A INPUT {rst} -j DROP")),
                _ => {}
            }
        }
    }

    /// An RST that TCP would accept if it got it: at the next byte.
    pub fn rst(self, conn: &RawConn) -> Vec<u8> {
        self.packet(&conn.segment(RST, 0))
    }

    /// The same of a FIN.
    pub fn fin(self, conn: &RawConn, offset: i64) -> Vec<u8> {
        self.packet(&conn.segment(FIN | lab::ACK, offset))
    }

    pub fn packet(self, segment: &Segment) -> Vec<u8> {
        if self == Self::SpoofedAnswer {
            let (source, destination) = (segment.destination, segment.source);
            let (seq, ack) = (segment.ack, segment.seq);
            let answer = Segment { source, destination, seq, ack, ..segment.clone() };
            return answer.to_packet();
        }
        let plain = segment.to_packet();
        let IpAddr::V4(hop) = segment.destination.ip() else {
            return self.of_ipv6(plain);
        };
        let [a, b, c, d] = hop.octets();
        match self {
            // Type, length, pointer to the next hop, one hop; then the end.
            Self::SourceRoute => with_options(&plain, &[131, 7, 4, a, b, c, d, 0]),
            Self::MalformedOption => with_options(&plain, &[7, 0, 0, 0]),
            Self::Md5 => lab::with_tcp_options(&plain, &SIGNATURE),
            Self::FewHops => with_hops(&plain, 2),
            _ => plain,
        }
    }

    fn of_ipv6(self, plain: Vec<u8>) -> Vec<u8> {
        const ROUTING: u8 = 43;
        const DESTINATION_OPTIONS: u8 = 60;
        match self {
            // Type 0, one address left: it is not processed any more.
            Self::RoutingHeader => {
                let destination = plain.get(24..40).expect("a header").to_vec();
                let rest = [&[0, 1, 0, 0, 0, 0][..], &destination].concat();
                with_extension(&plain, ROUTING, &rest)
            }
            // The two highest bits of the option's kind: drop the packet.
            Self::UnknownOption => {
                with_extension(&plain, DESTINATION_OPTIONS, &[0x5e, 4, 0, 0, 0, 0])
            }
            Self::Md5 => lab::with_tcp_options(&plain, &SIGNATURE),
            Self::FewHops => with_hops(&plain, 2),
            _ => plain,
        }
    }
}

/// An IPv4 packet with these options in its header.
pub fn with_options(packet: &[u8], options: &[u8]) -> Vec<u8> {
    let (mut header, payload) = Ipv4Header::from_slice(packet).expect("an IPv4 packet");
    header.options = Ipv4Options::try_from(options).expect("whole words");
    header.set_payload_len(payload.len()).expect("a small payload");
    let mut packet = Vec::new();
    header.write(&mut packet).expect("a header");
    packet.extend(payload);
    packet
}

/// An IPv6 packet with one more extension header, `rest` being all behind its length.
pub fn with_extension(packet: &[u8], kind: u8, rest: &[u8]) -> Vec<u8> {
    let (header, payload) = packet.split_at(40);
    let size = rest.len() + 2;
    assert_eq!(size % 8, 0, "whole words");
    let length = u16::try_from(size + payload.len()).expect("a small packet").to_be_bytes();
    let (begin, next, end) = (header.split_at(4).0, header[6], header.split_at(7).1);
    let extension = [next, u8::try_from(size / 8 - 1).expect("one header")];
    [begin, &length, &[kind], end, &extension, rest, payload].concat()
}

fn with_hops(packet: &[u8], hops: u8) -> Vec<u8> {
    if packet[0] >> 4 == 6 {
        let mut packet = packet.to_vec();
        packet[7] = hops;
        return packet;
    }
    let (mut header, payload) = Ipv4Header::from_slice(packet).expect("an IPv4 packet");
    header.time_to_live = hops;
    let mut packet = Vec::new();
    header.write(&mut packet).expect("a header");
    packet.extend(payload);
    packet
}
