//! Rule sets from the field: who is over which limit, and what the report says of the rules.
//!
//! Each file of tests/cases stands for a kind. It is loaded by the administrator's own tool into a
//! namespace of the test and read back from the kernel.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::lab;
use std::collections::HashMap;
use std::fs;

use crate::lab::Namespace;
use crate::played::{entry, flow, socket};
use ctkeep::audit::finding::Verdict;
use ctkeep::audit::judge;
use ctkeep::audit::loads::{Load, loads};
use ctkeep::audit::plays::Plays;
use ctkeep::audit::sources::{Measure, Source, sources};
use ctkeep::conntrack::TcpState;
use ctkeep::firewall::limits::{LimitRule, Limiter};
use ctkeep::firewall::{Hook, Ruleset};
use ctkeep::reconcile::snapshot::View;
use ctkeep::sockdiag::State;

/// So many open connections of a source to an endpoint.
type Held<'a> = (&'a str, &'a str, u16);

struct Case {
    rules: Ruleset,
    limiter: Limiter,
}

impl Case {
    /// The rules of a file, as the kernel has them; `None` where there is no lab.
    fn load(file: &str) -> Option<Self> {
        Self::load_and(file, |_| ())
    }

    fn load_and(file: &str, then: impl FnOnce(&Namespace)) -> Option<Self> {
        if !lab::require() {
            return None;
        }
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
        let text = fs::read_to_string(format!("{folder}/{file}")).unwrap();
        let namespace = Namespace::new().expect("namespace");
        let tool = if file.ends_with(".nft") { "nft -f -" } else { "iptables-nft-restore" };
        namespace.feed(tool, &text);
        then(&namespace);
        let rules = namespace.within(Ruleset::read);
        let limiter = Limiter::of(&rules);
        assert!(limiter.unread.is_empty(), "{:?}", limiter.unread);
        Some(Self { rules, limiter })
    }

