//! What the fuzz targets have in common: a kernel that answers by the fuzzer's bytes.

#[path = "../../tests/played/mod.rs"]
pub mod played;

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
