//! The limits of the rules, and the ports that they are for.

use std::collections::BTreeSet;

use crate::audit::finding::Finding;
use crate::firewall::limits::{
    EarlierAccept, Key, LimitRule, Limiter, Sight, Unjudged, Where, Witness,
};
use crate::firewall::{Hook, Ports, Ruleset, published};
use crate::flow::Endpoint;
use crate::rtnetlink::link::Link;

/// The rules; `ports` are those that are looked after.
pub fn limiter(limiter: &Limiter, ports: &[u16]) -> Vec<Finding> {
    let mut all: Vec<_> = limiter
        .unread
        .iter()
        .map(|what| {
            Finding::warn(
                "rules-unread",
                what.clone(),
                "name the limit yourself: ctkeep audit --limit N",
            )
        })
        .collect();
    // Rules that were not read may have one.
    if limiter.rules.is_empty() && limiter.unread.is_empty() {
        all.push(Finding::warn(
            "no-limit",
            "no connlimit or ct count rule for TCP connections of clients was found",
            "name the limit yourself: ctkeep audit --limit N",
        ));
    }
    all.extend(limiter.rules.iter().flat_map(limit));
    all.extend(limiter.unjudged.iter().map(unjudged));
    for rule in &limiter.dormant {
        all.push(Finding::bad(
            "limit-dormant",
            format!("{rule} is switched off: its table is dormant"),
            format!("nft add table {} {}", rule.family, rule.table),
        ));
    }
    all.extend(limiter.rules.iter().filter(|rule| rule.tells).map(|rule| {
        Finding::ok(
            "rule-sees-nudges",
            format!(
                "{} may tell of what exceeds it (a log, a set, a mark): ctkeep shows it no connection \
                 beyond its limit, and asks it nothing",
                rule.place()
            ),
        )
    }));
    all.extend(limiter.witnesses.iter().map(witness));
    for port in ports {
        if limiter.synproxied.iter().any(|ports| ports.contains(*port)) {
            continue;
        }
        all.extend(match limiter.notrack(*port) {
            Some(place) => Some(untracked_port(limiter, *port, place)),
            None => {
                let place = limiter.notrack_of_syns(*port);
                place.and_then(|place| untracked_syns(limiter, *port, place))
            }
        });
    }
    all
}

/// One limit, and the set that it keeps its lists in.
pub fn limit(rule: &LimitRule) -> Vec<Finding> {
    let mut all = vec![one_limit(rule)];
    all.extend(rule.set.as_ref().filter(|set| set.is_full()).map(|set| {
        Finding::bad(
            "set-full",
            format!(
                "set {} is full: {} of {} sources; others are not limited ({})",
                set.name,
                set.elements,
                set.size.unwrap_or(0),
                rule.place()
            ),
            format!("give set {} a larger size", set.name),
        )
    }));
    all
}

/// A limit for devices that none of its packets comes in by: those of a bridge, bond or VRF come in by that one.
/// `links` are empty where they are not known. Nothing of one that is named by its number.
pub fn device(rule: &LimitRule, links: &[Link]) -> Option<Finding> {
    const ID: &str = "limit-interface";
    let named = &rule.matches.interfaces;
    let link = |name: &String| links.iter().find(|link| link.name == *name);
    if named.is_empty()
        || links.is_empty()
        || named.iter().any(|name| name.ends_with('*') || name.contains(' '))
    {
        return None;
    }
    let found: Vec<_> = named.iter().filter_map(link).collect();
    if found.is_empty() {
        return Some(Finding::warn(
            ID,
            format!(
                "{rule} is for {}, which this host does not have now: it counts nothing",
                named.join(", ")
            ),
            format!("name the device that clients come in by: {}", names(links)),
        ));
    }
    let master = |link: &&Link| links.iter().find(|other| Some(other.index) == link.master);
    let masters: Vec<_> = found.iter().filter_map(master).collect();
    let first = masters.first().filter(|_| masters.len() == found.len())?;
    Some(Finding::bad(
        ID,
        format!(
            "{rule} is for {}, whose packets come in by {} {}: it never counts one",
            named.join(", "),
            first.kind,
            first.name
        ),
        format!("name {} in the rule", first.name),
    ))
}

