//! What passes the shield as before: streams, answers, and what ends a connection.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use super::*;

/// An RST that TCP accepts ends the socket and the entry: at once after a FIN, and one batch later
/// without.
#[test]
fn exact_rsts_close_socket_and_entry_together() {
    for source in [SOURCE, SOURCE6] {
        let Some(lab) = lab() else { return };
        let _server = lab.serve("[::]:80");
        for restore in ["iptables-restore", "ip6tables-restore"] {
            lab.server.feed(restore, STRICT);
        }
        let daemon = shielded(&lab);
        daemon.stop();
        let peer = lab.peer(source);
        let mut conns = peer.hold(80, 5);
        for (conn, trick) in conns.iter_mut().zip(0..) {
            match trick {
                0 => conn.rst_at(0),
                1 => {
                    conn.fin();
                    conn.rst(0);
                }
                2 => {
                    conn.fin();
                    conn.rst(1);
                }
                3 => {
                    lab.half_close(conn);
                    conn.rst(1);
                }
                _ => {
                    conn.send(b"a request");
                    conn.rst_at(0);
                }
            }
            let over = holds_within(SOON, || is_over(&lab, conn));
            let state = (lab.socket_state(conn), lab.entry_state(conn));
            assert!(over, "{source}, number {trick}: {state:?}");
        }
    }
}

/// TCP also accepts an RST at the end of what it has acknowledged selectively (RFC 5961). Such an
/// RST must not be kept from conntrack, nor from rules that drop what it does not track.
#[test]
fn an_rst_at_the_end_of_a_selective_acknowledgement_is_shown() {
    for (offset, decision) in [(100, "rst_hidden"), (59, "rst_shown")] {
        let Some(lab) = lab() else { return };
        let _server = lab.serve("0.0.0.0:80");
        let _daemon = shielded(&lab);
        // A real client, for the option that allows these acknowledgements.
        let mut stream = None;
        let frames = lab.client_sees(|| {
            stream = lab.client.within(|| TcpStream::connect("192.0.2.1:80")).ok();
        });
        let stream = stream.expect("a connection");
        let (seq, ack) = frames.iter().find_map(answer_to_syn).expect("an answer to the SYN");
        let segment = |flags, offset, payload: &[u8]| Segment {
            source: stream.local_addr().expect("an address"),
            destination: stream.peer_addr().expect("an address"),
            seq: ack.wrapping_add(offset),
            ack: seq.wrapping_add(1),
            flags,
            payload: payload.to_vec(),
        };
        let peer = lab.peer(SOURCE);
        peer.send(&segment(PSH | ACK, 50, b"the third"));
        peer.send(&segment(RST, offset, &[]));
        await_decisions(&lab, &[("delayed", 1.0), (decision, 1.0)]);
        let sockets = lab.all_sockets();
        let is_there = sockets.iter().any(|it| it.state == "established" && it.local.port() == 80);
        assert_eq!(is_there, decision == "rst_hidden", "what TCP made of it");
    }
}

/// Who only knows the addresses and ports cannot keep the client's own FIN from conntrack.
#[test]
fn a_fin_beyond_the_window_is_not_learned() {
    let Some((lab, _server, _daemon)) = scene() else { return };
    let peer = lab.peer(SOURCE);
    for offset in [5_000_000, -5_000_000] {
        let mut conn = peer.connect(80).expect("a connection");
        conn.fin_at(offset);
        assert_eq!(lab.entry_state(&conn).as_deref(), Some("ESTABLISHED"));
        lab.half_close(&mut conn);
        let seen = || matches!(lab.entry_state(&conn).as_deref(), Some("FIN_WAIT" | "CLOSE_WAIT"));
        assert!(holds_within(SOON, seen), "{offset}: {:?}", lab.entry_state(&conn));
    }
}

/// What the server answers to whatever the shield hides is what it answers without, also where rules
/// drop what is invalid, and what is neither new nor established.
#[test]
fn tcp_answers_as_before() {
    let answers = |source: &str, is_shielded: bool| -> Option<Vec<String>> {
        let lab = lab()?;
        if is_shielded {
            for restore in ["iptables-restore", "ip6tables-restore"] {
                lab.server.feed(restore, STRICT);
            }
        }
        let _server = lab.serve("[::]:80");
        let daemon = is_shielded.then(|| shielded(&lab));
        if let Some(daemon) = &daemon {
            daemon.stop();
        }
        let peer = lab.peer(source);
        let mut all = Vec::new();
        // One connection each: challenge ACKs are rationed.
        for trick in 0..8 {
            let mut conn = peer.connect(80).expect("a connection");
            if trick < 4 {
                lab.half_close(&mut conn);
                // Or it goes with the next answer.
                assert!(conn.await_ack(), "the FIN is acknowledged");
            }
            let rst = |flags, ack| Segment { ack, ..conn.segment(flags, 100) };
            let frames = lab.client_sees(|| {
                match trick {
                    0 => conn.rst(6),
                    1 => conn.rst(200_000),
                    2 => conn.fin_again(),
                    3 => conn.syn(),
                    4 => conn.rst_at(100),
                    // Without an ACK its acknowledgement number is whatever the sender likes.
                    5 => peer.send(&rst(RST, 0)),
                    6 => peer.send(&rst(RST | ACK, conn.segment(RST, 0).ack)),
                    // A probe whether the server is there.
                    _ => conn.ack_at(-1),
                }
                thread::sleep(Duration::from_millis(100));
            });
            // The ports are no news.
            let kinds = frames.iter().map(|frame| match frame.kind {
                Kind::Tcp { flags, payload, .. } => format!("{trick}: {flags:#x} {payload}"),
                Kind::Icmp { .. } => format!("{trick}: icmp"),
            });
            all.extend(kinds);
        }
        Some(all)
    };
    for source in [SOURCE, SOURCE6] {
        let stock = answers(source, false);
        let (Some(stock), Some(shielded)) = (stock, answers(source, true)) else { return };
        assert!(stock.len() >= 7, "{stock:?}");
        assert_eq!(stock, shielded, "{source}");
    }
}

