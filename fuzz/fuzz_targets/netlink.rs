//! The frame iterator, and conversations in which the kernel says anything at all.

#![no_main]

use ctkeep::Op;
use ctkeep::netlink::script::{Reply, Script};
use ctkeep::netlink::{Conversation, Request, Transport, frames};
use ctkeep_fuzz::{played, set_seq, telling};
use libfuzzer_sys::fuzz_target;

const ERRNOS: [i32; 8] = [
    played::ENOBUFS,
    played::EPERM,
    played::ENOMEM,
    played::EINVAL,
    4,  // EINTR
    11, // EAGAIN
    16, // EBUSY
    9,  // EBADF
];
const REQUESTS: usize = 3;

// The first three bytes: what is asked; which messages begin a new datagram and which get the
// sequence number that fits; where receiving fails, and how.
fuzz_target!(|bytes: &[u8]| {
    let Some((&[way, cuts, failure], bytes)) = bytes.split_first_chunk() else { return };
    framed(bytes);

    let mut sends = 0;
    let mut conversation = Conversation::new(Script::new(|sent: &[u8]| {
        sends += 1;
        let first = played::requests(sent)[0].seq;
        replies(bytes, cuts, failure, first)
    }));
    let requests: Vec<Request> = (0..REQUESTS).map(|_| request()).collect();
    let mut taken = 0;
    match way % 4 {
        way @ 0..2 => {
            let mut last = 0;
            let answer = |index, _: ctkeep::netlink::Frame<'_>| {
                assert!(last <= index && index < REQUESTS, "{last} {index}");
                last = index;
                Ok(())
            };
            let outcomes = if way == 0 {
                conversation.batch(&requests, answer)
            } else {
                conversation.look_up(&requests, answer)
            };
            assert!(outcomes.is_err() || outcomes.is_ok_and(|all| all.len() == REQUESTS));
        }
        2 => {
            let dumped = conversation.dump(&requests[0], |all: &mut usize, _| {
                *all += 1;
                taken += 1;
                Ok(())
            });
            assert!(dumped.is_err() || dumped.is_ok_and(|all| all <= taken));
        }
        _ => {
            let _ = conversation.transaction(&requests[0], &requests[1..2], &requests[2]);
        }
    }
    drop(conversation);
    assert!(sends <= 5, "{sends} sends");
});

/// Frames are parts of the datagram, in order, and an error is the last item.
fn framed(bytes: &[u8]) {
    let mut rest = bytes;
    let mut items = frames(bytes);
    for frame in items.by_ref() {
        let Ok(frame) = frame else {
            assert!(items.next().is_none());
            return;
        };
        let length = 16 + frame.payload.len();
        assert_eq!(&rest[16..length], frame.payload);
        assert_eq!(rest[..4], (length as u32).to_ne_bytes());
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    assert!(rest.is_empty());

    let mut told = 0;
    let mut transport = telling(bytes);
    let op = Op::new("fuzz");
    let drained = ctkeep::netlink::drain(&mut transport, &mut Vec::new(), 8, op, |_| {
        told += 1;
        Ok(())
    });
    assert_eq!((drained.unwrap().malformed, told), (0, frames(bytes).count()));
    assert!(transport.recv(&mut Vec::new()).is_err());
}

fn replies(bytes: &[u8], cuts: u8, failure: u8, first: u32) -> Vec<Reply> {
    let mut all: Vec<Vec<u8>> = vec![Vec::new()];
    for (index, frame) in frames(bytes).enumerate() {
        let Ok(frame) = frame else {
            all.push(bytes.to_vec());
            break;
        };
        let mut message =
            played::message_from(frame.port, frame.kind, frame.flags, frame.seq, frame.payload);
        if cuts & 0x80 == 0 {
            set_seq(&mut message, first.wrapping_add((index % REQUESTS) as u32));
        }
        if cuts >> (index % 7) & 1 != 0 {
            all.push(Vec::new());
        }
        all.last_mut().unwrap().extend(message);
    }
    let mut replies: Vec<Reply> = all.into_iter().map(Reply::Datagram).collect();
    let at = usize::from(failure >> 4);
    if at < replies.len() {
        let kind = usize::from(failure & 0xf);
        replies.insert(at, ERRNOS.get(kind).map_or(Reply::Truncated, |errno| Reply::Errno(*errno)));
    }
    replies
}

fn request() -> Request {
    Request {
        op: Op::new("fuzz"),
        kind: played::CT_GET,
        flags: 0,
        body: vec![2, 0, 0, 0],
        joined: false,
    }
}
