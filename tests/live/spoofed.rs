//! Floods of packets from addresses that have no connection, with every chain of headers: what they
//! cost the host is bounded.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use crate::lab::http::{ask, samples};
use crate::lab::{FIN, Lab, RST, Segment};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const PORT: u16 = 80;
const METRICS: &str = "127.0.0.1:9815";
const IPPROTO_TCP: u8 = 6;
const IPPROTO_DSTOPTS: u8 = 60;

/// An IPv6 packet with so many bytes of destination options before its TCP header.
fn with_destination_options(segment: &Segment, size: usize) -> Vec<u8> {
    /// Of an unknown option: skip it (RFC 8200, 4.2).
    const SKIPPED: u8 = 0x1e;
    let plain = segment.to_packet();
    let (header, tcp) = plain.split_at(40);
    let length = u16::try_from(size + tcp.len()).expect("a small packet");
    // Payload length and next header stand at 4 (RFC 8200, 3).
    let (begin, _) = header.split_at(4);
    let (_, end) = header.split_at(7);
    let mut packet = [begin, &length.to_be_bytes(), &[IPPROTO_DSTOPTS], end].concat();
    let begin = packet.len();
    packet.extend([IPPROTO_TCP, u8::try_from(size / 8 - 1).expect("one header")]);
    let mut left = size - 2;
    while left > 0 {
        let option = left.min(257);
        // No single byte may be left over.
        let option = if left - option == 1 { option - 2 } else { option };
        packet.extend([SKIPPED, u8::try_from(option - 2).expect("one option")]);
        packet.resize(packet.len() + option - 2, 0);
        left -= option;
    }
    assert_eq!(packet.len(), begin + size);
    packet.extend(tcp);
    packet
}

fn sweeps(lab: &Lab) -> f64 {
    let answer = ask(&lab.server, METRICS, "GET /metrics", "").expect("metrics");
    *samples(&answer.body).get("ctkeep_sweeps_total").expect("sweeps")
}

/// Once a hundred RSTs with an extension header that was too long for the log made ctkeep read the
/// whole table fifty times in a second, with a warning each.
#[test]
fn extension_headers_of_strangers_start_no_sweep() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(PORT, 3);
    let _server = lab.serve("[::]:80");
    let honest = lab.peer("2001:db8:1::8");
    let held = honest.open(PORT, 1);
    let conn = held.first().expect("a connection");
    let daemon = lab.daemon(CTKEEP, &["--port", "80", "--sweep-interval", "10s"]);
    let before = sweeps(&lab);
    for size in [80, 128, 512, 1024] {
        for number in 0..20 {
            for flags in [RST, FIN] {
                let mut segment = conn.segment(flags, 0);
                segment.source.set_ip(IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 1, number]));
                honest.send_packet(&with_destination_options(&segment, size));
            }
            // Not all in one go of the daemon's.
            thread::sleep(Duration::from_millis(5));
        }
    }
    thread::sleep(Duration::from_secs(1));
    let swept = sweeps(&lab) - before;
    assert!(swept <= 1.0, "{swept} sweeps\n{}", daemon.log());
    assert!(!daemon.logged("events were lost"), "{}", daemon.log());
}
