//! Connections that no application has accepted: each takes a place of the listen queue, so each is
//! counted as long as it waits, and a handshake that waits for its last step is never taken away.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::indexing_slicing)]

use std::net::SocketAddr;
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use crate::lab::{Lab, RawConn, SERVER_V4, wait_for};
use crate::scene::{CLIENT, CTKEEP, LIMIT, SOON};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// A listener that never accepts by itself.
fn deaf(lab: &Lab, backlog: i32) -> Socket {
    lab.server.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_reuse_address(true).expect("reuse address");
        socket.bind(&SocketAddr::from((SERVER_V4, 80)).into()).expect("bound");
        socket.listen(backlog).expect("listening");
        socket
    })
}

fn audit(lab: &Lab) -> Value {
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--format", "json", "--all"]);
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"))
}

/// How many get in beside three that wait, half-closed and with a stale RST each.
fn admitted_beside_three(is_guarded: bool) -> Option<(Lab, Socket, Vec<RawConn>, usize)> {
    let lab = Lab::new()?;
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "60");
    lab.connlimit(80, 3);
    let listener = deaf(&lab, 20);
    let daemon = is_guarded.then(|| lab.daemon(CTKEEP, &[]));
    let peer = lab.peer(CLIENT);
    let mut conns = peer.hold(80, LIMIT);
    for conn in &mut conns {
        conn.send(&[b'x'; 212]);
        lab.half_close(conn);
        conn.stale_rst();
    }
    for conn in &conns {
        let client = format!("{} ", conn.client);
        let is_counted = |lab: &Lab| lab.is_alive(conn);
        match &daemon {
            Some(daemon) => wait_for("revive", SOON, || {
                let log = daemon.log();
                log.lines().any(|line| line.contains("revive") && line.contains(&client))
            }),
            None => wait_for("closed entry", SOON, || !is_counted(&lab)),
        }
    }
    let more = peer.open_promptly(80, LIMIT).len();
    if let Some(daemon) = daemon {
        let report = audit(&lab);
        let row = |key| report.pointer(&format!("/layers/application/0/{key}"));
        assert_eq!((row("kind"), row("pid")), (Some(&"queue".into()), Some(&Value::Null)));
        assert_eq!(row("sockets/close-wait"), Some(&3.into()), "{report:#}");
        drop(listener);
        wait_for("free limit", SOON, || conns.iter().all(|conn| !lab.is_alive(conn)));
        let again = deaf(&lab, 20);
        let next = peer.open_promptly(80, LIMIT).len();
        assert_eq!(next, LIMIT, "given back when the listener is closed");
        drop(daemon);
        return Some((lab, again, conns, more));
    }
    Some((lab, listener, conns, more))
}

#[test]
fn what_waits_to_be_accepted_keeps_its_place_until_the_listener_is_closed() {
    let Some((.., more)) = admitted_beside_three(false) else { return };
    assert_eq!(more, LIMIT, "the bypass");
    let Some((.., more)) = admitted_beside_three(true) else { return };
    assert_eq!(more, 0);
}

/// The queue is full, so the last step of each handshake waits: the server has no socket yet, and
/// conntrack believes that the connection is established.
#[test]
fn a_handshake_that_waits_for_a_place_is_never_reaped() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 50);
    // Without cookies, which would keep nothing of a handshake.
    lab.server.sysctl("net/ipv4/tcp_syncookies", "0");
    let listener = deaf(&lab, 3);
    let peer = lab.peer(CLIENT);
    // The queue takes one more than it is asked for: of the second three only one has a place.
    let mut conns = peer.hold(80, 3);
    conns.extend(peer.open(80, 3));
    let of_state =
        |state: &str| lab.all_sockets().iter().filter(|socket| socket.state == state).count();
    wait_for("handshakes", SOON, || of_state("syn-recv") == 2 && of_state("established") == 4);
    let waiting = of_state("syn-recv");
    let report = audit(&lab);
    assert_eq!(report["layers"]["syn"]["syn_recv"], waiting, "{report:#}");
    assert_eq!(report["summary"]["classes"]["socket-missing"], 0, "{report:#}");
    let entries = lab.entries().len();
    assert_eq!((conns.len(), entries), (6, 6), "all believe that they are connected");
    // The control: an entry of the same port without any socket.
    lab.server.run(
        "conntrack -I -p tcp -s 203.0.113.9 -d 192.0.2.1 --sport 40000 --dport 80 \
         --state ESTABLISHED -t 3600 -u SEEN_REPLY,ASSURED",
    );
    let daemon = lab.daemon(CTKEEP, &["--reap", "1s", "--deep-interval", "300ms"]);
    wait_for("the reaper", SOON, || daemon.log().contains("reap"));
    thread::sleep(Duration::from_secs(2));
    assert!(of_state("syn-recv") > 0, "they still wait");
    assert_eq!(lab.entries().len(), entries, "{}", daemon.log());
    drop(listener);
}