    fn measured(&self, held: &[Held<'_>]) -> (Vec<Source>, Vec<Load>) {
        let views = held.iter().flat_map(|(source, local, count)| {
            (0..*count).map(move |port| {
                let remote = format!("{source}:{}", 40_000 + port);
                let flow = flow(local, &remote);
                View {
                    connection: ctkeep::flow::Connection::of_sender(flow),
                    socket: Some(socket(local, &remote, State::Established, u64::from(port))),
                    entry: Some(entry(flow, TcpState::Established, 432_000)),
                }
            })
        });
        let views: Vec<View> = views.collect();
        let measure = Measure { mask: 32, mask6: 128, limit: None, limiter: &self.limiter };
        let mut plays = Plays::new(&self.limiter, &self.rules);
        let loads = loads(views.iter().copied(), &mut plays);
        (sources(views, measure, &loads, &HashMap::new()), loads)
    }

    /// Sources that are over a limit for sure, and those of which it cannot be told.
    fn over(&self, held: &[Held<'_>]) -> (Vec<String>, Vec<String>) {
        let (sources, _) = self.measured(held);
        let of = |wanted: Option<bool>| {
            let all = sources.iter().filter(|source| source.over_limit == wanted);
            let mut all: Vec<_> = all.map(|source| source.net.addr().to_string()).collect();
            all.sort();
            all
        };
        (of(Some(true)), of(None))
    }

    /// Verdict by the finding's name; the worst one of several.
    fn findings(&self, ports: &[u16]) -> HashMap<&'static str, Verdict> {
        let mut all = HashMap::new();
        for finding in judge::limits::limiter(&self.limiter, ports) {
            let known = all.entry(finding.id).or_insert(finding.verdict);
            *known = (*known).max(finding.verdict);
        }
        all
    }
}

fn none() -> Vec<String> {
    Vec::new()
}

fn only(source: &str) -> (Vec<String>, Vec<String>) {
    (vec![source.to_owned()], none())
}

/// An empty set of protocols and ports accepts nothing.
#[test]
fn an_empty_set_before_a_limit_shadows_nothing() {
    let Some(case) = Case::load("nixos.nft") else { return };
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:80", 5)]), only("198.51.100.7"));
    assert!(!case.findings(&[80]).contains_key("limit-shadowed"));
    // What is untracked comes to the same limit another way; no stale RST does.
    assert_eq!(case.limiter.rules.len(), 1, "{:#?}", case.limiter.rules);
    assert!(!case.findings(&[80]).contains_key("limit-without-syn"));
}

/// A rate, a named limit and a quota before it let some pass, and not all.
#[test]
fn rates_and_quotas_before_a_limit_do_not_shadow_it() {
    let Some(case) = Case::load("rate-accept.nft") else { return };
    for port in [22, 80] {
        let local = format!("192.0.2.1:{port}");
        assert_eq!(case.over(&[("198.51.100.7", &local, 5)]), only("198.51.100.7"), "{port}");
    }
    // Its network passes before.
    assert_eq!(case.over(&[("203.0.113.9", "192.0.2.1:80", 5)]), (none(), none()));
    assert!(!case.findings(&[22, 80]).contains_key("limit-shadowed"));
}

/// A chain that sends back so many a second and drops the others: who has got through is measured.
#[test]
fn a_rate_for_all_before_a_limit_does_not_end_its_measure() {
    for file in ["global-rate-before-limit.rules", "openwrt.nft"] {
        let Some(case) = Case::load(file) else { return };
        assert_eq!(
            case.over(&[("198.51.100.7", "192.0.2.1:80", 5)]),
            only("198.51.100.7"),
            "{file}"
        );
        assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:80", 3)]), (none(), none()), "{file}");
    }
}

/// Accepted, sent back, or measured by a limit of its own before it.
#[test]
fn who_passes_before_a_limit_is_not_measured_by_it() {
    let Some(case) = Case::load("whitelist.rules") else { return };
    let local = "192.0.2.1:443";
    let held = [
        ("203.0.113.5", local, 5),
        ("203.0.113.6", local, 5),
        ("203.0.113.20", local, 5),
        ("198.51.100.7", local, 5),
    ];
    assert_eq!(case.over(&held), only("198.51.100.7"));
    let (sources, _) = case.measured(&held);
    let tier = sources.iter().find(|it| it.net.addr().to_string() == "203.0.113.20").unwrap();
    assert_eq!((tier.held, tier.limit), (5, Some(100)));
}

#[test]
fn a_limit_for_one_address_of_the_host_is_not_charged_for_another() {
    let Some(case) = Case::load("two-destinations.rules") else { return };
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.2:443", 10)]), (none(), none()));
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:443", 4)]), only("198.51.100.7"));
    let (sources, _) = case.measured(&[("198.51.100.7", "192.0.2.2:443", 10)]);
    assert_eq!(sources[0].limit, Some(20));
}

#[test]
fn who_is_not_tracked_is_not_measured() {
    let Some(case) = Case::load("notrack-some-clients.rules") else { return };
    let held = [("203.0.113.5", "192.0.2.1:8080", 20), ("198.51.100.7", "192.0.2.1:8080", 1)];
    assert_eq!(case.over(&held), (none(), none()));
    assert!(!case.findings(&[8080]).contains_key("port-untracked"), "only for some");
}

#[test]
fn limits_of_elements_are_read() {
    let Some(case) = Case::load("elements.nft") else { return };
    let local = "192.0.2.1:80";
    let held = [("203.0.113.5", local, 10), ("203.0.113.6", local, 10)];
    assert_eq!(case.over(&held), only("203.0.113.5"));
}

#[test]
fn a_named_synproxy_is_one() {
    let Some(case) = Case::load("named-objects.nft") else { return };
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:80", 5)]).0, ["198.51.100.7"]);
    let findings = case.findings(&[80]);
    assert!(!findings.contains_key("port-untracked"), "{findings:?}");
}

#[test]
fn a_full_set_limits_nobody_else_and_is_said() {
    let fill = |namespace: &Namespace| {
        namespace.run("nft add element inet fw web { 203.0.113.1 ct count over 3 }");
        namespace.run("nft add element inet fw web { 203.0.113.2 ct count over 3 }");
    };
    let Some(case) = Case::load_and("set-full.nft", fill) else { return };
    assert_eq!(case.findings(&[80]).get("set-full"), Some(&Verdict::Bad));
    let local = "192.0.2.1:80";
    assert_eq!(case.over(&[("198.51.100.7", local, 5)]), (none(), none()), "no room");
    assert_eq!(case.over(&[("203.0.113.1", local, 5)]), only("203.0.113.1"));
}

#[test]
fn a_count_without_a_key_is_for_all_together_and_that_is_said() {
    let Some(case) = Case::load("plain-count.nft") else { return };
    assert_eq!(case.findings(&[22]).get("limit-for-all"), Some(&Verdict::Warn));
    let sources: Vec<_> = (1..=6).map(|octet| format!("198.51.100.{octet}")).collect();
    let held: Vec<_> = sources.iter().map(|source| (source.as_str(), "192.0.2.1:22", 1)).collect();
    let (by_source, loads) = case.measured(&held);
    assert_eq!(loads.iter().map(|load| (load.held, load.is_over())).next(), Some((6, Some(true))));
    assert!(by_source.iter().all(|source| source.over_limit == Some(false)), "{by_source:?}");
}

#[test]
fn a_total_is_measured_in_all_and_sources_are_listed_by_address() {
    let Some(case) = Case::load("mask0.rules") else { return };
    let sources: Vec<_> = (1..=20).map(|octet| format!("198.51.100.{octet}")).collect();
    let local = "192.0.2.1:9702";
    let held: Vec<_> = sources.iter().map(|source| (source.as_str(), local, 30)).collect();
    let (by_source, loads) = case.measured(&held);
    assert_eq!(by_source.len(), 20);
    assert_eq!(
        loads.iter().map(|load| (load.held, load.is_over())).next(),
        Some((600, Some(true)))
    );
    assert!(!case.findings(&[9702]).contains_key("limit-for-all"), "all is meant");
}

#[test]
fn a_limit_in_a_dormant_table_measures_nobody_and_is_said() {
    let Some(case) = Case::load("dormant.nft") else { return };
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:80", 5)]), (none(), none()));
    assert_eq!(case.findings(&[80]).get("limit-dormant"), Some(&Verdict::Bad));
    let wake = |namespace: &Namespace| {
        namespace.run("nft add table inet limits { }");
    };
    let case = Case::load_and("dormant.nft", wake).unwrap();
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:80", 5)]), only("198.51.100.7"));
}

/// What is published is limited by the port that clients ask for, before it is translated.
#[test]
fn a_forwarded_limit_is_for_the_published_port() {
    let Some(case) = Case::load("docker-user.rules") else { return };
    let words: Vec<_> = case.limiter.rules.iter().map(LimitRule::words).collect();
    assert_eq!(words, ["at most 3 from each /32 to port 8080, by eth0"]);
    assert_eq!(case.limiter.rules[0].hook, Hook::Forward);
    // A socket of this host is none of its business.
    assert_eq!(case.over(&[("198.51.100.7", "192.0.2.1:8080", 5)]), (none(), none()));
    assert!(!case.findings(&[8080]).contains_key("no-limit"));
}

/// What each rule that sees nudges is said to do with them, in a word of the finding.
fn witnesses(file: &str) -> Option<Vec<(Verdict, String)>> {
    let case = Case::load(file)?;
    let found = judge::limits::limiter(&case.limiter, &[80]);
    let found = found.into_iter().filter(|finding| finding.id == "rule-sees-nudges");
    Some(found.map(|finding| (finding.verdict, finding.what)).collect())
}

#[test]
fn rules_that_see_nudges_are_named_with_what_follows() {
    let is = |found: &[(Verdict, String)], wanted: &[(Verdict, &str, &str)]| {
        let are = found.iter().zip(wanted).all(|((verdict, what), (of, place, does))| {
            verdict == of && what.starts_with(place) && what.contains(does)
        });
        assert!(are && found.len() == wanted.len(), "{found:#?}");
    };
    let Some(found) = witnesses("ufw-limit.rules") else { return };
    let (ok, warn) = (Verdict::Ok, Verdict::Warn);
    is(
        &found,
        &[
            (ok, "ip filter user-input rule 1 ", "(recent) counts SYNs"),
            (ok, "ip filter user-input rule 2 ", "(recent) counts SYNs"),
        ],
    );
    is(
        &witnesses("rate-before-limit.nft").unwrap(),
        &[(warn, "inet fw input rule 3 ", "through to inet fw input rule 4")],
    );
    is(
        &witnesses("global-rate-before-limit.rules").unwrap(),
        &[(warn, "ip filter synflood rule 1 ", "through to ip filter INPUT rule 4")],
    );
    is(
        &witnesses("ban-on-count.nft").unwrap(),
        &[(ok, "inet fw input rule 1 ", "may tell of what exceeds it")],
    );
    is(
        &witnesses("rate-accept.nft").unwrap(),
        &[
            (
                warn,
                "inet fw input rule 3 ",
                "accepts so many SYNs a second before inet fw input rule 4",
            ),
            (warn, "inet fw input rule 5 ", "before inet fw input rule 7"),
            (warn, "inet fw input rule 6 ", "before inet fw input rule 7"),
        ],
    );
    // Rates for what is invalid, for what is not for this host, in rules that only log, and in INPUT
    // before a limit in FORWARD: a nudge to port 80 meets none of them before its limit.
    let found = witnesses("ufw-docker.rules").unwrap();
    assert!(found.iter().all(|(verdict, _)| *verdict == ok), "{found:#?}");
    is(&witnesses("own-tables.nft").unwrap(), &[]);
    let found = witnesses("recent-ban.rules").unwrap();
    assert!(found.iter().all(|(verdict, what)| *verdict == ok && what.contains("(recent)")));
    assert!(found.len() >= 2, "{found:#?}");
}

/// Rule sets as their programs and well-known pages have them: CSF, fail2ban, the set of javapipe,
/// cPanel, OpenWrt's fw4 with a limit of the administrator.
#[test]
fn rule_sets_that_people_have_are_told_as_they_are() {
    let told = |file: &str| {
        let case = Case::load(file)?;
        let findings = case.findings(&[80]).into_iter();
        let mut wrong: Vec<_> =
            findings.filter(|(_, it)| *it != Verdict::Ok).map(|(id, _)| id).collect();
        wrong.sort_unstable();
        let rules = case.limiter.rules.iter();
        let told = rules.map(|rule| {
            let before: Vec<_> = rule.before.iter().map(ToString::to_string).collect();
            (rule.words(), before.join("; "))
        });
        Some((told.collect::<Vec<_>>(), wrong))
    };
    let one = |words: &str, before: &str, wrong: &[&'static str]| {
        Some((vec![(words.to_owned(), before.to_owned())], wrong.to_vec()))
    };
    let csf = told("csf.rules");
    if csf.is_none() {
        return;
    }
    let friend = "what goes to any port, from 203.0.113.9/32, if not by lo; what comes in by lo";
    let words = "at most 20 from each /32 to port 80, if not by lo";
    assert_eq!(csf, one(words, friend, &["rule-sees-nudges"]));
    assert_eq!(told("fail2ban.rules"), one("at most 30 from each /32 to port 80", "", &[]));
    let words = "at most 111 from each /32 to any port";
    assert_eq!(told("javapipe.rules"), one(words, "", &["limit-without-syn"]));
    let words = "at most 15 from each /32 to port 80";
    assert_eq!(told("cpanel.rules"), one(words, "everything to port 80", &["limit-shadowed"]));
    let words = "at most 10 from each /32 to port 80, by eth0";
    let before = "packets of established connections";
    assert_eq!(told("openwrt-limit.nft"), one(words, before, &["rule-sees-nudges"]));
    let before = "packets of established connections";
    let limits = |limits: &[(&str, &str)]| {
        let told =
            limits.iter().map(|(words, more)| ((*words).to_owned(), format!("{before}{more}")));
        Some((told.collect::<Vec<_>>(), Vec::<&'static str>::new()))
    };
    let friend = "; what goes to port 8080, from 203.0.113.0/24, by eth0";
    let shorewall = limits(&[
        ("at most 10 from each /32 to port 25, by eth0", ""),
        ("at most 3 from each /32 to port 80,443, by eth0", ""),
        ("at most 2 from each /32 to port 8080, by eth0", friend),
    ]);
    assert_eq!(told("shorewall.rules"), shorewall);
    let ufw = told("ufw-docker.rules").unwrap();
    let words: Vec<_> = ufw.0.iter().map(|(words, _)| words.as_str()).collect();
    assert_eq!(
        words,
        ["at most 3 from each /32 to port 80", "at most 10 from each /32 to port 8443"]
    );
    assert!(ufw.1.is_empty(), "{:?}", ufw.1);
}

/// A chain that packets without SYN leave at once; friends as a range, tiers by a map, one list for
/// each port.
#[test]
fn a_limit_behind_a_return_of_all_but_syns_judges_no_other_packet() {
    let Some(case) = Case::load("tiers.nft") else { return };
    let held = [
        ("198.51.100.7", "192.0.2.1:80", 3),
        ("198.51.100.7", "192.0.2.1:443", 4),
        ("198.51.100.20", "192.0.2.1:80", 6),
        ("203.0.113.5", "192.0.2.1:80", 6),
        ("203.0.113.6", "192.0.2.1:80", 3),
        ("203.0.113.6", "192.0.2.1:443", 2),
    ];
    let (_, loads) = case.measured(&held);
    let full = loads.iter().filter(|load| load.is_full());
    let full: Vec<_> = full.map(|load| (load.net.to_string(), load.port, load.held)).collect();
    let of = |net: &str, port, held| (net.to_owned(), port, held);
    assert_eq!(
        full,
        [
            of("203.0.113.6/32", None, 5),
            of("198.51.100.7/32", Some(443), 4),
            of("198.51.100.7/32", Some(80), 3),
            of("203.0.113.6/32", Some(80), 3),
        ]
    );
    let wrong: Vec<_> =
        case.findings(&[80, 443]).into_iter().filter(|(_, it)| *it != Verdict::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    for rule in &case.limiter.rules {
        let before: Vec<_> = rule.before.iter().map(ToString::to_string).collect();
        assert!(before.contains(&"packets of established connections".to_owned()), "{before:?}");
        // The tier of one client is not for the friends.
        let is_friends = before.contains(&"what goes to any port, from 203.0.113.4/31".to_owned());
        assert_eq!(is_friends, rule.chain == "pre", "{before:?}");
    }
}

/// Of a list that is not by source alone, the client is named where it is one.
#[test]
fn who_is_at_a_limit_by_several_fields_is_named() {
    let Some(case) = Case::load("meter.nft") else { return };
    let (_, loads) = case.measured(&[
        ("198.51.100.7", "192.0.2.1:80", 3),
        ("198.51.100.20", "192.0.2.1:80", 3),
        ("198.51.100.7", "192.0.2.1:443", 4),
        ("198.51.100.20", "192.0.2.1:443", 3),
    ]);
    let clients: Vec<_> = loads.iter().map(|load| load.client.map(|it| it.to_string())).collect();
    let one = |client: &str| Some(client.to_owned());
    assert_eq!(clients.len(), 3, "{loads:?}");
    assert!(clients.contains(&one("198.51.100.7")) && clients.contains(&one("198.51.100.20")));
    assert!(clients.contains(&None), "all together");
}

/// A port that rules keep out of conntrack is bad where a limit is for it, and nobody's business else.
#[test]
fn an_untracked_port_is_bad_where_a_limit_is_for_it() {
    let found = |limit: &str| {
        let text = format!(
            "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp --dport 81 -j CT --notrack\nCOMMIT\n*filter\n{limit}COMMIT\n"
        );
        let chains = ctkeep::firewall::parse_saved(&text, ctkeep::firewall::Family::Ip);
        let limiter = Limiter::of(&Ruleset { chains, unread: Vec::new() });
        let all = judge::limits::limiter(&limiter, &[80, 81]);
        let all = all.into_iter().filter(|finding| finding.id == "port-untracked");
        all.map(|finding| finding.verdict).collect::<Vec<_>>()
    };
    let limit = |port: &str| {
        format!(
            ":INPUT ACCEPT [0:0]\n-A INPUT -p tcp --syn{port} -m connlimit --connlimit-above 3 -j DROP\n"
        )
    };
    assert_eq!(found(&limit(" --dport 81")), [Verdict::Bad]);
    assert_eq!(found(&limit("")), [Verdict::Warn]);
    assert_eq!(found(&limit(" --dport 80")), [Verdict::Ok]);
    assert_eq!(found(""), [Verdict::Ok]);
}
