//! The command line as scripts and people meet it: exit codes, messages, JSON.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::indexing_slicing)]

use crate::lab;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};

use crate::lab::{Lab, RawConn, wait_for};
use crate::scene::{CLIENT, CTKEEP, LIMIT, Limiter, PORT, SOON, Scene, TRIES};
use serde_json::{Value, json};

const OTHER: &str = "203.0.113.9";
const THIRD: &str = "203.0.113.10";

const CLOSE_TIMEOUT: &str = "net/netfilter/nf_conntrack_tcp_timeout_close";

/// Runs the program where it is told to stop before it asks the kernel anything.
fn ctkeep(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(CTKEEP).args(args).output().expect("the program starts");
    texts(&output)
}

fn texts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[test]
fn wrong_usage_ends_with_2_and_names_the_fault() {
    let cases: [(&[&str], &[&str]); 26] = [
        (&[], &["Usage: ctkeep"]),
        (&["frobnicate"], &["'frobnicate'"]),
        (&["audit", "--frobnicate"], &["'--frobnicate'"]),
        (&["audit", "--port", "0"], &["--port", "'0'", "1 to 65535"]),
        (&["audit", "--port", "65536"], &["--port", "'65536'"]),
        (&["audit", "--port", "http"], &["--port", "'http'"]),
        (&["audit", "--port", "80,0"], &["--port", "'0'"]),
        (&["audit", "--states", "half-closed"], &["'half-closed'", "close-wait, "]),
        (&["audit", "--states", "time-wait"], &["'time-wait'", "cannot be guarded"]),
        (&["audit", "--source", "198.51.100.0/33"], &["--source", "'198.51.100.0/33'"]),
        (&["audit", "--source", "example.org"], &["--source", "'example.org'"]),
        (&["audit", "--exempt", "198.51.100"], &["--exempt", "'198.51.100'"]),
        (&["audit", "--mask", "33"], &["--mask", "'33'"]),
        (&["audit", "--mask6", "129"], &["--mask6", "'129'"]),
        (&["audit", "--limit", "0"], &["--limit", "'0'"]),
        (&["audit", "--format", "xml"], &["--format", "'xml'", "json"]),
        (&["audit", "--netns", "no-such"], &["--netns", "'no-such'", "/run/netns/no-such"]),
        (&["audit", "--netns", "/no/such"], &["--netns", "'/no/such'"]),
        (&["explain", "192.0.2.1:80"], &["<REMOTE>"]),
        (&["explain", "192.0.2.1:80", "198.51.100.7:0"], &["<REMOTE>", "'198.51.100.7:0'"]),
        (&["explain", "192.0.2.1", "198.51.100.7:1"], &["<LOCAL>", "192.0.2.1:80"]),
        (&["explain", "192.0.2.1:80", "[2001:db8::7]:1"], &["two families"]),
        (&["run", "--lease", "60"], &["--lease", "'60'", "unit"]),
        (&["run", "--lease", "1s"], &["--lease", "at least 2s"]),
        (&["run", "--lease", "4s", "--sweep-interval", "2s"], &["--lease", "2s", "5s"]),
        (&["run", "--events", "carrier-pigeon"], &["'carrier-pigeon'", "ctnetlink"]),
    ];
    for (args, words) in cases {
        let (code, out, err) = ctkeep(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        for word in words {
            assert!(err.contains(word), "{args:?}: no {word} in: {err}");
        }
    }
}

/// A path that exists and is something else.
#[test]
fn what_is_no_namespace_is_a_usage_error() {
    if !lab::require() {
        return;
    }
    for path in ["/proc/self/ns/uts", "/proc/self/status"] {
        // `run` waits for it: `ip netns add` makes an empty file first.
        for command in ["audit", "doctor"] {
            let (code, _, err) = ctkeep(&[command, "--netns", path]);
            assert_eq!(code, 2, "{command} {path}: {err}");
            assert!(err.contains(path), "{err}");
        }
    }
}

#[test]
fn a_history_that_is_not_kept_is_a_usage_error_that_says_where_and_how() {
    let missing = ["history", "--dir", "/no/such"];
    for args in [&missing[..], &["top", "--at", "03:12", "--dir", "/no/such"]] {
        let (code, out, err) = ctkeep(args);
        let says = ["no history is kept in /no/such", "ctkeep run --history /no/such", "--dir"];
        assert!(
            code == 2 && out.is_empty() && says.iter().all(|it| err.contains(it)),
            "{code} {err}"
        );
        assert!(!err.contains("entity not found"), "{err}");
    }
}

#[test]
fn help_is_on_stdout_and_ends_with_0() {
    let (code, out, err) = ctkeep(&["--help"]);
    assert_eq!((code, err.as_str()), (0, ""));
    for command in ["audit", "reconcile", "run", "explain"] {
        assert!(out.contains(command), "{out}");
        let (code, out, err) = ctkeep(&[command, "--help"]);
        assert_eq!((code, err.as_str()), (0, ""), "{command}");
        assert!(out.contains("--netns") && out.contains("--port"), "{command}: {out}");
    }
    let (code, out, _) = ctkeep(&["--version"]);
    assert_eq!((code, out.trim_end()), (0, concat!("ctkeep ", env!("CARGO_PKG_VERSION"))));
}

/// A configuration file that lives as long as this value.
struct Config(tempfile::NamedTempFile);

impl Config {
    fn new(text: &str) -> Self {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("its text");
        Self(file)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().expect("a path of text")
    }
}

#[test]
fn a_faulty_file_is_named_with_line_and_column() {
    let cases = [
        ("port = [80\n", "1:11", "unclosed"),
        ("lease = \"60s\"\nport = [80, 0]\n", "2:1", "'0'"),
        ("\n  frobnicate = 1\n", "2:3", "'frobnicate'"),
        ("[run]\nlease = \"60s\"\n", "1:2", "'run'"),
        ("lease = 60\n", "1:1", "unit"),
        ("port = true\n", "1:1", "'port' takes a text, a number or a list"),
        ("port = [80, \"http\"]\n", "1:1", "a port, 1 to 65535"),
        ("ports = [80]\n", "1:1", "did you mean 'port'?"),
        ("follow_rules = \"off\"\n", "1:1", "did you mean 'follow-rules'?"),
        ("shield = true\n", "1:1", "\"on\""),
        ("[[overload]]\nports = [80]\n", "1:3", "above is missing"),
        ("all = \"yes\"\n", "1:1", "'all' takes true or false"),
        ("states = [\"close-wait\", \"half-closed\"]\n", "1:1", "'half-closed'"),
        ("exempt = \"198.51.100.0/33\"\n", "1:1", "'198.51.100.0/33'"),
        ("port = 80\nport = 443\n", "2:1", "duplicate"),
        ("config = \"other.toml\"\n", "1:1", "'config'"),
        ("ask = true\n", "1:1", "'ask'"),
        ("lease = \"60s\n", "1:13", ""),
    ];
    for (text, place, words) in cases {
        let file = Config::new(text);
        for command in [&["audit", "--config"][..], &["run", "--config"], &["check"]] {
            let (code, out, err) = ctkeep(&[command, &[file.path()]].concat());
            assert_eq!((code, out.as_str()), (2, ""), "{text}: {err}");
            let place = format!("{}:{place}: ", file.path());
            assert!(err.contains(&place) && err.contains(words), "{text}: {err}");
        }
    }
    let (code, _, err) = ctkeep(&["run", "--config", "/no/such.toml"]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("/no/such.toml"), "{err}");
    let short = Config::new("lease = \"2s\"\n");
    let (code, _, err) = ctkeep(&["check", short.path()]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("--lease"), "{err}");
    let good = Config::new("lease = \"60s\"\nport = [80]\n");
    let (code, out, err) = ctkeep(&["check", good.path()]);
    assert_eq!((code, out), (0, format!("{}: good\n", good.path())), "{err}");
}

/// Two half-closed connections, one of them with a stale RST.
fn drifted(port: u16) -> Option<(Lab, lab::Server, [RawConn; 2])> {
    let lab = Lab::new()?;
    // Ten seconds by default: a busy machine may need more to see what becomes of it.
    lab.server.sysctl(CLOSE_TIMEOUT, "60");
    lab.connlimit(port, 3);
    let server = lab.serve(&format!("[::]:{port}"));
    let conns = lab.peer(CLIENT).open_promptly(port, 2);
    let mut conns: [RawConn; 2] = conns.try_into().ok().expect("two connections");
    for conn in &mut conns {
        lab.half_close(conn);
        assert!(conn.await_ack());
    }
    let [closed, _] = &conns;
    closed.rst(-5);
    wait_for("CLOSE", SOON, || lab.entry_state(closed).as_deref() == Some("CLOSE"));
    Some((lab, server, conns))
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let Some((lab, _server, conns)) = drifted(PORT) else { return };
    let elsewhere = Config::new("port = [443, 8443]\nformat = \"json\"\n");
    let here = Config::new("port = 80\nno-header = true\nlimit = 1\ndry-run = true\n");
    let nobody = Config::new(&format!("exempt = [\"{CLIENT}\"]\n"));
    let audit = |args: &[&str]| lab.ctkeep(CTKEEP, &[&["audit"], args].concat());

    let (code, out, err) = audit(&["--config", elsewhere.path()]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.starts_with('{'), "{out}");
    let (code, out, err) = audit(&["--config", elsewhere.path(), "--port", "80"]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(out.starts_with('{'), "{out}");
    let args = ["--config", elsewhere.path(), "--port", "80", "--format", "table"];
    let (code, out, err) = audit(&args);
    assert_eq!(code, 1, "{out}{err}");
    assert!(out.contains("SOURCE"), "{out}");
    let (code, out, err) = audit(&["--config", here.path()]);
    assert_eq!(code, 1, "{out}{err}");
    assert!(out.contains("over 1") && !out.contains("SOURCE"), "{out}");
    let (code, out, err) = audit(&["--config", nobody.path()]);
    assert_eq!(code, 0, "{out}{err}");

    // Keys of other commands are left to them.
    let reconcile = |args: &[&str]| lab.ctkeep(CTKEEP, &[&["reconcile"], args].concat());
    let (code, out, err) = reconcile(&["--config", here.path()]);
    assert_eq!(code, 1, "{out}{err}");
    assert_eq!(lab.entry_state(&conns[0]).as_deref(), Some("CLOSE"), "a dry run");
}

#[test]
fn exit_codes_follow_a_disagreement_through_its_repair() {
    let Some((lab, _server, conns)) = drifted(PORT) else { return };
    let client = conns[0].client.to_string();
    let run = |args: &[&str]| lab.ctkeep(CTKEEP, args);

    let (code, out, err) = run(&["audit", "--limit", "3"]);
    assert_eq!((code, err.as_str()), (1, ""), "{out}");
    assert!(out.contains("1 agree, 1 entry-closed"), "{out}");
    let (code, out, err) = run(&["reconcile", "--dry-run"]);
    assert_eq!((code, err.as_str()), (1, ""), "{out}");
    let line = out.lines().find(|line| line.contains("revive")).expect("a plan");
    assert!(line.contains(&client) && line.contains("planned"), "{out}");
    let (code, out, err) = run(&["reconcile"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let line = out.lines().find(|line| line.contains("revive")).expect("an action");
    assert!(line.contains(&client) && line.contains("done, sent by"), "{out}");

    let (code, out, err) = run(&["audit"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("2 agree"), "{out}");
    for args in [&["reconcile"][..], &["reconcile", "--dry-run"]] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str(), err.as_str()), (0, "nothing to repair\n", ""));
    }
}

/// Sources by the keys of the contract: new ones may appear beside them.
fn of_contract(sources: &Value) -> Value {
    let mut sources = sources.clone();
    for source in sources.as_array_mut().expect("a list") {
        let source = source.as_object_mut().expect("an object");
        source.retain(|key, _| {
            !["limit", "oldest_half_close_seconds", "listed", "full", "listed_limit"]
                .contains(&key.as_str())
        });
    }
    sources
}

#[test]
fn no_header_leaves_the_headings_out_and_nothing_else() {
    let Some((lab, _server, _conns)) = drifted(PORT) else { return };
    for command in [&["audit", "--all"][..], &["reconcile", "--dry-run"]] {
        let (_, with, _) = lab.ctkeep(CTKEEP, command);
        let (_, without, _) = lab.ctkeep(CTKEEP, &[command, &["--no-header"]].concat());
        // Without headings columns are narrower, and less is wrapped.
        let letters = |text: &str| text.chars().filter(|letter| !letter.is_whitespace()).count();
        let is_heading = |line: &&str| {
            ["REMOTE", "SOURCE", "LAYER", "RULE"].iter().any(|word| line.contains(word))
        };
        assert!(with.lines().any(|line| is_heading(&line)), "{with}");
        assert!(!without.lines().any(|line| is_heading(&line)), "{without}");
        let headings: usize = with.lines().filter(is_heading).map(letters).sum();
        assert_eq!(letters(&with) - headings, letters(&without), "{with}{without}");
    }
}

/// The reader of a pipe may leave at any time: `ctkeep audit | head -0`.
#[test]
fn a_broken_pipe_is_no_error() {
    let Some((lab, _server, conns)) = drifted(PORT) else { return };
    let (local, remote) = (conns[0].server.to_string(), conns[0].client.to_string());
    for args in [
        &["audit"][..],
        &["audit", "--format", "json"],
        &["explain", &local, &remote],
        &["reconcile", "--dry-run"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(CTKEEP);
        command.args(args);
        let child = lab.server.spawn_with(&command, |command| {
            command.stdout(writer).stderr(Stdio::piped());
        });
        let output = child.expect("the program").wait_with_output().expect("its end");
        let (code, _, err) = texts(&output);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    }
}

/// Without this capability, or the other, or any.
#[test]
fn a_missing_privilege_ends_with_3_and_says_which() {
    let Some((lab, _server, conns)) = drifted(PORT) else { return };
    let (local, remote) = (conns[0].server.to_string(), conns[0].client.to_string());
    let without = |caps: &str, args: &[&str]| {
        let bounds = format!("--bounding-set={caps}");
        let words = [&[bounds.as_str(), "--inh-caps=-all", "--", CTKEEP], args].concat();
        lab.ctkeep("setpriv", &words)
    };
    let commands = [
        &["audit"][..],
        &["explain", &local, &remote],
        &["reconcile"],
        &["run"],
        &["run", "--dry-run"],
    ];
    for caps in ["-net_admin", "-net_admin,-net_raw", "-all"] {
        for args in commands {
            let (code, out, err) = without(caps, args);
            assert_eq!((code, out.as_str()), (3, ""), "{caps} {args:?}: {err}");
            for word in ["CAP_NET_ADMIN", "CAP_NET_RAW", "setcap", "root"] {
                assert!(err.contains(word), "{caps} {args:?}: no {word} in: {err}");
            }
        }
    }
    for args in [&["reconcile"][..], &["run"]] {
        let (code, out, err) = without("-net_raw", args);
        assert_eq!((code, out.as_str()), (3, ""), "{args:?}: {err}");
        assert!(err.contains("CAP_NET_RAW"), "{err}");
    }
    assert_eq!(lab.entry_state(&conns[0]).as_deref(), Some("CLOSE"), "nothing was half done");
    // Looking takes less, and so does a repair without recount.
    let (code, out, err) = without("-net_raw", &["audit"]);
    assert_eq!((code, err.as_str()), (1, ""), "{out}");
    let (code, out, err) = without("-net_raw", &["reconcile", "--recount", "off"]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert_eq!(lab.entry_state(&conns[0]).as_deref(), Some("CLOSE_WAIT"));
}

#[test]
fn a_namespace_that_may_not_be_entered_ends_with_3() {
    let Some(lab) = Lab::new() else { return };
    let path = lab.client.path();
    let words = ["--bounding-set=-sys_admin", "--inh-caps=-all", "--", CTKEEP, "audit", "--netns"];
    let (code, out, err) = lab.ctkeep("setpriv", &[&words[..], &[&path]].concat());
    assert_eq!((code, out.as_str()), (3, ""), "{err}");
    assert!(err.contains("CAP_SYS_ADMIN") && err.contains(&path), "{err}");
}

#[test]
fn a_second_daemon_in_the_same_namespace_is_refused() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&[]);
    let (code, _, err) = scene.ctkeep(&["run", "--metrics-listen", "off"]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("already") || err.contains("another"), "{err}");
    // One that only looks is welcome, and so is a repair by hand.
    let (code, out, err) = scene.ctkeep(&["reconcile"]);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "nothing to repair\n", ""));
}

