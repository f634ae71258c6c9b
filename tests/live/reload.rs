//! Rules that change: what is open stays counted over a reload, by connlimit and `ct count`.
//!
//! Each test holds three half-closed connections of one address and three ESTABLISHED ones of
//! another, at a limit of three; then the rules change. What counts is how many further connections
//! are let in. Without ctkeep, in the same steps, the limit admits three more of each: the control.
//! `CTKEEP_RELOADS` says how many reloads are made in a row (2).

mod by_hand;
mod frontends;
mod streams;

use crate::lab;
use std::cell::RefCell;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::rules::{CONNLIMIT, CONNLIMIT6, INPUT, chain, input, restore};
use crate::lab::{Daemon, Lab, Namespace, Peer, RawConn, Server, process, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");

const LIMIT: usize = 3;

const TRIES: usize = LIMIT + 2;

const SOON: Duration = Duration::from_secs(10);

/// By then everything is counted again.
const COUNTED: Duration = Duration::from_secs(1);

/// The same where a run of iptables-legacy shows nothing of what it did.
const COUNTED_LEGACY: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
struct Site {
    ipv6: bool,
    /// The server is in a container.
    container: bool,
    /// The limit is there when the connections are opened.
    limited: bool,
    within: Duration,
}

const HERE: Site = Site { ipv6: false, container: false, limited: true, within: COUNTED };

const OVER_IPV6: Site = Site { ipv6: true, ..HERE };

const CONTAINER: Site = Site { container: true, ..HERE };

const LEGACY: Site = Site { within: COUNTED_LEGACY, ..HERE };

/// Connections of one address.
struct Held {
    peer: Peer,
    conns: Vec<RawConn>,
}

impl Held {
    fn open(lab: &Lab, site: Site, octet: u8) -> Self {
        let network = if site.ipv6 { "2001:db8:1::" } else { "198.51.100." };
        let peer = lab.peer(&format!("{network}{octet}"));
        let conns = peer.hold(80, LIMIT);
        Self { peer, conns }
    }
}

fn reloads() -> usize {
    std::env::var("CTKEEP_RELOADS").ok().and_then(|text| text.parse().ok()).unwrap_or(2)
}

/// The limit holds over `reload` of what `load` has loaded; without ctkeep it does not.
fn holds_over(site: Site, load: impl Fn(&Namespace), reload: impl Fn(&Namespace)) {
    if !lab::require() {
        return;
    }
    assert_eq!(admitted(site, &load, &reload, false), [LIMIT; 2], "the control");
    assert_eq!(admitted(site, &load, &reload, true), [0; 2], "with ctkeep");
}

/// How many further connections are let in after the reloads, of the half-closed source and of the
/// other.
fn admitted(
    site: Site,
    load: &impl Fn(&Namespace),
    reload: &impl Fn(&Namespace),
    with_ctkeep: bool,
) -> [usize; 2] {
    let lab = Lab::new().expect("a lab");
    let container = site.container.then(|| lab.container());
    let place = container.as_ref().unwrap_or(&lab.server);
    load(&lab.server);
    let listen = if site.container { "[::]:8080" } else { "[::]:80" };
    let _server = Server::start(place, listen);
    let mut half_closed = Held::open(&lab, site, 11);
    let established = Held::open(&lab, site, 12);
    half_closed.conns.iter_mut().for_each(RawConn::fin);
    wait_for("CLOSE_WAIT", SOON, || {
        place.output("ss -Htan state close-wait").lines().count() == LIMIT
    });
    let path = place.path();
    let arguments: &[&str] = if site.container { &["--netns", &path] } else { &[] };
    let daemon = with_ctkeep.then(|| lab.daemon(PROGRAM, arguments));
    if let Some(daemon) = &daemon {
        // That of the rules, not the container's.
        wait_for("its guard", SOON * 2, || daemon.logged("guard{netns=\"\"}: ready"));
    }
    for held in [&half_closed, &established].into_iter().filter(|_| site.limited) {
        assert_eq!(held.peer.admitted(80, 1), 0, "the limit holds before");
    }
    let both = [&half_closed, &established];
    let mut granted = [0; 2];
    for _ in 0..reloads() {
        let before = daemon.as_ref().map_or(0, shown);
        reload(&lab.server);
        if let Some(daemon) = &daemon {
            thread::sleep(site.within);
            // Later only on a machine that has no time for it; what legacy programs do shows nothing.
            if site.within == COUNTED && shown(daemon) < before + 2 * LIMIT {
                let late = Instant::now();
                wait_for("recounts", SOON, || shown(daemon) >= before + 2 * LIMIT);
                eprintln!("late by {:?}", late.elapsed());
            }
            let tried = both.map(|held| held.peer.open_promptly(80, TRIES).len());
            granted = [granted[0] + tried[0], granted[1] + tried[1]];
        }
    }
    if !with_ctkeep {
        granted = both.map(|held| held.peer.admitted(80, TRIES));
    }
    if let Some(daemon) = daemon.filter(|_| granted != [0; 2]) {
        eprintln!("{}\n{}", daemon.log(), lab.server.output("iptables -S"));
    }
    granted
}

fn limit(site: Site) -> String {
    let count = if site.ipv6 { CONNLIMIT6 } else { CONNLIMIT };
    let port = if site.container { 8080 } else { 80 };
    format!("{} -p tcp --syn --dport {port} {count} -j DROP", chain_of(site))
}

/// Connections that were shown to limits so far.
fn shown(daemon: &Daemon) -> usize {
    daemon.log().matches("action=\"recount\"").count()
}

fn chain_of(site: Site) -> &'static str {
    if site.container { "FORWARD" } else { "INPUT" }
}

