//! The daemon's own cost: ordinary closes, storms of events, memory.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{
    Change, Conntrack, Entry, EntryKey, Filter, Insert, Status, TcpState, Zone,
};
use ctkeep::flow::{AF_INET, Endpoint, FourTuple};

use lab::{Daemon, Lab, Peer, holds_within};
use report::Target;
use traffic::{CTKEEP, Ending, Exchange};

const CLOSES: f64 = 10_000.0;
const CLOSES_TIME: Duration = Duration::from_secs(20);
const STORM: f64 = 200_000.0;
const STORM_TIME: Duration = Duration::from_secs(8);
/// Stale RSTs during a storm.
const REPAIRS: usize = 50;

fn main() {
    lab::serve_if_asked();
    closes();
    storm();
    holding();
}

/// Connections that end as they should must cost nothing.
fn closes() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 10_000);
    traffic::widen_ports(&lab);
    let listener = traffic::listener(&lab, 80);
    report::heading("20 s of ordinary closes, as fast as possible up to 10 000/s");
    for (source, ending, is_judged) in [
        ("nflog", Ending::Fin, true),
        ("nflog", Ending::Rst, true),
        ("ctnetlink", Ending::Fin, false),
        ("ctnetlink", Ending::Rst, false),
    ] {
        let daemon = lab.daemon(CTKEEP, &["--events", source]);
        let time = if is_judged { CLOSES_TIME } else { CLOSES_TIME / 2 };
        let name = ending.name();
        let (cpu, count) = traffic::cpu_percent(daemon.pid(), || {
            lab.client.within(|| {
                Exchange::new(&listener).run(ending, Some(CLOSES), Instant::now() + time)
            })
        });
        let (_, log) = daemon.term();
        let changes = traffic::all_done(&log).expect("a last line");
        let changes = f64::from(u32::try_from(changes).unwrap_or(u32::MAX));
        let bound = |most| if is_judged { Target::AtMost(most) } else { Target::None };
        report::figure(&format!("{name}, {source}"), report::rate(count, time), "/s", Target::None);
        report::figure("  kernel changes", changes, "", Target::AtMost(0.0));
        report::figure("  CPU of ctkeep", cpu, "%", bound(15.0));
    }
}

/// Conntrack events of connections that need nothing, and a few that do.
fn storm() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 10_000);
    let _server = lab.serve("0.0.0.0:80");
    let peer = lab.peer("198.51.100.7");
    report::heading("Storm of conntrack events, up to 200 000/s, with 50 stale RSTs in it");
    for (source, target) in [("nflog", Target::AtMost(50.0)), ("ctnetlink", Target::AtMost(50.0))] {
        let daemon = lab.daemon(CTKEEP, &["--events", source, "--defence", "0"]);
        let (cpu, (rate, repaired)) = traffic::cpu_percent(daemon.pid(), || {
            thread::scope(|scope| {
                let storm = scope.spawn(|| lab.server.within(|| events(STORM_TIME)));
                let repaired = repair_some(&lab, &peer);
                (storm.join().expect("storm"), repaired)
            })
        });
        report_storm(source, &daemon, rate, repaired, cpu, target);
    }
    let mut command = Command::new("conntrack");
    command.args(["-E", "-p", "tcp"]);
    let child = lab.server.spawn_with(&command, |command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    });
    let mut child = child.expect("conntrack");
    thread::sleep(Duration::from_millis(200));
    let (cpu, rate) =
        traffic::cpu_percent(child.id(), || lab.server.within(|| events(STORM_TIME / 2)));
    report::figure("events, conntrack -E >/dev/null", rate, "/s", Target::None);
    report::figure("CPU of conntrack -E", cpu, "%", Target::None);
    child.kill().expect("a running conntrack");
    child.wait().expect("the end of conntrack");
}

fn report_storm(
    source: &str,
    daemon: &Daemon,
    rate: f64,
    repaired: usize,
    cpu: f64,
    target: Target,
) {
    let lost = f64::from(u32::try_from(REPAIRS - repaired).expect("some fifty"));
    report::figure(&format!("events, {source}"), rate, "/s", Target::None);
    report::figure(&format!("lost repairs, {source}"), lost, "", Target::AtMost(0.0));
    report::figure(&format!("CPU of ctkeep, {source}"), cpu, "%", target);
    if daemon.logged("events were lost") {
        println!("(the receive buffer overran at least once)");
    }
}

