//! Connections of other namespaces in the conntrack table of this one: containers made by hand.

use crate::lab;
use crate::lab::guests;
use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use crate::lab::guests::{Guest, LIMIT};
use crate::lab::{Lab, RawConn, process, wait_for};
use nix::sys::signal::Signal;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(15);
const CLIENT: &str = "198.51.100.7";

/// How many more get in at the own server, whose limit is full, after stale RSTs.
fn gain_at_home(lab: &Lab, source: &str, with_ctkeep: bool) -> usize {
    let peer = lab.peer(source);
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(RawConn::fin);
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    conns.iter().for_each(RawConn::stale_rst);
    wait_for("what comes of them", SOON, || {
        conns.iter().all(|conn| guests::is_counted(lab, conn) == with_ctkeep)
    });
    peer.admitted(80, LIMIT + 2)
}

#[test]
fn the_own_namespace_is_guarded_beside_one_that_is_named() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let guest = Guest::start(&lab, 1);
    assert_eq!(guest.gain(&lab, &lab.peer(CLIENT), false), LIMIT, "the control");
    assert_eq!(gain_at_home(&lab, CLIENT, false), LIMIT, "the control");

    let path = guest.namespace.path();
    let daemon = lab.daemon(CTKEEP, &["--netns", &path]);
    assert_eq!(guest.gain(&lab, &lab.peer("198.51.100.8"), true), 0, "{}", daemon.log());
    assert_eq!(gain_at_home(&lab, "198.51.100.8", true), 0, "{}", daemon.log());
}

#[test]
fn a_name_without_a_namespace_costs_itself_alone_and_is_waited_for() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let (first, second) = (Guest::start(&lab, 1), Guest::start(&lab, 2));
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().join("late");
    let (path, late) = (first.namespace.path(), name.to_str().unwrap());
    let daemon = lab.daemon(CTKEEP, &["--netns", late, "--netns", &path]);
    assert!(daemon.logged("no such namespace, waiting for it"), "{}", daemon.log());
    assert_eq!(first.gain(&lab, &lab.peer(CLIENT), true), 0, "{}", daemon.log());
    symlink(second.namespace.path(), &name).unwrap();
    assert_eq!(second.gain(&lab, &lab.peer("198.51.100.8"), true), 0, "{}", daemon.log());
}

#[test]
fn two_names_of_one_namespace_are_one() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    let folder = tempfile::tempdir().unwrap();
    let (again, own) = (folder.path().join("again"), folder.path().join("own"));
    symlink(guest.namespace.path(), &again).unwrap();
    symlink(lab.server.path(), &own).unwrap();
    let path = guest.namespace.path();
    let args =
        ["--netns", &path, "--netns", again.to_str().unwrap(), "--netns", own.to_str().unwrap()];
    let daemon = lab.daemon(CTKEEP, &args);
    wait_for("both", SOON, || daemon.log().matches("guarded already").count() == 2);
    assert_eq!(guest.gain(&lab, &lab.peer(CLIENT), true), 0, "{}", daemon.log());
    let (status, log) = daemon.term();
    assert!(status.success(), "{log}");
    assert!(!log.contains("another ctkeep"), "{log}");
    assert_eq!(log.matches(" ready ").count(), 2, "{log}");
}

#[test]
fn a_reload_takes_other_names_up() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let (first, second) = (Guest::start(&lab, 1), Guest::start(&lab, 2));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ctkeep.toml");
    let write = |guest: &Guest| {
        fs::write(&file, format!("netns = [\"{}\"]\n", guest.namespace.path())).unwrap();
    };
    write(&first);
    let daemon = lab.daemon(CTKEEP, &["--containers", "off", "--config", file.to_str().unwrap()]);
    assert_eq!(first.gain(&lab, &lab.peer(CLIENT), true), 0, "{}", daemon.log());
    write(&second);
    daemon.signal(Signal::SIGHUP);
    wait_for("the reload", SOON, || daemon.logged("configuration reloaded"));
    assert_eq!(second.gain(&lab, &lab.peer("198.51.100.8"), true), 0, "{}", daemon.log());
    assert_eq!(first.gain(&lab, &lab.peer("198.51.100.9"), false), LIMIT, "{}", daemon.log());
}

