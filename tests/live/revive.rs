//! Connections that conntrack believes closed while the server's socket is open: with ctkeep the
//! limiter counts them, without it the same steps get past the limit.

use std::thread;
use std::time::Duration;

use crate::lab::{ACK, FIN, RST, RawConn, holds_within, kernel, wait_for};
use crate::scene::{CLIENT, Contrast, LIMIT, Limiter, PORT, SOON, Scene, TRIES, contrast};

/// Ten tries, each with a FIN and then an RST that the server's TCP ignores.
fn assert_stale_rst_is_revived(limiter: Limiter, offset: i64) {
    let believed = kernel::believes_rst(offset);
    let result = contrast(limiter, CLIENT, &[], |scene| {
        let admitted = scene.attack(|scene, conn| {
            assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
            conn.rst(offset);
            if believed {
                scene.await_repair("revive", std::slice::from_ref(conn));
            }
        });
        assert_eq!(scene.server.held(), admitted.len());
        (admitted.len(), scene.open_sockets())
    });
    let Some(result) = result else { return };
    let stock = if believed { TRIES } else { LIMIT };
    assert_eq!(
        result,
        Contrast { without: (stock, stock), with: (LIMIT, LIMIT) },
        "admitted and open sockets at offset {offset}"
    );
}

/// Three half-closed connections, ended by RSTs that the server's TCP accepts.
fn assert_exact_rst_is_left_alone(offset: i64) {
    let believed = kernel::believes_rst(offset);
    let result = contrast(Limiter::Connlimit, CLIENT, &[], |scene| {
        let conns = scene.half_closed();
        assert_eq!(scene.admitted(), 0, "a full limit");
        for conn in &conns {
            conn.rst(offset);
        }
        wait_for("end of the sockets", SOON, || scene.open_sockets() == 0);
        // An event can come before TCP has seen the packet: ctkeep must notice within moments.
        let soon = Duration::from_millis(500);
        let freed = || !conns.iter().any(|conn| scene.is_counted(conn));
        assert_eq!(holds_within(soon, freed), believed, "free entries");
        let admitted = scene.admitted();
        (admitted, scene.open_sockets())
    });
    let Some(result) = result else { return };
    let all = if believed { (LIMIT, LIMIT) } else { (0, 0) };
    assert_eq!(result, Contrast { without: all, with: all }, "offset {offset}");
}

#[test]
fn an_rst_one_before_the_fin_is_revived() {
    assert_stale_rst_is_revived(Limiter::Connlimit, -1);
}

#[test]
fn an_rst_five_before_the_fin_is_revived() {
    assert_stale_rst_is_revived(Limiter::Connlimit, -5);
}

#[test]
fn an_rst_six_after_the_fin_is_revived() {
    assert_stale_rst_is_revived(Limiter::Connlimit, 6);
}

#[test]
fn an_rst_a_hundred_after_the_fin_is_revived() {
    assert_stale_rst_is_revived(Limiter::Connlimit, 100);
}

#[test]
fn an_rst_far_outside_the_window_is_revived() {
    assert_stale_rst_is_revived(Limiter::Connlimit, 200_000);
}

#[test]
fn a_stale_rst_is_revived_behind_an_nft_set() {
    assert_stale_rst_is_revived(Limiter::NftSet, kernel::stale_rst());
}

#[test]
fn a_stale_rst_is_revived_behind_strict_rules() {
    assert_stale_rst_is_revived(Limiter::Strict, kernel::stale_rst());
}

#[test]
fn an_rst_at_the_fin_frees_its_place_at_once() {
    assert_exact_rst_is_left_alone(0);
}

#[test]
fn an_rst_just_after_the_fin_frees_its_place_at_once() {
    assert_exact_rst_is_left_alone(1);
}

#[test]
fn a_repeated_fin_is_revived() {
    let result = contrast(Limiter::Connlimit, CLIENT, &[], |scene| {
        let admitted = scene.attack(|scene, conn| {
            conn.fin_again();
            scene.await_repair("revive", std::slice::from_ref(conn));
        });
        (admitted.len(), scene.lab.sockets("close-wait"))
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (TRIES, TRIES), with: (LIMIT, LIMIT) });
}

/// The server's socket stays ESTABLISHED, for it waits for the byte before the FIN.
#[test]
fn a_fin_with_a_hole_before_it_and_an_old_rst_are_revived() {
    let trick = |scene: &Scene, conn: &mut RawConn| {
        scene.peer.send(&conn.segment(FIN | ACK, 1));
        scene.peer.send(&conn.segment(RST, kernel::stale_rst()));
        scene.await_repair("revive", std::slice::from_ref(conn));
    };
    let result = contrast(Limiter::Connlimit, CLIENT, &[], |scene| {
        let mut conns = Vec::new();
        while conns.len() < TRIES
            && let Some(mut conn) = scene.open(1).pop()
        {
            trick(scene, &mut conn);
            conns.push(conn);
        }
        (conns.len(), scene.lab.sockets("established"))
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (TRIES, TRIES), with: (LIMIT, LIMIT) });
}

