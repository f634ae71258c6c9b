//! The limits of the rules, and the ports that they are for.

use crate::audit::finding::Finding;
use crate::firewall::limits::{EarlierAccept, LimitRule, Limiter, Sight, Unjudged, Where, Witness};
use crate::firewall::{Hook, Ports};

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
