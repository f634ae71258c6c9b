//! `ctkeep report`: what it has of a host is read again as the host itself is, with its addresses or
//! with others.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::indexing_slicing)]

use crate::lab;
use std::collections::BTreeSet;
use std::fs;

use crate::scene::{CLIENT, LIMIT, Limiter, Scene};
use ctkeep::audit::saved::Saved;
use ctkeep::reconcile::policy::Policy;
use ctkeep::reconcile::snapshot::View;
use ctkeep::report::host::Tables;
use serde_json::Value;

/// A source over its limit, one of a range that passes before it, one below it, IPv6.
fn stage() -> Option<(Scene, Vec<lab::RawConn>)> {
    let scene = Scene::new(Limiter::Nothing)?;
    // The half-closed one stays for as long as a busy machine takes.
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600");
    // Entries are made from the first connection on.
    for program in ["iptables", "ip6tables"] {
        scene.lab.server.run(&format!("{program} -A INPUT -m conntrack --ctstate INVALID -j DROP"));
    }
    let mut conns = scene.peer.hold(80, LIMIT + 2);
    for source in ["198.51.100.55", "198.51.100.8", "2001:db8:1::7"] {
        conns.extend(
            scene.lab.peer(source).hold(80, LIMIT + 1 - usize::from(source.ends_with('8'))),
        );
    }
    scene.lab.half_close(&mut conns[0]);
    let device = scene.lab.server.output("ip -o route get 198.51.100.7");
    let device = device.split(" dev ").nth(1).and_then(|rest| rest.split(' ').next());
    let device = device.expect("a device");
    for rule in [
        "iptables -A INPUT -m iprange --src-range 198.51.100.50-198.51.100.60 -j ACCEPT".to_owned(),
        format!(
            "iptables -A INPUT -i {device} -s 198.51.100.0/24 -p tcp --syn --dport 80 -m connlimit \
             --connlimit-above 3 -j DROP"
        ),
        "ip6tables -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 \
         --connlimit-mask 64 -j DROP"
            .to_owned(),
    ] {
        scene.lab.server.run(&rule);
    }
    Some((scene, conns))
}

