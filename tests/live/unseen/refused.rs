//! Packets of open connections that a limit answers with a reset: the rule closes their entries
//! (`nf_ct_set_closing()`), and TCP never gets them.

use std::thread;
use std::time::Duration;

use super::{ATTACKER, ATTACKER6, PORT, Scene, assert_bounded, contrast};
use crate::lab::{self, Lab, RawConn, Segment};

/// The limit as many have it.
fn reset(lab: &Lab) {
    for (program, mask) in [("iptables", 32), ("ip6tables", 128)] {
        let over = format!("-m connlimit --connlimit-above 3 --connlimit-mask {mask}");
        let verdict = "-j REJECT --reject-with tcp-reset";
        lab.server.run(&format!("{program} -A INPUT -p tcp --syn --dport {PORT} {over} {verdict}"));
    }
}

/// For two ticks one more than the limit stands on its list; so long it answers all SYNs of the source.
fn refuse(scene: &Scene, conns: &[RawConn]) {
    let _over = scene.attacker.syn_only(PORT);
    for conn in conns {
        let syn = conn.segment(lab::SYN, 1000);
        scene.attacker.send(&Segment { ack: 0, ..syn });
    }
    thread::sleep(Duration::from_millis(20).max(scene.pause));
}

#[test]
fn no_syn_of_an_open_connection_that_is_answered_by_a_reset_frees_a_slot() {
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, reset, 24, 8, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let new = scene.attacker.complete(begun, Duration::from_millis(5));
            scene.held.extend(new);
            refuse(scene, &scene.held);
        });
        assert_bounded("a SYN that is refused", &counts, 24);
    }
}

/// One a round: with an entry closed there is room on the list, and TCP itself answers the next SYN.
#[test]
fn no_syn_in_the_handshake_that_is_answered_by_a_reset_frees_a_slot() {
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, reset, 14, 16, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let begun = scene.attacker.half_open(begun, Duration::from_millis(10));
            refuse(scene, &begun);
            begun.iter().for_each(RawConn::ack);
        });
        assert_bounded("a SYN that is refused in the handshake", &counts, 14);
    }
}