/// The first FIN, which conntrack has seen, is lost on its way to TCP: its repetition, which
/// conntrack must not see, ends the connection, under rules that drop what is not established.
#[test]
fn a_repeated_fin_reaches_tcp_under_strict_rules() {
    for address in ["192.0.2.1:80", "[2001:db8::1]:80"] {
        let Some(lab) = lab() else { return };
        let neighbours = "-A INPUT -p ipv6-icmp -j ACCEPT\nCOMMIT\n";
        lab.server.feed("iptables-restore", STRICT);
        lab.server.feed("ip6tables-restore", &STRICT.replace("COMMIT\n", neighbours));
        let address: SocketAddr = address.parse().expect("an address");
        let listener = lab.server.within(|| TcpListener::bind(address)).expect("a listener");
        let _daemon = shielded(&lab);
        let program = if address.is_ipv4() { "iptables" } else { "ip6tables" };
        let lost = "INPUT -i eth0 -p tcp --tcp-flags FIN FIN -j DROP";
        lab.server.run(&format!("{program} -I {lost}"));
        let mut stream = lab.client.within(|| TcpStream::connect(address)).expect("a server");
        let (mut accepted, _) = listener.accept().expect("a client");
        accepted.set_read_timeout(Some(SOON)).expect("a timeout");
        stream.write_all(b"GET").expect("a server that reads");
        stream.shutdown(Shutdown::Write).expect("a half-close");
        await_decisions(&lab, &[("fin_learned", 1.0)]);
        lab.server.run(&format!("{program} -D {lost}"));
        let mut request = String::new();
        accepted.read_to_string(&mut request).expect("the end of the request");
        assert_eq!(request, "GET");
        drop(accepted);
        assert_eq!(stream.read(&mut [0]).expect("the end of the answer"), 0);
    }
}

/// A client that half-closes gets all that the server has to say, under rules that drop what is
/// INVALID both ways.
#[test]
fn half_closed_streams_are_whole() {
    const LENGTH: usize = 8 << 20;
    for address in ["192.0.2.1:80", "[2001:db8::1]:80"] {
        let Some(lab) = lab() else { return };
        for restore in ["iptables-restore", "ip6tables-restore"] {
            let neighbours = "-A INPUT -p ipv6-icmp -j ACCEPT\nCOMMIT\n";
            let is_ipv6 = restore.starts_with("ip6");
            let rules =
                if is_ipv6 { STRICT.replace("COMMIT\n", neighbours) } else { STRICT.into() };
            lab.server.feed(restore, &rules);
        }
        let address: SocketAddr = address.parse().expect("an address");
        let listener = lab.server.within(|| TcpListener::bind(address)).expect("a listener");
        let _daemon = shielded(&lab);
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = String::new();
            stream.read_to_string(&mut request).expect("a request");
            stream.write_all(&[b'x'; LENGTH]).expect("a client that reads");
            request
        });
        let mut stream = lab.client.within(|| TcpStream::connect(address)).expect("a server");
        stream.write_all(b"GET").expect("a server that reads");
        stream.shutdown(Shutdown::Write).expect("a half-close");
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("a stream");
        assert_eq!(received.len(), LENGTH);
        assert_eq!(server.join().expect("a server"), "GET");
    }
}

/// The FINs have a hole before them, so TCP takes none of them and all must be remembered; of so many
/// connections some ten pairs meet in one place of the program's memory. Once they are over, their
/// places are free for others.
#[test]
fn a_first_fin_is_remembered_until_tcp_has_taken_it() {
    const MANY: usize = 400;
    let Some(lab) = lab() else { return };
    let _server = lab.serve("0.0.0.0:80");
    let _daemon = shielded(&lab);
    let peer = lab.peer(SOURCE);
    let decisions = |learned: u16, hidden: u16, shown: u16| {
        let wanted = [("fin_learned", learned), ("fin_hidden", hidden), ("rst_shown", shown)];
        await_decisions(&lab, &wanted.map(|(decision, count)| (decision, count.into())));
    };
    let hold = || {
        let conns = peer.hold(80, MANY);
        // A place is for a socket, which a request that waits to be accepted has not.
        wait_for("sockets", SOON, || lab.sockets("established") == MANY);
        conns
    };
    let conns = hold();
    for _ in 0..3 {
        conns.iter().for_each(|conn| conn.fin_at(50));
    }
    decisions(400, 800, 0);
    conns.iter().for_each(|conn| conn.rst_at(0));
    decisions(400, 800, 400);
    let mut conns = hold();
    conns.iter_mut().for_each(RawConn::fin);
    conns.iter().for_each(RawConn::fin_again);
    decisions(800, 1200, 400);
}
