//! Sockets: read as netlink-packet-sock-diag and a plain reading of `struct inet_diag_msg` do, and
//! an answer about another socket is none.

#![no_main]

use std::collections::HashSet;
use std::net::IpAddr;

use ctkeep::flow::Endpoint;
use ctkeep::netlink::frames;
use ctkeep::sockdiag::{Cookie, Lookup, SockDiag, Socket, State, States};
use ctkeep_fuzz::answering;
use ctkeep_fuzz::played::{SOCK_DIAG_BY_FAMILY, done, message, socket_payload};
use libfuzzer_sys::fuzz_target;
use netlink_packet_core::ParseableParametrized;
use netlink_packet_sock_diag::SockDiagMessage;

fuzz_target!(|bytes: &[u8]| {
    let mut known = Vec::new();
    for frame in frames(bytes).flatten() {
        let payload = frame.payload;
        let dump = [message(SOCK_DIAG_BY_FAMILY, 2, 1, payload), done(1, 0)].concat();
        let Ok(sockets) = SockDiag::new(answering(&dump)).sockets(States::connected()) else {
            continue;
        };
        let [socket] = sockets[..] else {
            assert!(sockets.is_empty() && State::from_kernel(payload[1]).is_none());
            continue;
        };
        assert_eq!(socket, plainly(payload));
        by_the_crate(frame.kind, payload, &socket);
        known.push(socket);
        // A listener's own address may be mapped, and its peer's is none.
        if socket.local.addr().is_ipv4() != socket.remote.addr().is_ipv4() {
            continue;
        }
        let again = [message(SOCK_DIAG_BY_FAMILY, 2, 1, &socket_payload(&socket)), done(1, 0)];
        let again = SockDiag::new(answering(&again.concat())).sockets(States::connected());
        assert_eq!(again.expect("what was read"), [socket]);
    }

    if let Ok(listed) = SockDiag::new(answering(bytes)).sockets(States::connected()) {
        let names: HashSet<_> = listed.iter().map(|s| (s.cookie, s.local, s.remote)).collect();
        assert_eq!(names.len(), listed.len(), "one socket twice");
        assert!(listed.iter().all(|socket| known.contains(socket)));
    }
    if let Some(socket) = known.last() {
        let lookup = Lookup::from(socket);
        if let Ok(found) = SockDiag::new(answering(bytes)).lookup(&[lookup]) {
            let [found] = found[..] else { panic!("one question, {} answers", found.len()) };
            let is_asked = |s: Socket| s.connection() == lookup.connection && s.state != State::Listen;
            assert!(found.is_none_or(is_asked));
        }
    }
});

/// By the offsets of `struct inet_diag_msg` (`linux/inet_diag.h`).
fn plainly(payload: &[u8]) -> Socket {
    let word = |at: usize| u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap());
    let end = |port: usize, at: usize| {
        let addr: IpAddr = if payload[0] == 2 {
            <[u8; 4]>::try_from(&payload[at..at + 4]).unwrap().into()
        } else {
            <[u8; 16]>::try_from(&payload[at..at + 16]).unwrap().into()
        };
        Endpoint::new(addr, u16::from_be_bytes([payload[port], payload[port + 1]]))
    };
    Socket {
        local: end(4, 8),
        remote: end(6, 24),
        state: State::from_kernel(payload[1]).unwrap(),
        interface: word(40),
        cookie: Cookie(u64::from_ne_bytes(payload[44..52].try_into().unwrap())),
        recv_queue: word(56),
        send_queue: word(60),
        uid: word(64),
        inode: word(68),
    }
}

/// The whole message, attributes and all.
fn by_the_crate(kind: u16, payload: &[u8], socket: &Socket) {
    if let Ok(SockDiagMessage::InetResponse(response)) =
        SockDiagMessage::parse_with_param(payload, kind)
    {
        let id = &response.header.socket_id;
        assert_eq!(socket.local, Endpoint::new(id.source_address, id.source_port));
        assert_eq!(socket.remote, Endpoint::new(id.destination_address, id.destination_port));
        assert_eq!((socket.inode, socket.uid), (response.header.inode, response.header.uid));
    }
}