/// A daemon that began without them has given up what they take, and says so in place of guarding nothing.
#[test]
fn a_reload_turns_containers_off_and_on_or_is_refused() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ctkeep.toml");
    let start = |words: &str| {
        fs::write(&file, words).unwrap();
        lab.daemon(CTKEEP, &["--config", file.to_str().unwrap()])
    };
    let reload = |daemon: &lab::Daemon, words: &str, answer: &str| {
        let before = daemon.log().matches(answer).count();
        fs::write(&file, words).unwrap();
        daemon.signal(Signal::SIGHUP);
        wait_for(answer, SOON, || daemon.log().matches(answer).count() > before);
    };
    let gains = |source: &str, daemon: &lab::Daemon, is_guarded: bool| {
        let gained = guest.gain(&lab, &lab.peer(source), is_guarded);
        assert_eq!(gained, if is_guarded { 0 } else { LIMIT }, "{}", daemon.log());
    };
    let (auto, off) = ("containers = \"auto\"\n", "containers = \"off\"\n");
    let daemon = start(auto);
    gains("198.51.100.7", &daemon, true);
    reload(&daemon, off, "configuration reloaded");
    wait_for("its end", SOON, || daemon.log().matches("action=\"release\"").count() == LIMIT);
    gains("198.51.100.8", &daemon, false);
    reload(&daemon, auto, "configuration reloaded");
    gains("198.51.100.9", &daemon, true);
    drop(daemon);

    let daemon = start(off);
    let names = format!("{off}netns = [\"{}\"]\n", guest.namespace.path());
    reload(&daemon, auto, "a change of containers takes a restart");
    reload(&daemon, &names, "a change of netns takes a restart");
    gains("198.51.100.10", &daemon, false);
    reload(&daemon, &format!("{off}lease = \"30s\"\n"), "configuration reloaded");
}

/// An RST that comes in from outside and says to be a container's answer closes the entry, and its
/// server has not sent it.
#[test]
fn an_rst_that_says_to_be_a_containers_own_frees_no_slot() {
    let play = |is_guarded: bool| {
        let lab = Lab::new()?;
        guests::limit(&lab);
        let guest = Guest::start(&lab, 1);
        let daemon = is_guarded.then(|| {
            let daemon = lab.daemon(CTKEEP, &["--events", "nflog"]);
            wait_for("the container", SOON, || daemon.logged("namespaces=1"));
            daemon
        });
        let peer = lab.peer(CLIENT);
        let conns = peer.hold(guest.port, LIMIT);
        std::thread::sleep(Duration::from_millis(30));
        for conn in &conns {
            let of_client = conn.segment(lab::RST, 0);
            let source = format!("{}:{}", guest.address, guests::INSIDE);
            let answer = lab::Segment {
                source: source.parse().expect("an address"),
                destination: conn.client,
                seq: of_client.ack,
                ack: of_client.seq,
                ..of_client
            };
            peer.send_packet(&answer.to_packet());
        }
        wait_for("what comes of them", SOON, || {
            conns.iter().all(|conn| guests::is_counted(&lab, conn) == is_guarded)
        });
        if let Some(daemon) = &daemon {
            wait_for("repairs", SOON, || daemon.log().matches("revive").count() >= LIMIT);
        }
        Some(peer.admitted(guest.port, LIMIT + 2))
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (LIMIT, Some(0)));
}

#[test]
fn a_container_is_guarded_without_being_named() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    assert_eq!(guest.gain(&lab, &lab.peer(CLIENT), false), LIMIT, "the control: no ctkeep");
    let off = lab.daemon(CTKEEP, &["--containers", "off"]);
    assert_eq!(guest.gain(&lab, &lab.peer("198.51.100.8"), false), LIMIT, "the control: off");
    drop(off);
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(guest.gain(&lab, &lab.peer("198.51.100.9"), true), 0, "{}", daemon.log());
    let log = daemon.log();
    assert!(!log.contains(&guest.namespace.path()), "no list of namespaces: {log}");
}

