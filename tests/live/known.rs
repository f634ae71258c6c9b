//! A recount is done when the limit says so: what a rule swallowed is sent again, and what is counted
//! is left alone.

use crate::lab;
use std::thread;
use std::time::Duration;

use crate::lab::rules::{CONNLIMIT, INPUT, chain, input, restore};
use crate::lab::{Lab, Peer, Queue, RawConn, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const LIMIT: usize = 3;
const TRIES: usize = LIMIT + 2;
const SOON: Duration = Duration::from_secs(20);

/// A rate for each source before the limit: it lets two new connections a second through.
const RATE_FIRST: &str = "\
    tcp dport 80 ct state new add @web { ip saddr limit rate over 2/second burst 2 packets } drop\n\
    tcp dport 80 ct state new add @held { ip saddr ct count over 3 } drop";

fn rate_first(lab: &Lab) {
    let rules = chain(INPUT, RATE_FIRST);
    let held = "set held { type ipv4_addr; flags dynamic; }\nchain web_input";
    lab.server.feed("nft -f -", &rules.replacen("chain web_input", held, 1));
}

/// Opens three slowly, so that the rate lets them in, and half-closes them.
fn half_closed(lab: &Lab) -> (lab::Peer, Vec<RawConn>) {
    let peer = lab.peer(CLIENT);
    let mut conns = Vec::new();
    for _ in 0..LIMIT {
        conns.extend(peer.hold(80, 1));
        thread::sleep(Duration::from_millis(600));
    }
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    (peer, conns)
}

/// All three are closed by stale RSTs, and the set throws them out by itself before the repair.
fn evict(lab: &Lab, conns: &[RawConn]) {
    conns.iter().for_each(RawConn::stale_rst);
    wait_for("closed entries", SOON, || {
        !conns.iter().any(|conn| lab.entry_state(conn).is_some_and(|state| state != "CLOSE"))
    });
    thread::sleep(Duration::from_millis(1500));
}

/// Half-closed connections, two beyond the limit, and none of them on its list.
fn five_held(lab: &Lab, peer: &Peer) -> Vec<RawConn> {
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    evict(lab, &conns);
    let mut more = peer.hold(80, 2);
    more.iter_mut().for_each(|conn| lab.half_close(conn));
    conns.append(&mut more);
    evict(lab, &conns);
    conns
}

/// One SYN a second, so that no rate but the limit refuses it.
fn admitted_slowly(peer: &lab::Peer) -> usize {
    (0..TRIES)
        .filter(|_| {
            thread::sleep(Duration::from_millis(1200));
            !peer.open_promptly(80, 1).is_empty()
        })
        .count()
}

#[test]
fn what_a_rate_rule_before_the_limit_swallows_is_sent_again() {
    let play = |guarded: bool| {
        let lab = Lab::new()?;
        rate_first(&lab);
        let _server = lab.serve("[::]:80");
        let daemon = guarded.then(|| lab.daemon(PROGRAM, &[]));
        let (peer, conns) = half_closed(&lab);
        if let Some(daemon) = &daemon {
            daemon.stop();
        }
        evict(&lab, &conns);
        if let Some(daemon) = &daemon {
            daemon.cont();
            wait_for("the limit's answer", SOON, || daemon.logged(" recounted"));
        }
        Some(admitted_slowly(&peer))
    };
    let Some(without) = play(false) else { return };
    assert_eq!(without, LIMIT, "the control");
    assert_eq!(play(true), Some(0));
}

/// Connections that a limit has thrown off are repaired while a program holds up what passes this table's
/// PREROUTING.
fn held_up(table: &str) {
    const HELD_UP: Duration = Duration::from_millis(50);
    let play = |guarded: bool| {
        let lab = Lab::new()?;
        let queued = "PREROUTING -p tcp --dport 80 -j NFQUEUE --queue-num 0";
        let limit = format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP");
        let rules = restore(table, "PREROUTING", &[queued]) + &input(&[&limit]);
        lab.server.feed("iptables-restore", &rules);
        let _queue = Queue::hold_up(&lab.server, HELD_UP);
        let _server = lab.serve("[::]:80");
        let daemon = guarded.then(|| lab.daemon(PROGRAM, &["--shield", "off"]));
        let peer = lab.peer(CLIENT);
        let mut conns = peer.hold(80, LIMIT);
        conns.iter_mut().for_each(|conn| lab.half_close(conn));
        if let Some(daemon) = &daemon {
            daemon.stop();
        }
        conns.iter().for_each(RawConn::stale_rst);
        wait_for("closed entries", SOON, || !conns.iter().any(|conn| lab.is_alive(conn)));
        // At the limit, which looks at its list then.
        let looked = peer.half_open(vec![peer.syn_only(80)], SOON).pop().expect("an answer");
        looked.rst(0);
        wait_for("its end", SOON, || !lab.is_alive(&looked));
        if let Some(daemon) = &daemon {
            daemon.cont();
            wait_for("the limit's answer", SOON, || daemon.logged(" recounted"));
        }
        Some(peer.admitted(80, TRIES))
    };
    let Some(without) = play(false) else { return };
    assert_eq!(without, LIMIT, "the control");
    assert_eq!(play(true), Some(0));
}

/// The first step of each repair is long over when its nudge gets to the limit.
#[test]
fn what_a_program_holds_up_before_the_limit_is_counted_again() {
    held_up("mangle");
}

/// And when it gets to conntrack.
#[test]
fn what_a_program_holds_up_before_conntrack_is_counted_again() {
    held_up("raw");
}

/// Nothing has been heard of it: it was there first.
#[test]
fn a_limit_that_was_added_before_ctkeep_started_counts_what_is_open() {
    let play = |guarded: bool| {
        let lab = Lab::new()?;
        // Without any rule of its kind conntrack does not work in a namespace.
        lab.server
            .feed("iptables-restore", &input(&["INPUT -m conntrack --ctstate RELATED -j ACCEPT"]));
        let _server = lab.serve("[::]:80");
        let peer = lab.peer(CLIENT);
        let conns = peer.hold(80, LIMIT);
        lab.server.run(&format!("iptables -A INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP"));
        let daemon = guarded.then(|| lab.daemon(PROGRAM, &[]));
        if let Some(daemon) = &daemon {
            wait_for("a recount", SOON, || {
                conns.iter().all(|conn| {
                    let client = format!("{} ", conn.client);
                    let of_conn = |line: &&str| line.contains("recount") && line.contains(&client);
                    daemon.log().lines().find(of_conn).is_some()
                })
            });
        }
        Some(peer.open_promptly(80, TRIES).len())
    };
    let Some(without) = play(false) else { return };
    assert_eq!(without, TRIES.min(LIMIT), "the control");
    assert_eq!(play(true), Some(0));
}

#[test]
fn a_start_over_connections_that_are_counted_changes_no_entry() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let (full, half) = (lab.peer(CLIENT), lab.peer("198.51.100.8"));
    let _conns = (full.hold(80, LIMIT), half.hold(80, 1));
    for _ in 0..2 {
        let daemon = lab.daemon(PROGRAM, &[]);
        thread::sleep(Duration::from_secs(1));
        let log = daemon.log();
        assert!(!log.contains("action="), "{log}");
    }
    assert_eq!(full.open_promptly(80, TRIES).len(), 0);
    assert_eq!(half.open_promptly(80, TRIES).len(), LIMIT - 1);
}

