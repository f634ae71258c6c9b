//! `ctkeep doctor` on hosts set up well and badly.

use std::net::SocketAddr;
use std::time::Duration;

use crate::lab::{Lab, SERVER_V4, wait_for};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");

fn doctor(lab: &Lab) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &["doctor", "--format", "json"]);
    (code, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

/// The verdicts on `id`.
fn verdicts(report: &Value, id: &str) -> Vec<String> {
    let findings = report["findings"].as_array().expect("findings").iter();
    let wanted = findings.filter(|finding| finding["id"] == id);
    wanted.map(|finding| finding["verdict"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn a_host_that_is_set_up_well_has_nothing_bad() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
    lab.server.sysctl("net/netfilter/nf_conntrack_events", "1");
    let (code, report) = doctor(&lab);
    assert_eq!(code, 0, "{report:#}");
    for id in [
        "kernel",
        "table-full",
        "loose-pickup",
        "conntrack-events",
        "recount-route",
        "seal",
        "hide",
    ] {
        assert_eq!(verdicts(&report, id), ["ok"], "{id}");
    }
    assert_eq!(verdicts(&report, "limit"), ["ok", "ok"], "one a family");
    assert_eq!(verdicts(&report, "daemon"), ["warn"]);
    assert!(verdicts(&report, "limit-one-family").is_empty());
}

#[test]
fn what_keeps_a_limit_from_working_is_bad() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80 [::]:81 [::]:82");
    lab.server.feed(
        "iptables-restore",
        "*raw\n-A PREROUTING -p tcp --dport 81 -j CT --notrack\nCOMMIT\n\
         *filter\n-A INPUT -p tcp --dport 82 -m connlimit --connlimit-above 3 -j DROP\n\
         -A INPUT -p tcp --syn --dport 81 -m connlimit --connlimit-above 3 -j DROP\n\
         -A INPUT -p tcp --dport 80 -j ACCEPT\n\
         -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n",
    );
    let (code, report) = doctor(&lab);
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(verdicts(&report, "port-untracked"), ["bad"]);
    assert_eq!(verdicts(&report, "limit-shadowed"), ["bad"]);
    assert_eq!(verdicts(&report, "limit-without-syn"), ["warn"]);
    // Ports 81 and 82 are limited for IPv4 alone; that of 80 limits no client.
    assert_eq!(verdicts(&report, "limit-one-family"), ["warn", "warn"]);
    let what = texts(&report, "limit-one-family");
    assert!(what.contains("port 82") && what.contains("not for those of IPv6"), "{what}");
}

/// What is advised for the other family is the limit of the first: so many to both ports together.
#[test]
fn the_rule_for_the_other_family_is_the_same_limit() {
    const LIMIT: usize = 3;
    let iptables = "*filter\n-A INPUT -p tcp --syn -m multiport --dports 80,443 -m connlimit \
                    --connlimit-above 3 -j DROP\nCOMMIT\n";
    let nft = "table inet limits {\nset s { type ipv4_addr; flags dynamic; }\n\
               set s6 { type ipv6_addr; flags dynamic; }\n\
               chain c {\ntype filter hook input priority 0;\n\
               tcp dport { 80, 443 } ct state new add @s { ip saddr ct count over 3 } drop\n\
               tcp dport { 80, 443 } accept\n}\n}\n";
    for (tool, rules) in [("iptables-restore", iptables), ("nft -f -", nft)] {
        let Some(lab) = Lab::new() else { return };
        lab.server.feed(tool, rules);
        let _server = lab.serve("[::]:80 [::]:443");
        let (_, report) = doctor(&lab);
        assert_eq!(verdicts(&report, "limit-one-family"), ["warn"], "{report:#}");
        let findings = report["findings"].as_array().unwrap();
        let said = findings.iter().find(|it| it["id"] == "limit-one-family").unwrap();
        let advice = said["advice"].as_str().unwrap();
        let peer = lab.peer("2001:db8:1::7");
        let held = |peer: &crate::lab::Peer| {
            let conns = [peer.open(80, LIMIT - 1), peer.open(443, LIMIT)];
            conns.map(|conns| conns.len())
        };
        assert_eq!(held(&peer), [LIMIT - 1, LIMIT], "{tool}: the truth, before");
        match advice.split_once("before what accepts the port: ") {
            None => lab.server.run(advice),
            Some((_, rule)) => {
                let rule = rule.replace("@SET", "@s6");
                lab.server.feed("nft -f -", &format!("insert rule inet limits c {rule}\n"));
            }
        }
        let (_, report) = doctor(&lab);
        assert!(verdicts(&report, "limit-one-family").is_empty(), "{report:#}");
        // The list is new: what is open already is not on it.
        assert_eq!(held(&peer), [LIMIT - 1, 1], "{tool}: the truth of {advice}");
    }
}

#[test]
fn a_missing_privilege_is_named_and_ends_with_three() {
    let Some(lab) = Lab::new() else { return };
    let drop = ["--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--", CTKEEP, "doctor"];
    let (code, out, err) = lab.ctkeep("setpriv", &drop);
    assert_eq!(code, 3, "{out}{err}");
    assert!(out.contains("privilege-net-admin  bad"), "{out}");
    assert!(out.contains("AmbientCapabilities"), "{out}");
}

#[test]
fn a_limit_on_a_port_of_a_bridge_is_bad() {
    let Some(lab) = Lab::new() else { return };
    lab.server.feed("ip -batch -", "link add br0 type bridge\nlink set eth0 master br0\n");
    lab.server
        .run("iptables -A INPUT -i eth0 -p tcp --syn -m connlimit --connlimit-above 3 -j DROP");
    let (code, report) = doctor(&lab);
    assert_eq!(code, 1, "{report:#}");
    assert_eq!(verdicts(&report, "limit-interface"), ["bad"]);
    assert!(texts(&report, "limit-interface").contains("come in by bridge br0"), "{report:#}");
    assert!(texts(&report, "ingress-device").contains("bridge br0 of eth0"), "{report:#}");
}

/// What was found about `id`.
fn texts(report: &Value, id: &str) -> String {
    let findings = report["findings"].as_array().expect("findings").iter();
    let wanted = findings.filter(|finding| finding["id"] == id);
    wanted.map(|finding| finding["what"].as_str().unwrap_or_default()).collect()
}

#[test]
fn the_routes_are_those_that_a_limit_counted() {
    let Some(lab) = Lab::new() else { return };
    let (_, report) = doctor(&lab);
    let text = texts(&report, "recount-route");
    assert!(text.contains("counts connections again by ingress and by loopback"), "{text}");
    // Without TUN devices there is no ingress route.
    let hidden = format!("mount --bind /dev/null /dev/net/tun; {CTKEEP} doctor --format json");
    let (_, out, err) = lab.ctkeep("unshare", &["--mount", "sh", "-c", &hidden]);
    let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    assert_eq!(verdicts(&report, "recount-route"), ["warn"], "{report:#}");
    let text = texts(&report, "recount-route");
    assert!(text.contains("counts connections again by loopback; not by ingress: "), "{text}");
}

#[test]
fn the_trial_of_the_recount_routes_leaves_nothing_behind() {
    let Some(lab) = Lab::new() else { return };
    let state =
        || [lab.server.output("ip -o link"), lab.server.output("nft list tables")].join("\n");
    let before = state();
    doctor(&lab);
    assert_eq!(state(), before);
}

/// A listener that never accepts; its queue takes two more than `backlog`.
fn deaf(lab: &Lab, port: u16, backlog: i32) -> Socket {
    lab.server.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from((SERVER_V4, port)).into()).expect("bound");
        socket.listen(backlog).expect("listening");
        socket
    })
}