fn tool(site: Site) -> &'static str {
    if site.ipv6 { "ip6tables" } else { "iptables" }
}

fn connlimit(site: Site) -> impl Fn(&Namespace) {
    move |server| {
        if site.container {
            let dnat = "PREROUTING -d 192.0.2.1 -p tcp --dport 80 -j DNAT \
                        --to-destination 10.0.0.2:8080";
            server.feed("iptables-restore", &restore("nat", "PREROUTING", &[dnat]));
        }
        let text = restore("filter", "INPUT FORWARD", &[&limit(site)]);
        server.feed(&format!("{}-restore", tool(site)), &text);
    }
}

/// Saves the rules and restores them.
fn save_and_restore(site: Site, flags: &'static str) -> impl Fn(&Namespace) {
    move |server| {
        let saved = server.output(&format!("{}-save", tool(site)));
        server.feed(&format!("{}-restore {flags}", tool(site)), &saved);
    }
}

#[test]
fn the_limit_holds_over_a_restore() {
    holds_over(HERE, connlimit(HERE), save_and_restore(HERE, ""));
}

#[test]
fn the_limit_holds_over_a_restore_over_ipv6() {
    holds_over(OVER_IPV6, connlimit(OVER_IPV6), save_and_restore(OVER_IPV6, ""));
}

#[test]
fn the_limit_holds_over_a_restore_before_a_container() {
    holds_over(CONTAINER, connlimit(CONTAINER), save_and_restore(CONTAINER, ""));
}

/// Empties its chain, or takes the rule away; and adds it.
fn add_anew(site: Site, empties: bool, add: &'static str) -> impl Fn(&Namespace) {
    move |server| {
        let (tool, rule) = (tool(site), limit(site));
        let delete = if empties { format!("-F {}", chain_of(site)) } else { format!("-D {rule}") };
        server.run(&format!("{tool} {delete}"));
        server.run(&format!("{tool} {add} {rule}"));
    }
}

fn change_number(site: Site) -> impl Fn(&Namespace) {
    move |server| {
        let (tool, rule) = (tool(site), limit(site));
        let (chain, rest) = rule.split_once(' ').expect("a rule of a chain");
        server.run(&format!("{tool} -R {chain} 1 {}", rest.replace("above 3", "above 4")));
        server.run(&format!("{tool} -R {chain} 1 {rest}"));
    }
}

/// Added without flush the first rule keeps its list: the second of the same kind is added, and
/// then the first is taken away.
fn add_once_more(site: Site) -> impl Fn(&Namespace) {
    move |server| {
        let (tool, chain) = (tool(site), chain_of(site));
        let text = restore("filter", chain, &[&limit(site)]);
        server.feed(&format!("{tool}-restore -n"), &text);
        server.run(&format!("{tool} -D {chain} 1"));
    }
}

#[test]
fn the_limit_holds_when_the_rule_is_taken_away_and_added_anew() {
    for (empties, add) in [(true, "-A"), (false, "-A"), (false, "-I")] {
        holds_over(HERE, connlimit(HERE), add_anew(HERE, empties, add));
    }
}

#[test]
fn the_limit_holds_when_its_number_changes_and_changes_back() {
    holds_over(HERE, connlimit(HERE), change_number(HERE));
}