/// A rule that takes the packets of the source before the limit, for all that can be told from outside.
#[test]
fn what_cannot_be_known_is_not_called_recounted() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    lab.server.run(&format!("iptables -I INPUT -s {CLIENT} -m ttl --ttl-lt 200 -j DROP"));
    let daemon = lab.daemon(PROGRAM, &[]);
    daemon.stop();
    conns.iter().for_each(RawConn::stale_rst);
    // Else the connections are on the list still, and nothing is sent.
    peer.syn_only(80);
    daemon.cont();
    wait_for("a question", SOON, || daemon.logged("could not be asked"));
    assert!(!daemon.logged(" recounted"), "{}", daemon.log());
}

/// Who exceeds the count is banned for a day.
fn ban(lab: &Lab) {
    lab.server.feed(
        "nft -f -",
        "table inet fw {
           set banned { type ipv4_addr; flags dynamic,timeout; timeout 24h; size 65535; }
           set web { type ipv4_addr; flags dynamic; size 65535; }
           chain input {
             type filter hook input priority filter; policy accept;
             tcp dport 80 ct state new add @web { ip saddr ct count over 3 } \
               add @banned { ip saddr timeout 24h } log prefix \"too many: \" drop
           }
         }",
    );
}

/// Five are held where three are allowed: two of them came in while nobody looked.
#[test]
fn under_a_rule_that_bans_our_packets_never_exceed_the_count() {
    let Some(lab) = Lab::new() else { return };
    ban(&lab);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let conns = five_held(&lab, &peer);
    let banned = || lab.server.output("nft list set inet fw banned").contains("elements");
    assert!(!banned(), "before");
    let daemon = lab.daemon(PROGRAM, &["--deep-interval", "1s", "--shield", "off"]);
    let is_alive = |conn: &RawConn| lab.is_alive(conn);
    wait_for("repairs", SOON, || conns.iter().all(is_alive));
    thread::sleep(Duration::from_secs(2));
    assert!(!banned(), "{}", daemon.log());
    // Two end: the two that were withheld take their places, and no more get in.
    for conn in &conns[..2] {
        conn.rst(0);
        wait_for("its end", SOON, || lab.socket_state(conn).is_none());
    }
    thread::sleep(Duration::from_secs(4));
    assert!(!banned(), "{}", daemon.log());
    let admitted = peer.open_promptly(80, 1).len();
    assert_eq!((admitted, banned()), (0, true), "three are counted:\n{}", daemon.log());
    // Their entries live on.
    assert!(conns[2..].iter().all(is_alive));
}