/// A server whose TCP waits for the first byte of a client before it makes a socket
/// (`TCP_DEFER_ACCEPT`).
struct Deferring(Child);

impl Deferring {
    fn start(lab: &Lab) -> Self {
        let mut command = Command::new("python3");
        command.arg("-c").arg(
            "import socket\n\
             s = socket.socket()\n\
             s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
             s.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)\n\
             s.bind(('192.0.2.1', 80))\n\
             s.listen(20)\n\
             held = []\n\
             while True: held.append(s.accept())\n",
        );
        let this = Self(lab.server.spawn(&command).expect("python3"));
        wait_for("a listener", SOON, || lab.server.output("ss -Hltn").contains(":80 "));
        this
    }
}

impl Drop for Deferring {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Three clients open and say nothing; one speaks at last, the others have vanished. How many more
/// get in at limit 3 when TCP has given those up.
fn admitted_beside_the_silent(is_guarded: bool) -> Option<usize> {
    let lab = Lab::new()?;
    lab.connlimit(80, 3);
    let _server = Deferring::start(&lab);
    let peer = lab.peer(CLIENT);
    let args = ["--reap", "1s", "--sweep-interval", "200ms", "--deep-interval", "300ms"];
    let _daemon = is_guarded.then(|| lab.daemon(CTKEEP, &args));
    let mut conns = peer.hold(80, 3);
    let of_state =
        |state: &str| lab.all_sockets().iter().filter(|socket| socket.state == state).count();
    let of_client = || {
        let all = lab.entries();
        all.iter().filter(|entry| entry.orig.0.ip().to_string() == CLIENT).count()
    };
    assert_eq!((of_state("syn-recv"), of_client()), (3, 3), "TCP waits, conntrack does not");
    let report = audit(&lab);
    assert_eq!(report["summary"]["classes"]["socket-missing"], 0, "{report:#}");
    let speaker = conns.first_mut().expect("three");
    speaker.send(b"at last");
    wait_for("a socket", SOON, || of_state("established") == 1);
    // The others are given up when their timer comes next.
    lab.server.sysctl("net/ipv4/tcp_synack_retries", "1");
    wait_for("the end of the others", SOON, || of_state("syn-recv") == 0);
    if is_guarded {
        wait_for("the reaper", SOON, || of_client() == 1);
    } else {
        assert_eq!(of_client(), 3, "conntrack keeps them for days");
        let report = audit(&lab);
        assert_eq!(report["summary"]["classes"]["socket-missing"], 2, "{report:#}");
    }
    let more = (0..LIMIT).map(|_| {
        // A list is swept once a jiffy.
        thread::sleep(Duration::from_millis(30));
        peer.syn_only(80)
    });
    let more = peer.complete(more.collect(), Duration::from_secs(3)).len();
    assert!(lab.is_alive(speaker), "who has spoken is connected");
    Some(more)
}

#[test]
fn a_deferred_handshake_is_kept_until_tcp_gives_it_up() {
    let [without, with] = thread::scope(|scope| {
        let arms = [false, true].map(|it| scope.spawn(move || admitted_beside_the_silent(it)));
        arms.map(|arm| arm.join().expect("an arm"))
    });
    let Some(without) = without else { return };
    assert_eq!(without, 0, "an honest client is refused for two that have vanished");
    assert_eq!(with, Some(2));
}
