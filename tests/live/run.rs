//! The daemon beyond a single repair: what the operator changes while it runs, clocks that jump, and
//! ghosts that only `--reap` takes away.

use crate::lab;
use std::collections::HashSet;
use std::fs;
use std::thread;
use std::time::Duration;

use crate::lab::{Lab, Peer, RawConn, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const SOON: Duration = Duration::from_secs(10);
const SOURCE: &str = "198.51.100.7";

/// Fills the limit of a port with half-closed connections and has conntrack forget them.
fn fool(lab: &Lab, peer: &Peer, port: u16) -> Vec<RawConn> {
    let mut conns = peer.hold(port, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    conns.iter().for_each(|conn| conn.stale_rst());
    conns
}

/// Whether all of them are counted again.
fn is_repaired(lab: &Lab, conns: &[RawConn]) -> bool {
    conns.iter().all(|conn| lab.is_alive(conn))
}

fn await_repair(lab: &Lab, peer: &Peer, port: u16, conns: &[RawConn], when: &str) {
    wait_for(&format!("repair {when}"), SOON, || is_repaired(lab, conns));
    // The seal and its last step come right behind.
    thread::sleep(Duration::from_millis(50));
    assert_eq!(peer.admitted(port, LIMIT), 0, "{when}: the limit lets more in");
}

fn hang_up(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id"));
    kill(pid, Signal::SIGHUP).expect("a running daemon");
}

/// What was out of scope is repaired after the reload, and a broken file changes nothing.
#[test]
fn a_reload_takes_a_port_in_and_a_broken_file_takes_none_away() {
    let Some(lab) = Lab::new() else { return };
    let (_first, _second) = (lab.serve("0.0.0.0:80"), lab.serve("0.0.0.0:81"));
    for port in [80, 81] {
        lab.connlimit(port, 3);
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ctkeep.toml");
    fs::write(&path, "port = [80]\n").expect("a file");
    let daemon = lab.daemon(CTKEEP, &["--config", path.to_str().expect("a path in UTF-8")]);
    let peer = lab.peer(SOURCE);
    let other = lab.peer("198.51.100.8");

    let control = fool(&lab, &other, 81);
    thread::sleep(Duration::from_secs(2));
    assert!(!is_repaired(&lab, &control), "a port out of scope was touched");
    assert_eq!(other.admitted(81, LIMIT), LIMIT, "no bypass to be mended");

    // What the event source remembers goes by the sweep interval, so it is opened anew.
    fs::write(&path, "port = [80, 81]\nsweep-interval = \"2s\"\n").expect("a file");
    hang_up(daemon.pid());
    wait_for("the reload", SOON, || daemon.logged("configuration reloaded"));
    let listens = || daemon.log().matches("listening source=").count();
    wait_for("the event source", SOON, || listens() == 2);
    let conns = fool(&lab, &peer, 81);
    await_repair(&lab, &peer, 81, &conns, "after the reload");

    fs::write(&path, "port = [80, 81]\nevents = \"off\"\ndefence = \"1\"\n").expect("a file");
    hang_up(daemon.pid());
    wait_for("the refusal", SOON, || daemon.logged("a change of events, defence takes a restart"));

    fs::write(&path, "port = [80, 81]\nsweep-interval = \"soon\"\n").expect("a file");
    hang_up(daemon.pid());
    wait_for("the refusal", SOON, || daemon.logged("sweep-interval"));
    let conns = fool(&lab, &peer, 80);
    await_repair(&lab, &peer, 80, &conns, "with a broken file");
}

/// The entries of a server whose sockets were destroyed without a packet: `ss -K` as a firewall in
/// between does it, in silence.
fn ghosts(lab: &Lab, port: u16) -> Vec<RawConn> {
    let peer = lab.peer(SOURCE);
    let conns = peer.hold(port, LIMIT);
    // Nobody hears the RSTs that the server sends.
    lab.server.run(&format!("iptables -t raw -A OUTPUT -p tcp --sport {port} -j DROP"));
    lab.server.run(&format!("ss -K -t state established sport = :{port}"));
    wait_for("end of the sockets", SOON, || lab.sockets("established") == 0);
    lab.server.run("iptables -t raw -F OUTPUT");
    assert!(
        conns.iter().all(|conn| lab.entry_state(conn).as_deref() == Some("ESTABLISHED")),
        "no ghosts to be reaped"
    );
    conns
}

#[test]
fn a_ghost_blocks_its_source_for_days_without_reap() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("0.0.0.0:80");
    let _daemon = lab.daemon(CTKEEP, &["--deep-interval", "500ms"]);
    let _ghosts = ghosts(&lab, 80);
    thread::sleep(Duration::from_secs(3));
    assert_eq!(lab.peer(SOURCE).admitted(80, LIMIT), 0, "the ghosts block nobody");
}

#[test]
fn reap_takes_ghosts_of_the_scope_away_and_no_others() {
    let Some(lab) = Lab::new() else { return };
    for port in [80, 81] {
        lab.connlimit(port, 3);
    }
    let (_first, _second) = (lab.serve("0.0.0.0:80"), lab.serve("0.0.0.0:81"));
    let args = ["--port", "80", "--reap", "2s", "--deep-interval", "500ms"];
    let daemon = lab.daemon(CTKEEP, &args);
    let outside = ghosts(&lab, 81);
    let honest = lab.peer("198.51.100.8").hold(80, 1);
    let inside = ghosts(&lab, 80);
    thread::sleep(Duration::from_secs(1));
    assert!(inside.iter().all(|conn| lab.entry(conn).is_some()), "before the grace time");
    // A deep sweep takes at most a hundredth of a core, on a slow machine too.
    wait_for("the reaper", Duration::from_secs(60), || {
        inside.iter().all(|conn| lab.entry(conn).is_none())
    });
    assert_eq!(lab.peer(SOURCE).admitted(80, LIMIT), LIMIT, "{}", daemon.log());
    assert!(outside.iter().all(|conn| lab.entry(conn).is_some()), "a port out of scope");
    drop(honest);
}

/// `CLOCK_REALTIME` jumps under the daemon, years ahead and back: it measures time by the
/// monotonic clock alone.
#[test]
fn a_wall_clock_that_jumps_changes_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("0.0.0.0:80");
    let directory = tempfile::tempdir().expect("a directory");
    let clock = directory.path().join("clock");
    let set = |offset: &str| fs::write(&clock, format!("{offset}\n")).expect("a file");
    set("+0");
    let environment = lab::faketime(clock.to_str().expect("a path in UTF-8"));
    let daemon = lab.daemon_with(CTKEEP, &["--sweep-interval", "200ms"], &environment);
    for (source, offset) in [(10, "+0"), (11, "+40000d"), (12, "-12000d"), (13, "+1d")] {
        set(offset);
        let peer = lab.peer(&format!("198.51.100.{source}"));
        let conns = fool(&lab, &peer, 80);
        await_repair(&lab, &peer, 80, &conns, offset);
    }
    let years: HashSet<_> =
        daemon.log().lines().filter_map(|line| line.get(..4).map(str::to_owned)).collect();
    assert!(years.len() >= 3, "the clock did not jump: {years:?}");
}

/// The policy of the thread that repairs, as the kernel says.
#[test]
fn realtime_is_round_robin_at_the_lowest_priority() {
    const SCHED_RR: &str = "2";
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("0.0.0.0:80");
    let daemon = lab.daemon(CTKEEP, &["--realtime"]);
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("threads");
    let policies: Vec<_> = tasks
        .map(|task| {
            let stat = fs::read_to_string(task.expect("a thread").path().join("stat"));
            let stat = stat.expect("its figures");
            // proc(5): behind the name rt_priority is field 40 and policy 41.
            let fields = stat.rsplit_once(')').expect("a name").1.split_whitespace();
            let [priority, policy] =
                <[&str; 2]>::try_from(fields.skip(37).take(2).collect::<Vec<_>>()).expect("both");
            (policy.to_owned(), priority.to_owned())
        })
        .collect();
    assert!(policies.contains(&(SCHED_RR.to_owned(), "1".to_owned())), "{policies:?}");
    let peer = lab.peer(SOURCE);
    let conns = fool(&lab, &peer, 80);
    await_repair(&lab, &peer, 80, &conns, "in real time");
}
