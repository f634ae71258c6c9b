//! The shield among others: what passes as before, what comes and goes beside it, and how it ends.

mod levels;
mod passing;

use crate::lab;
use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::lab::neighbour::{Place, filters, has_tcx, programs};
use crate::lab::process::capabilities;
use crate::lab::{
    ACK, Daemon, FIN, Frame, Kind, Lab, PSH, Peer, RST, RawConn, SYN, Segment, Server,
    holds_within, http, kernel, wait_for,
};
use serde_json::{Value, json};
use tun_rs::{DeviceBuilder, Layer};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");

const METRICS: &str = "127.0.0.1:9815";

const SOURCE: &str = "198.51.100.7";

const SOURCE6: &str = "2001:db8:1::7";

const LIMIT: u32 = 3;

const SOON: Duration = Duration::from_secs(10);

/// The default of --shield-mark.
const MARK: u32 = 0x1000;

const PROGRAM: &str = "ctkeep_shield";

const STRICT: &str = "*filter\n:INPUT DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n\
    -A INPUT -i lo -j ACCEPT\n\
    -A INPUT -m conntrack --ctstate INVALID -j DROP\n\
    -A OUTPUT -m conntrack --ctstate INVALID -j DROP\n\
    -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
    -A INPUT -p tcp --dport 80 -m conntrack --ctstate NEW -j ACCEPT\n\
    COMMIT\n";

fn lab() -> Option<Lab> {
    let lab = Lab::new()?;
    if !ctkeep::shield::IS_BUILT_IN {
        lab::skip("ctkeep was built without clang, hence without the shield");
        return None;
    }
    Some(lab)
}

fn shielded(lab: &Lab) -> Daemon {
    lab.daemon(CTKEEP, &["--port", "80", "--shield", "on", "--metrics-listen", METRICS])
}

/// A limited server whose shield works alone: nothing is repaired.
fn scene() -> Option<(Lab, Server, Daemon)> {
    let lab = lab()?;
    lab.connlimit(80, LIMIT);
    let server = lab.serve("[::]:80");
    let daemon = shielded(&lab);
    daemon.stop();
    Some((lab, server, daemon))
}

/// A FIN and an RST that TCP does not take, for as many connections as the limit allows; how many
/// more the limit admits then.
fn gain(peer: &Peer) -> usize {
    let mut held = peer.hold(80, LIMIT as usize);
    for conn in &mut held {
        conn.fin();
        conn.stale_rst();
    }
    let begun = (0..LIMIT).map(|_| peer.syn_only(80)).collect();
    peer.complete(begun, Duration::from_millis(200)).len()
}

fn is_over(lab: &Lab, conn: &RawConn) -> bool {
    let closed = |state: String| matches!(state.as_str(), "CLOSE" | "TIME_WAIT");
    lab.socket_state(conn).is_none() && lab.entry_state(conn).is_none_or(closed)
}

fn answer_to_syn(frame: &Frame) -> Option<(u32, u32)> {
    match frame.kind {
        Kind::Tcp { flags, seq, ack, .. } if flags == SYN | ACK => Some((seq, ack)),
        _ => None,
    }
}

/// Nobody else sees the mark, and a flush of all rules takes nothing of the shield's.
#[test]
fn the_mark_is_gone_before_any_other_chain_and_a_flush_changes_nothing() {
    let Some((lab, _server, _daemon)) = scene() else { return };
    let count = "table inet eyes { chain c { type filter hook prerouting priority -309; \
                 meta mark & 0x1000 != 0 counter; meta mark 0 counter; }; }";
    lab.server.feed("nft -f -", count);
    let peer = lab.peer(SOURCE);
    assert_eq!(gain(&peer), 0);
    let counts = lab.server.output("nft list table inet eyes");
    assert!(counts.contains("!= 0x00000000 counter packets 0 bytes 0"), "{counts}");
    lab.server.run("nft flush ruleset");
    lab.connlimit(80, LIMIT);
    assert_eq!(gain(&lab.peer("198.51.100.8")), 0);
}