fn audit(scene: &Scene, args: &[&str]) -> Value {
    let all = [&["audit", "--all", "--format", "json"], args].concat();
    let (code, out, err) = scene.ctkeep(&all);
    assert!(code < 2, "{out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

fn written(scene: &Scene, folder: &tempfile::TempDir, args: &[&str]) -> (String, String) {
    let (code, text, err) = scene.ctkeep(&[&["report"], args].concat());
    assert_eq!(code, 0, "{text}{err}");
    let path = folder.path().join("report");
    fs::write(&path, &text).expect("a file");
    (text, path.to_str().expect("a path").to_owned())
}

/// What an audit says, without names of addresses: of each source what it holds and its limit.
fn told(report: &Value) -> (Vec<String>, Vec<String>, Value) {
    let keys = ["held", "counted", "uncounted", "stale", "limit", "over_limit"];
    let sources = report["sources"].as_array().expect("sources");
    let mut sources: Vec<_> = sources
        .iter()
        .map(|it| {
            let family = it["source"].as_str().is_some_and(|source| source.contains(':'));
            format!("{family} {}", keys.map(|key| it[key].to_string()).join(" "))
        })
        .collect();
    sources.sort();
    let connections = report["connections"].as_array().expect("connections").iter();
    let keys = ["socket_state", "entry_state", "class", "inode", "pid", "command", "recv_queue"];
    let mut connections: Vec<_> =
        connections.map(|it| keys.map(|key| it[key].to_string()).join(" ")).collect();
    connections.sort();
    (sources, connections, report["summary"]["classes"].clone())
}

#[test]
fn a_report_is_read_as_the_host_is_with_its_addresses_or_with_others() {
    let Some((scene, _conns)) = stage() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let here = told(&audit(&scene, &[]));
    assert!(here.0.iter().any(|it| it.ends_with("3 true")), "nobody is over: {here:?}");
    assert!(here.0.iter().any(|it| it.ends_with("null false")), "nobody is exempt: {here:?}");
    let (_, path) = written(&scene, &folder, &[]);
    let report = audit(&scene, &["--report", &path]);
    assert_eq!(told(&report), here);
    assert_eq!(report["sources"][0]["source"], format!("{CLIENT}/32"));

    let (text, path) = written(&scene, &folder, &["--anonymous"]);
    for ours in ["198.51.100.", "192.0.2.", "2001:db8:1:"] {
        assert!(!text.contains(ours), "{ours} is in:\n{text}");
    }
    let report = audit(&scene, &["--report", &path]);
    assert_eq!(told(&report), here, "{text}");
    // The same at every place, and networks stay networks.
    let sources: BTreeSet<_> = report["sources"]
        .as_array()
        .expect("sources")
        .iter()
        .filter_map(|it| it["source"].as_str()?.strip_suffix("/32"))
        .collect();
    let starts: BTreeSet<_> =
        sources.iter().filter_map(|it| it.rsplit_once('.')).map(|it| it.0).collect();
    assert_eq!((sources.len(), starts.len()), (3, 1), "{sources:?}");
    for source in sources {
        assert!(text.matches(&format!("{source}:")).count() >= LIMIT, "{source}");
    }
}

/// Tables of a report are whole: a family without one entry has lost them all, sockets in one state are all there
/// are, and without connections the host is idle.
#[test]
fn a_report_leaves_no_family_out() {
    let Some((scene, _conns)) = stage() else { return };
    scene.lab.server.run("conntrack -D -f ipv6");
    let folder = tempfile::tempdir().expect("a folder");
    let live = audit(&scene, &[]);
    let is_of_ipv6 = |it: &&Value| it["source"].as_str().is_some_and(|it| it.contains(':'));
    let six = live["sources"].as_array().and_then(|all| all.iter().find(is_of_ipv6));
    assert_eq!(six.map(|it| &it["over_limit"]), Some(&Value::from(true)), "{live:#}");
    for args in [&[][..], &["--anonymous"]] {
        let (text, path) = written(&scene, &folder, args);
        let report = audit(&scene, &["--report", &path]);
        assert_eq!(told(&report), told(&live), "{text}");
        let findings = |of: &Value| of["layers"]["limiter"]["findings"].to_string();
        assert!(!findings(&report).contains("saved-text"), "{report:#}");
    }
    // Without connections.
    let idle = Scene::new(Limiter::Nothing).expect("another network");
    let (_, path) = written(&idle, &folder, &[]);
    let (code, out, err) = idle.ctkeep(&["audit", "--report", &path]);
    assert!(code < 2 && !format!("{out}{err}").contains("only listening sockets"), "{out}{err}");
}

/// Rules that only nf_tables has: a white list with intervals, a map of verdicts, networks, several
/// fields as one key, and a limit of its own for one address.
const NATIVE: &str = "
table inet fw {
    set friends { type ipv4_addr; flags interval; elements = { 198.51.100.50-198.51.100.60, 203.0.113.0/24 } }
    set pairs { type ipv4_addr . inet_service; elements = { 198.51.100.9 . 80 } }
    set seen { type ipv4_addr; flags dynamic; }
    set seen6 { type ipv6_addr; flags dynamic; }
    map tiers { type ipv4_addr : verdict; elements = { 198.51.100.8 : jump strict } }
    chain strict { ct state new ct count over 2 drop; }
    chain input {
        type filter hook input priority 0; policy accept;
        ip saddr @friends accept
        ip saddr . tcp dport @pairs accept
        ether saddr 02:00:00:00:00:99 drop
        tcp dport 80 ip saddr vmap @tiers
        ip saddr 198.51.100.0/24 tcp dport 80 ct state new add @seen { ip saddr ct count over 3 } drop
        ip6 saddr 2001:db8:1::/64 tcp dport 80 ct state new add @seen6 { ip6 saddr ct count over 3 } drop
    }
}
";

#[test]
fn native_rules_of_a_report_are_played_as_on_its_host() {
    let Some(scene) = Scene::new(Limiter::Nothing) else { return };
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600");
    // Entries are made from the first connection on.
    scene.lab.server.feed("nft -f -", "table inet see { chain in {\ntype filter hook input priority 5\nct state invalid drop\n}\n}\n");
    let mut conns = Vec::new();
    for source in [CLIENT, "198.51.100.55", "198.51.100.8", "198.51.100.9", "2001:db8:1::7"] {
        conns.extend(scene.lab.peer(source).hold(80, LIMIT + 2));
    }
    scene.lab.half_close(&mut conns[0]);
    scene.lab.server.feed("nft -f -", NATIVE);
    let folder = tempfile::tempdir().expect("a folder");
    let here = audit(&scene, &[]);
    let over = |of: &str| {
        here["sources"]
            .as_array()
            .is_some_and(|all| all.iter().any(|it| it["source"] == of && it["over_limit"] == true))
    };
    let are = [&format!("{CLIENT}/32"), "198.51.100.55/32", "198.51.100.8/32", "198.51.100.9/32"]
        .map(over);
    assert_eq!(are, [true, false, true, false], "{here:#}");
    for args in [&[][..], &["--anonymous"]] {
        let (text, path) = written(&scene, &folder, args);
        let report = audit(&scene, &["--report", &path]);
        assert_eq!(told(&report), told(&here), "{text}");
        let limits = |of: &Value| of["layers"]["limiter"]["rules"].as_array().map(Vec::len);
        assert_eq!(limits(&report), limits(&here));
        let is_open = |what: &Value| what["id"] == "rules-unread";
        let findings = report["layers"]["limiter"]["findings"].as_array().expect("findings");
        assert!(!findings.iter().any(is_open), "{findings:#?}");
        for ours in
            ["198.51.100.", "203.0.113.", "2001:db8:1:", "02:00:00:00:00:99", "020000000099"]
        {
            assert!(args.is_empty() || !text.contains(ours), "{ours} is in:\n{text}");
        }
    }
}

/// Of tables that are too large the same connections are left out of both.
#[test]
fn what_is_left_out_is_left_out_of_both_tables() {
    let Some((scene, _conns)) = stage() else { return };
    let tables = scene.lab.server.within(|| Tables::read(4)).expect("both tables");
    let of_peers = |text: &str| {
        // By their ports; an inode may begin so, too.
        let lines = text.lines().map(|line| line.split(" users:").next().unwrap_or(line));
        lines.filter(|line| line.contains(":20") || line.contains("sport=20")).count()
    };
    let (sockets, entries) = (of_peers(&tables.sockets), of_peers(&tables.entries));
    assert!(tables.one_of > 3 && (2..8).contains(&sockets), "{tables:?}");
    assert_eq!(sockets, entries, "{tables:?}");
    let saved = Saved::read(tables.sockets.as_bytes(), tables.entries.as_bytes(), None);
    let host = saved.expect("tables").join(&Policy::default()).expect("a host");
    let both = |view: View| view.socket.is_some() == view.entry.is_some();
    assert!(host.seen.snapshot.views.iter().all(both), "{tables:?}");
}

#[test]
fn a_report_says_what_it_does_not_have() {
    let Some(scene) = Scene::new(Limiter::NftSet) else { return };
    let _conns = scene.established();
    let folder = tempfile::tempdir().expect("a folder");
    let settings = folder.path().join("ctkeep.toml");
    fs::write(&settings, "# hunter2\nlease = \"60s\"\n").expect("a file");
    let (text, path) = written(&scene, &folder, &["--config", settings.to_str().expect("a path")]);
    assert!(text.contains("\nlease = \"60s\"\n") && !text.contains("hunter2"), "{text}");
    for section in ["settings", "daemon", "doctor", "audit", "history", "sockets", "entries"] {
        assert!(text.contains(&format!("\n== {section} ==\n")), "no {section} in:\n{text}");
    }
    assert!(text.contains("== history ==\nnot read: ") || text.contains("== history ==\nTIME"));
    // Without its rules it says so; a limit can be named.
    assert!(text.contains("ct count over 3"), "{text}");
    let start = text.find("== rules ==").expect("rules");
    let end = text.find("== nft list ruleset ==").expect("rules as nft prints them");
    fs::write(&path, [&text[..start], &text[end..]].concat()).expect("a file");
    let (code, out, err) = scene.ctkeep(&["audit", "--report", &path]);
    assert!(code < 2 && out.contains("the report has no rules"), "{code} {out}{err}");
    let named = audit(&scene, &["--report", &path, "--limit", "2"]);
    assert_eq!(named["sources"][0]["over_limit"], true, "{named}");
    // What is no report is refused.
    let (code, _, err) = scene.ctkeep(&["audit", "--report", settings.to_str().expect("a path")]);
    assert!(code == 2 && err.contains("no report"), "{err}");
}