/// A limit that counts connections to these ports together with others, which were not looked at.
pub fn partial(rule: &LimitRule, left_out: &BTreeSet<u16>) -> Option<Finding> {
    let is_together = !matches!(rule.limit.key, Key::SourceAndPort(_)) && rule.hook == Hook::Input;
    let ports = left_out.iter().filter(|port| is_together && rule.matches.ports.contains(**port));
    let ports: Vec<_> = ports.map(u16::to_string).collect();
    (!ports.is_empty()).then(|| {
        Finding::warn(
            "limit-partial",
            format!(
                "{rule} counts port {}, too, which was not looked at: a source may be at it with fewer \
                 sockets than are shown",
                ports.join(", ")
            ),
            "leave --port out",
        )
    })
}

/// Those by which others may come in.
fn names(links: &[Link]) -> String {
    let all = links.iter().filter(|link| !link.is_loopback && link.master.is_none());
    all.map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// None of the connections to a port that the limit names comes to it.
pub fn translated(rule: &LimitRule, port: u16, local: Endpoint, connections: usize) -> Finding {
    let all =
        if connections == 1 { "the one open connection" } else { "any of the open connections" };
    Finding::warn(
        "limit-translated",
        format!("{rule} does not see {all} to port {port}: rules lead them to {local} first"),
        format!(
            "limit port {} where they pass (FORWARD, where that is in a container), or what clients asked \
             for: --ctorigdstport {port} (nft: ct original proto-dst {port})",
            local.port()
        ),
    )
}

fn one_limit(rule: &LimitRule) -> Finding {
    let hidden = rule.before.iter().filter_map(|before| match before {
        EarlierAccept::Ports(ports) => Some(ports.clone()),
        _ => None,
    });
    let left = hidden.fold(rule.matches.ports.clone(), |left, ports: Ports| left.and(&ports.not()));
    if left.is_empty() {
        return Finding::bad(
            "limit-shadowed",
            format!("{rule}: an accept before it takes every packet"),
            format!("move {} before the rule that accepts", rule.place()),
        );
    }
    if !rule.matches.may_open() && !rule.matches.is_for_all() {
        return Finding::ok(
            "limit-unjudged",
            format!(
                "{rule} sees no packet by which a client opens a connection: who is at it is not known"
            ),
        );
    }
    let is_established_gone = rule.before.contains(&EarlierAccept::Established);
    if rule.matches.is_established() && is_established_gone {
        return Finding::bad(
            "limit-shadowed",
            format!(
                "{rule} is for packets of established connections, which an accept before it takes"
            ),
            "let it see the packets that open connections: --syn (nft: ct state new)",
        );
    }
    if rule.notes {
        return noted(rule);
    }
    if rule.matches.is_for_all() && !is_established_gone {
        let what = match rule.matches.may_open() {
            true => format!("{rule} judges every packet: a stale RST itself frees the slot"),
            false => format!(
                "{rule} judges packets of open connections, and none that opens one: who is at it is \
                 not known here"
            ),
        };
        return Finding::warn(
            "limit-without-syn",
            format!("{what}{}", others(rule)),
            let_open_alone(rule),
        );
    }
    if rule.limit.is_keyless {
        return Finding::warn(
            "limit-for-all",
            format!("{rule} counts all clients together: one client can lock everybody out"),
            format!("for each client: add @SET {{ ip saddr ct count over {} }}", rule.limit.count),
        );
    }
    if rule.hook == Hook::Forward {
        let rest = others(rule);
        return Finding::ok("limit-forwarded", format!("{rule}, for forwarded connections{rest}"));
    }
    let nudged = match () {
        () if rule.before.contains(&EarlierAccept::Loopback) => "loopback is accepted before it",
        () if !rule.matches.interfaces.is_empty() => "it is bound to an interface",
        () if !rule.matches.sources.is_empty() || rule.matches.is_narrowed() => {
            "not for every client"
        }
        () => return Finding::ok("limit", format!("{rule}{}", others(rule))),
    };
    Finding::ok("limit", format!("{rule}; {nudged}{}", others(rule)))
}

/// How a limit is made to judge what opens connections alone.
fn let_open_alone(rule: &LimitRule) -> &'static str {
    // One that lets in what stays within it lets in the rest of each connection, too: behind it that is dropped.
    match (rule.limit.over, rule.is_before_conntrack()) {
        (true, _) => "add --syn (nft: ct state new) to the rule",
        (false, false) => {
            "first accept, in a rule before it, what is established: -m conntrack --ctstate ESTABLISHED -j \
             ACCEPT (nft: ct state established accept); only then add --syn (nft: ct state new) to the \
             rule, which alone would cut off every client"
        }
        (false, true) => {
            "first accept, in a rule before it, what opens no connection: -p tcp ! --syn -j ACCEPT (nft: \
             tcp flags & (fin|syn|rst|ack) != syn accept); only then add --syn to the rule, which alone \
             would cut off every client"
        }
    }
}