/// Any user can take the address that an instance claims, and fill its queue.
#[test]
fn a_user_who_takes_the_address_keeps_no_daemon_out() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    // Perl is there on every Debian; its own pack_sockaddr_un() would pad the name.
    let squatter = "socket(S, AF_UNIX, SOCK_STREAM, 0); \
                    bind(S, pack('Sa*', AF_UNIX, qq(\\0ctkeep))) or die; \
                    listen(S, 0); \
                    socket(C, AF_UNIX, SOCK_STREAM, 0); \
                    connect(C, pack('Sa*', AF_UNIX, qq(\\0ctkeep))) or die; \
                    syswrite(STDOUT, 'bound'); sleep(600)";
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65533", "--clear-groups", "--", "perl", "-MSocket", "-e", squatter]);
    let child = scene.lab.server.spawn_with(&command, |command| {
        command.stdout(Stdio::piped());
    });
    let mut child = child.expect("a squatter");
    let mut said = [0; 5];
    child.stdout.take().expect("a pipe").read_exact(&mut said).expect("a bound socket");
    // What root asks ends, too, and believes nothing that such a user says.
    let commands =
        [&["audit"][..], &["doctor"], &["explain", "192.0.2.1:80", "198.51.100.7:40000"]];
    for args in commands {
        let (code, out, err) = scene.lab.ctkeep("timeout", &[&["30", CTKEEP], args].concat());
        assert_ne!(code, 124, "{args:?} hangs: {out}{err}");
        assert!(args != ["doctor"] || out.contains("is not known"), "{out}");
    }
    scene.guard(&[]);
    assert!(scene.daemon().logged("no administrator"), "{}", scene.daemon().log());
    let conns = scene.half_closed();
    conns.iter().for_each(|conn| conn.rst(-5));
    scene.await_repair("revive", &conns);
    assert_eq!(scene.open(LIMIT).len(), 0, "the limit lets more in");
    child.kill().expect("a squatter");
    child.wait().expect("its end");
}

