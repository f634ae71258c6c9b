//! How long an audit takes beside the two tools that only print the tables: 200 000 entries, 25 000
//! sockets. Prints medians of interleaved rounds and their ratio; the target is 0.7.
//!
//!     cargo bench --bench audit
//!
//! An older program that `CTKEEP_BEFORE` names takes turns with it.

mod foreign;
#[path = "../tests/lab/mod.rs"]
mod lab;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::Lab;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOCKETS: usize = 25_000;
const ENTRIES: u32 = 200_000;
const ROUNDS: usize = 9;

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    // Without a rule that asks for conntrack nothing is tracked.
    lab.connlimit(80, 100_000);
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
    let servers = [lab.serve("[::]:80"), lab.serve("[::]:81")];
    let peers = ["198.51.100.7", "203.0.113.9"].map(|address| lab.peer(address));
    let mut conns = Vec::with_capacity(SOCKETS);
    while conns.len() < SOCKETS {
        for (peer, port) in peers.iter().zip([80, 81]) {
            conns.extend(peer.open(port, 250));
        }
    }
    let others = ENTRIES - u32::try_from(conns.len()).expect("a count");
    lab.server.within(|| foreign::insert(0..others));
    compare(&lab, "every socket has its entry");
    // As after a firewall was started anew: every socket is looked at exactly, and reported.
    lab.server.run("conntrack -D -p tcp -d 192.0.2.1");
    lab.server.within(|| foreign::insert(others..ENTRIES));
    compare(&lab, "no socket has an entry");
    drop(servers);
}

fn compare(lab: &Lab, what: &str) {
    println!(
        "{} entries, {} sockets, {what}; median of {ROUNDS}",
        lab.server.output("conntrack -C").trim(),
        lab.sockets("established")
    );
    let before = std::env::var("CTKEEP_BEFORE").ok();
    let tools = || time(lab, "sh", &["-c", "conntrack -L >/dev/null 2>&1; ss -tan >/dev/null"]);
    for (name, args) in [
        ("ctkeep audit", &["audit"][..]),
        ("ctkeep audit --port (four of them)", &["audit", "--port=80,81,82,83"]),
        ("ctkeep audit --format json --all", &["audit", "--format=json", "--all"]),
    ] {
        let (mut ours, mut theirs, mut older) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            theirs.push(tools());
            ours.push(time(lab, CTKEEP, args));
            older.extend(before.as_ref().map(|before| time(lab, before, args)));
        }
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "{name:36} {ours:>8.1?}   conntrack -L; ss -tan {theirs:>8.1?}   ratio {:.2}",
            ours.as_secs_f64() / theirs.as_secs_f64()
        );
        if !older.is_empty() {
            let older = median(older);
            let ratio = ours.as_secs_f64() / older.as_secs_f64();
            println!("{:36} {older:>8.1?}   ratio to it {ratio:.2}", "  the version before");
        }
    }
}

fn time(lab: &Lab, program: &str, args: &[&str]) -> Duration {
    let mut command = Command::new(program);
    command.args(args);
    let start = Instant::now();
    let mut child = lab
        .server
        .spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        })
        .expect("program starts");
    let status = child.wait().expect("program ends");
    let took = start.elapsed();
    assert!(matches!(status.code(), Some(0 | 1)), "{program} {args:?}: {status}");
    took
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
