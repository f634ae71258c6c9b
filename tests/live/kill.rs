//! `ctkeep kill`: only what was named, and never another socket that has taken the tuple.

use std::thread;
use std::time::Duration;

use crate::lab::guests::Guest;
use crate::lab::{Lab, RawConn, wait_for};
use crate::scene::{CTKEEP, LIMIT, Limiter, SOON, Scene};
use ctkeep::kill::choose::Which;
use ctkeep::kill::{Fate, Killer};
use ctkeep::reconcile::policy::Policy;
use ctkeep::sockdiag::{State, States};
use serde_json::Value;

/// Runs `ctkeep kill` and returns its rows.
fn kill(lab: &Lab, args: &[&str]) -> Vec<Value> {
    let all = [&["kill", "--format", "json"], args].concat();
    let (code, out, err) = lab.ctkeep(CTKEEP, &all);
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    let report: Value = serde_json::from_str(&out).expect("JSON");
    report.get("sockets").and_then(Value::as_array).expect("rows").clone()
}

/// The remote ends of rows, in the order of their ports.
fn remotes(rows: &[Value]) -> Vec<String> {
    let remote = |row: &Value| row["remote"].as_str().expect("a remote").to_owned();
    let mut all: Vec<_> = rows.iter().map(remote).collect();
    all.sort();
    all
}

fn clients(conns: &[RawConn]) -> Vec<String> {
    let mut all: Vec<_> = conns.iter().map(|conn| conn.client.to_string()).collect();
    all.sort();
    all
}

#[test]
fn what_is_named_is_closed_and_nothing_else_and_its_place_is_free_again() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let lab = &scene.lab;
    let bystander = lab.peer("198.51.100.8");
    let mut bystanders = bystander.hold(80, 2);
    lab.half_close(&mut bystanders[0]);
    let mut conns = scene.half_closed();
    assert_eq!(scene.admitted(), 0, "the limit is full");
    let named = ["--state", "close-wait", "--source", "198.51.100.7"];

    let rows = kill(lab, &named);
    assert_eq!(remotes(&rows), clients(&conns));
    for row in &rows {
        assert_eq!((&row["result"], &row["peer_gets"]), (&Value::Null, &"rst".into()), "{row}");
        assert_eq!(row["pid"], scene.server.pid(), "{row}");
    }
    assert_eq!(lab.sockets("close-wait"), LIMIT + 1, "nothing was closed");

    let rows = kill(lab, &[&named[..], &["--yes", "--max", "2"]].concat());
    assert!(rows.len() == 2 && rows.iter().all(|row| row["result"] == "closed"), "{rows:?}");
    let rows = kill(lab, &[&named[..], &["--yes"]].concat());
    assert_eq!((rows.len(), &rows[0]["result"]), (1, &"closed".into()), "{rows:?}");
    assert!(conns.iter_mut().all(RawConn::await_rst), "each peer is told");
    assert_eq!(scene.server.held(), LIMIT + 2, "the process has the descriptors still");
    assert_eq!(lab.open_sockets_of("198.51.100.8"), 2, "the bystander's");
    assert_eq!(scene.admitted(), LIMIT, "the places are free");

    let (code, out, _) = scene.ctkeep(&["kill", "--state", "fin-wait-1"]);
    assert_eq!((code, out.as_str()), (0, "no such socket\n"));
    let (code, _, err) = scene.ctkeep(&["kill", "--yes"]);
    assert_eq!(code, 2, "all of them is nothing to ask for: {err}");
    let unprivileged = "setpriv --bounding-set -net_admin --inh-caps -net_admin";
    let command = format!("{unprivileged} {CTKEEP} kill --source 198.51.100.8 --yes");
    let error = scene.lab.server.try_run(&command).expect_err("a privilege is missing");
    assert!(error.contains("CAP_NET_ADMIN"), "{error}");
    assert_eq!(scene.lab.open_sockets_of("198.51.100.8"), 2);
}

#[test]
fn another_socket_that_has_taken_the_tuple_meanwhile_lives() {
    let Some(lab) = Lab::new() else { return };
    let mut server = lab.serve("[::]:80");
    let peer = lab.peer("198.51.100.7");
    let mut conn = peer.hold(80, 1).pop().expect("a connection");
    let which = Which {
        states: States::open(),
        older_than: None,
        process: None,
        container: None,
        over_limit: false,
        max: 100,
    };
    let policy = Policy::default();
    let (mut killer, old) = lab.server.within(|| {
        let mut killer = Killer::open(which).expect("a conversation");
        let found = killer.find(&policy).expect("sockets");
        (killer, found.choice.chosen.first().expect("one").socket)
    });
    server.reset_all();
    wait_for("the end of the first", SOON, || lab.socket_state(&conn).is_none());
    assert!(conn.reopen(), "the same tuple again");
    wait_for("the second", SOON, || lab.socket_state(&conn).as_deref() == Some("established"));
    assert!(matches!(killer.close(&old).expect("an answer"), Fate::Gone));
    // Without the look before it: the kernel compares the cookie itself.
    let mut sockets = lab.server.within(|| ctkeep::sockdiag::SockDiag::open().expect("sock_diag"));
    assert!(!sockets.destroy(&old).expect("an answer"));
    assert_eq!(lab.socket_state(&conn).as_deref(), Some("established"));
    // The control: by its own cookie it goes.
    let new = lab.server.within(|| killer.find(&policy).expect("sockets")).choice.chosen;
    let new = new.first().expect("one").socket;
    assert!(new.connection() == old.connection() && new.cookie != old.cookie, "{new:?}");
    assert!(matches!(killer.close(&new).expect("an answer"), Fate::Closed));
    assert_eq!(lab.socket_state(&conn), None);
    assert!(matches!(killer.close(&new).expect("an answer"), Fate::Gone));
}