/// Before 5.12 the flush takes the shield's table, which a sweep makes anew.
#[test]
fn its_table_is_made_anew_after_a_flush() {
    if kernel::tables_have_owners() {
        return;
    }
    let Some(lab) = lab() else { return };
    let _server = lab.serve("[::]:80");
    let daemon = shielded(&lab);
    lab.server.run("nft flush ruleset");
    lab.connlimit(80, LIMIT);
    wait_for("its table", SOON, || {
        daemon.logged("the table of the shield is gone, making it anew")
    });
    daemon.stop();
    assert_eq!(gain(&lab.peer(SOURCE)), 0);
}

#[test]
fn it_is_there_after_the_link_was_down() {
    let Some((lab, _server, _daemon)) = scene() else { return };
    lab.server.run("ip link set eth0 down");
    lab.server.feed(
        "ip -batch -",
        "link set eth0 up\n\
         addr replace 2001:db8::1/64 dev eth0 nodad\n\
         neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev eth0\n\
         neigh replace 2001:db8::2 lladdr 02:00:00:00:00:02 dev eth0\n\
         route replace 198.51.100.0/24 via 192.0.2.2\n",
    );
    wait_for("carrier", SOON, || lab.server.output("ip -o link show eth0").contains("state UP"));
    assert_eq!(gain(&lab.peer(SOURCE)), 0);
}

/// It follows devices that come and go, and is at a bridge rather than at its ports.
#[test]
fn devices_are_followed() {
    let Some(lab) = lab() else { return };
    lab.connlimit(80, LIMIT);
    let _server = lab.serve("[::]:80");
    let daemon = shielded(&lab);
    let has = |device: &str| programs(&lab.server, device).contains(&PROGRAM.to_owned());
    assert!(has("eth0") && !has("lo"));
    lab.server.run("ip link add hot0 type veth peer name hot1");
    wait_for("the shield at a new device", SOON, || has("hot0") && has("hot1"));
    lab.server.run("ip link del hot0");
    wait_for("its end", SOON, || daemon.log().matches("shield taken off").count() == 2);

    // Else conntrack sees packets before the bridge does, and the shield keeps away.
    for family in ["iptables", "ip6tables"] {
        let name = format!("net/bridge/bridge-nf-call-{family}");
        // It is there where br_netfilter is.
        if Path::new("/proc/sys").join(&name).exists() {
            lab.server.sysctl(&name, "0");
        }
    }
    lab.server.feed(
        "ip -batch -",
        "link add br0 address 02:00:00:00:00:01 type bridge\n\
         link set br0 up\n\
         addr del 192.0.2.1/24 dev eth0\n\
         link set eth0 master br0\n\
         addr add 192.0.2.1/24 dev br0\n\
         neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev br0\n\
         route add 198.51.100.0/24 via 192.0.2.2\n",
    );
    wait_for("the shield at the bridge", SOON, || has("br0") && !has("eth0"));
    daemon.stop();
    assert_eq!(gain(&lab.peer(SOURCE)), 0);
}

/// Whatever stands behind it may take packets for itself, and what stands before it may use the
/// same mark: conntrack sees what it saw before.
#[test]
fn neighbours_make_no_difference() {
    let Some((lab, _server, _daemon)) = scene() else { return };
    if !has_tcx(&lab.server) {
        return;
    }
    let behind = lab.neighbour(Place::Last, 0);
    let order = programs(&lab.server, "eth0");
    assert_eq!(order, [PROGRAM, "neighbour"]);
    assert_eq!(gain(&lab.peer(SOURCE)), 0);
    drop(behind);
    let _before = lab.neighbour(Place::First, MARK);
    let peer = lab.peer("198.51.100.8");
    let conns = peer.hold(80, 1);
    let states: Vec<_> = conns.iter().filter_map(|conn| lab.entry_state(conn)).collect();
    assert_eq!(states, ["ESTABLISHED"]);
}

/// Program and table go with the process, however it ends.
#[test]
fn a_killed_daemon_leaves_nothing_behind() {
    let Some((lab, _server, daemon)) = scene() else { return };
    if !has_tcx(&lab.server) {
        return;
    }
    let table = || lab.server.output("nft list tables").contains("ctkeep0-shield");
    assert!(table());
    assert_eq!(programs(&lab.server, "eth0"), [PROGRAM]);
    daemon.kill();
    wait_for("the end of the program", SOON, || {
        programs(&lab.server, "eth0").is_empty() && !table()
    });
    // The next one starts as the first did.
    let daemon = shielded(&lab);
    assert_eq!(programs(&lab.server, "eth0"), [PROGRAM]);
    let (status, log) = daemon.term();
    assert!(status.success(), "{log}");
    assert!(programs(&lab.server, "eth0").is_empty());
    assert!(!table());
}

