//! Sockets that an application holds in other states than ESTABLISHED and CLOSE_WAIT: the server has
//! sent its FIN first (a lingering close, an answer of HTTP/1.0) and still reads.

mod lab;
#[path = "lab/scene.rs"]
mod scene;

use std::thread;
use std::time::Duration;

use lab::{RawConn, wait_for};
use scene::{LIMIT, Limiter, SOON, Scene};

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

/// What the application has closed is the kernel's, as ever.
#[test]
fn a_socket_that_its_application_has_closed_is_left_to_the_kernel() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&BRISK);
    let conns = lingering(&mut scene);
    scene.server.close_all();
    thread::sleep(SWEPT);
    for conn in &conns {
        conn.rst(-7);
    }
    thread::sleep(SWEPT);
    assert_eq!(scene.admitted(), LIMIT, "{:#?}", scene.lab.entries());
}