/// Once with one named port, which is how entries are filtered by the kernel, and once with two.
#[test]
fn a_named_port_is_that_of_clients_as_well_as_that_of_the_container() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let (guest, _other) = (Guest::start(&lab, 1), Guest::start(&lab, 2));
    for (number, (ports, is_guarded)) in
        [("8002", false), ("8001", true), ("8001,9", true), ("8080", true)].iter().enumerate()
    {
        let daemon = lab.daemon(CTKEEP, &["--port", ports]);
        let peer = lab.peer(&format!("198.51.100.{number}"));
        let gained = guest.gain(&lab, &peer, *is_guarded);
        assert_eq!(gained, if *is_guarded { 0 } else { LIMIT }, "{ports}: {}", daemon.log());
        let unheard = daemon.log().matches("nothing listens on this port").count();
        assert_eq!(unheard, usize::from(ports.ends_with(",9")), "{}", daemon.log());
        if *is_guarded {
            lab.server.run(&format!("conntrack -D -p tcp -s 198.51.100.{number}"));
            peer.syn_only(guest.port).rst(0);
            wait_for("re-inserts", SOON, || {
                daemon.log().matches("action=\"reinsert\"").count() == LIMIT
            });
            assert_eq!(peer.admitted(guest.port, LIMIT), 0, "{ports}: {}", daemon.log());
        }
    }
    for (ports, is_found) in [("8001", false), ("8001,9", true)] {
        let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--port", ports, "--all"]);
        assert_eq!(out.contains("nothing listens on port 9,"), is_found, "{out}{err}");
        assert!(out.contains("10.1.1.2:8080") && !out.contains("10.1.2.2:8080"), "{out}{err}");
    }
}

/// A container that comes after the daemon, and one that ends and comes again at the same address,
/// while another holds its connections all along.
#[test]
fn a_new_container_is_guarded_at_once_and_one_that_ends_is_let_go() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let bystander = Guest::start(&lab, 1);
    let daemon = lab.daemon(CTKEEP, &[]);
    let peer = lab.peer("198.51.100.99");
    assert_eq!(bystander.gain(&lab, &peer, true), 0, "{}", daemon.log());
    let kept = || -> Vec<String> {
        let entries = lab.entries().into_iter();
        let of_it = entries.filter(|entry| entry.orig.0.ip().to_string() == "198.51.100.99");
        let mut lines: Vec<_> = of_it.map(|entry| entry.line).collect();
        lines.sort();
        lines
    };
    // What questions to limits take is opened with the first, and stays.
    wait_for("a question", SOON, || daemon.log().contains("source=198.51.100.99"));
    let open = process::descriptors_at_rest(daemon.pid());
    let (before, actions) = (kept(), daemon.log().matches("198.51.100.99:").count());
    for (round, source) in ["198.51.100.7", "198.51.100.8", "198.51.100.9"].iter().enumerate() {
        let guest = if round == 0 { Guest::start(&lab, 2) } else { Guest::start_again(&lab, 2) };
        assert_eq!(guest.gain(&lab, &lab.peer(source), true), 0, "round {round}: {}", daemon.log());
        let Guest { namespace, server, .. } = guest;
        server.kill();
        drop(namespace);
        // As runtimes do: the kernel keeps the namespace while a socket of it is closing.
        lab.server.run("ip link del guest2");
        wait_for("its end in the daemon", SOON, || process::descriptors(daemon.pid()) <= open);
    }
    assert_eq!(kept(), before, "entries of another container");
    assert_eq!(daemon.log().matches("198.51.100.99:").count(), actions, "{}", daemon.log());
    assert_eq!(peer.admitted(bystander.port, LIMIT + 2), 0, "{}", daemon.log());
}

/// What an event shows of a translated connection is put right before the next sweep.
#[test]
fn a_stale_rst_to_a_container_is_answered_by_the_event_not_by_the_sweep() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    let daemon = lab.daemon(CTKEEP, &["--sweep-interval", "20s"]);
    let conns = guest.half_closed(&lab.peer(CLIENT));
    conns.iter().for_each(RawConn::stale_rst);
    wait_for("repair", Duration::from_secs(5), || {
        conns.iter().all(|conn| guests::is_counted(&lab, conn))
    });
    let log = daemon.log();
    assert_eq!(log.matches("trigger=Event").count(), LIMIT, "{log}");
}

