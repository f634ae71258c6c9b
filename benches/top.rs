//! What `ctkeep top` costs where much is open: 100 800 sockets, and as many entries as the kernel allows
//! by default, or `CTKEEP_ENTRIES`.
//!
//!     cargo bench --bench top
//!     make top-test          # 2 000 000 entries, in a guest whose table takes them

mod foreign;
#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::Lab;
use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};
use report::Target;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
/// A process that may have 20 000 descriptors has room for one port's.
const PORTS: std::ops::Range<u16> = 80..86;
const SOURCES: u32 = 240;
/// Of one source to each port.
const EACH: u32 = 70;
const SOCKETS: u32 = SOURCES * EACH * 6;
/// Below the 262 144 that the kernel gives a machine with more than 4 GiB.
const ENTRIES: u32 = 250_000;
/// Looks between which the share is taken.
const LOOKS: usize = 3;
const AT_LEAST: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(3_600);

fn main() {
    lab::serve_if_asked();
    // Where it is more already, or may be no more, so be it.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, 20_000, 20_000);
    let Some(lab) = Lab::new() else { return };
    let entries =
        std::env::var("CTKEEP_ENTRIES").map_or(ENTRIES, |it| it.parse().expect("a number"));
    // Without a rule that asks for conntrack nothing is tracked.
    PORTS.for_each(|port| lab.connlimit(port, EACH));
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
    let _servers: Vec<_> = PORTS.map(|port| lab.serve(&format!("0.0.0.0:{port}"))).collect();
    let mut conns = Vec::new();
    for number in 0..SOURCES {
        let peer = lab.peer(&format!("198.51.100.{}", 1 + number));
        PORTS.for_each(|port| conns.extend(peer.hold(port, EACH as usize)));
    }
    lab.server.within(|| foreign::insert(0..entries - SOCKETS));
    let (open, tracked) = (lab.sockets("established"), lab.server.output("conntrack -C"));
    report::heading(&format!("{open} sockets of {SOURCES} sources, {} entries", tracked.trim()));
    once(&lab);
    live(&lab);
}

/// One look, beside the two tools that only print the tables; by processor time.
fn once(lab: &Lab) {
    let mut costs = [(); 2].map(|()| Vec::new());
    for _ in 0..LOOKS {
        for (costs, (program, args)) in costs.iter_mut().zip([
            ("sh", &["-c", "conntrack -L 2>/dev/null | wc -l; ss -tan | wc -l"][..]),
            (CTKEEP, &["top", "--once"]),
        ]) {
            let before = children();
            let mut command = Command::new(program);
            command.args(args);
            let child = lab.server.spawn_with(&command, |command| {
                command.stdin(Stdio::null()).stdout(Stdio::null());
            });
            assert!(child.expect("a program").wait().expect("its end").success(), "{program}");
            costs.push((children() - before).as_secs_f64());
        }
    }
    let [tools, ours] = costs.map(|costs| report::median(&costs));
    report::figure("conntrack -L | wc -l; ss -tan | wc -l", tools, "s", Target::None);
    report::ratio("ctkeep top --once", ours, "s", ours / tools, Target::None);
}

/// Processor time of all that has been waited for.
fn children() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("usage");
    [usage.user_time(), usage.system_time()]
        .iter()
        .map(|it| {
            let micros = it.tv_sec() * 1_000_000 + it.tv_usec();
            Duration::from_micros(micros.try_into().expect("a time"))
        })
        .sum()
}

/// What share of a core the live table takes, from look to look.
fn live(lab: &Lab) {
    let name = format!("ctkeep-bench-{}", std::process::id());
    let tmux = |args: &[&str]| {
        let mut command = Command::new("tmux");
        let output = command.args(["-L", &name, "-f", "/dev/null"]).args(args).output();
        String::from_utf8_lossy(&output.expect("tmux").stdout).trim().to_owned()
    };
    let shell = format!("exec nsenter --net={} {CTKEEP} top", lab.server.path());
    tmux(&["new-session", "-d", "-x", "80", "-y", "24", &shell]);
    // `ctkeep top  2026-11-30T01:02:03Z  ...`
    let shown = || {
        let screen = tmux(&["capture-pane", "-p"]);
        screen.split_whitespace().nth(2).filter(|it| it.ends_with('Z')).map(str::to_owned)
    };
    lab::wait_for("the table", SOON, || shown().is_some());
    let pid = tmux(&["list-panes", "-F", "#{pane_pid}"]);
    let cost = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("its figures");
        // proc(5): utime and stime, in hundredths of a second.
        let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace().skip(11).take(2);
        fields.map(|field| field.parse::<f64>().expect("a number")).sum::<f64>() / 100.0
    };
    let (began, before, mut last, mut looks) = (Instant::now(), cost(), shown(), 0_usize);
    while looks < LOOKS || began.elapsed() < AT_LEAST {
        lab::wait_for("the next look", SOON, || shown() != last);
        (last, looks) = (shown(), looks + 1);
    }
    let took = began.elapsed().as_secs_f64();
    report::figure(
        &format!("ctkeep top in a terminal: from look to look, of {looks}"),
        report::rate(looks, began.elapsed()).recip(),
        "s",
        Target::None,
    );
    let share = 100.0 * (cost() - before) / took;
    report::figure("ctkeep top in a terminal: share of a core", share, "%", Target::AtMost(10.0));
    tmux(&["kill-server"]);
}
