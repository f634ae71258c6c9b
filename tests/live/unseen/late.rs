//! Packets that are held up between conntrack and TCP.

use std::thread;
use std::time::Duration;

use super::dropped::Dropped;
use super::{ATTACKER, LONG_PAUSE, PORT, assert_bounded, contrast};
use crate::lab::{self, Daemon, Lab, Queue, RawConn};

/// Hosts shape what comes in by an ifb device: packets are late, and what conntrack makes of them is still
/// a moment before what TCP does.
#[test]
fn no_rst_behind_a_shaper_frees_a_slot() {
    // A packet takes 10 ms. There is no matchall in every kernel.
    const SHAPER: [&str; 5] = [
        "ip link add ifb0 type ifb",
        "ip link set ifb0 up",
        "tc qdisc add dev ifb0 root tbf rate 48kbit burst 120 latency 2s",
        "tc qdisc add dev eth0 handle ffff: ingress",
        "tc filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev ifb0",
    ];
    let shaped = |lab: &Lab| SHAPER.iter().for_each(|command| lab.server.run(command));
    assert_repaired_in_time("a shaper", shaped);
}

/// A program between conntrack and TCP holds each packet up for 50 ms.
#[test]
fn no_rst_that_a_program_holds_up_frees_a_slot() {
    const HELD_UP: Duration = Duration::from_millis(50);
    assert_repaired_in_time("NFQUEUE", |lab| {
        let queued = "PREROUTING -p tcp --dport 80 -j NFQUEUE --queue-num 0";
        lab.server.run(&format!("iptables -t mangle -A {queued}"));
        Queue::hold_up(&lab.server, HELD_UP)
    });
}

/// RSTs for all that is held, and, when what they closed has been repaired, as many SYNs as the limit.
fn assert_repaired_in_time<P>(what: &str, prepare: impl Fn(&Lab) -> P + Sync) {
    let counts = contrast(ATTACKER, prepare, 9, 4, |scene| {
        scene
            .held
            .iter()
            .for_each(|conn| scene.attacker.send_packet(&Dropped::SourceRoute.rst(conn)));
        let repaired = |daemon: &Daemon, conn: &RawConn| {
            let (log, client) = (daemon.log(), format!("{} ", conn.client));
            log.lines().any(|line| line.contains("revive") && line.contains(&client))
        };
        match &scene.daemon {
            Some(daemon) => lab::wait_for("repairs", LONG_PAUSE * 60, || {
                scene.held.iter().all(|conn| repaired(daemon, conn))
            }),
            None => thread::sleep(LONG_PAUSE),
        }
        let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
        let new = scene.attacker.complete(begun, LONG_PAUSE);
        scene.held.extend(new);
    });
    assert_bounded(what, &counts, 9);
    assert!(counts.iter().skip(1).all(|count| *count <= 6), "{what}: {counts:?}");
}
