//! TCP Fast Open: a connection is accepted, and costs its slot, before its handshake ends. Until then TCP
//! answers each ACK of what it has never sent by an RST of its own, which conntrack believes.

use std::thread;
use std::time::Duration;

use super::{ATTACKER, ATTACKER6, PORT, assert_bounded, contrast};
use crate::lab::{self, Lab, RawConn, Segment};

const BURSTS: usize = 8;
/// Of 24: on a busy machine an answer can come too late.
const GROWN: usize = 15;

#[test]
fn no_ack_of_what_was_never_sent_frees_a_slot_of_what_was_opened_fast() {
    // Servers are fast, need no cookie, and all listeners are (`TFO_SERVER_*` in net/tcp.h).
    const FAST: &str = "1538";
    let fast = |lab: &Lab| lab.server.sysctl("net/ipv4/tcp_fastopen", FAST);
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, fast, GROWN, 1, |scene| {
            for _ in 0..BURSTS {
                for conn in &scene.held {
                    let wrong = conn.segment(lab::ACK, 0);
                    scene.attacker.send(&Segment { ack: wrong.ack.wrapping_sub(100), ..wrong });
                }
                thread::sleep(Duration::from_millis(5));
                let syn = |_| scene.attacker.syn_with_data(PORT, b"GET / HTTP/1.0\r\n\r\n");
                let begun = (0..scene.limit).map(syn).collect();
                let new = scene.attacker.half_open(begun, Duration::from_millis(10));
                scene.held.extend(new);
                thread::sleep(scene.pause.max(Duration::from_millis(80)));
            }
            scene.held.iter().for_each(RawConn::ack);
        });
        assert_bounded("an ACK of what was never sent, opened fast", &counts, GROWN);
    }
}