/// A filter, where there are no links or no place is left for one, outlives a kill; the next start
/// takes it away, with the shield or without.
#[test]
fn a_filter_in_place_of_a_link_is_taken_away_by_the_next_start() {
    let Some(lab) = lab() else { return };
    let _all = has_tcx(&lab.server).then(|| lab.all_neighbours(MARK << 1));
    lab.connlimit(80, LIMIT);
    let _server = lab.serve("[::]:80");
    let killed = |source: &str| {
        let daemon = shielded(&lab);
        assert!(daemon.logged("how=\"clsact\""), "{}", daemon.log());
        daemon.stop();
        assert_eq!(gain(&lab.peer(source)), 0);
        daemon.kill();
        assert_eq!(filters(&lab.server, "eth0"), [PROGRAM]);
    };
    killed(SOURCE);
    // In place of the first, not beside it.
    killed(SOURCE6);
    let daemon = lab.daemon(CTKEEP, &["--port", "80", "--shield", "off"]);
    assert_eq!(filters(&lab.server, "eth0"), [""; 0]);
    assert!(!lab.server.output("nft list tables").contains("ctkeep0-shield"));
    drop(daemon);
    let (status, log) = shielded(&lab).term();
    assert!(status.success(), "{log}");
    assert_eq!(filters(&lab.server, "eth0"), [""; 0]);
}

/// Counting takes no more privileges than repairs do, where the kernel allows that.
#[test]
fn decisions_are_counted() {
    let Some(lab) = lab() else { return };
    let _server = lab.serve("0.0.0.0:80");
    // What it takes to look into containers is kept besides, where that is wanted.
    let args =
        ["--port", "80", "--shield", "on", "--metrics-listen", METRICS, "--containers", "off"];
    let daemon = lab.daemon(CTKEEP, &args);
    assert_eq!(capabilities(daemon.pid(), "CapEff"), kernel::kept_under_the_shield());
    let peer = lab.peer(SOURCE);
    let mut conns = peer.hold(80, 4);
    for conn in conns.iter_mut().take(3) {
        conn.fin();
        conn.fin_again();
        conn.stale_rst();
    }
    for conn in conns.iter().skip(3) {
        conn.rst_at(0);
    }
    let wanted = [
        ("fin_learned", 3.0),
        ("fin_hidden", 3.0),
        ("rst_hidden", 3.0),
        ("delayed", 1.0),
        ("rst_shown", 1.0),
        ("fragment_dropped", 0.0),
        ("not_learned", 0.0),
        ("not_read", 0.0),
    ];
    await_decisions(&lab, &wanted);
}

fn samples(lab: &Lab) -> HashMap<String, f64> {
    let answer = http::ask(&lab.server, METRICS, "GET /metrics", "").expect("an answer");
    http::samples(&answer.body)
}

fn await_decisions(lab: &Lab, wanted: &[(&str, f64)]) {
    let counted = || {
        let samples = samples(lab);
        let is = |(decision, count): &(&str, f64)| {
            let name = format!("ctkeep_shield_packets_total{{decision=\"{decision}\"}}");
            samples.get(&name) == Some(count)
        };
        wanted.iter().all(is)
            && samples.get("ctkeep_shield_devices").is_some_and(|it| *it >= 1.0)
            && samples.get("ctkeep_shield_missing") == Some(&0.0)
    };
    assert!(holds_within(SOON, counted), "{wanted:?}");
}

