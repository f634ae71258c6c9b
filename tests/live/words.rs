//! Words of the reports that were false: each is said beside what the kernel does with a new connection.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::time::Duration;

use crate::lab::guests::{self, Guest, LIMIT};
use crate::lab::rules::{INPUT, chain};
use crate::lab::{Lab, kernel, wait_for};
use crate::scene::{Limiter, Scene};
use serde_json::Value;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const SOON: Duration = Duration::from_secs(20);

fn audit(lab: &Lab, args: &[&str]) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &[&["audit", "--format", "json"], args].concat());
    (code, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

/// Rules of ctkeep's own change packets of a connection that it has repaired, and no SYN: a limit that is
/// passed is said to be passed.
#[test]
fn what_ctkeep_hides_from_conntrack_leaves_limits_sure() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let all = |scene: &Scene, words: &str| {
        let (code, report) = audit(&scene.lab, &[]);
        let source = &report["sources"][0];
        let is_over = (&source["held"], &source["over_limit"]);
        assert_eq!(
            (code, is_over),
            (1, (&(2 * LIMIT).into(), &true.into())),
            "{words}: {report:#}"
        );
        let (_, chosen, _) = scene.ctkeep(&["kill", "--over-limit", "--format", "json"]);
        let chosen: Value = serde_json::from_str(&chosen).unwrap();
        assert_eq!(chosen["sockets"].as_array().unwrap().len(), LIMIT, "{words}: {chosen:#}");
    };
    let twice = |scene: &Scene| {
        scene.lab.server.run("conntrack -D -p tcp --dport 80");
        let more = scene.open(LIMIT);
        assert_eq!(more.len(), LIMIT, "the bypass");
        more
    };
    // The control: without ctkeep nothing is hidden, and the words are these.
    let conns = scene.half_closed();
    let more = twice(&scene);
    all(&scene, "without ctkeep");
    scene.end(&conns);
    scene.end(&more);

    scene.guard(&["--events", "nflog"]);
    let conns = scene.half_closed();
    conns.iter().for_each(|conn| conn.rst(kernel::stale_rst()));
    scene.await_repair("revive", &conns);
    wait_for("what is hidden", SOON, || scene.hides());
    assert_eq!(scene.admitted(), 0, "the limit holds");
    scene.freeze();
    let more = twice(&scene);
    scene.thaw();
    wait_for("the entries", SOON, || conns.iter().all(|conn| scene.is_counted(conn)));
    assert!(scene.hides(), "still");
    all(&scene, "with ctkeep");
    drop(more);
}

/// The limit stands before the rule that leads its port to another one, on this host, and no entry shows
/// what clients asked for.
#[test]
fn what_a_redirect_leads_to_is_no_port_without_a_limit() {
    for leads in ["REDIRECT --to-ports 8080", "DNAT --to-destination 192.0.2.1:8080"] {
        let Some(lab) = Lab::new() else { return };
        let _server = lab.serve("0.0.0.0:8080 0.0.0.0:81");
        lab.server.run(&format!("iptables -t nat -A PREROUTING -p tcp --dport 80 -j {leads}"));
        lab.server.run(&format!(
            "iptables -t mangle -A PREROUTING -p tcp --syn --dport 80 -m connlimit \
             --connlimit-above {LIMIT} --connlimit-mask 32 -j DROP"
        ));
        let peer = lab.peer(CLIENT);
        let held = peer.hold(80, LIMIT);
        assert_eq!(peer.admitted(80, 1), 0, "{leads}: the limit");
        lab.server.run(&format!("conntrack -D -p tcp -s {CLIENT}"));
        let more = peer.open(80, 2);
        assert_eq!(more.len(), 2, "{leads}: the bypass");
        lab.server.run(&format!("conntrack -D -p tcp -s {CLIENT}"));
        let (code, report) = audit(&lab, &[]);
        let missing = &report["summary"]["classes"]["entry-missing"];
        assert_eq!((code, missing), (1, &(LIMIT + 2).into()), "{leads}: {report:#}");
        let source = &report["sources"][0];
        let (limit, is_over) = (&source["limit"], &source["over_limit"]);
        assert_eq!((limit, is_over), (&LIMIT.into(), &Value::Null), "{leads}: {source:#}");
        drop((held, more));
    }
}