/// The fields of `explain --format json`.
fn explained(lab: &Lab, conn: &RawConn) -> (i32, Value) {
    let (local, remote) = (conn.server.to_string(), conn.client.to_string());
    let args = ["explain", &local, &remote, "--format", "json"];
    let (code, out, err) = lab.ctkeep(CTKEEP, &args);
    assert_eq!(err, "");
    (code, serde_json::from_str(&out).expect("JSON"))
}

fn assert_has(value: &Value, expected: &Value) {
    for (key, expected) in expected.as_object().expect("an object") {
        assert_eq!(value.get(key), Some(expected), "{key} of {value}");
    }
}

#[test]
fn explain_tells_what_is_and_what_would_be_done() {
    let Some((lab, _server, conns)) = drifted(PORT) else { return };
    let (code, closed) = explained(&lab, &conns[0]);
    let expected = json!({
        "local": conns[0].server.to_string(), "remote": conns[0].client.to_string(),
        "socket_state": "close-wait", "entry_state": "close", "zone": 0, "counted": false,
        "in_scope": true, "tracked": true, "action": "revive",
    });
    assert_has(&closed, &expected);
    assert_eq!(code, 1);

    let (code, alive) = explained(&lab, &conns[1]);
    let expected = json!({
        "socket_state": "close-wait", "entry_state": "close-wait", "counted": true, "action": null,
    });
    assert_has(&alive, &expected);
    assert_eq!(code, 0);

    let gone = lab.peer(OTHER).syn_only(9);
    let (code, gone) = explained(&lab, &gone);
    let expected = json!({
        "socket_state": null, "entry_state": null, "counted": false, "in_scope": false,
        "action": null,
    });
    assert_has(&gone, &expected);
    assert_eq!(code, 0);

    let (local, remote) = (conns[0].server.to_string(), conns[0].client.to_string());
    let (code, out, _) = lab.ctkeep(CTKEEP, &["explain", &local, &remote]);
    assert_eq!(code, 1);
    for line in ["socket      close-wait", "entry       close,", "would do    revive"] {
        assert!(out.lines().any(|text| text.starts_with(line)), "{out}");
    }
}