/// Half-closes connections and sends a stale RST to each; how many are counted a while later.
fn repair_some(lab: &Lab, peer: &Peer) -> usize {
    let mut conns = Vec::new();
    for _ in 0..REPAIRS {
        let mut conn = peer.connect(80).expect("a connection");
        conn.fin();
        thread::sleep(Duration::from_millis(20));
        conn.rst(-5);
        thread::sleep(Duration::from_millis(80));
        conns.push(conn);
    }
    let end = |addr: std::net::SocketAddr| Endpoint::new(addr.ip(), addr.port());
    let keys: Vec<_> = conns
        .iter()
        .map(|conn| (FourTuple::new(end(conn.client), end(conn.server)), Zone::default()))
        .collect();
    let entries = lab.server.within(|| {
        Conntrack::open().and_then(|mut conntrack| conntrack.get(&keys)).expect("look-up")
    });
    // Recounted, hence a new entry, hence liberal without SACK.
    let counted =
        |entry: &Entry| entry.is_ours() && entry.state().is_some_and(TcpState::is_counted);
    entries.iter().flatten().filter(|entry| counted(entry)).count()
}

/// Changes the state of entries that have no socket to and fro; each change is an event. Returns
/// how many a second.
fn events(time: Duration) -> f64 {
    const ENTRIES: u16 = 1_024;
    let mut conntrack = Conntrack::open().expect("conntrack");
    let keys: Vec<EntryKey> = (0..ENTRIES)
        .map(|number| {
            let client = Endpoint::new(Ipv4Addr::new(10, 0, 0, 1).into(), 20_000 + number);
            let server = Endpoint::new(Ipv4Addr::new(203, 0, 113, 9).into(), 443);
            EntryKey { zone: Zone::default(), orig: FourTuple::new(client, server) }
        })
        .collect();
    let timeout = Duration::from_secs(600);
    let delete = |key: &EntryKey| Change::Delete { key: *key, id: None };
    let insert = |key: &EntryKey| {
        Change::Insert(Insert {
            like: Entry::plain(key.orig, key.zone),
            state: TcpState::Established,
            status: Status::ASSURED,
            timeout,
        })
    };
    let deletes: Vec<_> = keys.iter().map(delete).collect();
    let inserts: Vec<_> = keys.iter().map(insert).collect();
    conntrack.change(&deletes).expect("deletes");
    conntrack.change(&inserts).expect("inserts");
    let rounds = [TcpState::FinWait, TcpState::CloseWait, TcpState::LastAck, TcpState::TimeWait];
    let rounds = rounds.map(|state| {
        let update = |key: &EntryKey| Change::Update { key: *key, state, status: None, timeout };
        keys.iter().map(update).collect::<Vec<_>>()
    });
    let begun = Instant::now();
    let mut count = 0_usize;
    for changes in rounds.iter().cycle() {
        for changes in changes.chunks(64) {
            conntrack.change(changes).expect("updates");
            count += changes.len();
            #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
            let due = begun + Duration::from_secs_f64(count as f64 / STORM);
            let ahead = due.saturating_duration_since(Instant::now());
            if ahead > Duration::from_millis(1) {
                thread::sleep(ahead);
            }
        }
        if begun.elapsed() >= time {
            break;
        }
    }
    report::rate(count, begun.elapsed())
}

/// How many entries have a longer timeout than the kernel gives to half-closed connections.
fn held(lab: &Lab) -> usize {
    const LONGER: Duration = Duration::from_secs(180);
    let is_held = |entry: &Entry| entry.timeout.is_some_and(|timeout| timeout > LONGER);
    let count = |count: &mut usize, entry: &Entry| *count += usize::from(is_held(entry));
    lab.server.within(|| {
        Conntrack::open()
            .and_then(|mut conntrack| conntrack.entries(AF_INET, Filter::Tcp, count))
            .expect("dump")
    })
}