#[test]
fn a_socket_that_is_no_longer_as_asked_for_is_left_alone() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80");
    let mut conn = lab.peer("198.51.100.7").hold(80, 1).pop().expect("a connection");
    let which = Which {
        states: [State::Established].into_iter().collect(),
        older_than: None,
        process: None,
        container: None,
        over_limit: false,
        max: 100,
    };
    let fate = lab.server.within(|| {
        let mut killer = Killer::open(which).expect("a conversation");
        let found = killer.find(&Policy::default()).expect("sockets");
        let socket = found.choice.chosen.first().expect("one").socket;
        lab.half_close(&mut conn);
        killer.close(&socket).expect("an answer")
    });
    assert!(matches!(fate, Fate::Changed(State::CloseWait)), "{fate:?}");
    assert_eq!(lab.socket_state(&conn).as_deref(), Some("close-wait"));
}

#[test]
fn ages_are_the_daemons_or_the_least_that_the_socket_proves() {
    let Some(mut scene) = Scene::new(Limiter::Nothing) else { return };
    let mut conns = scene.established();
    let old = ["--state", "close-wait", "--older-than", "2s"];
    scene.lab.half_close(&mut conns[0]);
    thread::sleep(Duration::from_millis(1_200));
    scene.guard(&[]);
    wait_for("it held", SOON, || kill(&scene.lab, &old).len() == 1);
    scene.lab.half_close(&mut conns[1]);
    // An old connection, half-closed a moment ago.
    let rows = kill(&scene.lab, &[&old[..], &["--yes"]].concat());
    assert_eq!(remotes(&rows), clients(&conns[..1]), "{rows:?}");
    // Its own silence is longer than the daemon's memory.
    assert_eq!(rows[0]["age_from"], "socket", "{rows:?}");
    // What the peer sends breaks its silence, and the daemon knows better.
    thread::sleep(Duration::from_millis(1_100));
    conns[1].ack();
    let is_of_daemon = |row: &Value| row["age_from"] == "daemon" && row["age_seconds"] != 0;
    wait_for("the daemon's age", SOON, || {
        conns[1].ack();
        kill(&scene.lab, &["--state", "close-wait"]).iter().any(is_of_daemon)
    });
}

#[test]
fn of_a_source_over_its_limit_as_many_go_as_are_too_many() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80 [::]:81");
    let peer = lab.peer("198.51.100.7");
    let mut conns = peer.hold(80, 5);
    let others = [peer.hold(81, 5), lab.peer("198.51.100.8").hold(80, LIMIT)];
    lab.half_close(&mut conns[4]);
    lab.connlimit(80, 3);
    let rows = kill(&lab, &["--over-limit"]);
    assert_eq!(rows.len(), 2, "{rows:?}");
    assert!(remotes(&rows).contains(&conns[4].client.to_string()), "half-closed first: {rows:?}");
    kill(&lab, &["--over-limit", "--yes"]);
    assert_eq!(lab.open_sockets_of("198.51.100.7"), LIMIT + others[0].len());
    assert_eq!(lab.open_sockets_of("198.51.100.8"), LIMIT);
    assert!(kill(&lab, &["--over-limit"]).is_empty());
}

#[test]
fn sockets_of_a_container_are_named_by_it_and_closed_there() {
    let Some(lab) = Lab::new() else { return };
    lab.server.sysctl("net/ipv4/ip_forward", "1");
    let [mut web, mut mail] = [1, 2].map(|number| Guest::start(&lab, number));
    let peer = lab.peer("198.51.100.7");
    let conns = [peer.hold(web.port, 2), peer.hold(mail.port, 2)];
    // What a process has not accepted yet it does not hold.
    for guest in [&mut web, &mut mail] {
        wait_for("its accept", SOON, || guest.server.held() == 2);
    }
    let pid = web.server.pid().to_string();
    let rows = kill(&lab, &["--process", &pid]);
    assert_eq!(remotes(&rows), clients(&conns[0]), "{rows:?}");
    let name = rows[0]["container"].as_str().expect("a container").to_owned();
    let rows = kill(&lab, &["--container", &name, "--yes"]);
    assert_eq!(remotes(&rows), clients(&conns[0]), "{rows:?}");
    assert!(rows.iter().all(|row| row["result"] == "closed"), "{rows:?}");
    let left = |guest: &Guest| guest.namespace.output("ss -Htn state established").lines().count();
    assert_eq!((left(&web), left(&mail)), (0, 2));
}
