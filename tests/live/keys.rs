//! Limits by something else than the source, and limits that are not for a connection: what is called
//! recounted was asked, and what no limit counts is not missed.

use std::thread;
use std::time::Duration;

use crate::lab::rules::{INPUT, chain, input};
use crate::lab::{Daemon, Lab, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const OTHER: &str = "198.51.100.8";
const SOON: Duration = Duration::from_secs(20);
/// A list is swept once a jiffy, of 10 ms at most.
const JIFFIES: Duration = Duration::from_millis(30);

fn iptables(rules: &[&str]) -> impl Fn(&Lab) + use<> {
    let text = input(rules);
    move |lab| drop(lab.server.feed("iptables-restore", &text))
}

/// A dynamic set with a key of two parts.
fn set(key: &str, rule: &str) -> impl Fn(&Lab) + use<> {
    let both = format!("set both {{ type {key}; flags dynamic; }}\nchain web_input");
    let text = chain(INPUT, rule).replacen("chain web_input", &both, 1);
    move |lab| drop(lab.server.feed("nft -f -", &text))
}

fn by_source_and_port() -> impl Fn(&Lab) {
    let rule = "tcp dport { 80, 81 } ct state new \
                add @both { ip saddr . tcp dport ct count over 3 } drop";
    set("ipv4_addr . inet_service", rule)
}

/// Half-closed connections of each client to each port; one of the first client is thrown off its list
/// and repaired.
fn repaired(lab: &Lab, opened: &[(&str, u16, usize)], guarded: bool) -> Option<Daemon> {
    let daemon = guarded.then(|| lab.daemon(PROGRAM, &["--shield", "off"]));
    let mut conns = Vec::new();
    for (client, port, count) in opened {
        let peer = lab.peer(client);
        for _ in 0..*count {
            conns.extend(peer.hold(*port, 1));
            thread::sleep(JIFFIES);
        }
    }
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    if let Some(daemon) = &daemon {
        daemon.stop();
    }
    let fooled = conns.first().expect("a connection");
    fooled.stale_rst();
    wait_for("a closed entry", SOON, || !lab.is_alive(fooled));
    thread::sleep(JIFFIES);
    // Here the limit looks at its list.
    let (client, port, _) = opened.first().expect("a client");
    lab.peer(client).syn_only(*port).rst(0);
    thread::sleep(JIFFIES);
    if let Some(daemon) = &daemon {
        daemon.cont();
        wait_for("a repair", SOON, || daemon.logged("revive") && lab.is_alive(fooled));
    }
    // They stay open.
    std::mem::forget(conns);
    daemon
}

/// The limit that three connections have reached says that it counts the one that was repaired.
fn is_asked(load: impl Fn(&Lab), opened: &[(&str, u16, usize)]) {
    for guarded in [false, true] {
        let Some(lab) = Lab::new() else { return };
        load(&lab);
        let _server = lab.serve("0.0.0.0:80 0.0.0.0:81");
        let daemon = repaired(&lab, opened, guarded);
        if let Some(daemon) = &daemon {
            wait_for("an answer", SOON, || daemon.logged(" recounted "));
        }
        let (client, port, _) = *opened.last().expect("a client");
        let admitted = lab.peer(client).open_promptly(port, 3).len();
        assert_eq!(admitted, usize::from(!guarded), "guarded: {guarded}");
    }
}

#[test]
fn a_limit_by_destination_is_asked() {
    let limit = "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 --connlimit-daddr \
                 -j DROP";
    is_asked(iptables(&[limit]), &[(CLIENT, 80, 2), (OTHER, 80, 1)]);
}

#[test]
fn a_limit_of_all_together_is_asked() {
    let limit =
        "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 --connlimit-mask 0 -j DROP";
    is_asked(iptables(&[limit]), &[(CLIENT, 80, 1), (OTHER, 80, 2)]);
}

#[test]
fn a_limit_by_source_and_port_is_asked_for_each_port() {
    is_asked(by_source_and_port(), &[(CLIENT, 80, 3), (CLIENT, 81, 2), (CLIENT, 80, 0)]);
}

#[test]
fn a_limit_by_source_and_destination_is_asked() {
    let rule = "tcp dport 80 ct state new add @both { ip saddr . ip daddr ct count over 3 } drop";
    is_asked(set("ipv4_addr . ipv4_addr", rule), &[(CLIENT, 80, 3)]);
}

/// Four are open where three are allowed, or more; no limit refuses the next, and rightly so.
fn is_not_missed(load: impl Fn(&Lab), opened: &[(&str, u16, usize)]) {
    let Some(lab) = Lab::new() else { return };
    load(&lab);
    let _server = lab.serve("0.0.0.0:80 0.0.0.0:81");
    let daemon = repaired(&lab, opened, true).expect("a daemon");
    // Questions come a second after the last event at the soonest.
    thread::sleep(Duration::from_millis(1800));
    for said in ["does not count them", " recounted "] {
        assert!(!daemon.logged(said), "{said}:\n{}", daemon.log());
    }
    let (client, port, _) = *opened.first().expect("a client");
    assert_eq!(lab.peer(client).open_promptly(port, 1).len(), 1, "it is not limited");
}

#[test]
fn a_source_whose_ports_are_below_their_own_limits_is_not_missed() {
    is_not_missed(by_source_and_port(), &[(CLIENT, 80, 2), (CLIENT, 81, 2)]);
}

#[test]
fn a_source_that_a_rule_lets_pass_before_the_limit_is_not_missed() {
    let load = iptables(&[
        "INPUT -s 198.51.100.0/29 -p tcp -j ACCEPT",
        "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP",
    ]);
    is_not_missed(load, &[(CLIENT, 80, 4)]);
}

#[test]
fn a_source_that_a_limit_for_another_address_or_device_is_not_for_is_not_missed() {
    for limit in ["-d 192.0.2.9", "-i eth7"] {
        let load = |lab: &Lab| {
            let limit = format!(
                "INPUT {limit} -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP"
            );
            lab.server.feed("iptables-restore", &input(&[&limit]));
        };
        is_not_missed(load, &[(CLIENT, 80, 4)]);
    }
}
