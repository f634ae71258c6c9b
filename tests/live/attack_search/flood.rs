//! A flood of the same packets from addresses that have no connection: what it costs is bounded.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use super::packet::{Random, Shot};
use super::rules::Rules;
use super::{Host, LIMIT, PORT, seed};
use crate::lab::http::{ask, samples};
use crate::lab::{RawConn, process, wait_for};

/// Packets, each of another shape: flags, options, extension headers, fragments, lies.
const PACKETS: usize = 20_000;
/// A second has so many of them at most.
const PACE: usize = 8_000;
const SOON: Duration = Duration::from_secs(10);

fn sweeps(host: &Host) -> f64 {
    let answer = ask(&host.lab.server, "127.0.0.1:9815", "GET /metrics", "").expect("metrics");
    *samples(&answer.body).get("ctkeep_sweeps_total").expect("sweeps")
}

/// Somebody else in the networks that the test's peers have.
fn strange(random: &mut Random, address: IpAddr) -> IpAddr {
    let byte = |random: &mut Random| u8::try_from(random.below(256)).expect("a byte");
    match address {
        IpAddr::V4(_) => [203, 0, 113, byte(random)].into(),
        IpAddr::V6(_) => {
            let (a, b) = (u16::from(byte(random)), u16::from(byte(random)));
            [0x2001, 0xdb8, 1, 0, 0, 0, a, b].into()
        }
    }
}

#[test]
fn of_any_shape_starts_no_sweep_fills_no_memory_and_stops_no_repair() {
    let rules = Rules::Plain;
    let args = ["--sweep-interval", "20s"];
    let Some(host) = Host::new(rules, None, Some(&args)) else { return };
    let daemon = host.daemon.as_ref().expect("a daemon");
    let peers = ["198.51.100.7", "2001:db8:1::7"].map(|source| host.lab.peer(source));
    let mut models: Vec<RawConn> = peers.iter().flat_map(|peer| peer.hold(PORT, 1)).collect();
    let addresses: Vec<IpAddr> = models.iter().map(|conn| conn.client.ip()).collect();
    wait_for("the first sweep", SOON, || daemon.logged(" ready "));

    let mut random = Random(seed(7));
    let before = (sweeps(&host), daemon.log().lines().count());
    let memory = process::status_kib(daemon.pid(), "VmRSS");
    let (begun, worked) = (Instant::now(), process::cpu_time(daemon.pid()));
    for number in 0..PACKETS {
        let one = random.below(models.len());
        let (conn, address) = (&mut models[one], addresses[one]);
        conn.client.set_ip(strange(&mut random, address));
        conn.client.set_port(u16::try_from(1024 + random.below(60_000)).expect("a port"));
        for frame in Shot::draw(&mut random, 1).frames(conn) {
            // A frame that the device refuses is as good as lost.
            let _ = host.wire.send(&frame);
        }
        if number % 100 == 0 {
            let due = Duration::from_secs_f64(number as f64 / PACE as f64);
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
    }
    let flooded = begun.elapsed();
    let entries = host.lab.entries().len();
    assert!(entries > 500, "{entries} entries: the flood did not arrive");

    // In the midst of what is left of it.
    let attacker = host.lab.peer("198.51.100.8");
    let mut conns = attacker.hold(PORT, LIMIT);
    conns.iter_mut().for_each(|conn| host.lab.half_close(conn));
    conns.iter().for_each(RawConn::stale_rst);
    wait_for("a repair", SOON, || conns.iter().all(|conn| host.lab.is_alive(conn)));
    assert_eq!(attacker.admitted(PORT, LIMIT), 0, "{}", daemon.log());

    let worked = process::cpu_time(daemon.pid()) - worked;
    let swept = sweeps(&host) - before.0;
    let lines = daemon.log().lines().count() - before.1;
    let grown = process::status_kib(daemon.pid(), "VmRSS").saturating_sub(memory);
    eprintln!(
        "{PACKETS} packets in {flooded:?}: {worked:?} of a processor, {swept} sweeps, {lines} lines, {grown} KiB"
    );
    assert!(swept <= 1.0 + flooded.as_secs_f64() / 10.0, "{swept} sweeps: {}", daemon.log());
    assert!(lines <= 3 * LIMIT + 10, "{lines} lines: {}", daemon.log());
    assert!(grown < 8192, "{grown} KiB");
    assert!(worked < flooded, "{worked:?} of a processor in {flooded:?}");
}