/// What it costs to hold many entries, and how soon it notices what happens to them; the same with the
/// version before, where `CTKEEP_BEFORE` names it.
fn holding() {
    const PORTS: u16 = 6;
    const STEPS: [(usize, f64, f64); 2] = [(10_000, 20.0, 0.5), (100_000, 80.0, 3.0)];
    /// On a port of their own, to be ended.
    const ENDING: usize = 200;
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 100_000);
    // Conntrack is not to see how they end.
    lab.server.run("iptables -t raw -A OUTPUT -p tcp --sport 90 --tcp-flags RST RST -j NOTRACK");
    traffic::widen_ports(&lab);
    let sources = traffic::own_addresses(&lab, 100);
    // A process may have 20 000 descriptors.
    let mut servers: Vec<_> =
        (80..80 + PORTS).map(|port| (port, lab.serve(&format!("0.0.0.0:{port}")))).collect();
    let mut ending = lab.serve("0.0.0.0:90");
    report::heading("Entries held");
    let programs = [traffic::before(), Some(CTKEEP.to_owned())];
    let mut open = 0;
    for (count, memory, idle) in STEPS {
        let new = count - open;
        let share = new.div_ceil(servers.len());
        let mut left = new;
        for (port, server) in &mut servers {
            let now = share.min(left);
            traffic::half_close(&lab, server, *port, &sources, now);
            left -= now;
        }
        open = count;
        for (program, name) in programs.iter().zip(["before, ", ""]) {
            let Some(program) = program else { continue };
            let is_judged = name.is_empty();
            let bound = |most| if is_judged { Target::AtMost(most) } else { Target::None };
            traffic::half_close(&lab, &mut ending, 90, &sources, ENDING);
            release_all(&lab);
            // A lease of which half is longer than what the kernel gives: every entry is due at once.
            let daemon = lab.daemon(program, &["--lease", "10m"]);
            let all = count + ENDING;
            assert!(holds_within(Duration::from_secs(60), || held(&lab) >= all), "{all} not held");
            thread::sleep(Duration::from_secs(3));
            let resident = traffic::resident(daemon.pid());
            report::figure(&format!("{name}RSS, {count} held"), resident, "MB", bound(memory));
            let time = Duration::from_secs(10);
            let (cpu, ()) = traffic::cpu_percent(daemon.pid(), || thread::sleep(time));
            report::figure(&format!("{name}CPU, {count} held, idle"), cpu, "%", bound(idle));
            let (p50, p99) = releases(&lab, &mut ending);
            report::figure(&format!("{name}release, {count} held: p50"), p50, "ms", Target::None);
            report::figure(&format!("{name}release, {count} held: p99"), p99, "ms", bound(50.0));
            if count == 10_000 {
                let (noticed, back) = loss(&lab, count);
                let row = format!("{name}conntrack -F, {count} held: the first back");
                report::figure(&row, noticed, "ms", bound(1200.0));
                report::figure("  all of them back", back, "ms", bound(2500.0));
            }
            drop(daemon);
        }
    }
}

/// Gives all entries what the kernel would.
fn release_all(lab: &Lab) {
    lab.server.within(|| {
        let mut conntrack = Conntrack::open().expect("conntrack");
        let keys = conntrack
            .entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, entry| all.push(entry.key()))
            .expect("dump");
        let timeout = Duration::from_secs(170);
        let changes: Vec<_> = keys.into_iter().map(|key| Change::Extend { key, timeout }).collect();
        drop(conntrack.change(&changes).expect("changes"));
    });
}

/// All sockets of port 90 end, and conntrack does not see how; milliseconds until half, and until 99
/// of a hundred of their entries are given back.
fn releases(lab: &Lab, server: &mut lab::Server) -> (f64, f64) {
    lab.server.within(|| {
        let mut conntrack = Conntrack::open().expect("conntrack");
        let of_port = |all: &mut Vec<_>, entry: &Entry| {
            if entry.reply.src.port() == 90 {
                all.push((entry.orig, Zone::default()));
            }
        };
        let mut keys = conntrack.entries(AF_INET, Filter::Tcp, of_port).expect("dump");
        let begun = Instant::now();
        server.reset_all();
        let mut times = Vec::new();
        while !keys.is_empty() && begun.elapsed() < Duration::from_secs(30) {
            let entries = conntrack.get(&keys).expect("look-ups");
            let at = report::ms(begun.elapsed());
            let mut entries = entries.into_iter();
            keys.retain(|_| {
                let state = entries.next().flatten().and_then(|entry| entry.state());
                let is_over = state.is_none_or(|state| !state.is_counted());
                times.extend(is_over.then_some(at));
                !is_over
            });
            thread::sleep(Duration::from_millis(1));
        }
        times.extend(keys.iter().map(|_| 30_000.0));
        (report::median(&times), report::quantile(&times, 0.99))
    })
}

/// Everything is flushed; milliseconds until the first entry is back, and until all are.
fn loss(lab: &Lab, count: usize) -> (f64, f64) {
    lab.server.within(|| {
        let mut conntrack = Conntrack::open().expect("conntrack");
        lab.server.run("conntrack -F");
        let begun = Instant::now();
        let mut until = |least: u32| {
            while conntrack.size().expect("size").entries < least {
                assert!(begun.elapsed() < Duration::from_secs(60), "{least} not back");
                thread::sleep(Duration::from_millis(2));
            }
            report::ms(begun.elapsed())
        };
        (until(20), until(u32::try_from(count).expect("a count")))
    })
}
