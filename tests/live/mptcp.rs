//! Multipath TCP: a connection of it outlives its TCP connections, and so does what it costs the
//! server. The client's kernel ends its TCP connections one by one and holds the rest.

use crate::lab;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::lab::{Daemon, IPPROTO_MPTCP, Lab, Server, holds_within, kernel, wait_for};
use socket2::{Domain, Protocol, Socket, Type};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const ROUNDS: usize = 6;
const SOON: Duration = Duration::from_secs(20);

/// How the client ends a TCP connection and keeps what stands upon it.
#[derive(Clone, Copy, Debug)]
enum End {
    Rst,
    Fin,
}

struct Scene {
    lab: Lab,
    server: Server,
    daemon: Option<Daemon>,
    address: SocketAddr,
    held: Vec<Socket>,
}

impl Scene {
    fn new(address: &str, args: Option<&[&str]>) -> Option<Self> {
        let lab = Lab::new()?;
        let address: SocketAddr = address.parse().expect("an address");
        let one = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::from(IPPROTO_MPTCP)));
        if one.is_err() && kernel::may_lack_mptcp() {
            return None;
        }
        if one.is_err() {
            lab::skip_rare("this kernel has no Multipath TCP");
            return None;
        }
        lab.connlimit(80, u32::try_from(LIMIT).expect("a small limit"));
        let server = lab.serve("[::]:80%mptcp");
        let daemon = args.map(|args| lab.daemon(CTKEEP, args));
        Some(Self { lab, server, daemon, address, held: Vec::new() })
    }

    /// Tries as many connections as the limit, and one more; how many are let in.
    fn open(&mut self) -> usize {
        let Self { lab, address, .. } = self;
        let opened: Vec<_> = lab.client.within(|| {
            let open = |_| {
                let protocol = Some(Protocol::from(IPPROTO_MPTCP));
                let domain = Domain::for_address(*address);
                let socket = Socket::new(domain, Type::STREAM, protocol).expect("a socket");
                let connected =
                    socket.connect_timeout(&(*address).into(), Duration::from_millis(200));
                // The limiter counts what has come within one tick twice.
                thread::sleep(Duration::from_millis(20));
                // What is sent makes it a connection of Multipath TCP for good.
                connected.is_ok_and(|()| socket.send(b"GET").is_ok()).then_some(socket)
            };
            (0..=LIMIT).filter_map(open).collect()
        });
        let count = opened.len();
        self.held.extend(opened);
        count
    }

    /// Ends the TCP connections of all from the client's side.
    fn end_all(&self, by: End) {
        let line = match by {
            // It closes what it lists as TCP and complains of the rest.
            End::Rst => "ss -K state established dport = 80",
            End::Fin => "ip mptcp endpoint delete id 0 192.0.2.2",
        };
        let _ = self.lab.client.try_run(line);
        wait_for("the end of all TCP connections", SOON, || {
            let sockets = self.lab.all_sockets();
            !sockets.iter().any(|it| it.local.port() == 80 && it.remote.port() != 0)
        });
    }

    fn attack(&mut self, by: End) -> Vec<usize> {
        let round = |_| {
            self.open();
            self.end_all(by);
            self.server.held()
        };
        (0..ROUNDS).map(round).collect()
    }
}

/// All of its TCP connections have ended, and the source has as many places again: the limiter has
/// forgotten it, there is no TCP socket, and the server holds on.
fn their_end_frees_no_place(address: &str, by: End, args: &[&str]) {
    let Some(mut stock) = Scene::new(address, None) else { return };
    let grown = stock.attack(by);
    assert_eq!(grown.last(), Some(&(ROUNDS * LIMIT)), "the stock kernel resists: {grown:?}");
    let Some(mut scene) = Scene::new(address, Some(args)) else { return };
    let held = scene.attack(by);
    let log = |scene: &Scene| scene.daemon.as_ref().map(Daemon::log).unwrap_or_default();
    let most = held.last().copied().unwrap_or_default();
    let is_flat = held.get(1) == held.last();
    assert!(most <= 2 * LIMIT && is_flat, "{args:?}: {held:?}\n{}", log(&scene));
    // What the server lets go of gives its place back.
    scene.server.close_all();
    let mut admitted = 0;
    let is_free = holds_within(SOON, || {
        admitted = scene.open();
        admitted > 0
    });
    assert!(is_free, "places stay taken\n{}", log(&scene));
    assert!(admitted <= LIMIT, "{admitted}");
}

#[test]
fn a_connection_without_tcp_connections_is_counted_as_long_as_the_server_holds_it() {
    their_end_frees_no_place("192.0.2.1:80", End::Rst, &["--events", "nflog"]);
}

#[test]
fn a_connection_without_tcp_connections_is_counted_over_ipv6() {
    their_end_frees_no_place("[2001:db8::1]:80", End::Rst, &["--events", "nflog"]);
}

#[test]
fn a_connection_without_tcp_connections_is_counted_beside_the_shield() {
    their_end_frees_no_place("192.0.2.1:80", End::Rst, &["--shield", "on"]);
}

#[test]
fn a_connection_whose_last_tcp_connection_ends_by_fins_is_counted() {
    their_end_frees_no_place("192.0.2.1:80", End::Fin, &["--events", "nflog"]);
}
