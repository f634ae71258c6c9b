//! What flows while rules are reloaded arrives whole, and reloads cost a bounded share.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// 20 Mbit/s: so many bytes at a time, from one to the next.
const PIECE: usize = 12_500;

const PACE: Duration = Duration::from_millis(5);

/// How long streams flow, and what of it is before the first reload.
const STREAM: Duration = Duration::from_secs(5);

const BEFORE: Duration = Duration::from_secs(1);

/// Different at every place, so that a byte lost, repeated or moved is seen.
fn content(index: usize) -> u8 {
    index.wrapping_mul(2_654_435_761).to_be_bytes()[5]
}

/// Sends for a while, at its pace; returns how much.
fn send(mut stream: &TcpStream) -> usize {
    let (begun, mut sent) = (Instant::now(), 0);
    while begun.elapsed() < STREAM {
        let piece: Vec<u8> = (sent..sent + PIECE).map(content).collect();
        stream.write_all(&piece).expect("the stream goes on");
        sent += PIECE;
        thread::sleep(PACE);
    }
    stream.shutdown(Shutdown::Write).expect("end");
    sent
}

/// Reads to the end; returns how much, all of it as it was sent.
fn receive(mut stream: &TcpStream) -> usize {
    let (mut received, mut piece) = (0, vec![0; 65_536]);
    loop {
        let count = stream.read(&mut piece).expect("the stream goes on");
        if count == 0 {
            return received;
        }
        let wrong = (received..).zip(&piece).take(count).find(|(at, byte)| content(*at) != **byte);
        assert_eq!(wrong, None, "another byte");
        received += count;
    }
}

/// Both ways at once; returns what was sent and what was received.
fn both_ways(stream: &TcpStream) -> [usize; 2] {
    stream.set_read_timeout(Some(SOON)).expect("timeout");
    thread::scope(|scope| {
        let sender = scope.spawn(|| send(stream));
        let received = receive(stream);
        [sender.join().expect("a sender"), received]
    })
}

/// Streams flow both ways while the rules are loaded anew and their connections counted again: not
/// a byte is lost, and no packet is INVALID.
fn streams_arrive_over(site: Site, target: &str) {
    const STREAMS: usize = 2;
    let Some(lab) = Lab::new() else { return };
    let container = site.container.then(|| lab.container());
    let place = container.as_ref().unwrap_or(&lab.server);
    connlimit(site)(&lab.server);
    // A table that no reload of iptables touches.
    let drop = "ct state invalid counter drop";
    lab.server.feed(
        "nft -f -",
        &format!(
            "table inet strict {{\n\
               chain in {{ type filter hook prerouting priority -150; {drop}; }}\n\
               chain out {{ type filter hook output priority -150; {drop}; }}\n\
             }}\n"
        ),
    );
    let path = place.path();
    let arguments: &[&str] = if site.container { &["--netns", &path] } else { &[] };
    let port = if site.container { "[::]:8080" } else { "[::]:80" };
    let listener = place.within(|| TcpListener::bind(port).expect("listener"));
    let daemon = lab.daemon(PROGRAM, arguments);
    wait_for("its guard", SOON * 2, || daemon.logged("guard{netns=\"\"}: ready"));
    thread::scope(|scope| {
        let served = scope.spawn(|| {
            let streams = (0..STREAMS).map(|_| listener.accept().expect("a connection").0);
            let threads: Vec<_> =
                streams.map(|stream| thread::spawn(move || both_ways(&stream))).collect();
            threads.into_iter().map(|one| one.join().expect("a stream")).collect::<Vec<_>>()
        });
        let clients: Vec<_> = (0..STREAMS)
            .map(|_| lab.client.within(|| TcpStream::connect(target).expect("connect")))
            .map(|stream| scope.spawn(move || both_ways(&stream)))
            .collect();
        let begun = Instant::now();
        thread::sleep(BEFORE);
        let mut reloads = 0;
        while begun.elapsed() < STREAM - BEFORE {
            save_and_restore(site, "")(&lab.server);
            reloads += 1;
            thread::sleep(Duration::from_millis(500));
        }
        let mut sent: Vec<_> = Vec::new();
        for client in clients {
            let [out, back] = client.join().expect("a stream");
            sent.push((out, back));
        }
        let mut served: Vec<_> =
            served.join().expect("a server").into_iter().map(|[out, back]| (back, out)).collect();
        sent.sort_unstable();
        served.sort_unstable();
        assert_eq!(sent, served, "sent and received");
        let shown = daemon.log().matches("action=\"recount\"").count();
        assert!(shown >= STREAMS * reloads / 2, "{reloads} reloads, {shown}:\n{}", daemon.log());
    });
    let counters = lab.server.output("nft list table inet strict");
    assert_eq!(counters.matches("counter packets 0 ").count(), 2, "{counters}\n{}", daemon.log());
}

#[test]
fn streams_arrive_over_reloads() {
    streams_arrive_over(HERE, "192.0.2.1:80");
}

#[test]
fn streams_arrive_over_reloads_over_ipv6() {
    streams_arrive_over(OVER_IPV6, "[2001:db8::1]:80");
}

#[test]
fn streams_arrive_over_reloads_in_a_container() {
    streams_arrive_over(CONTAINER, "192.0.2.1:80");
}
