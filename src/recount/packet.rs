//! The bytes of nudges and seals.

use std::net::IpAddr;

use etherparse::{PacketBuilder, PacketBuilderStep, TcpHeader};

use crate::flow::FourTuple;

/// Where the checksum stands in a TCP header.
const TCP_CHECKSUM: usize = 16;
/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Any; nothing but this host ever sees these packets.
const TTL: u8 = 64;
/// TCP MD5 signature option (RFC 2385) with a digest of zeros, then two NOPs.
const MD5_OPTION: [u8; 20] = [19, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1];

/// What keeps TCP from answering a nudge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silencer {
    /// A wrong checksum (`TcpInCsumErrors`). Conntrack does not verify those of local output.
    WrongChecksum,
    /// A signature that the socket does not expect (`TCPMD5Unexpected`). On ingress conntrack
    /// verifies checksums.
    Md5Option,
}

/// An IP packet with a SYN of `flow`.
pub(super) fn nudge(flow: FourTuple, seq: u32, silencer: Silencer) -> Option<Vec<u8>> {
    let syn = ip(flow)?.tcp(flow.src.port(), flow.dst.port(), seq, u16::MAX).syn();
    match silencer {
        Silencer::Md5Option => write(syn.options_raw(&MD5_OPTION).ok()?),
        Silencer::WrongChecksum => {
            let mut packet = write(syn)?;
            let checksum = packet.len().checked_sub(TCP_HEADER)? + TCP_CHECKSUM;
            *packet.get_mut(checksum)? ^= 0x55;
            Some(packet)
        }
    }
}

/// An IP packet with a bare ACK of `flow`.
pub(super) fn seal(flow: FourTuple, seq: u32) -> Option<Vec<u8>> {
    write(ip(flow)?.tcp(flow.src.port(), flow.dst.port(), seq, u16::MAX).ack(0))
}

fn ip(flow: FourTuple) -> Option<PacketBuilderStep<etherparse::IpHeaders>> {
    match (flow.src.addr(), flow.dst.addr()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            Some(PacketBuilder::ipv4(src.octets(), dst.octets(), TTL))
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            Some(PacketBuilder::ipv6(src.octets(), dst.octets(), TTL))
        }
        _ => None,
    }
}

fn write(builder: PacketBuilderStep<TcpHeader>) -> Option<Vec<u8>> {
    let mut packet = Vec::with_capacity(builder.size(0));
    builder.write_to_vec(&mut packet, &[]).ok()?;
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{SlicedPacket, TransportSlice};

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
    fn a_nudge_is_a_syn_that_tcp_drops_in_silence() {
        for (src, dst) in
            [("198.51.100.7:4000", "192.0.2.1:80"), ("[2001:db8:1::7]:4000", "[2001:db8::1]:80")]
        {
            let flow = FourTuple::new(src.parse().unwrap(), dst.parse().unwrap());
            for silencer in [Silencer::WrongChecksum, Silencer::Md5Option] {
                let packet = nudge(flow, 7, silencer).unwrap();
                let sliced = SlicedPacket::from_ip(&packet).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = &sliced.transport else { panic!("no TCP") };
                assert!(tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin());
                assert_eq!((tcp.source_port(), tcp.destination_port()), (4000, 80));
                assert_eq!(tcp.sequence_number(), 7);
                let valid = tcp.checksum() == right_checksum(flow, tcp);
                assert_eq!(valid, silencer == Silencer::Md5Option);
                assert_eq!(tcp.options().first() == Some(&19), silencer == Silencer::Md5Option);
            }
        }
    }
}