#[test]
fn every_figure_that_the_page_names_is_there() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let server = lab.serve("[::]:80");
    let _deaf = deaf(&lab, 81, 3);
    let (code, report) = doctor(&lab);
    assert_eq!(code, 0, "{report:#}");
    for id in ["source-over-limit", "syn-backlog", "listen-queue-full", "half-closed-held"] {
        assert_eq!(verdicts(&report, id), ["ok"], "{id}: {report:#}");
    }
    let peer = lab.peer("198.51.100.7");
    let mut conns = Vec::new();
    for _ in 0..10 {
        let mut conn = (0..5).find_map(|_| peer.connect(80)).expect("the limit is bypassed");
        lab.half_close(&mut conn);
        conn.rst(-5);
        conns.push(conn);
    }
    let other = lab.peer("203.0.113.9");
    let queued = |wanted: &str| {
        wait_for("connections in the queue", Duration::from_secs(5), || {
            let listener = lab.server.output("ss -Hltn sport = 81");
            listener.split_whitespace().nth(1) == Some(wanted)
        });
    };
    // As many as its backlog: the kernel takes one more.
    let mut waiting = other.hold(81, 3);
    queued("3");
    let (_, report) = doctor(&lab);
    assert_eq!(verdicts(&report, "listen-queue-full"), ["warn"], "{report:#}");
    let queue = texts(&report, "listen-queue-full");
    assert!(queue.starts_with("192.0.2.1:81: 3 of 3 wait to be accepted by "), "{queue}");
    waiting.extend(other.hold(81, 1));
    queued("4");
    let (code, report) = doctor(&lab);
    assert_eq!((code, waiting.len(), other.admitted(81, 1)), (1, 4, 0), "{report:#}");
    assert_eq!(verdicts(&report, "source-over-limit"), ["bad"]);
    let over = texts(&report, "source-over-limit");
    assert_eq!(over, "198.51.100.7/32: 10 sockets, limit 3, 0 have an entry that counts");
    assert_eq!(verdicts(&report, "half-closed-held"), ["warn"]);
    let held = texts(&report, "half-closed-held");
    assert!(held.contains(&format!("({}): 10 of 10 open sockets", server.pid())), "{held}");
    assert_eq!(verdicts(&report, "listen-queue-full"), ["bad"], "{report:#}");
    let queue = texts(&report, "listen-queue-full");
    let full = "192.0.2.1:81: 4 wait, and the backlog is 3: none more is taken until some are accepted by ";
    assert!(queue.starts_with(full), "{queue}");
}

