//! A host that forgets everything after a second, as far as its settings go: what has a socket must not be.

use std::thread;
use std::time::Duration;

use ctkeep::Op;
use ctkeep::firewall::lists::Lists;
use ctkeep::netlink::attribute::{emitted, nested, nla, text, word};
use ctkeep::netlink::{Conversation, KernelSocket, Request};
use netlink_packet_core::NLM_F_CREATE;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{ATTACKER, ATTACKER6, PORT, Scene, assert_bounded, contrast};
use crate::lab::{self, Lab, RawConn};

const ROUNDS: usize = 5;
const GROWN: usize = 15;
/// The kernel has forgotten what was not heard of for so long.
const FORGOTTEN: Duration = Duration::from_millis(1300);

/// A sixth of the time from one deep sweep to the next.
const REPAIRED: Duration = Duration::from_secs(5);

/// All that a client can be waited for.
const TIMEOUTS: [&str; 8] = [
    "established",
    "close_wait",
    "fin_wait",
    "last_ack",
    "syn_recv",
    "max_retrans",
    "unacknowledged",
    "time_wait",
];

fn hasty(lab: &Lab) {
    for timeout in TIMEOUTS {
        lab.server.sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{timeout}"), "1");
    }
}

/// What the client does with the connections that it holds, round by round, before conntrack forgets them.
fn assert_kept(what: &str, act: impl Fn(&mut Scene, Vec<RawConn>) + Sync) {
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, hasty, GROWN, ROUNDS, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let begun = scene.attacker.half_open(begun, Duration::from_millis(20));
            act(scene, begun);
            thread::sleep(FORGOTTEN);
            if scene.daemon.is_some() {
                // Half a second later, on a machine with nothing else to do.
                let is_back = |conn| scene.lab.entry(conn).is_some();
                lab::holds_within(REPAIRED, || scene.held.iter().all(is_back));
            }
        });
        assert_bounded(what, &counts, GROWN);
    }
}

#[test]
fn a_host_that_forgets_idle_connections_at_once_keeps_its_limit() {
    assert_kept("idle", |scene, begun| {
        begun.iter().for_each(RawConn::ack);
        scene.held.extend(begun);
    });
}

/// A packet gives the entry the kernel's timeout again, whatever it had.
#[test]
fn packets_that_shorten_leases_open_no_limit() {
    assert_kept("a byte each, ESTABLISHED", |scene, begun| {
        begun.iter().for_each(RawConn::ack);
        scene.held.extend(begun);
        scene.held.iter_mut().for_each(|conn| conn.send(b"x"));
    });
    assert_kept("an ACK each, CLOSE_WAIT", |scene, mut begun| {
        begun.iter().for_each(RawConn::ack);
        begun.iter_mut().for_each(RawConn::fin);
        scene.held.extend(begun);
        scene.held.iter().for_each(RawConn::ack);
    });
}

#[test]
fn a_host_that_forgets_half_closed_connections_at_once_keeps_its_limit() {
    assert_kept("CLOSE_WAIT", |scene, mut begun| {
        begun.iter().for_each(RawConn::ack);
        begun.iter_mut().for_each(RawConn::fin);
        scene.held.extend(begun);
    });
}

/// The last packet comes when the entry has gone, and is picked up.
#[test]
fn a_handshake_that_ends_when_its_entry_has_gone_keeps_its_place() {
    assert_kept("SYN_RECV", |scene, begun| {
        thread::sleep(FORGOTTEN);
        begun.iter().for_each(RawConn::ack);
        scene.held.extend(begun);
    });
}

/// A FIN behind a hole closes the entry and not the socket, and with what administrators set it is forgotten
/// before a deep sweep.
#[test]
fn a_fin_that_tcp_does_not_take_frees_no_slot() {
    const FORGETS: u64 = 2;
    let forgets = |lab: &Lab| {
        for timeout in ["close_wait", "fin_wait", "last_ack"] {
            let setting = format!("net/netfilter/nf_conntrack_tcp_timeout_{timeout}");
            lab.server.sysctl(&setting, &FORGETS.to_string());
        }
    };
    for source in [ATTACKER, ATTACKER6] {
        let counts = contrast(source, forgets, GROWN, ROUNDS, |scene| {
            let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
            let new = scene.attacker.complete(begun, Duration::from_millis(50));
            new.iter().for_each(|conn| conn.fin_at(100));
            scene.held.extend(new);
            thread::sleep(Duration::from_millis(FORGETS * 1000 + 300));
        });
        assert_bounded("a FIN behind a hole", &counts, GROWN);
    }
}