/// What a limit counts beside TCP.
fn others(rule: &LimitRule) -> &'static str {
    if rule.matches.is_for_all_protocols() {
        "; UDP and others count as well, so a source may be at it with fewer sockets (--ask)"
    } else {
        ""
    }
}

/// A limit that refuses nobody.
pub fn noted(rule: &LimitRule) -> Finding {
    let what =
        format!("{rule} refuses nobody: no rule stops what passes it (a log, a count, a mark)");
    Finding::ok("limit-notes", what)
}

/// One that accepts up to a number, and no other says how many get in: who writes that means to refuse the rest.
pub fn inert(rule: &LimitRule) -> Finding {
    Finding::bad(
        "limit-notes",
        format!("{rule} refuses nobody: what exceeds it is let in behind it"),
        format!("drop behind {} what it is for", rule.place()),
    )
}

/// A limit of which a rate decides whether it refuses.
pub fn rated(rule: &LimitRule) -> Finding {
    Finding::warn(
        "limit-rated",
        format!("{rule}: a rate beside it decides who is refused, so some get in that exceed it"),
        "refuse what exceeds the limit without a rate: put the rate in a rule of its own",
    )
}

/// A limit that ctkeep does not look at.
fn unjudged(unjudged: &Unjudged) -> Finding {
    const ID: &str = "limit-unjudged";
    let Unjudged { place, stands } = unjudged;
    match stands {
        Where::OutForNew => Finding::ok(
            ID,
            format!("{place} is a limit for what this host opens: ctkeep does not look at it"),
        ),
        Where::Postrouting => Finding::warn(
            ID,
            format!(
                "{place} is a limit behind routing, for what this host opens and what clients open to \
                 containers: who is at it is not known here"
            ),
            "limit clients of containers in FORWARD (DOCKER-USER)",
        ),
        Where::Out => Finding::warn(
            ID,
            format!(
                "{place} is a limit on the way out: whether it holds for the answers to clients is not \
                 known here"
            ),
            "limit what comes in: INPUT, --syn (nft: ct state new)",
        ),
        Where::Elsewhere => Finding::warn(
            ID,
            format!(
                "{place} is a limit of a bridge or of an egress chain: whether it holds is not known here"
            ),
            "",
        ),
        Where::Nowhere => Finding::warn(
            ID,
            format!("{place} is a limit in a chain that no hook leads to: it counts nothing"),
            "jump to its chain, or delete it",
        ),
    }
}

/// A rule that sees what ctkeep sends in its clients' names.
fn witness(witness: &Witness) -> Finding {
    const ID: &str = "rule-sees-nudges";
    let Witness { place, sight, before, .. } = witness;
    let advice = |limit: &str| match witness.is_of_nat {
        // A limit of a filter table cannot stand there.
        true => format!("translate without a rate: put that behind {limit}"),
        false => format!("put {limit} before it"),
    };
    let some = |what: &str| match what {
        "statistic" => "a share of the SYNs",
        _ => "so many SYNs a second",
    };
    match (sight, before) {
        (Sight::Rate(what), Some(limit)) => Finding::warn(
            ID,
            format!(
                "{place} ({what}) lets {} through to {limit}: a burst of repairs is counted only as it does",
                some(what)
            ),
            advice(limit),
        ),
        (Sight::Accepts(what), Some(limit)) => Finding::warn(
            ID,
            format!(
                "{place} ({what}) accepts {} before {limit}: a repair among them is not counted",
                some(what)
            ),
            advice(limit),
        ),
        (Sight::Rate(what) | Sight::Accepts(what) | Sight::Memory(what), _) => Finding::ok(
            ID,
            format!(
                "{place} ({what}) counts SYNs: a connection that is repaired behind the next SYN of its \
                 source is one more"
            ),
        ),
        (Sight::Log, _) => Finding::ok(
            ID,
            format!("{place} logs SYNs, and those that ctkeep sends for repairs and questions"),
        ),
    }
}