/// It fails open: where the program cannot be loaded, `auto` says so in one line and repairs.
#[test]
fn without_the_privilege_it_is_one_line() {
    let Some(lab) = lab() else { return };
    let _server = lab.serve("0.0.0.0:80");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("ctkeep");
    let bounds = "--bounding-set=-all,+net_admin,+net_raw";
    let script = format!("#!/bin/sh\nexec setpriv {bounds} -- {CTKEEP} \"$@\"\n");
    fs::write(&path, script).expect("a script");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("a program");
    let program = path.to_str().expect("a path in UTF-8");
    let daemon = lab.daemon(program, &["--shield", "auto", "--metrics-listen", METRICS]);
    let log = daemon.log();
    assert_eq!(log.matches("no shield, repairs go on without it").count(), 1, "{log}");
    let is_missing = || samples(&lab).get("ctkeep_shield_missing") == Some(&1.0);
    assert!(holds_within(SOON, is_missing), "the metric says so too");
    assert!(programs(&lab.server, "eth0").is_empty());
}

/// Where it is asked for, it must be had.
#[test]
fn asked_for_in_vain_it_ends_the_start() {
    let Some(lab) = lab() else { return };
    let bounds = "--bounding-set=-all,+net_admin,+net_raw";
    let words = [bounds, "--", CTKEEP, "run", "--shield", "on"];
    let (code, _, log) = lab.ctkeep("setpriv", &words);
    assert_eq!(code, 3, "{log}");
    assert!(log.contains("CAP_BPF"), "{log}");
}

/// The shield puts no sweep off: what it does not cover is found as soon as without it.
#[test]
fn sweeps_are_as_frequent_as_without_and_extend_in_time() {
    let Some(lab) = lab() else { return };
    lab.connlimit(80, LIMIT);
    let _server = lab.serve("0.0.0.0:80");
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "8");
    let _daemon = shielded(&lab);
    let peer = lab.peer(SOURCE);
    let mut held = peer.hold(80, LIMIT as usize);
    held.iter_mut().for_each(|conn| lab.half_close(conn));
    let sweeps = || {
        let answer = http::ask(&lab.server, METRICS, "GET /metrics", "").expect("an answer");
        http::samples(&answer.body).get("ctkeep_sweeps_total").copied().expect("a counter")
    };
    let before = sweeps();
    thread::sleep(Duration::from_secs(12));
    let swept = sweeps() - before;
    assert!(swept >= 10.0, "{swept} sweeps in 12 seconds");
    assert!(held.iter().all(|conn| lab.is_alive(conn)), "all entries live");
    assert_eq!(peer.admitted(80, 3), 0);
}

/// A flush is repaired as soon with it as without.
#[test]
fn a_flush_is_repaired_as_soon_as_without() {
    if lab().is_none() {
        return;
    }
    let [without, with] = ["off", "on"].map(|shield| {
        let lab = Lab::new().expect("a lab");
        lab.connlimit(80, LIMIT);
        let _server = lab.serve("0.0.0.0:80");
        let daemon = lab.daemon(CTKEEP, &["--port", "80", "--shield", shield]);
        let peer = lab.peer(SOURCE);
        let mut held = peer.hold(80, LIMIT as usize);
        held.iter_mut().for_each(|conn| lab.half_close(conn));
        // It is known to ctkeep by a sweep.
        thread::sleep(Duration::from_millis(2500));
        lab.server.run("conntrack -F");
        let begun = std::time::Instant::now();
        wait_for("entries", Duration::from_secs(30), || held.iter().all(|conn| lab.is_alive(conn)));
        let took = begun.elapsed();
        assert_eq!(peer.admitted(80, 3), 0, "{}", daemon.log());
        took
    });
    // Both within the interval of a sweep, and as exactly as a sweep is in time.
    assert!(with < without + Duration::from_secs(1), "{with:?} with it, {without:?} without");
    assert!(with < Duration::from_secs(4), "{with:?}");
}