/// A backlog of 0 takes one.
#[test]
fn a_queue_without_a_backlog_is_full_with_one() {
    let Some(lab) = Lab::new() else { return };
    let _deaf = deaf(&lab, 81, 0);
    let peer = lab.peer("203.0.113.9");
    let (_, report) = doctor(&lab);
    assert_eq!(verdicts(&report, "listen-queue-full"), ["ok"], "{report:#}");
    let held = peer.hold(81, 1);
    wait_for("a connection in the queue", Duration::from_secs(5), || {
        lab.server.output("ss -Hltn sport = 81").split_whitespace().nth(1) == Some("1")
    });
    let (_, report) = doctor(&lab);
    assert_eq!((held.len(), peer.admitted(81, 1)), (1, 0), "the truth");
    assert_eq!(verdicts(&report, "listen-queue-full"), ["bad"], "{report:#}");
}

#[test]
fn no_device_node_is_made_where_there_is_none() {
    let Some(lab) = Lab::new() else { return };
    let hidden = format!(
        "mount -t tmpfs none /dev/net && {CTKEEP} doctor --format json; ls -A /dev/net >&2"
    );
    let (_, out, err) = lab.ctkeep("unshare", &["--mount", "sh", "-c", &hidden]);
    let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    assert_eq!(verdicts(&report, "recount-route"), ["warn"], "{report:#}");
    assert!(texts(&report, "recount-route").contains("no /dev/net/tun here"), "{report:#}");
    assert_eq!(err, "", "a node was made");
}
