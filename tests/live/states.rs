//! Sockets that an application holds in other states than ESTABLISHED and CLOSE_WAIT: the server has
//! sent its FIN first (a lingering close, an answer of HTTP/1.0) and still reads.

#![allow(clippy::indexing_slicing)]

use std::thread;
use std::time::Duration;

use crate::lab::{Lab, RawConn, kernel, wait_for};
use crate::scene::{CLIENT, CTKEEP, LIMIT, Limiter, PORT, SOON, Scene};

const BRISK: [&str; 2] = ["--sweep-interval", "100ms"];
/// Time for several sweeps.
const SWEPT: Duration = Duration::from_millis(600);

/// Connections of which the server has ended its own side; its application reads on.
fn lingering(scene: &mut Scene) -> Vec<RawConn> {
    let mut conns = scene.established();
    scene.server.shutdown_all();
    for conn in &mut conns {
        assert!(conn.await_fin(), "the server's FIN");
        conn.ack_all();
    }
    wait_for("FIN_WAIT2", SOON, || scene.lab.sockets("fin-wait-2") == LIMIT);
    conns
}

/// How many more are admitted after `trick`, and how many of the sockets are still there.
fn admitted_after(
    limiter: Limiter,
    guard: Option<&[&str]>,
    trick: impl Fn(&Scene, &[RawConn]),
) -> Option<(usize, usize)> {
    let mut scene = Scene::new(limiter)?;
    if let Some(args) = guard {
        scene.guard(&[&BRISK[..], args].concat());
    }
    let conns = lingering(&mut scene);
    thread::sleep(SWEPT);
    trick(&scene, &conns);
    thread::sleep(SWEPT);
    Some((scene.admitted(), scene.lab.sockets("fin-wait-2")))
}

/// TCP ignores an RST before the next byte; conntrack believes it.
fn stale_rst(scene: &Scene, conns: &[RawConn]) {
    for conn in conns {
        conn.rst(-7);
    }
    if scene.is_guarded() {
        return;
    }
    wait_for("the end of the entries", SOON, || conns.iter().all(|conn| !scene.lab.is_alive(conn)));
}

fn assert_counted(limiter: Limiter, args: &[&str], trick: impl Fn(&Scene, &[RawConn])) {
    let Some(without) = admitted_after(limiter, None, &trick) else { return };
    assert_eq!(without, (LIMIT, LIMIT), "the control");
    assert_eq!(admitted_after(limiter, Some(args), &trick), Some((0, LIMIT)), "with ctkeep");
}

#[test]
fn a_stale_rst_frees_no_place_of_a_worker_in_fin_wait_2() {
    assert_counted(Limiter::Connlimit, &[], stale_rst);
}

#[test]
fn a_stale_rst_frees_no_place_in_fin_wait_2_of_an_nft_set() {
    assert_counted(Limiter::NftSet, &[], stale_rst);
}

#[test]
fn a_stale_rst_in_fin_wait_2_is_found_by_conntracks_events() {
    assert_counted(Limiter::Connlimit, &["--events", "ctnetlink"], stale_rst);
}

#[test]
fn a_stale_rst_in_fin_wait_2_is_found_by_the_sweep_alone() {
    assert_counted(Limiter::Connlimit, &["--events", "off"], stale_rst);
}

#[test]
fn a_worker_in_fin_wait_2_keeps_its_place_when_conntrack_forgets_it_by_itself() {
    assert_counted(Limiter::Connlimit, &[], |scene, conns| {
        for conn in conns {
            let (src, sport) = (conn.client.ip(), conn.client.port());
            let tuple = format!("-p tcp --orig-src {src} --sport {sport}");
            scene.lab.server.run(&format!("conntrack -D {tuple}"));
        }
    });
}

/// Its entry goes with the socket, and an ordinary end leaves nothing behind.
#[test]
fn the_ordinary_end_of_a_lingering_close_is_not_disturbed() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&BRISK);
    let mut conns = lingering(&mut scene);
    for conn in &conns {
        conn.rst(-7);
    }
    thread::sleep(SWEPT);
    for conn in &mut conns {
        conn.fin();
    }
    wait_for("the end of the sockets", SOON, || scene.lab.sockets("fin-wait-2") == 0);
    scene.server.close_all();
    thread::sleep(SWEPT);
    assert_eq!(scene.admitted(), LIMIT, "{:#?}", scene.lab.entries());
}

/// TCP Fast Open: a connection is accepted, and costs its slot, before its handshake ends. Bursts of an
/// RST in the window for each, which TCP answers by a challenge and conntrack believes, and then as
/// many SYNs with data as the limit: how many sockets there are after each.
fn opened_fast(guard: bool) -> Option<Vec<usize>> {
    // Servers are fast, need no cookie, and all listeners are (`TFO_SERVER_*` in net/tcp.h).
    const FAST: &str = "1538";
    let lab = Lab::new()?;
    lab.connlimit(PORT, 3);
    lab.server.sysctl("net/ipv4/tcp_fastopen", FAST);
    let mut server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(CLIENT);
    drop(lab.peer("198.51.100.8").hold(PORT, 1));
    let daemon = guard.then(|| lab.daemon(CTKEEP, &["--port", "80"]));
    let mut held: Vec<RawConn> = Vec::new();
    let burst = |_| {
        held.iter().for_each(|conn| conn.rst(6));
        held.extend((0..LIMIT).map(|_| peer.syn_with_data(PORT, b"GET / HTTP/1.0\r\n\r\n")));
        thread::sleep(Duration::from_millis(20));
        lab.sockets("syn-recv")
    };
    let counts: Vec<_> = (0..10).map(burst).collect();
    assert!(server.held() > LIMIT, "the application has not got them: {counts:?}");
    eprintln!("guarded: {}, {counts:?}", daemon.is_some());
    Some(counts)
}

#[test]
fn a_connection_that_was_opened_fast_keeps_its_place_before_its_handshake_ends() {
    if !kernel::believes_rst_before_the_handshake_ends() {
        return;
    }
    let Some(without) = opened_fast(false) else { return };
    assert!(without[9] > without[5] && without[9] > 4 * LIMIT, "the stock kernel resists");
    let Some(with) = opened_fast(true) else { return };
    assert!(with[9] == with[5] && with[9] <= 4 * LIMIT, "{with:?}, without {without:?}");
}

/// What the application has closed is the kernel's, as ever.
#[test]
fn a_socket_that_its_application_has_closed_is_left_to_the_kernel() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&BRISK);
    let conns = lingering(&mut scene);
    scene.server.close_all();
    thread::sleep(SWEPT);
    for conn in &conns {
        conn.stale_rst();
    }
    thread::sleep(SWEPT);
    assert_eq!(scene.admitted(), LIMIT, "{:#?}", scene.lab.entries());
}