/// The list of one port has lost its connections, that of the other has them.
#[test]
fn each_port_of_a_source_answers_for_itself() {
    let Some(lab) = Lab::new() else { return };
    let set = "set both { type ipv4_addr . inet_service; flags dynamic; }\nchain web_input";
    let rule = format!(
        "tcp dport {{ 80, 81 }} ct state new add @both {{ ip saddr . tcp dport ct count over {LIMIT} }} drop"
    );
    let text = chain(INPUT, &rule).replacen("chain web_input", set, 1);
    lab.server.feed("nft -f -", &text);
    let _server = lab.serve("0.0.0.0:80 0.0.0.0:81");
    let peer = lab.peer(CLIENT);
    let (_one, _other) = (peer.hold(80, LIMIT), peer.hold(81, LIMIT));
    lab.server.run(&format!("conntrack -D -p tcp -s {CLIENT} --dport 81"));
    // The set forgets each second what has no entry.
    wait_for("a list without them", SOON, || {
        let elements = lab.server.output("nft list ruleset");
        !elements.contains(". 81")
    });
    let (code, report) = audit(&lab, &["--ask"]);
    let findings = report["layers"]["limiter"]["findings"].as_array().unwrap().clone();
    let lacking: Vec<_> = findings.iter().filter(|it| it["id"] == "limit-lacking").collect();
    assert!(
        lacking.iter().any(|it| it["what"].as_str().unwrap().contains("to port 81")),
        "{code} {findings:#?}"
    );
    assert!(
        !lacking.iter().any(|it| it["what"].as_str().unwrap().contains("to port 80")),
        "{findings:#?}"
    );
    assert_eq!((peer.admitted(80, 1), peer.admitted(81, 1)), (0, 1), "the truth");
}

/// One limit counts what a client holds of two containers together.
#[test]
fn explain_adds_up_what_audit_adds_up() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let (one, other) = (Guest::start(&lab, 1), Guest::start(&lab, 2));
    let peer = lab.peer(CLIENT);
    let held = peer.hold(one.port, LIMIT - 1);
    let _also = peer.hold(other.port, 1);
    assert_eq!((peer.admitted(one.port, 1), peer.admitted(other.port, 1)), (0, 0), "the truth");
    let (_, report) = audit(&lab, &[]);
    let full = &report["layers"]["limiter"]["rules"][0]["full"][0];
    assert_eq!(full["held"], LIMIT, "{report:#}");
    let (server, client) = (held[0].server.to_string(), held[0].client.to_string());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["explain", &server, &client]);
    let said = format!("holds {LIMIT} sockets, {LIMIT} have an entry that counts");
    assert!(out.contains(&said), "{out}{err}");
}

