//! From the first bytes of a packet to its four-tuple, whatever headers stand between. Pure.

use std::net::IpAddr;

use crate::flow::{Endpoint, FourTuple};

const IPPROTO_HOPOPTS: u8 = 0;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_ROUTING: u8 = 43;
const IPPROTO_FRAGMENT: u8 = 44;
const IPPROTO_AH: u8 = 51;
const IPPROTO_DSTOPTS: u8 = 60;

const IPV6_HEADER: usize = 40;
/// The fragment offset in an IPv4 header (RFC 791) and in a fragment header of IPv6 (RFC 8200).
const IPV4_OFFSET: u16 = 0x1fff;
const IPV6_OFFSET: u16 = 0xfff8;

/// The four-tuple of an IP packet that may be cut off; `None` where its TCP ports are not in it.
pub(super) fn tcp_flow(packet: &[u8]) -> Option<FourTuple> {
    match packet.first()? >> 4 {
        4 => {
            let is_later_fragment = u16_at(packet, 6)? & IPV4_OFFSET != 0;
            let header = usize::from(packet.first()? & 0x0f) * 4;
            if *packet.get(9)? != IPPROTO_TCP || is_later_fragment || header < 20 {
                return None;
            }
            let ends = [12, 16].map(|at| octets::<4>(packet, at).map(IpAddr::from));
            flow(packet, ends, header)
        }
        6 => {
            let header = behind_extensions(packet)?;
            let ends = [8, 24].map(|at| octets::<16>(packet, at).map(IpAddr::from));
            flow(packet, ends, header)
        }
        _ => None,
    }
}

/// Where the TCP header of an IPv6 packet begins. Each header is at least eight bytes, so the walk
/// ends with the packet.
fn behind_extensions(packet: &[u8]) -> Option<usize> {
    let (mut next, mut at) = (*packet.get(6)?, IPV6_HEADER);
    loop {
        let length = || packet.get(at + 1).copied().map(usize::from);
        let size = match next {
            IPPROTO_TCP => return Some(at),
            IPPROTO_HOPOPTS | IPPROTO_ROUTING | IPPROTO_DSTOPTS => (length()? + 1) * 8,
            IPPROTO_AH => (length()? + 2) * 4,
            IPPROTO_FRAGMENT if u16_at(packet, at + 2)? & IPV6_OFFSET == 0 => 8,
            _ => return None,
        };
        next = *packet.get(at)?;
        at += size;
    }
}

fn flow(packet: &[u8], [src, dst]: [Option<IpAddr>; 2], header: usize) -> Option<FourTuple> {
    let [from, to] = [header, header + 2].map(|at| u16_at(packet, at));
    Some(FourTuple::new(Endpoint::new(src?, from?), Endpoint::new(dst?, to?)))
}

fn u16_at(packet: &[u8], at: usize) -> Option<u16> {
    octets(packet, at).map(u16::from_be_bytes)
}

fn octets<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
    packet.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PORTS: [u8; 4] = [0x1f, 0x90, 0, 80];

    fn ipv4(words: u8, fragment: u16) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x40 | words;
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet[9] = IPPROTO_TCP;
        packet[12..20].copy_from_slice(&[198, 51, 100, 7, 192, 0, 2, 1]);
        packet.resize(usize::from(words) * 4, 1);
        [packet, PORTS.to_vec()].concat()
    }

    /// With these extension headers: the kind of each and its bytes, the first two of which are
    /// written here.
    fn ipv6(extensions: &[(u8, usize)]) -> Vec<u8> {
        let mut packet = vec![0; IPV6_HEADER];
        packet[0] = 0x60;
        packet[8..24].copy_from_slice(&[0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]);
        packet[24..40].copy_from_slice(&[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        let mut next_at = 6;
        for (kind, size) in extensions {
            packet[next_at] = *kind;
            next_at = packet.len();
            packet.resize(next_at + size, 0);
            let length = match *kind {
                IPPROTO_AH => size / 4 - 2,
                IPPROTO_FRAGMENT => 0,
                _ => size / 8 - 1,
            };
            packet[next_at + 1] = u8::try_from(length).unwrap();
        }
        packet[next_at] = IPPROTO_TCP;
        [packet, PORTS.to_vec()].concat()
    }

    fn read(packet: &[u8]) -> Option<String> {
        tcp_flow(packet).map(|flow| flow.to_string())
    }

    #[test]
    fn the_tuple_stands_behind_any_options_and_extensions() {
        for words in [5, 6, 15] {
            let read = read(&ipv4(words, 0x4000));
            assert_eq!(read.as_deref(), Some("198.51.100.7:8080 > 192.0.2.1:80"), "{words}");
        }
        let long = vec![(IPPROTO_DSTOPTS, 2048); 8];
        for extensions in [
            &[][..],
            &[(IPPROTO_HOPOPTS, 8), (IPPROTO_DSTOPTS, 80)],
            &[(IPPROTO_ROUTING, 24), (IPPROTO_FRAGMENT, 8), (IPPROTO_AH, 24)],
            &long,
        ] {
            let read = read(&ipv6(extensions));
            let whole = "[2001:db8:1::7]:8080 > [2001:db8::1]:80";
            assert_eq!(read.as_deref(), Some(whole), "{extensions:?}");
        }
    }

    #[test]
    fn what_is_cut_off_or_no_tcp_has_no_tuple() {
        for whole in [ipv4(5, 0), ipv4(15, 0), ipv6(&[]), ipv6(&[(IPPROTO_DSTOPTS, 80)])] {
            for length in 0..whole.len() {
                assert_eq!(read(&whole[..length]), None, "{length}");
            }
        }
        assert_eq!(read(&ipv4(5, 1)), None, "a later fragment");
        assert_eq!(read(&ipv4(4, 0)), None, "a header that is too short");
        let mut udp = ipv6(&[]);
        udp[6] = 17;
        assert_eq!(read(&udp), None);
    }
}