#[test]
fn the_limit_holds_when_it_is_added_once_more_and_the_first_taken_away() {
    holds_over(HERE, connlimit(HERE), add_once_more(HERE));
}

/// Added again, the second rule has a list of its own, and what is shown to it must pass the first, whose
/// list has all that is open, and SYNs that it refused.
#[test]
fn a_list_behind_one_that_is_full_gets_what_is_open() {
    if !lab::require() {
        return;
    }
    let play = |with_ctkeep: bool| {
        let lab = Lab::new().expect("a lab");
        connlimit(HERE)(&lab.server);
        let _server = lab.serve("[::]:80");
        let mut half_closed = Held::open(&lab, HERE, 11);
        let established = Held::open(&lab, HERE, 12);
        half_closed.conns.iter_mut().for_each(|conn| lab.half_close(conn));
        let daemon = with_ctkeep.then(|| lab.daemon(PROGRAM, &[]));
        let both = [&half_closed, &established];
        for held in both {
            assert_eq!(held.peer.admitted(80, TRIES), 0, "the limit holds before");
        }
        lab.server.run(&format!("iptables -A {}", limit(HERE)));
        if let Some(daemon) = &daemon {
            wait_for("recounts", SOON, || {
                daemon.log().matches("action=\"recount\"").count() == 2 * LIMIT
            });
        }
        lab.server.run("iptables -D INPUT 1");
        both.map(|held| held.peer.admitted(80, TRIES))
    };
    assert_eq!(play(false), [LIMIT; 2], "the control");
    assert_eq!(play(true), [0; 2]);
}

fn rule_with_set(site: Site) -> String {
    let (family, set) = if site.ipv6 { ("ip6", "web6") } else { ("ip", "web") };
    let port = if site.container { 8080 } else { 80 };
    format!("tcp dport {port} ct state new add @{set} {{ {family} saddr ct count over 3 }} drop")
}

fn set(site: Site) -> String {
    if !site.container {
        return chain(INPUT, &rule_with_set(site));
    }
    let dnat = "ip daddr 192.0.2.1 tcp dport 80 dnat to 10.0.0.2:8080";
    chain("forward priority 0", &rule_with_set(site))
        + &format!(
            "table ip nat {{\nchain in {{\n type nat hook prerouting priority -100;\n {dnat}\n}}\n}}\n"
        )
}

fn load_set(site: Site) -> impl Fn(&Namespace) {
    move |server| drop(server.feed("nft -f -", &set(site)))
}

fn flush_ruleset(site: Site) -> impl Fn(&Namespace) {
    move |server| drop(server.feed("nft -f -", &format!("flush ruleset\n{}", set(site))))
}

fn flush_set(site: Site) -> impl Fn(&Namespace) {
    let set = if site.ipv6 { "web6" } else { "web" };
    move |server| server.run(&format!("nft flush set inet limits {set}"))
}

fn make_set_anew(site: Site) -> impl Fn(&Namespace) {
    let (set, kind) = if site.ipv6 { ("web6", "ipv6_addr") } else { ("web", "ipv4_addr") };
    move |server| {
        let rule = rule_with_set(site);
        let lines = format!(
            "flush chain inet limits web_input\n\
             delete set inet limits {set}\n\
             add set inet limits {set} {{ type {kind}; flags dynamic; }}\n\
             add rule inet limits web_input {rule}\n"
        );
        server.feed("nft -f -", &lines);
    }
}

#[test]
fn the_limit_holds_over_a_flush_of_the_ruleset() {
    holds_over(HERE, load_set(HERE), flush_ruleset(HERE));
}

#[test]
fn the_limit_holds_over_a_flush_of_the_ruleset_over_ipv6() {
    holds_over(OVER_IPV6, load_set(OVER_IPV6), flush_ruleset(OVER_IPV6));
}

#[test]
fn the_limit_holds_over_a_flush_of_its_set() {
    holds_over(HERE, load_set(HERE), flush_set(HERE));
}

#[test]
fn the_limit_holds_when_its_set_is_made_anew() {
    holds_over(HERE, load_set(HERE), make_set_anew(HERE));
}

/// Each way that the tests above do not go by this road.
fn holds_over_every_other_way(site: Site) {
    type Reload = Box<dyn Fn(&Namespace)>;
    let ways: [(&str, Reload); 5] = [
        ("-F, -A", Box::new(add_anew(site, true, "-A"))),
        ("-D, -A", Box::new(add_anew(site, false, "-A"))),
        ("-D, -I", Box::new(add_anew(site, false, "-I"))),
        ("-R", Box::new(change_number(site))),
        ("restore -n", Box::new(add_once_more(site))),
    ];
    for (name, way) in ways {
        eprintln!("{name}");
        holds_over(site, connlimit(site), way);
    }
    eprintln!("flush ruleset");
    holds_over(site, load_set(site), flush_ruleset(site));
    eprintln!("flush set");
    holds_over(site, load_set(site), flush_set(site));
    eprintln!("set made anew");
    holds_over(site, load_set(site), make_set_anew(site));
}