/// The commands say what the shield covers: by a guarded port, untranslated, from the wire.
#[test]
fn the_commands_tell_what_is_covered() {
    let Some(lab) = lab() else { return };
    lab.connlimit(80, LIMIT);
    let _server = lab.serve("0.0.0.0:80 0.0.0.0:81 0.0.0.0:82");
    lab.server.run("iptables -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 82");
    let verdict = || {
        let (_, out, err) = lab.ctkeep(CTKEEP, &["doctor", "--format", "json"]);
        let report: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{err}"));
        let all = report["findings"].as_array().expect("findings");
        let one = all.iter().find(|finding| finding["id"] == "shield").expect("a finding");
        one["verdict"].as_str().expect("a verdict").to_owned()
    };
    assert_eq!(verdict(), "warn", "it would work, and is down");
    let ports = ["--port", "80", "--port", "82", "--shield", "on"];
    let _daemon = lab.daemon(CTKEEP, &ports);
    assert_eq!(verdict(), "ok");
    let peer = lab.peer(SOURCE);
    let conns = [80, 81, 8080].map(|port| peer.connect(port).expect("a connection"));
    let (_, out, _) = lab.ctkeep(CTKEEP, &["audit", "--all", "--format", "json"]);
    let report: Value = serde_json::from_str(&out).expect("a report");
    let explained = |conn: &RawConn| {
        // The server's end is the socket's.
        let port = if conn.server.port() == 8080 { 82 } else { conn.server.port() };
        let local = SocketAddr::new(conn.server.ip(), port);
        let (_, out, _) =
            lab.ctkeep(CTKEEP, &["explain", &local.to_string(), &conn.client.to_string()]);
        let line = out.lines().find(|line| line.starts_with("shield")).expect("a line").to_owned();
        let shielded = report["connections"].as_array().expect("connections").iter();
        let mut one = shielded.filter(|it| it["remote"] == conn.client.to_string());
        (line, one.next().expect("the connection")["shielded"].clone())
    };
    let [guarded, other, redirected] = conns.each_ref().map(explained);
    assert_eq!(guarded, ("shield      covers it".to_owned(), json!(true)));
    assert_eq!(other, ("shield      not this port".to_owned(), json!(false)));
    assert!(redirected.0.contains("translated") && redirected.1 == json!(false), "{redirected:?}");
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit"]);
    assert!(out.contains("1 of 3 connections under the shield"), "{code} {out}{err}");
}

/// Devices without link headers: the second pass of an RST has none either.
#[test]
fn a_tunnel_is_covered() {
    let Some(lab) = lab() else { return };
    lab.connlimit(80, LIMIT);
    let _server = lab.serve("0.0.0.0:80");
    let device = lab
        .server
        .within(|| DeviceBuilder::new().name("tun0").layer(Layer::L3).enable(true).build_sync());
    let device = &device.expect("a tunnel");
    device.set_nonblocking(true).expect("a device that can be polled");
    lab.server.run("ip addr add 10.9.0.1/24 dev tun0");
    let daemon = shielded(&lab);
    daemon.stop();
    let connect = |port: u16| {
        let source = SocketAddr::from(([10, 9, 0, 2], port));
        let destination = SocketAddr::from(([10, 9, 0, 1], 80));
        let mut buffer = [0; 2048];
        let send = move |flags, seq, ack| {
            let payload = Vec::new();
            let segment = Segment { source, destination, seq, ack, flags, payload };
            device.send(&segment.to_packet()).expect("a packet");
        };
        send(SYN, 1000, 0);
        let mut answer = None;
        wait_for("an answer to the SYN", SOON, || {
            let length = device.recv(&mut buffer).unwrap_or_default();
            let frame = buffer.get(..length).and_then(Frame::parse);
            answer = frame.as_ref().and_then(answer_to_syn);
            answer.is_some()
        });
        let (seq, _) = answer.expect("an answer");
        send(ACK, 1001, seq.wrapping_add(1));
        (source, move |flags, offset: u32| send(flags, 1001 + offset, seq.wrapping_add(1)))
    };
    let states = |remote: SocketAddr| {
        let socket = lab.all_sockets().into_iter().find(|it| it.remote == remote);
        let entry = lab.entries().into_iter().find(|it| it.orig.0 == remote);
        (socket.map(|it| it.state), entry.map(|it| it.state))
    };
    let (fooled, send) = connect(4000);
    send(FIN | ACK, 0);
    send(FIN | ACK, 0);
    send(RST, 50);
    let counted = ["FIN_WAIT", "CLOSE_WAIT"];
    let (socket, entry) = states(fooled);
    assert_eq!(socket.as_deref(), Some("close-wait"));
    assert!(counted.contains(&entry.as_deref().unwrap_or_default()), "{entry:?}");
    let (closed, send) = connect(4001);
    send(RST, 0);
    let is_over = || states(closed) == (None, Some("CLOSE".to_owned()));
    assert!(holds_within(SOON, is_over), "{:?}", states(closed));
}