/// A policy of the rules goes before the kernel's settings. All rounds are over before the second deep sweep,
/// which would put back what is forgotten until then: unread, a policy gains 15 at least.
fn assert_kept_by_policy(what: &str, policy: impl Fn(&Lab) + Sync) {
    const ROUNDS: usize = 6;
    const REPAIRED: Duration = Duration::from_secs(2);
    let counts = contrast(ATTACKER, policy, GROWN, ROUNDS, |scene| {
        let begun = (0..scene.limit).map(|_| scene.attacker.syn_only(PORT)).collect();
        let new = scene.attacker.complete(begun, Duration::from_millis(50));
        scene.held.extend(new);
        thread::sleep(Duration::from_millis(2300));
        if scene.daemon.is_some() {
            let is_back = |conn| scene.lab.entry(conn).is_some();
            lab::holds_within(REPAIRED, || scene.held.iter().all(is_back));
        }
    });
    assert_bounded(what, &counts, GROWN);
}

#[test]
fn a_policy_that_forgets_idle_connections_opens_no_limit() {
    assert_kept_by_policy("idle, by a policy", |lab| {
        lab.server.feed(
            "nft -f -",
            "table ip hasty {\n\
             ct timeout short { protocol tcp; l3proto ip; policy = { established: 2, close_wait: 2 }\n }\n\
             chain names { type filter hook prerouting priority 0; ct timeout set \"short\"\n }\n}\n",
        );
    });
}

/// The same by `CT --timeout`, whose policies are those of nfnetlink_cttimeout.
#[test]
fn a_policy_that_iptables_names_opens_no_limit() {
    const RULE: &str = "-t raw -A PREROUTING -p tcp --dport 80 -j CT --timeout short";
    let Some(lab) = Lab::new() else { return };
    if let Err(error) = lab.server.within(add_policy) {
        return lab::skip_rare(&error.to_string());
    }
    for iptables in ["iptables", "iptables-legacy"] {
        assert_kept_by_policy(&format!("idle, by a policy that {iptables} names"), |lab| {
            lab.server.within(add_policy).expect("a policy");
            lab.server.run(&format!("{iptables} {RULE}"));
        });
    }
}

/// Where no rule names one, nobody asks for policies: the question would make the kernel load a module.
#[test]
fn a_policy_is_asked_for_where_a_rule_names_one() {
    const ZONE: &str = "-t raw -A PREROUTING -p tcp --dport 80 -j CT --zone 5";
    let Some(lab) = Lab::new() else { return };
    if let Err(error) = lab.server.within(add_policy) {
        return lab::skip_rare(&error.to_string());
    }
    let names = |known: Option<&Lists>| {
        let lists = lab.server.within(|| Lists::read(known)).expect("rules");
        (lists.name_policies(), lists)
    };
    for iptables in ["iptables", "iptables-legacy"] {
        lab.server.run(&format!("{iptables} {ZONE}"));
        assert!(!names(None).0, "{iptables}: that is a zone");
        lab.server.run(&format!("{iptables} {ZONE} --timeout short"));
        let (is_named, known) = names(None);
        assert!(is_named, "{iptables}");
        assert!(names(Some(&known)).0, "{iptables}: nothing was heard of since");
        lab.server.run(&format!("{iptables} -t raw -F"));
        assert!(!names(None).0, "{iptables}");
    }
}

/// `nfct add timeout short inet tcp established 2 close_wait 2`
fn add_policy() -> ctkeep::Result<()> {
    const CTA_TIMEOUT_NAME: u16 = 1;
    const CTA_TIMEOUT_L3PROTO: u16 = 2;
    const CTA_TIMEOUT_L4PROTO: u16 = 3;
    const CTA_TIMEOUT_DATA: u16 = 4;
    const CTA_TIMEOUT_TCP_ESTABLISHED: u16 = 3;
    const CTA_TIMEOUT_TCP_CLOSE_WAIT: u16 = 5;
    // NFNL_SUBSYS_CTNETLINK_TIMEOUT << 8 | IPCTNL_MSG_TIMEOUT_NEW
    const NEW: u16 = 8 << 8;
    let op = Op::new("add a policy of timeouts");
    let timeouts = [word(CTA_TIMEOUT_TCP_ESTABLISHED, 2), word(CTA_TIMEOUT_TCP_CLOSE_WAIT, 2)];
    let policy = [
        text(CTA_TIMEOUT_NAME, "short"),
        nla(CTA_TIMEOUT_L3PROTO, &2_u16.to_be_bytes()),
        nla(CTA_TIMEOUT_L4PROTO, &[6]),
        nested(CTA_TIMEOUT_DATA, &timeouts),
    ];
    let body = [vec![0; 4], emitted(&policy)].concat();
    let request = Request { op, kind: NEW, flags: NLM_F_CREATE, body, joined: false };
    Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?).execute(&request)
}