#[test]
#[ignore = "minutes: make reload-test"]
fn the_limit_holds_over_every_other_way_over_ipv6() {
    holds_over_every_other_way(OVER_IPV6);
}

#[test]
#[ignore = "minutes: make reload-test"]
fn the_limit_holds_over_every_other_way_before_a_container() {
    holds_over_every_other_way(CONTAINER);
}

#[test]
fn the_limit_holds_over_a_reload_of_plain_ct_count() {
    let rules = "ip saddr 198.51.100.11 tcp dport 80 ct count over 3 counter drop\n\
                 ip saddr 198.51.100.12 tcp dport 80 ct count over 3 counter drop";
    let load = |server: &Namespace| drop(server.feed("nft -f -", &chain(INPUT, rules)));
    holds_over(HERE, load, |server| {
        server.feed("nft -f -", &format!("flush ruleset\n{}", chain(INPUT, rules)));
    });
}

/// Every change of any rule replaces the whole table.
#[test]
fn the_limit_holds_over_an_unrelated_rule_of_iptables_legacy() {
    let load = |server: &Namespace| server.run(&format!("iptables-legacy -A {}", limit(HERE)));
    holds_over(LEGACY, load, |server| {
        server.run("iptables-legacy -I INPUT -p udp --dport 9 -j DROP");
    });
}

#[test]
fn the_limit_holds_over_a_rule_of_iptables_legacy_that_comes_and_goes() {
    let load = |server: &Namespace| server.run(&format!("iptables-legacy -A {}", limit(HERE)));
    holds_over(LEGACY, load, |server| {
        server.run("iptables-legacy -A INPUT -p udp --dport 9 -j DROP");
        server.run("iptables-legacy -D INPUT -p udp --dport 9 -j DROP");
    });
}

/// A limit counts what is open when it is added, too.
#[test]
fn a_limit_that_is_added_counts_what_is_open() {
    let site = Site { limited: false, ..HERE };
    // Without any rule of its kind conntrack does not work in a namespace.
    let tracked = input(&["INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]);
    let load = |server: &Namespace| drop(server.feed("iptables-restore", &tracked));
    holds_over(site, load, |server| server.run(&format!("iptables -A {}", limit(HERE))));
}

/// Ten reloads a second cost a fifth of a core at most, and at their end all is counted.
/// `CTKEEP_STORM` is for how many seconds (5).
#[test]
fn a_storm_of_reloads_costs_a_bounded_share_and_ends_well() {
    const SOURCES: u8 = 100;
    let Some(lab) = Lab::new() else { return };
    let seconds = std::env::var("CTKEEP_STORM").ok().and_then(|text| text.parse().ok());
    let storm = Duration::from_secs(seconds.unwrap_or(5));
    connlimit(HERE)(&lab.server);
    let _server = lab.serve("[::]:80");
    let held: Vec<_> = (1..=SOURCES).map(|octet| Held::open(&lab, HERE, octet)).collect();
    let daemon = lab.daemon(PROGRAM, &[]);
    let saved = lab.server.output("iptables-save");
    let (begun, before) = (Instant::now(), process::cpu_time(daemon.pid()));
    let mut reloads = 0;
    while begun.elapsed() < storm {
        reloads += 1;
        lab.server.feed("iptables-restore", &saved);
        thread::sleep((begun + reloads * Duration::from_millis(100)) - Instant::now());
    }
    let cost = process::cpu_time(daemon.pid()) - before;
    thread::sleep(COUNTED);
    let admitted: usize = held.iter().step_by(10).map(|held| held.peer.admitted(80, TRIES)).sum();
    assert_eq!(admitted, 0, "{reloads} reloads\n{}", daemon.log());
    // What is given in advance, and half a second for the sweeps of a debug build beside other tests
    // (seen: 2.0 s of 5; alone 1.4).
    let bound = Duration::from_millis(1500) + storm / 5;
    assert!(cost < bound, "{reloads} reloads cost {cost:?} of {storm:?}");
    eprintln!("{reloads} reloads in {storm:?} cost {cost:?}");
}
