//! Sockets as kernels have sent them.

use super::*;

fn found(name: &str, server: &str, peer: &str) -> Option<Socket> {
    let lookup = Lookup { connection: Connection::of_sender(flow(server, peer)), interface: 0 };
    let name = format!("sockets/{name}");
    SockDiag::new(replay(&name)).lookup(&[lookup]).unwrap().remove(0)
}

fn socket(local: &str, remote: &str, state: State, inode: u32, cookie: u64) -> Socket {
    Socket {
        local: played::endpoint(local),
        remote: played::endpoint(remote),
        state,
        inode,
        uid: 0,
        cookie: Cookie(cookie),
        interface: 0,
        recv_queue: 0,
        send_queue: 0,
    }
}

/// One byte unread, which the FIN counts as; four sent and not yet acknowledged.
fn half_closed(local: &str, remote: &str, inode: u32, cookie: u64) -> Socket {
    let socket = socket(local, remote, State::CloseWait, inode, cookie);
    Socket { recv_queue: 1, send_queue: 4, ..socket }
}

#[test]
fn a_look_up_finds_the_socket() {
    let (server, peer) = ("192.0.2.1:8080", "198.51.100.7:20009");
    let expected = half_closed(server, peer, 420184, 0x2db6);
    assert_eq!(found("look-up", server, peer), Some(expected));
}

#[test]
fn a_look_up_finds_the_ipv4_socket_of_a_dual_stack_listener() {
    let (server, peer) = ("192.0.2.1:80", "198.51.100.7:20000");
    let expected = half_closed(server, peer, 420055, 0x2db5);
    assert_eq!(found("look-up-dual-stack", server, peer), Some(expected));
}

#[test]
fn a_look_up_finds_the_ipv6_socket() {
    let (server, peer) = ("[2001:db8::1]:80", "[2001:db8:1::7]:20001");
    let expected = half_closed(server, peer, 420070, 0x2db4);
    assert_eq!(found("look-up-ipv6", server, peer), Some(expected));
}

#[test]
fn an_absent_socket_is_none_beside_a_listener_and_without() {
    let peer = "198.51.100.99:1";
    assert_eq!(found("absent-beside-a-listener", "192.0.2.1:80", peer), None);
    assert_eq!(found("absent", "192.0.2.1:7", peer), None);
}

fn dumped(name: &str, states: States) -> Vec<Socket> {
    SockDiag::new(replay(&format!("sockets/{name}"))).sockets(states).unwrap()
}

fn close_wait() -> [Socket; 3] {
    [
        ("192.0.2.1:8080", "198.51.100.7:20001", 133_652_441, 0x2b_88f6),
        ("192.0.2.1:80", "198.51.100.7:20000", 133_652_437, 0x2b_88f8),
        ("[2001:db8::1]:80", "[2001:db8:1::7]:20002", 133_652_443, 0x2b_88f9),
    ]
    .map(|(local, remote, inode, cookie)| Socket {
        send_queue: 0,
        ..half_closed(local, remote, inode, cookie)
    })
}

#[test]
fn a_dump_of_half_closed_sockets_of_both_families() {
    let states = States::from_iter([State::CloseWait]);
    assert_eq!(dumped("dump-of-close-wait", states), close_wait());
}

#[test]
fn a_dump_of_listeners() {
    let expected = [
        socket("0.0.0.0:8080", "0.0.0.0:0", State::Listen, 133_652_434, 0x2b_88f5),
        socket("[::]:80", "[::]:0", State::Listen, 133_652_433, 0x2b_88f7),
    ]
    // The length of its queue.
    .map(|socket| Socket { send_queue: 4096, ..socket });
    let states = States::from_iter([State::Listen]);
    assert_eq!(dumped("dump-of-listeners", states), expected);
    let listeners = SockDiag::new(replay("sockets/dump-of-listeners")).listeners().unwrap();
    assert_eq!(listeners, expected);
}

#[test]
fn a_dump_of_everything_that_has_a_peer() {
    let mut expected = close_wait().to_vec();
    expected.extend([
        socket("192.0.2.1:80", "198.51.100.8:20003", State::Established, 133_652_964, 0x2b_88fa),
        // A request that waits for the third packet has no file.
        socket("192.0.2.1:80", "198.51.100.9:20004", State::SynRecv, 0, 0x2b_88fb),
    ]);
    assert_eq!(dumped("dump-of-the-connected", States::connected()), expected);
}
