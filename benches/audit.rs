//! How long an audit takes beside the two tools that only print the tables: 200 000 entries, 25 000
//! sockets. Prints medians of interleaved rounds and their ratio; the target is 0.7.
//!
//!     cargo bench --bench audit

#[path = "../tests/lab/mod.rs"]
mod lab;

use std::ops::Range;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Change, Conntrack, Entry, Insert, Status, TcpState, Zone};
use ctkeep::flow::{Endpoint, FourTuple};
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
    let foreign = ENTRIES - u32::try_from(conns.len()).expect("a count");
    lab.server.within(|| insert(0..foreign));
    compare(&lab, "every socket has its entry");
    top(&lab);
    // As after a firewall was started anew: every socket is looked at exactly, and reported.
    lab.server.run("conntrack -D -p tcp -d 192.0.2.1");
    lab.server.within(|| insert(foreign..ENTRIES));
    compare(&lab, "no socket has an entry");
    drop(servers);
}

fn compare(lab: &Lab, what: &str) {
    println!(
        "{} entries, {} sockets, {what}; median of {ROUNDS}",
        lab.server.output("conntrack -C").trim(),
        lab.sockets("established")
    );
    let tools = || time(lab, "sh", &["-c", "conntrack -L >/dev/null 2>&1; ss -tan >/dev/null"]);
    for (name, args) in [
        ("ctkeep audit", &["audit"][..]),
        ("ctkeep audit --port (four of them)", &["audit", "--port=80,81,82,83"]),
        ("ctkeep audit --format json --all", &["audit", "--format=json", "--all"]),
    ] {
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..ROUNDS {
            theirs.push(tools());
            ours.push(time(lab, CTKEEP, args));
        }
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "{name:36} {ours:>8.1?}   conntrack -L; ss -tan {theirs:>8.1?}   ratio {:.2}",
            ours.as_secs_f64() / theirs.as_secs_f64()
        );
    }
}

/// What share of a core `ctkeep top` takes in a terminal.
fn top(lab: &Lab) {
    const WATCHED: Duration = Duration::from_secs(60);
    let name = format!("ctkeep-bench-{}", std::process::id());
    let tmux = |args: &[&str]| {
        let mut command = Command::new("tmux");
        let output = command.args(["-L", &name, "-f", "/dev/null"]).args(args).output();
        String::from_utf8_lossy(&output.expect("tmux").stdout).trim().to_owned()
    };
    let shell = format!("exec nsenter --net={} {CTKEEP} top", lab.server.path());
    tmux(&["new-session", "-d", "-x", "80", "-y", "24", &shell]);
    lab::wait_for("the table", Duration::from_secs(120), || {
        tmux(&["capture-pane", "-p"]).contains("SOURCE")
    });
    let pid = tmux(&["list-panes", "-F", "#{pane_pid}"]);
    let cost = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its figures");
        // proc(5): utime and stime, in hundredths of a second.
        let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace().skip(11).take(2);
        fields.map(|field| field.parse::<f64>().expect("a number")).sum::<f64>() / 100.0
    };
    let (began, before) = (Instant::now(), cost());
    std::thread::sleep(WATCHED);
    let share = (cost() - before) / began.elapsed().as_secs_f64();
    println!("ctkeep top, {WATCHED:?} in a terminal: {:.1} % of a core", 100.0 * share);
    tmux(&["kill-server"]);
}

/// Entries of other hosts.
fn insert(numbers: Range<u32>) {
    let mut table = Conntrack::open().expect("conntrack");
    let change = |number: u32| {
        let client =
            Endpoint::new((0x0a00_0000 + number / 50_000).to_be_bytes().into(), port(number));
        let server = Endpoint::new([172, 16, 0, 1].into(), 443);
        let like = Entry::plain(FourTuple::new(client, server), Zone::default());
        let timeout = Duration::from_secs(3600);
        Change::Insert(Insert {
            like,
            state: TcpState::Established,
            status: Status::ASSURED,
            timeout,
        })
    };
    let changes: Vec<_> = numbers.map(change).collect();
    let failed =
        table.change(&changes).expect("a conversation").iter().filter(|r| r.is_err()).count();
    assert_eq!(failed, 0, "of {} inserts", changes.len());
}

fn port(number: u32) -> u16 {
    u16::try_from(number % 50_000 + 10_000).expect("a port")
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
