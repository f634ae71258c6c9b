//! What `audit`, `doctor` and `explain` say of a limit, beside what it does with a new connection: no
//! all-clear over one that lets more in, and nothing bad where it refuses nobody or is not judged.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::net::SocketAddr;

use crate::lab::{Lab, Peer, SERVER_V4, Server};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const LIMIT: usize = 3;

fn json(lab: &Lab, args: &[&str]) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &[args, &["--format", "json"]].concat());
    (code, serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}")))
}

/// The verdicts of findings with this name.
fn verdicts(findings: &Value, id: &str) -> Vec<String> {
    let all = findings.as_array().unwrap().iter().filter(|it| it["id"] == id);
    all.map(|it| it["verdict"].as_str().unwrap().to_owned()).collect()
}

/// The exit code of a doctor, and its findings.
fn doctor(lab: &Lab) -> (i32, Value) {
    let (code, report) = json(lab, &["doctor"]);
    (code, report["findings"].clone())
}

/// The exit code of an audit, the findings of the layer limiter, and the first limit.
fn audit(lab: &Lab, args: &[&str]) -> (i32, Value, Value) {
    let (code, report) = json(lab, &[&["audit"], args].concat());
    let limiter = &report["layers"]["limiter"];
    (code, limiter["findings"].clone(), limiter["rules"][0].clone())
}

/// A host with these rules of iptables, and a client.
fn host(rules: &str) -> Option<(Lab, Server, Peer)> {
    let lab = Lab::new()?;
    lab.server.feed("iptables-restore", &format!("*filter\n{rules}COMMIT\n"));
    let server = lab.serve("0.0.0.0:80");
    let peer = lab.peer(CLIENT);
    Some((lab, server, peer))
}

const OPENS: &str = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3";

/// A source is at its limit, and nothing of it is counted any more.
#[test]
fn doctor_says_no_all_clear_where_entries_are_lost() {
    let Some((lab, _server, peer)) = host(&format!("{OPENS} -j DROP\n")) else { return };
    let _held = peer.hold(80, LIMIT);
    let (code, findings) = doctor(&lab);
    assert_eq!((code, verdicts(&findings, "tables-disagree")), (0, vec!["ok".to_owned()]));
    assert_eq!(verdicts(&findings, "limit-uncounted"), [""; 0], "{findings:#}");
    assert_eq!(peer.admitted(80, 1), 0, "the truth, before");
    lab.server.run("conntrack -F");
    let (code, findings) = doctor(&lab);
    let said = ["tables-disagree", "limit-uncounted"].map(|id| verdicts(&findings, id));
    assert_eq!((code, said), (1, [["bad"], ["bad"]].map(|it| it.map(str::to_owned).to_vec())));
    let (code, findings, limit) = audit(&lab, &[]);
    assert_eq!((code, verdicts(&findings, "limit-uncounted").len()), (1, 1), "{findings:#}");
    assert_eq!((&limit["holds"], &limit["verdict"]), (&false.into(), &"bad".into()), "{limit:#}");
    assert_eq!(peer.admitted(80, 1), 1, "the truth");
}

/// A rule that logs, counts or marks refuses nobody; one whose mark another rule refuses, one that refuses in
/// another chain, and one that bans, do.
#[test]
fn who_exceeds_a_rule_that_only_notes_is_not_over_it() {
    const LOG: &str = "-A INPUT -j LOG\n";
    for (refuses, rules) in [
        (false, format!("{OPENS} -j LOG\n")),
        (false, format!("{OPENS}\n")),
        (false, format!("{OPENS} -j MARK --set-mark 9\n{LOG}")),
        (false, format!(":X - [0:0]\n-A X -j LOG\n{OPENS} -j X\n")),
        (false, format!("{OPENS} -j RETURN\n-A INPUT -j ACCEPT\n")),
        (true, format!("{OPENS} -j MARK --set-mark 9\n-A INPUT -m mark --mark 9 -j DROP\n")),
        (true, format!(":X - [0:0]\n-A X -j LOG\n-A X -j DROP\n{OPENS} -j X\n")),
    ] {
        let Some((lab, _server, peer)) = host(&rules) else { return };
        // Before the limit counts, so that both hold more than it allows.
        let held = if refuses { peer.hold(80, LIMIT) } else { peer.hold(80, LIMIT + 2) };
        if refuses {
            lab.server.run("conntrack -F");
        }
        let more = if refuses { peer.hold(80, 2) } else { Vec::new() };
        let (code, findings, limit) = audit(&lab, &[]);
        let over = verdicts(&findings, "source-over-limit");
        let noted = verdicts(&findings, "limit-notes").len();
        let full = limit["full"].as_array().unwrap().len();
        let said = (code, noted, full, over.contains(&"bad".to_owned()));
        if refuses {
            assert_eq!((noted, full, over.len()), (0, 1, 1), "{rules}: {findings:#}");
        } else {
            assert_eq!(said, (0, 1, 0, false), "{rules}: {findings:#}");
            assert_eq!(peer.admitted(80, 1), 1, "{rules}: the truth");
        }
        drop((held, more));
    }
}