/// The limiter throws the closed connections out at the next SYN, before ctkeep can act. Then the
/// newcomers leave, so that only what was taken back can fill the limit.
fn assert_evicted_is_recounted(limiter: Limiter, source: &str, trick: impl Fn(&RawConn) + Sync) {
    let result = contrast(limiter, source, &[], |scene| {
        let conns = scene.half_closed();
        scene.freeze();
        for conn in &conns {
            trick(conn);
        }
        for conn in &conns {
            scene.await_forgotten(conn);
        }
        let newcomers = scene.open(TRIES);
        assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those thrown out");
        scene.thaw();
        scene.await_repair("revive", &conns);
        let beside = scene.admitted();
        assert_eq!(scene.open_sockets(), LIMIT + newcomers.len(), "no more than was let in");
        scene.end(&newcomers);
        (beside, scene.admitted())
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (0, LIMIT), with: (0, 0) }, "beside, and after them");
}

#[test]
fn those_that_connlimit_threw_out_after_an_rst_are_counted_again() {
    assert_evicted_is_recounted(Limiter::Connlimit, CLIENT, |conn| conn.stale_rst());
}

#[test]
fn those_that_were_thrown_out_over_ipv6_are_counted_again() {
    for limiter in [Limiter::Connlimit, Limiter::NftSet] {
        assert_evicted_is_recounted(limiter, "2001:db8:1::7", |conn| conn.stale_rst());
    }
}

#[test]
fn those_that_an_nft_set_threw_out_after_an_rst_are_counted_again() {
    assert_evicted_is_recounted(Limiter::NftSet, CLIENT, |conn| conn.stale_rst());
}

#[test]
fn those_that_strict_rules_threw_out_after_an_rst_are_counted_again() {
    assert_evicted_is_recounted(Limiter::Strict, CLIENT, |conn| conn.stale_rst());
}

#[test]
fn those_that_connlimit_threw_out_after_a_second_fin_are_counted_again() {
    assert_evicted_is_recounted(Limiter::Connlimit, CLIENT, RawConn::fin_again);
}

#[test]
fn those_that_an_nft_set_threw_out_after_a_second_fin_are_counted_again() {
    assert_evicted_is_recounted(Limiter::NftSet, CLIENT, RawConn::fin_again);
}

/// The set forgets closed connections by itself, once a second, without any packet.
#[test]
fn those_that_an_nft_set_threw_out_by_itself_are_counted_again() {
    let result = contrast(Limiter::NftSet, CLIENT, &[], |scene| {
        let conns = scene.half_closed();
        scene.freeze();
        for conn in &conns {
            conn.stale_rst();
        }
        thread::sleep(Duration::from_millis(2500));
        scene.thaw();
        scene.await_repair("revive", &conns);
        scene.admitted()
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: LIMIT, with: 0 });
}

/// Conntrack forgets an untouched half-closed connection after `timeout_close_wait`, by default a
/// minute; here the lease is renewed several times over.
#[test]
fn silence_is_outlived_by_the_lease() {
    const LEASE: u64 = 5;
    let sysctl = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    let result = contrast(Limiter::Connlimit, CLIENT, &["--lease", "5s"], |scene| {
        scene.lab.server.sysctl(sysctl, "3");
        let conns = scene.half_closed();
        thread::sleep(Duration::from_secs(12));
        let entries: Vec<_> = conns.iter().filter_map(|conn| scene.lab.entry(conn)).collect();
        assert!(entries.iter().all(|entry| entry.timeout <= LEASE), "{entries:?}");
        (entries.len(), scene.admitted())
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (0, LIMIT), with: (LIMIT, 0) });
}

/// Each round closes all that is counted and sends ten SYNs right behind, so that the limiter
/// judges them before any program can run. That gains one limit's worth once, and then no more.
#[test]
fn bursts_of_rsts_with_syns_behind_them_gain_one_limit_in_all() {
    const ROUNDS: usize = 8;
    let result = contrast(Limiter::Connlimit, CLIENT, &[], |scene| {
        let mut conns = scene.half_closed();
        for _ in 0..ROUNDS {
            conns.iter().for_each(|conn| conn.stale_rst());
            let mut newcomers = scene.open(TRIES);
            newcomers.iter_mut().for_each(RawConn::fin);
            conns.append(&mut newcomers);
            let all = conns.len();
            wait_for("CLOSE_WAIT", SOON, || scene.lab.sockets("close-wait") == all);
        }
        conns.len()
    });
    let Some(result) = result else { return };
    assert_eq!(result.without, LIMIT + ROUNDS * LIMIT);
    assert!(result.with <= 2 * LIMIT, "{} at a limit of {LIMIT}", result.with);
}

