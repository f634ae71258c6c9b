//! What containers cost: two hundred namespaces of twenty connections each, with nothing to do.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::thread;
use std::time::Duration;

use lab::guests::Guest;
use lab::{Lab, process, wait_for};
use report::Target;
use traffic::CTKEEP;

const GUESTS: u16 = 200;
const EACH: usize = 20;
const IDLE: Duration = Duration::from_secs(60);

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    lab.server.sysctl("net/ipv4/ip_forward", "1");
    lab.server.run(
        "iptables -A FORWARD -p tcp --syn -m connlimit --connlimit-above 100 --connlimit-mask 32 -j DROP",
    );
    let alone = lab.daemon(CTKEEP, &[]);
    report::heading("200 namespaces of 20 connections, 60 s with nothing to do");
    let threads = |pid| -> f64 {
        process::status(pid).get("Threads").and_then(|it| it.parse().ok()).expect("threads")
    };
    let without = threads(alone.pid());
    let (cpu, ()) = traffic::cpu_percent(alone.pid(), || thread::sleep(IDLE / 6));
    report::figure("no namespace: CPU of ctkeep", cpu, "%", Target::None);
    report::figure("no namespace: RSS", traffic::resident(alone.pid()), "MB", Target::None);
    drop(alone);

    let guests: Vec<_> = (1..=GUESTS).map(|number| Guest::start(&lab, number)).collect();
    let daemon = lab.daemon(CTKEEP, &[]);
    let conns: Vec<_> = guests
        .iter()
        .flat_map(|guest| {
            lab.peer(&format!("198.51.100.{}", guest.port - 8000)).hold(guest.port, EACH)
        })
        .collect();
    let all = usize::from(GUESTS) * EACH;
    wait_for("entries", Duration::from_secs(10), || lab.entries().len() >= all);
    assert_eq!(conns.len(), all);
    // The deep sweep that sees them all is among what is measured.
    thread::sleep(IDLE / 12);
    let (cpu, ()) = traffic::cpu_percent(daemon.pid(), || thread::sleep(IDLE));
    report::figure("CPU of ctkeep", cpu, "%", Target::AtMost(3.0));
    report::figure("RSS", traffic::resident(daemon.pid()), "MB", Target::AtMost(40.0));
    report::figure("threads", threads(daemon.pid()), "", Target::AtMost(without));
    let (_, log) = daemon.term();
    assert!(log.lines().all(|line| line.len() < 1000), "a log line lists namespaces");
}