/// A limit for what is established sees no packet behind a rule that accepts what is established, and none that
/// opens a connection in any case.
#[test]
fn a_limit_for_what_is_established_is_never_a_sound_one() {
    const ALL: &str = "-A INPUT -m state --state ESTABLISHED -j ACCEPT\n";
    const OTHERS: &str = "-A INPUT -s 203.0.113.0/24 -m state --state ESTABLISHED -j ACCEPT\n";
    const LIMIT: &str = "-A INPUT -p tcp --dport 80 -m state --state ESTABLISHED -m connlimit \
                         --connlimit-above 3 -j DROP\n";
    for (before, id, verdict) in [
        (ALL, "limit-shadowed", "bad"),
        (OTHERS, "limit-without-syn", "warn"),
        ("", "limit-without-syn", "warn"),
    ] {
        let Some((lab, _server, peer)) = host(&format!("{before}{LIMIT}")) else { return };
        let (_, findings, _) = audit(&lab, &[]);
        assert_eq!(verdicts(&findings, id), [verdict], "{before}: {findings:#}");
        if before == ALL {
            assert_eq!(peer.hold(80, 5).len(), 5, "the truth");
        }
    }
}

/// Limits of what goes out, of bridges, and in chains that nothing leads to.
#[test]
fn a_limit_that_is_not_judged_is_named() {
    let Some((lab, _server, peer)) = host(
        "-A OUTPUT -p tcp --sport 80 --tcp-flags SYN,ACK SYN,ACK -m connlimit --connlimit-above 3 \
         --connlimit-daddr -j DROP\n\
         -A OUTPUT -p tcp --syn -m connlimit --connlimit-above 30 -j DROP\n",
    ) else {
        return;
    };
    lab.server.feed(
        "nft -f -",
        "table inet x {\nset c { type ipv4_addr; flags dynamic; }\n\
         chain nowhere { tcp dport 80 ct state new add @c { ip saddr ct count over 3 } drop; }\n}\n",
    );
    let _held = peer.hold(80, LIMIT);
    assert_eq!(peer.admitted(80, 1), 0, "the truth: the first of them holds");
    let (code, findings, _) = audit(&lab, &[]);
    let mut all = verdicts(&findings, "limit-unjudged");
    all.sort();
    assert_eq!((code, all), (0, ["ok", "warn", "warn"].map(str::to_owned).to_vec()));
    let said = findings.to_string();
    for what in
        ["OUTPUT rule 1 is a limit on the way out", "x nowhere rule 1 is a limit in a chain"]
    {
        assert!(said.contains(what), "{what}: {findings:#}");
    }
}

/// A limit that names no protocol counts UDP, too.
#[test]
fn a_limit_of_any_protocol_says_so() {
    let Some((lab, _server, peer)) =
        host("-A INPUT -m state --state NEW -m connlimit --connlimit-above 3 -j DROP\n")
    else {
        return;
    };
    let udp: Vec<_> = (0..LIMIT)
        .map(|_| {
            lab.client.within(|| {
                let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).expect("a socket");
                socket.set_ip_transparent_v4(true).expect("an address of nobody");
                let client = CLIENT.parse().expect("an address");
                socket.bind(&SocketAddr::new(client, 0).into()).expect("bound");
                socket.send_to(b"x", &SocketAddr::from((SERVER_V4, 5353)).into()).expect("sent");
                socket
            })
        })
        .collect();
    assert_eq!(peer.admitted(80, 1), 0, "the truth: of UDP are as many as it allows");
    let (_, findings, limit) = audit(&lab, &[]);
    let what = limit["what"].as_str().unwrap();
    assert_eq!(what, "at most 3 from each /32 to any port, of any protocol", "{findings:#}");
    assert!(findings.to_string().contains("UDP and others count as well"), "{findings:#}");
    drop(udp);
}
