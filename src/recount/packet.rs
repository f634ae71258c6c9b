//! The bytes of nudges and seals.

use std::net::IpAddr;

use etherparse::{
    IpFragOffset, IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder,
    PacketBuilderStep, TcpHeader,
};

use crate::flow::FourTuple;

/// Where the checksum stands in a TCP header.
const TCP_CHECKSUM: usize = 16;
/// Length of the IP headers that we write.
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// What Linux sends with on its own link, and what is left of it across the usual number of routers.
const TTL_ON_LINK: u8 = 64;
const TTL_ROUTED: u8 = 52;

/// MTU 1500 without the headers.
const MSS_V4: u16 = 1460;
const MSS_V6: u16 = 1440;

/// TCP MD5 signature option (RFC 2385) with a digest of zeros, then two NOPs.
const MD5_OPTION: [u8; 20] = [19, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1];

/// What keeps TCP from answering a SYN of ours, should it ever get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DropBy {
    /// Nothing: it is dropped before.
    None,
    /// A wrong checksum (`TcpInCsumErrors`). Conntrack does not verify those of local output.
    WrongChecksum,
    /// A signature that the socket does not expect (`TCPMD5Unexpected`). On ingress conntrack
    /// verifies checksums.
    Md5Option,
}

/// What a SYN of ours is sent for. Our chains tell them apart by the window: both are ordinary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Purpose {
    /// To have its connection counted. `tcp_rmem[1]` of Linux at an MTU of 1500.
    Nudge = 64_240,
    /// To see whether it gets through.
    Probe = 65_535,
}

impl Purpose {
    /// The TCP window that says it.
    pub(super) fn window(self) -> u16 {
        self as u16
    }
}

/// What a SYN of ours looks like beside its tuple.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// Its sequence number.
    pub seq: u32,
    pub purpose: Purpose,
    /// IPv4: its identification. IPv6: the lower half of its flow label. Ordinary SYNs have any.
    pub id: u16,
    /// Whether routers stand between the client and this host.
    pub routed: bool,
    pub drop_by: DropBy,
}

/// An IP packet with a SYN of `flow` as Linux sends it: rules that look at SYNs must let it pass.
pub(super) fn syn(flow: FourTuple, shape: Shape) -> Option<Vec<u8>> {
    let ttl = if shape.routed { TTL_ROUTED } else { TTL_ON_LINK };
    let mss = if flow.is_ipv4() { MSS_V4 } else { MSS_V6 };
    let [a, b] = mss.to_be_bytes();
    let [c, d, e, f] = shape.seq.wrapping_mul(0x9e37_79b1).to_be_bytes();
    // MSS, SACK permitted, timestamps, a NOP, window scale 7, in the order of `tcp_syn_options()`.
    let mut options = vec![2, 4, a, b, 4, 2, 8, 10, c, d, e, f, 0, 0, 0, 0, 1, 3, 3, 7];
    if shape.drop_by == DropBy::Md5Option {
        options.extend(MD5_OPTION);
    }
    let syn = ip(flow, ttl, shape.id)?;
    let syn = syn.tcp(flow.src.port(), flow.dst.port(), shape.seq, shape.purpose.window());
    let syn = syn.syn();
    let mut packet = write(syn.options_raw(&options).ok()?)?;
    if shape.drop_by == DropBy::WrongChecksum {
        let header = if flow.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER };
        *packet.get_mut(header + TCP_CHECKSUM)? ^= 0x55;
    }
    Some(packet)
}

/// An IP packet with a bare ACK of `flow`.
pub(super) fn seal(flow: FourTuple, seq: u32) -> Option<Vec<u8>> {
    write(ip(flow, TTL_ON_LINK, 0)?.tcp(flow.src.port(), flow.dst.port(), seq, u16::MAX).ack(0))
}

fn ip(flow: FourTuple, ttl: u8, id: u16) -> Option<PacketBuilderStep<IpHeaders>> {
    let headers = match (flow.src.addr(), flow.dst.addr()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let header = Ipv4Header {
                identification: id,
                dont_fragment: true,
                fragment_offset: IpFragOffset::ZERO,
                time_to_live: ttl,
                protocol: IpNumber::TCP,
                source: src.octets(),
                destination: dst.octets(),
                ..Ipv4Header::default()
            };
            IpHeaders::Ipv4(header, Default::default())
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let header = Ipv6Header {
                flow_label: Ipv6FlowLabel::try_new(id.into()).ok()?,
                next_header: IpNumber::TCP,
                hop_limit: ttl,
                source: src.octets(),
                destination: dst.octets(),
                ..Ipv6Header::default()
            };
            IpHeaders::Ipv6(header, Default::default())
        }
        _ => return None,
    };
    Some(PacketBuilder::ip(headers))
}

fn write(builder: PacketBuilderStep<TcpHeader>) -> Option<Vec<u8>> {
    let mut packet = Vec::with_capacity(builder.size(0));
    builder.write_to_vec(&mut packet, &[]).ok()?;
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{SlicedPacket, TcpOptionElement, TransportSlice};

    fn right_checksum(flow: FourTuple, tcp: &etherparse::TcpSlice<'_>) -> u16 {
        match (flow.src.addr(), flow.dst.addr()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                tcp.calc_checksum_ipv4(src.octets(), dst.octets()).unwrap()
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                tcp.calc_checksum_ipv6(src.octets(), dst.octets()).unwrap()
            }
            _ => unreachable!(),
        }
    }

    #[test]
    fn a_nudge_looks_like_a_syn_of_linux() {
        for (src, dst, headers, mss) in [
            ("198.51.100.7:4000", "192.0.2.1:80", 40, 1460),
            ("[2001:db8:1::7]:4000", "[2001:db8::1]:80", 60, 1440),
        ] {
            let flow = FourTuple::new(src.parse().unwrap(), dst.parse().unwrap());
            for drop_by in [DropBy::None, DropBy::WrongChecksum, DropBy::Md5Option] {
                let purpose = Purpose::Nudge;
                let shape = Shape { seq: 7, purpose, id: 9, routed: true, drop_by };
                let packet = syn(flow, shape).unwrap();
                let sliced = SlicedPacket::from_ip(&packet).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else { panic!("no TCP") };
                assert!(tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin());
                assert_eq!((tcp.source_port(), tcp.destination_port()), (4000, 80));
                assert_eq!(tcp.sequence_number(), 7);
                let valid = tcp.checksum() == right_checksum(flow, tcp);
                assert_eq!(valid, drop_by != DropBy::WrongChecksum);
                let first = tcp.options_iterator().next();
                assert_eq!(first, Some(Ok(TcpOptionElement::MaximumSegmentSize(mss))));
                let signed = drop_by == DropBy::Md5Option;
                assert_eq!(tcp.options().get(20) == Some(&19), signed);
                assert_eq!(packet.len(), headers + 20 + if signed { 20 } else { 0 });
            }
        }
    }
}