/// The control: a limit that only drops is shown all five.
#[test]
fn under_a_rule_that_drops_everything_open_is_counted() {
    let Some(lab) = Lab::new() else { return };
    let rule = "tcp dport 80 ct state new add @web { ip saddr ct count over 3 } drop";
    lab.server.feed("nft -f -", &chain(INPUT, rule));
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let conns = five_held(&lab, &peer);
    let _daemon = lab.daemon(PROGRAM, &["--shield", "off"]);
    wait_for("repairs", SOON, || conns.iter().all(|conn| lab.is_alive(conn)));
    thread::sleep(Duration::from_secs(1));
    for conn in &conns[..2] {
        conn.rst(0);
        wait_for("its end", SOON, || lab.socket_state(conn).is_none());
    }
    thread::sleep(Duration::from_secs(2));
    assert_eq!(peer.open_promptly(80, TRIES).len(), 0);
}

/// As `ufw limit` writes it: who sends six SYNs in half a minute is refused.
fn limit_and_rate(lab: &Lab) {
    let new = "INPUT -p tcp --dport 80 -m conntrack --ctstate NEW";
    lab.server.feed(
        "iptables-restore",
        &input(&[
            "INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            &format!("INPUT -p tcp --syn --dport 80 {CONNLIMIT} -j DROP"),
            &format!("{new} -m recent --set --name seen --rsource"),
            &format!(
                "{new} -m recent --update --seconds 30 --hitcount 6 --name seen --rsource -j REJECT"
            ),
            &format!(
                "{new} -m hashlimit --hashlimit-above 1/hour --hashlimit-burst 5 \
                 --hashlimit-mode srcip --hashlimit-name web -j DROP"
            ),
        ]),
    );
}