/// Reports of several kinds of host keep to the schema.
#[test]
fn every_kind_of_report_keeps_to_the_schemas() {
    let now = serde_json::from_str(include_str!("../../docs/audit.schema.json")).unwrap();
    let first = serde_json::from_str(include_str!("../golden/audit.schema.0.1.0.json")).unwrap();
    let schemas = [("now", now), ("0.1.0", first)].map(|(name, schema): (_, Value)| {
        (name, jsonschema::validator_for(&schema).expect("a valid schema"))
    });
    // What docs/compatibility.md says to be new in values that were there before.
    let is_said = |error: &jsonschema::ValidationError<'_>| {
        let at = error.instance_path.to_string();
        at.ends_with("/over_limit") && error.instance.is_null()
    };
    let keeps = |what: &str, report: &Value| {
        for (name, schema) in &schemas {
            let errors: Vec<_> = schema
                .iter_errors(report)
                .filter(|error| *name == "now" || !is_said(error))
                .map(|error| format!("{error} at {}", error.instance_path))
                .collect();
            assert!(errors.is_empty(), "{what}, {name}: {errors:#?}");
        }
    };
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    let conns = guest.half_closed(&lab.peer(CLIENT));
    keeps("containers", &audit(&lab, &["--all"]).1);
    keeps("asked", &audit(&lab, &["--all", "--ask"]).1);
    let [sockets, entries] = [(); 2].map(|()| tempfile::NamedTempFile::new().unwrap());
    std::fs::write(sockets.path(), guest.namespace.output("ss -tnae")).unwrap();
    std::fs::write(entries.path(), lab.server.output("conntrack -L")).unwrap();
    let [sockets, entries] = [&sockets, &entries].map(|it| it.path().to_str().unwrap().to_owned());
    keeps("saved", &audit(&lab, &["--sockets", &sockets, "--conntrack", &entries]).1);
    lab.server.run(&format!("conntrack -D -p tcp -s {CLIENT}"));
    keeps("entries lost", &audit(&lab, &["--all"]).1);
    // What passes before by a mark cannot be told.
    lab.server.run("iptables -I FORWARD -m mark --mark 7 -j ACCEPT");
    lab.server.run("iptables -I FORWARD -s 203.0.113.77 -j ACCEPT");
    let more = guest.half_closed(&lab.peer(CLIENT));
    let (_, report) = audit(&lab, &["--all"]);
    let source = &report["sources"][0];
    assert_eq!((&source["held"], &source["over_limit"]), (&(2 * LIMIT).into(), &Value::Null));
    keeps("words of before", &report);
    drop((conns, more));
}

/// A rule before the limit lets some pass that cannot be told: whether the limit's list should have what is open is
/// not known either, and a list that lacks it is no limit that holds.
#[test]
fn a_limit_behind_what_cannot_be_told_is_not_said_to_hold() {
    let Some(lab) = Lab::new() else { return };
    lab.server.run("iptables -A INPUT -m mark --mark 7 -j ACCEPT");
    lab.connlimit(80, u32::try_from(LIMIT).unwrap());
    let _server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(CLIENT);
    let _held = peer.hold(80, LIMIT);
    let holds = |report: &Value| report["layers"]["limiter"]["rules"][0]["holds"].clone();
    let (code, report) = audit(&lab, &["--ask"]);
    assert_eq!((code, holds(&report)), (0, true.into()), "the control, all counted: {report:#}");
    lab.server.run("iptables -D INPUT 2");
    lab.connlimit(80, u32::try_from(LIMIT).unwrap());
    let (_, report) = audit(&lab, &["--ask"]);
    assert_eq!(holds(&report), Value::Null, "{report:#}");
    let findings = report["layers"]["limiter"]["findings"].as_array().unwrap();
    let lacking = findings.iter().find(|it| it["id"] == "limit-lacking");
    assert_eq!(lacking.map(|it| &it["verdict"]), Some(&"warn".into()), "{findings:#?}");
    assert_eq!(peer.admitted(80, 1), 1, "the truth");
}

/// Of two limits of one port the list of that which decides is measured by what that one counts.
#[test]
fn an_address_is_not_measured_by_its_network() {
    let Some(lab) = Lab::new() else { return };
    let limit = |above: usize, mask: u8| {
        lab.server.run(&format!(
            "iptables -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above {above} \
             --connlimit-mask {mask} -j REJECT"
        ));
    };
    // Room for two more of the network, for one of the first address and for none of the second.
    limit(2 * LIMIT + 3, 24);
    limit(LIMIT + 1, 32);
    let _server = lab.serve("0.0.0.0:80");
    let peers = [CLIENT, "198.51.100.8"].map(|client| lab.peer(client));
    let held = [peers[0].hold(80, LIMIT), peers[1].hold(80, LIMIT + 1)];
    let (code, report) = audit(&lab, &["--ask"]);
    let findings = report["layers"]["limiter"]["findings"].as_array().unwrap();
    let lacking: Vec<_> = findings.iter().filter(|it| it["id"] == "limit-lacking").collect();
    assert_eq!((code, lacking.len()), (0, 0), "{findings:#?}");
    assert_eq!(peers.each_ref().map(|peer| peer.admitted(80, 2)), [1, 0], "the truth");
    drop(held);
}