/// A port that a rule at `place` keeps out of conntrack.
fn untracked_port(limiter: &Limiter, port: u16, place: &str) -> Finding {
    const ID: &str = "port-untracked";
    // Those of FORWARD, too: the port can be a container's.
    let limits = || limiter.rules.iter().filter(|rule| rule.matches.shown_ports().contains(port));
    let what = format!("port {port} is not tracked ({place})");
    if let Some(limit) = limits().find(|rule| !rule.matches.shown_ports().is_all()) {
        return Finding::bad(
            ID,
            format!("{what}: {} cannot count it", limit.place()),
            "delete the NOTRACK rule, or leave the port out of ctkeep: --port",
        );
    }
    match limits().next() {
        Some(limit) => Finding::warn(
            ID,
            format!("{what}: {}, which is for any port, does not count it", limit.place()),
            "delete the NOTRACK rule, or name the ports of the limit",
        ),
        None => Finding::ok(ID, format!("{what}, and no limit is for it: left alone")),
    }
}

/// A port of which a rule at `place` keeps the SYNs alone out of conntrack.
fn untracked_syns(limiter: &Limiter, port: u16, place: &str) -> Option<Finding> {
    let mut limits = limiter.rules.iter().filter(|it| it.matches.shown_ports().contains(port));
    let limit = limits.next()?.place();
    Some(Finding::warn(
        "port-untracked",
        format!(
            "SYNs to port {port} are not tracked ({place}): {limit} counts what conntrack takes up at the next \
             packet, if it does (nf_conntrack_tcp_loose) and the limit does not look at ct state"
        ),
        "delete the NOTRACK rule: it is a part of SYNPROXY, and none is here",
    ))
}

/// Ports that are named in vain.
pub fn unheard(ports: &[u16]) -> Option<Finding> {
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    (!ports.is_empty()).then(|| {
        Finding::warn(
            "port-unheard",
            format!("nothing listens on port {}, and no rule leads it elsewhere", ports.join(", ")),
            "start its server, or name the ports that clients use: --port",
        )
    })
}

/// Limits of what is forwarded, and published ports, whose sockets are in other namespaces: the daemon
/// does not look at them, as it says, or this look may not, for want of privileges.
pub fn unseen(
    limiter: &Limiter,
    rules: &Ruleset,
    namespaces: usize,
    unseen: usize,
    daemon_looks: Option<bool>,
) -> Option<Finding> {
    let forwarded = limiter.rules.iter().find(|rule| rule.hook == Hook::Forward);
    let place = forwarded.map(LimitRule::place).or_else(|| published::any(rules))?;
    if unseen > 0 {
        return Some(Finding::bad(
            "limit-unseen",
            format!("{place}: its sockets are in namespaces that this look may not enter"),
            "run it as root, with CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
        ));
    }
    (namespaces > 0 && daemon_looks == Some(false)).then(|| {
        Finding::bad(
            "limit-unseen",
            format!("{place}: the daemon does not look at its sockets, in {namespaces} namespaces"),
            "install -D -m 0644 -t /etc/systemd/system/ctkeep.service.d \
             /usr/share/doc/ctkeep/examples/containers.conf && systemctl daemon-reload && \
             systemctl restart ctkeep",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::finding::Verdict;
    use crate::firewall::{Family, parse_saved};

    #[test]
    fn packets_of_a_bridges_port_come_in_by_the_bridge() {
        let link = |index, name: &str, kind: &str, master| Link {
            index,
            name: name.to_owned(),
            kind: kind.to_owned(),
            master,
            is_loopback: name == "lo",
            ..Link::default()
        };
        let links = [
            link(1, "lo", "", None),
            link(2, "eth0", "", Some(3)),
            link(3, "br0", "bridge", None),
            link(4, "eth1", "", None),
        ];
        let said = |interface: &str, links: &[Link]| {
            let text = format!(
                "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i {interface} -p tcp -m tcp --syn -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n"
            );
            let limiter = Limiter::of(&Ruleset {
                chains: parse_saved(&text, Family::Ip),
                unread: Vec::new(),
            });
            let rule = limiter.rules.first().expect("a limit");
            device(rule, links).map(|it| (it.verdict, it.advice))
        };
        let name = |what: &str| Some((Verdict::Bad, format!("name {what} in the rule")));
        assert_eq!(said("eth0", &links), name("br0"));
        let way = "name the device that clients come in by: br0, eth1";
        assert_eq!(said("ens3", &links), Some((Verdict::Warn, way.to_owned())));
        for interface in ["br0", "eth1", "ens+", "eth+"] {
            assert_eq!(said(interface, &links), None, "{interface}");
        }
        assert_eq!(said("ens3", &[]), None, "where they are not known");
    }
}