/// How many SYNs of the client, or in its name, the rule behind the limit has seen.
fn stamps(lab: &Lab) -> usize {
    let list = lab.server.output("cat /proc/net/xt_recent/seen");
    let line = list.lines().find(|line| line.contains(CLIENT)).unwrap_or_default();
    line.split("oldest_pkt:").nth(1).map_or(0, |stamps| stamps.split(',').count())
}

/// Three connections are closed by stale RSTs and repaired, before the next SYN of their source or behind
/// it. The stamps then, how many more are let in, and whether one is when another has ended.
fn stamps_of_a_repair(is_syn_between: bool) -> Option<(usize, usize, usize)> {
    let lab = Lab::new()?;
    limit_and_rate(&lab);
    let _server = lab.serve("[::]:80");
    let daemon = lab.daemon(PROGRAM, &["--shield", "off"]);
    let peer = lab.peer(CLIENT);
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    // Two jiffies are in doubt.
    thread::sleep(Duration::from_millis(50));
    if is_syn_between {
        daemon.stop();
    }
    conns.iter().for_each(RawConn::stale_rst);
    if is_syn_between {
        peer.syn_only(80).rst(0);
        daemon.cont();
    }
    wait_for("repairs", SOON, || {
        conns.iter().all(|conn| lab.is_alive(conn))
            && daemon.log().matches("action=\"revive\"").count() == LIMIT
    });
    let stamps = stamps(&lab);
    let admitted = peer.admitted(80, 2);
    // A list is swept once a jiffy.
    thread::sleep(Duration::from_millis(50));
    for conn in conns.iter().take(1) {
        conn.rst(0);
        wait_for("its end", SOON, || lab.socket_state(conn).is_none());
        wait_for("its entry's", SOON, || !lab.is_alive(conn));
    }
    Some((stamps, admitted, peer.admitted(80, 1)))
}

#[test]
fn a_repair_before_the_next_syn_of_its_source_costs_an_honest_client_nothing() {
    let Some(honest) = stamps_of_a_repair(false) else { return };
    // What is counted and not shown is counted: the limit holds, and lets one in when one has ended.
    assert_eq!(honest, (LIMIT, 0, 1));
}

/// The control: the same where a SYN came between.
#[test]
fn a_repair_behind_the_next_syn_is_shown_to_the_limit() {
    let Some((stamps, admitted, _)) = stamps_of_a_repair(true) else { return };
    assert!(stamps > LIMIT + 1, "{stamps}");
    assert_eq!(admitted, 0);
}

/// Three connections of a source that no list has, closed and brought back; what is logged of them.
fn log_of_a_repair(rules: &str, awaited: &str) -> Option<String> {
    let lab = Lab::new()?;
    lab.server.feed("nft -f -", rules);
    // Without any rule of its kind conntrack does not work in a namespace.
    lab.server
        .feed("iptables-restore", &input(&["INPUT -m conntrack --ctstate RELATED -j ACCEPT"]));
    let _server = lab.serve("[::]:80");
    let _others = ["198.51.100.8", "198.51.100.9"].map(|source| lab.peer(source).hold(80, 1));
    let peer = lab.peer(CLIENT);
    let mut conns = peer.hold(80, LIMIT);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    let daemon = lab.daemon(PROGRAM, &["--shield", "off"]);
    conns.iter().for_each(RawConn::stale_rst);
    wait_for(awaited, SOON, || daemon.logged(awaited));
    thread::sleep(Duration::from_millis(500));
    Some(daemon.log())
}

#[test]
fn what_a_full_set_has_no_room_for_is_not_called_recounted() {
    let full = include_str!("../cases/set-full.nft");
    let Some(log) = log_of_a_repair(full, "the limit does not count them") else { return };
    assert!(!log.contains(" recounted"), "{log}");
}

#[test]
fn what_a_limit_that_is_switched_off_is_for_is_not_called_recounted() {
    let dormant = include_str!("../cases/dormant.nft");
    let Some(log) = log_of_a_repair(dormant, "action=\"revive\"") else { return };
    assert!(!log.contains(" recounted"), "{log}");
}
