//! Logged packets: the tuple is that of the headers.

#![no_main]

use ctkeep::flow::{Endpoint, FourTuple};
use ctkeep::netlink::frames;
use ctkeep::watch::nflog;
use libfuzzer_sys::fuzz_target;
use netlink_packet_core::NlasIterator;

const NFULA_PAYLOAD: u16 = 9;

fuzz_target!(|bytes: &[u8]| {
    for frame in frames(bytes).flatten() {
        let read = nflog::packet(frame.payload);
        let attributes: Option<Vec<_>> = frame.payload.get(4..).and_then(|attributes| {
            NlasIterator::new(attributes).collect::<Result<Vec<_>, _>>().ok()
        });
        let mut packets = attributes.iter().flatten().filter(|a| a.kind() == NFULA_PAYLOAD);
        let Some(packet) = packets.next_back() else {
            assert!(read.is_none());
            continue;
        };
        if let Some(plain) = plainly(packet.value()) {
            assert_eq!(read.and_then(|read| read.flow), Some(plain));
        }
    }
});

/// The tuple of a whole TCP packet without options or extensions of IP; what is none of these is
/// left open.
fn plainly(packet: &[u8]) -> Option<FourTuple> {
    let port = |at: usize| packet.get(at..at + 2).map(|two| u16::from_be_bytes([two[0], two[1]]));
    let four = |at: usize| <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok();
    let sixteen = |at: usize| <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok();
    let is_whole = |length: usize, header: usize| {
        let offset = packet.get(header + 12).map_or(0, |byte| usize::from(byte >> 4) * 4);
        length == packet.len() && offset >= 20 && packet.len() >= header + offset
    };
    let (src, dst, header) = match packet.first()? {
        0x45 if packet.get(9)? == &6 && port(6)? & 0x3fff == 0 && is_whole(port(2)?.into(), 20) => {
            (four(12)?.into(), four(16)?.into(), 20)
        }
        0x60..=0x6f if packet.get(6)? == &6 && is_whole(40 + usize::from(port(4)?), 40) => {
            (sixteen(8)?.into(), sixteen(24)?.into(), 40)
        }
        _ => return None,
    };
    let end = |addr, at| Some(Endpoint::new(addr, port(at)?));
    Some(FourTuple::new(end(src, header)?, end(dst, header + 2)?))
}
