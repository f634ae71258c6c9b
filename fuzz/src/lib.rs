//! What the fuzz targets have in common: a kernel that answers by the fuzzer's bytes.

#[path = "../../tests/played/mod.rs"]
pub mod played;

use std::net::IpAddr;

use ctkeep::firewall::Ruleset;
use ctkeep::firewall::packet::Syn;
use ctkeep::firewall::play::Player;
use ctkeep::flow::Endpoint;
use ctkeep::netlink::Transport;
use ctkeep::netlink::script::Reply;
use netlink_packet_core::NetlinkBuffer;

use played::{Played, script};

/// Answers every send by `bytes`, all messages with the sequence number of its first request.
pub fn answering(bytes: &[u8]) -> Played {
    let bytes = bytes.to_vec();
    script(move |datagram| {
        let mut answer = bytes.clone();
        if let Some(request) = played::requests(datagram).first() {
            set_seq(&mut answer, request.seq);
        }
        vec![Reply::Datagram(answer)]
    })
}

/// Plays SYNs of both families through a rule set: whatever is in it, that has an end, and what a
/// connection meets on its whole way it meets for the limits alone.
pub fn played_through(ruleset: &Ruleset) {
    let player = Player::new(ruleset);
    for (source, server) in [("198.51.100.7", "192.0.2.1"), ("2001:db8::7", "2001:db8::1")] {
        let [source, server] = [source, server].map(|addr| addr.parse::<IpAddr>().expect("one"));
        let syn = Syn::new(source, Endpoint::new(server, 80));
        let limits = player.limits(&syn);
        let whole = player.play(&syn, &mut |hit| Some(hit.limit.count == 0));
        assert!(whole.admitted() == Some(false) || whole.hits.len() >= limits.hits.len());
    }
}

/// Has `bytes` to receive without being asked.
pub fn telling(bytes: &[u8]) -> Played {
    let mut transport = answering(bytes);
    transport.send(&[]).expect("a script takes everything");
    transport
}

/// Gives every message of a datagram this sequence number, as far as they can be told apart.
pub fn set_seq(datagram: &mut [u8], seq: u32) {
    let mut rest = datagram;
    while let Ok(mut message) = NetlinkBuffer::new_checked(&mut *rest) {
        message.set_sequence_number(seq);
        let length = message.length() as usize;
        rest = rest.get_mut(length.next_multiple_of(4)..).unwrap_or_default();
    }
}