#[test]
fn explain_leaves_an_untracked_connection_alone() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80");
    let mut conns = lab.peer(CLIENT).open_promptly(PORT, 1);
    lab.half_close(&mut conns[0]);
    let (code, untracked) = explained(&lab, &conns[0]);
    let expected = json!({
        "socket_state": "close-wait", "entry_state": null, "zone": null, "counted": false,
        "in_scope": true, "tracked": false, "action": null,
    });
    assert_has(&untracked, &expected);
    assert!(untracked["reason"].as_str().expect("a reason").contains("tracked"), "{untracked}");
    assert_eq!(code, 0);
}

/// Every key of the contract, with values that the scene dictates.
#[test]
fn the_json_of_audit_keeps_its_contract() {
    let Some(lab) = Lab::new() else { return };
    lab.server.sysctl(CLOSE_TIMEOUT, "60");
    lab.connlimit(PORT, 10);
    let server = lab.serve("[::]:80");
    let mut other_server = lab.serve("[::]:443");

    // Three of one client: one as it should be, one closed by an RST, one deleted by hand.
    let mut conns = lab.peer(CLIENT).open_promptly(PORT, LIMIT);
    for conn in &mut conns {
        lab.half_close(conn);
        assert!(conn.await_ack());
    }
    conns[1].rst(-5);
    wait_for("CLOSE", SOON, || lab.entry_state(&conns[1]).as_deref() == Some("CLOSE"));
    let port = conns[2].client.port();
    lab.server.run(&format!("conntrack -D -p tcp --orig-src {CLIENT} --sport {port}"));
    // One of another, busy; and one whose socket is gone and whose entry is not.
    let mut busy = lab.peer(OTHER).open_promptly(PORT, 1).pop().expect("a connection");
    busy.send(b"hello");
    assert!(busy.await_ack());
    let ghost = lab.peer(THIRD).open_promptly(443, 1).pop().expect("a connection");
    lab.server.run("iptables -t raw -A OUTPUT -p tcp --sport 443 --tcp-flags RST RST -j DROP");
    other_server.reset_all();
    wait_for("end of a socket", SOON, || lab.socket_state(&ghost).is_none());

    let audit = |args: &[&str]| {
        let (code, out, err) =
            lab.ctkeep(CTKEEP, &[&["audit", "--format", "json", "--limit", "2"], args].concat());
        assert_eq!((code, err.as_str()), (1, ""), "{out}");
        assert_eq!(out.lines().count(), 1, "one line, one document");
        serde_json::from_str::<Value>(&out).expect("JSON")
    };
    let report = audit(&[]);
    assert_has(&report, &json!({ "schema": 1, "limit": 2, "mask": 32, "mask6": 128 }));
    let kernel = lab.server.output("uname -r");
    assert_eq!(report["kernel"], kernel.trim_end());
    assert!(!report["netns"].as_str().expect("a name").is_empty());
    let at = report["generated_at"].as_str().expect("a time");
    assert!(humantime::parse_rfc3339(at).is_ok(), "{at}");

    let summary = json!({
        "sockets": {
            "established": 1, "syn-sent": 0, "syn-recv": 0, "fin-wait-1": 0, "fin-wait-2": 0,
            "time-wait": 0, "closed": 0, "close-wait": 3, "last-ack": 0, "listening": 2,
            "closing": 0,
        },
        "entries": {
            "none": 0, "syn-sent": 0, "syn-recv": 0, "established": 2, "fin-wait": 0,
            "close-wait": 1, "last-ack": 0, "time-wait": 0, "close": 1, "syn-sent2": 0,
        },
        "classes": {
            "agree": 2, "entry-missing": 1, "entry-closed": 1, "entry-expiring": 0,
            "entry-reversed": 0, "socket-missing": 1, "untracked": 0, "offloaded": 0,
        },
    });
    assert_eq!(report["summary"], summary);

    let uid = nix::unistd::getuid().as_raw();
    let connection = |report: &Value, conn: &RawConn| {
        let all = report["connections"].as_array().expect("a list").clone();
        let remote = conn.client.to_string();
        all.into_iter().find(|connection| connection["remote"] == remote)
    };
    let closed = connection(&report, &conns[1]).expect("a connection");
    let expected = json!({
        "local": "192.0.2.1:80", "remote": conns[1].client.to_string(), "class": "entry-closed",
        "socket_state": "close-wait", "entry_state": "close", "zone": 0, "pid": server.pid(),
        "uid": uid, "recv_queue": 1, "send_queue": 0,
    });
    assert_has(&closed, &expected);
    let command = closed["command"].as_str().expect("a command");
    assert!(command.starts_with("live"), "{closed}");
    assert!((1..=60).contains(&closed["entry_timeout_seconds"].as_u64().expect("seconds")));
    assert!(closed["inode"].as_u64().expect("an inode") > 0);

    let missing = connection(&report, &conns[2]).expect("a connection");
    let expected = json!({
        "class": "entry-missing", "socket_state": "close-wait", "entry_state": null,
        "entry_timeout_seconds": null, "pid": server.pid(),
    });
    assert_has(&missing, &expected);
    let stale = connection(&report, &ghost).expect("a connection");
    let expected = json!({
        "local": "192.0.2.1:443", "class": "socket-missing", "socket_state": null,
        "entry_state": "established", "pid": null, "command": null, "inode": null, "uid": null,
    });
    assert_has(&stale, &expected);
    assert_eq!(report["connections"].as_array().expect("a list").len(), 3);

    let all = audit(&["--all"]);
    assert_eq!(all["connections"].as_array().expect("a list").len(), 5);
    let quiet = connection(&all, &busy).expect("a connection");
    let expected = json!({
        "class": "agree", "socket_state": "established", "entry_state": "established",
        "recv_queue": 5,
    });
    assert_has(&quiet, &expected);

    let sources = json!([
        { "source": "198.51.100.7/32", "sockets": { "close-wait": 3 }, "held": 3, "counted": 1,
          "uncounted": 2, "stale": 0, "over_limit": true },
        { "source": "203.0.113.9/32", "sockets": { "established": 1 }, "held": 1, "counted": 1,
          "uncounted": 0, "stale": 0, "over_limit": false },
        { "source": "203.0.113.10/32", "sockets": {}, "held": 0, "counted": 1, "uncounted": 0,
          "stale": 1, "over_limit": false },
    ]);
    assert_eq!(of_contract(&report["sources"]), sources);
    let worst = audit(&["--top", "1", "--mask", "24"]);
    let expected = json!([
        { "source": "198.51.100.0/24", "sockets": { "close-wait": 3 }, "held": 3, "counted": 1,
          "uncounted": 2, "stale": 0, "over_limit": true },
    ]);
    assert_eq!(of_contract(&worst["sources"]), expected);

    // What the report says is what the limiter does: of ten places it counts one.
    assert_eq!(lab.peer(CLIENT).open_promptly(PORT, TRIES).len(), 9);
}