/// From the host, `audit`, `explain`, `doctor`, `reconcile` and `recount` see the container's sockets
/// beside the host's entries.
#[test]
fn every_command_joins_the_sockets_of_containers_with_the_entries_of_the_host() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    let peer = lab.peer(CLIENT);
    let conns = guest.half_closed(&peer);
    let audit = || {
        let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all", "--format", "json"]);
        assert!(code == 0 || code == 1, "{err}");
        (code, serde_json::from_str::<serde_json::Value>(&out).expect("a report"))
    };
    let over = || {
        let (_, out, err) = lab.ctkeep(CTKEEP, &["doctor", "--format", "json"]);
        let report: serde_json::Value = serde_json::from_str(&out).expect(&err);
        let findings = report["findings"].as_array().expect("findings").clone();
        let over: Vec<_> =
            findings.into_iter().filter(|it| it["id"] == "source-over-limit").collect();
        over
    };
    let (code, report) = audit();
    assert_eq!((code, report["summary"]["classes"]["agree"].as_u64()), (0, Some(3)), "{report:#}");
    assert!(over().iter().all(|it| it["verdict"] == "ok"), "{:?}", over());
    assert_eq!(report["sources"][0]["over_limit"], false, "{report:#}");
    assert_eq!(report["sources"][0]["limit"], 3, "the limit of FORWARD: {report:#}");
    let first = &report["connections"][0];
    assert_eq!(first["local"], "10.1.1.2:8080");
    assert_eq!(first["asked"], "192.0.2.1:8001");
    assert_eq!(first["pid"], guest.server.pid());
    assert!(first["container"].as_str().is_some_and(|name| name.starts_with("net:[")), "{first}");

    conns.iter().for_each(RawConn::stale_rst);
    wait_for("closed entries", SOON, || conns.iter().all(|it| !guests::is_counted(&lab, it)));
    let (code, report) = audit();
    assert_eq!(code, 1);
    assert_eq!(report["summary"]["classes"]["entry-closed"], 3, "{report:#}");
    let client = conns[0].client.to_string();
    for local in ["10.1.1.2:8080", "192.0.2.1:8001"] {
        let (code, out, err) = lab.ctkeep(CTKEEP, &["explain", local, &client]);
        assert_eq!(code, 1, "{out}{err}");
        assert!(out.contains("10.1.1.2:8080 (server)") && out.contains("revive"), "{out}");
        assert!(out.contains("ip filter FORWARD rule 1"), "{out}");
    }
    assert_eq!(peer.admitted(guest.port, 1), 1, "the control: the limit has forgotten them");
    let said = over();
    let is_ours = |it: &serde_json::Value| {
        it["verdict"] == "bad" && it["what"].as_str().is_some_and(|what| what.contains(CLIENT))
    };
    assert!(said.len() == 1 && said.iter().all(is_ours), "{said:?}");
    let (code, out, err) = lab.ctkeep(CTKEEP, &["reconcile"]);
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(out.matches("done, ").count(), 3, "{out}");
    assert_eq!(peer.admitted(guest.port, LIMIT), 0, "{out}");

    lab.server.run("iptables -F FORWARD");
    guests::limit(&lab);
    assert_eq!(peer.admitted(guest.port, 1), 1, "the control: the new list is empty");
    lab.server.run("iptables -F FORWARD");
    guests::limit(&lab);
    let (code, out, err) = lab.ctkeep(CTKEEP, &["recount"]);
    assert!(code == 0 || code == 4, "{out}{err}");
    assert_eq!(peer.admitted(guest.port, LIMIT), 0, "{out}{err}");
}

