//! What the tests of this room look at: six connections of three sources.

use super::rows::{Seen, Shown};
use crate::audit::processes::Holder;
use crate::flow::{Connection, Endpoint};
use crate::reconcile::snapshot::View;
use crate::sockdiag::{Cookie, Socket, State};

pub(super) fn connection(peer: &str, port: u16, state: State, cookie: u64) -> Shown {
    let remote: Endpoint = peer.parse().unwrap();
    let local = if remote.addr().is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
    let local = Endpoint::new(local.parse().unwrap(), port);
    let socket = Socket {
        local,
        remote,
        state,
        inode: 1,
        uid: 0,
        cookie: Cookie(cookie),
        interface: 0,
        recv_queue: 10,
        send_queue: 0,
    };
    let holder = Holder { pid: 7, command: "nginx".to_owned(), processes: 1, container: None };
    let view =
        View { connection: Connection::new(local, remote), socket: Some(socket), entry: None };
    Shown { view, holder: Some(holder), waits: false }
}

pub(super) fn seen() -> Seen {
    let connections = vec![
        connection("198.51.100.7:1", 80, State::CloseWait, 1),
        connection("198.51.100.7:2", 80, State::CloseWait, 2),
        connection("198.51.100.7:3", 443, State::Established, 3),
        connection("198.51.100.8:1", 80, State::Established, 4),
        connection("198.51.100.8:2", 443, State::Established, 5),
        connection("[2001:db8:1::7]:1", 80, State::Established, 6),
    ];
    Seen { at: "2026-01-01T00:00:00Z".to_owned(), connections, ..Seen::default() }
}