/// Whatever the client sends about connections that are held, they stay held, and counted.
#[test]
fn fifty_storms_of_stale_rsts_and_fins_gain_nothing() {
    let result = contrast(Limiter::Connlimit, CLIENT, &[], |scene| {
        let conns = scene.half_closed();
        for storm in 0..50_i64 {
            for conn in &conns {
                for offset in [-1, -5, 6, 100 + storm, 200_000] {
                    conn.rst(offset);
                }
                conn.fin_again();
            }
            thread::sleep(Duration::from_millis(10));
        }
        // The last storm is answered too; at the latest a sweep sees to it.
        let settled = || conns.iter().all(|conn| scene.is_counted(conn));
        holds_within(Duration::from_secs(3), settled);
        let admitted = scene.admitted();
        (admitted, scene.lab.sockets("close-wait"))
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (LIMIT, LIMIT), with: (0, LIMIT) });
}

/// A server that is told to stop takes no more connections and still has these.
#[test]
fn connections_are_guarded_after_the_server_has_stopped_listening() {
    let args = ["--sweep-interval", "100ms", "--deep-interval", "300ms"];
    let result = contrast(Limiter::Connlimit, CLIENT, &args, |scene| {
        let conns = scene.half_closed();
        scene.server.stop_listening();
        thread::sleep(Duration::from_millis(600));
        for conn in &conns {
            conn.stale_rst();
        }
        scene.await_repair("revive", &conns);
        let _next = scene.lab.serve("[::]:80");
        scene.admitted()
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: LIMIT, with: 0 });
}

/// Two clients, one of them in a conntrack zone of its own; each is counted where it belongs, and
/// nothing is put where it does not.
#[test]
fn entries_of_another_zone_are_revived_and_counted_there() {
    let play = |guarded: bool| {
        let mut scene = Scene::new(Limiter::Connlimit)?;
        for (chain, side) in [("PREROUTING", "-s"), ("OUTPUT", "-d")] {
            let rule = format!("-A {chain} -p tcp {side} {CLIENT} -j CT --zone 7");
            scene.lab.server.run(&format!("iptables -t raw {rule}"));
        }
        let neighbour = scene.lab.peer("203.0.113.9");
        assert_eq!(neighbour.open_promptly(PORT, TRIES).len(), LIMIT);
        let conns = scene.half_closed();
        if guarded {
            scene.guard(&[]);
        }
        scene.freeze();
        for conn in &conns {
            conn.stale_rst();
            scene.await_forgotten(conn);
        }
        let newcomers = scene.open(TRIES);
        assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those thrown out");
        scene.thaw();
        scene.await_repair("revive", &conns);
        scene.end(&newcomers);
        let entries = scene.lab.entries();
        let astray = entries.iter().filter(|entry| {
            let ours = entry.orig.0.ip().to_string() == CLIENT;
            ours != entry.line.contains(" zone=7 ")
        });
        assert_eq!(astray.count(), 0, "{entries:#?}");
        Some((scene.admitted(), neighbour.open_promptly(PORT, TRIES).len()))
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), ((LIMIT, 0), Some((0, 0))));
}

/// Drift that is older than ctkeep is repaired when it starts, and counted again.
#[test]
fn what_was_closed_before_the_start_is_revived_at_the_start() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    let newcomers = scene.open(TRIES);
    assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those thrown out");
    scene.guard(&[]);
    scene.await_repair("revive", &conns);
    scene.end(&newcomers);
    assert_eq!(scene.admitted(), 0);
    assert_eq!(scene.open_sockets(), LIMIT);
}

/// The packet log, both recount routes and the seal work on every kernel from 5.10 on. The log of
/// the daemon says what it has.
#[test]
fn nothing_that_is_preferred_is_missing() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&[]);
    for have in [r#"source="nflog""#, r#"recount=["ingress", "loopback"] seal=true"#] {
        assert!(scene.daemon().logged(have), "no {have} in {}", scene.daemon().log());
    }
}

/// The sweep alone does it too, only later.
#[test]
fn without_events_the_sweep_revives() {
    let result = contrast(Limiter::Connlimit, CLIENT, &["--events", "off"], |scene| {
        let conns = scene.half_closed();
        for conn in &conns {
            conn.stale_rst();
        }
        let newcomers = scene.open(TRIES);
        scene.await_repair("revive", &conns);
        scene.end(&newcomers);
        scene.admitted()
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: LIMIT, with: 0 });
}

/// One repair by hand does it too, as long as nothing more happens.
#[test]
fn a_single_reconcile_revives_and_recounts() {
    let Some(scene) = Scene::new(Limiter::Connlimit) else { return };
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    let newcomers = scene.open(TRIES);
    assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those thrown out");
    let (code, out, err) = scene.ctkeep(&["reconcile"]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(out.matches("revive").count(), LIMIT, "{out}");
    scene.end(&newcomers);
    assert_eq!(scene.admitted(), 0);
}