/// A limit for the port that clients ask for, which the socket does not show: what is known of a connection
/// whose entry is gone is what its siblings asked for, and where they are gone, too, nothing is sure.
#[test]
fn connections_without_entries_are_measured_by_what_their_siblings_asked_for() {
    let Some(lab) = Lab::new() else { return };
    lab.server.sysctl("net/ipv4/ip_forward", "1");
    lab.server.run(&format!(
        "iptables -A FORWARD -p tcp --syn -m conntrack --ctorigdstport 8001 \
         -m connlimit --connlimit-above {LIMIT} --connlimit-mask 32 -j DROP"
    ));
    let guest = Guest::start(&lab, 1);
    let (peer, other) = (lab.peer(CLIENT), lab.peer("198.51.100.8"));
    let forget = |source: &str| lab.server.run(&format!("conntrack -D -p tcp -s {source}"));
    let mut held = guest.half_closed(&peer);
    let sibling = other.hold(guest.port, 1);
    forget(CLIENT);
    held.extend(guest.half_closed(&peer));
    let audit = || {
        let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
        assert_eq!(code, 1, "{err}");
        let report: serde_json::Value = serde_json::from_str(&out).expect(&err);
        let sources = report["sources"].as_array().expect("sources").clone();
        let ours = sources.into_iter().find(|it| it["source"] == format!("{CLIENT}/32"));
        let missing = report["summary"]["classes"]["entry-missing"].clone();
        (ours.unwrap_or_else(|| panic!("{report:#}")), missing)
    };
    let (source, missing) = audit();
    assert_eq!((&source["held"], &source["counted"]), (&6.into(), &3.into()), "{source}");
    assert_eq!((&source["limit"], &source["over_limit"]), (&3.into(), &true.into()), "{source}");
    assert_eq!(missing, 3);
    let asked = held[0].server.to_string();
    let (code, out, err) = lab.ctkeep(CTKEEP, &["explain", &asked, &held[0].client.to_string()]);
    assert!(out.contains("10.1.1.2:8080 (server)") && out.contains("entry-missing"), "{out}{err}");
    assert!(out.contains("holds 6 sockets, 3 have an entry that counts"), "{out}{err}");
    assert!(out.contains("the entry that would show it is gone"), "{out}{err}");
    assert_eq!(code, 1, "{out}{err}");

    forget(CLIENT);
    forget("198.51.100.8");
    let (source, missing) = audit();
    assert_eq!((&source["held"], &source["counted"]), (&6.into(), &0.into()), "{source}");
    let unsure = serde_json::Value::Null;
    assert_eq!((&source["limit"], &source["over_limit"]), (&3.into(), &unsure), "{source}");
    assert_eq!(missing, 7);
    drop(sibling);
}

#[test]
fn a_limit_of_containers_answers_when_it_is_asked() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    let conns = lab.peer(CLIENT).hold(guest.port, LIMIT - 1);
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--ask", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_str(&out).expect(&err);
    assert_eq!(report["sources"][0]["listed"], LIMIT - 1, "{report:#}{err}");
    let (one, other) = (conns[0].server.to_string(), conns[0].client.to_string());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["explain", "--ask", &one, &other]);
    assert!(out.contains("1 more would be let in: 2 of 3 on the list"), "{out}{err}");
    let (_, out, err) = lab.ctkeep(CTKEEP, &["doctor", "--ask"]);
    assert!(out.contains("ip filter FORWARD rule 1 counted a connection of"), "{out}{err}");
    let (code, out, err) = lab.ctkeep(CTKEEP, &["recount"]);
    assert!(code == 0 && out.contains(" counted"), "{out}{err}");
}

#[test]
fn a_forwarded_limit_whose_sockets_the_daemon_does_not_look_at_is_bad() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let _guest = Guest::start(&lab, 1);
    for (containers, is_bad) in [("auto", false), ("off", true)] {
        let _daemon = lab.daemon(CTKEEP, &["--containers", containers]);
        for command in ["audit", "doctor"] {
            let (_, out, err) = lab.ctkeep(CTKEEP, &[command]);
            assert_eq!(
                out.contains("does not look at its sockets"),
                is_bad,
                "{command}: {out}{err}"
            );
            assert_eq!(out.contains("containers.conf"), is_bad, "{command}: {out}");
            let (_, out, err) = lab.ctkeep(CTKEEP, &[command, "--format", "json"]);
            let found = r#""id":"limit-unseen","verdict":"bad""#;
            assert_eq!(out.contains(found), is_bad, "{command}: {out}{err}");
        }
    }
}
