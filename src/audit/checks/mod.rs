//! Judges figures and rules. Pure: the thresholds stand here and in docs/doctor.md.

use std::collections::{BTreeMap, HashSet};

use ipnet::IpNet;

use super::asked::Answered;
use super::figures::{Table, Tcp};
use super::finding::Finding;
use super::fronts::Front;
use crate::firewall::limits::{EarlierAccept, LimitRule, Limiter, Sight, Witness};
use crate::firewall::{Hook, Ports, Ruleset, published};
use crate::flow::Endpoint;
use crate::reconcile::outgoing::Survey;
use crate::sockdiag::Socket;

/// A table this full, in percent, is worth a look.
const FULL_WARN: u64 = 80;
/// From here on the kernel's gc deletes closing entries (`nf_conntrack_max95`).
const FULL_BAD: u64 = 95;
/// More entries than this for each bucket make look-ups slow.
const PER_BUCKET: u64 = 8;
/// A timeout so long for all half-closed connections fills the table with those that are over.
const LONG_CLOSE_WAIT: u64 = 600;
/// The kernel's own, in seconds.
const CLOSE_WAIT: u64 = 60;
/// A queue this full, in percent.
const QUEUE_WARN: u64 = 50;

/// Twice the size; 0 would be no limit at all.
fn larger(maximum: Option<u64>) -> String {
    match maximum.filter(|maximum| *maximum > 0) {
        Some(maximum) => {
            format!("sysctl -w net.netfilter.nf_conntrack_max={}", maximum.saturating_mul(2))
        }
        None => "a larger net.netfilter.nf_conntrack_max".to_owned(),
    }
}

/// The conntrack table and its settings.
pub fn conntrack(figures: &Table) -> Vec<Finding> {
    let mut all = vec![fill(figures)];
    if figures.tcp_loose.is_none() && figures.events.is_none() {
        all.push(Finding::warn(
            "settings-unread",
            "the settings of conntrack cannot be read",
            "show /proc/sys/net/netfilter to this container, if only to read",
        ));
    }
    if figures.drop > 0 {
        all.push(Finding::warn(
            "table-dropped",
            format!("{} packets dropped for want of an entry since start", figures.drop),
            larger(figures.maximum),
        ));
    }
    if let (Some(maximum), Some(buckets)) = (figures.maximum, figures.buckets)
        && maximum > buckets.saturating_mul(PER_BUCKET)
    {
        all.push(Finding::warn(
            "buckets-few",
            format!("{buckets} hash buckets for up to {maximum} entries"),
            format!("sysctl -w net.netfilter.nf_conntrack_buckets={}", maximum / 4),
        ));
    }
    match figures.tcp_loose {
        Some(0) => all.push(Finding::ok("loose-pickup", "connections are not picked up midway")),
        Some(_) => all.push(Finding::warn(
            "loose-pickup",
            "connections are picked up midway: a forgotten one comes back the wrong way round",
            "sysctl -w net.netfilter.nf_conntrack_tcp_loose=0",
        )),
        None => {}
    }
    match figures.events {
        Some(1) => all.push(Finding::ok("conntrack-events", "every entry sends events")),
        Some(0) => all.push(Finding::warn(
            "conntrack-events",
            "entries send no events: repairs wait for the next sweep where nft is not to be had",
            "sysctl -w net.netfilter.nf_conntrack_events=1",
        )),
        Some(_) => all.push(Finding::warn(
            "conntrack-events",
            "entries made before ctkeep listened never send events",
            "sysctl -w net.netfilter.nf_conntrack_events=1",
        )),
        None => {}
    }
    if let Some(seconds) = figures.timeout_close_wait {
        all.push(if seconds > LONG_CLOSE_WAIT {
            Finding::warn(
                "close-wait-timeout",
                format!("half-closed connections stay {seconds} s, with a socket or without"),
                "outgoing = \"extend\" in ctkeep.toml, then sysctl -w \
                 net.netfilter.nf_conntrack_tcp_timeout_close_wait=60: ctkeep run holds those that have one",
            )
        } else {
            Finding::ok("close-wait-timeout", format!("half-closed connections stay {seconds} s"))
        });
    }
    all
}

/// Half-closed connections that this host opened: `kept` is what the daemon says of them, where it looks
/// after them; `timeout` is that of CLOSE_WAIT, in seconds.
pub fn outgoing(seen: Survey, kept: Option<[usize; 3]>, timeout: Option<u64>) -> Option<Finding> {
    const ID: &str = "outgoing";
    let (timeout, is_long) = (timeout?, timeout? > CLOSE_WAIT);
    let open = format!("{} half-closed connections that this host opened", seen.sockets);
    let some = (seen.sockets > 0).then_some(());
    match kept {
        Some([_, _, lost]) if lost > 0 => Some(Finding::warn(
            ID,
            format!("{open}, {lost} of them have lost their entry"),
            "journalctl -u ctkeep names them; docs/outgoing.md",
        )),
        Some([_, held, _]) if is_long => Some(Finding::warn(
            ID,
            format!("{open}, {held} entries kept by ctkeep: {timeout} s for all are needed no more"),
            format!(
                "sysctl -w net.netfilter.nf_conntrack_tcp_timeout_close_wait={CLOSE_WAIT}; of kube-proxy \
                 conntrack.tcpCloseWaitTimeout: {CLOSE_WAIT}s"
            ),
        )),
        Some([_, held, _]) => {
            Some(Finding::ok(ID, format!("{open}, {held} entries kept by ctkeep")))
        }
        None if seen.translated > 0 && !is_long => some.map(|()| {
            let lost = seen.without_entry;
            Finding::warn(
                ID,
                format!(
                    "{open}, {} behind address translation, which ends {timeout} s after their last \
                     packet; {lost} have no entry",
                    seen.translated
                ),
                "outgoing = \"extend\" in ctkeep.toml: docs/outgoing.md",
            )
        }),
        None => some.map(|()| Finding::ok(ID, open)),
    }
}

fn fill(figures: &Table) -> Finding {
    let entries = figures.entries;
    let Some(maximum) = figures.maximum.filter(|maximum| *maximum > 0) else {
        return Finding::ok("table-full", format!("{entries} entries"));
    };
    let percent = entries.saturating_mul(100) / maximum;
    let what = format!("{entries} of {maximum} entries ({percent} %)");
    let more = larger(Some(maximum));
    match percent {
        FULL_BAD.. => Finding::bad("table-full", what, more),
        FULL_WARN.. => Finding::warn("table-full", what, more),
        _ => Finding::ok("table-full", what),
    }
}

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
            "no connlimit or ct count rule was found",
            "name the limit yourself: ctkeep audit --limit N",
        ));
    }
    all.extend(limiter.rules.iter().flat_map(limit));
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
                "{} tells of what exceeds it (a log, a set): ctkeep shows it no connection beyond its \
                 limit, and asks it nothing",
                rule.place()
            ),
        )
    }));
    all.extend(limiter.witnesses.iter().map(witness));
    for port in ports {
        if let Some(place) = limiter.notrack(*port)
            && !limiter.synproxied.iter().any(|ports| ports.contains(*port))
        {
            all.push(untracked_port(limiter, *port, place));
        }
    }
    all
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

/// A rule that sees what ctkeep sends in its clients' names.
fn witness(witness: &Witness) -> Finding {
    const ID: &str = "rule-sees-nudges";
    let Witness { place, sight, before, .. } = witness;
    match (sight, before) {
        (Sight::Rate(what), Some(limit)) => Finding::warn(
            ID,
            format!(
                "{place} ({what}) lets so many SYNs a second through to {limit}: a burst of repairs is \
                 counted only as it does"
            ),
            format!("put {limit} before it"),
        ),
        (Sight::Accepts(what), Some(limit)) => Finding::warn(
            ID,
            format!(
                "{place} ({what}) accepts so many SYNs a second before {limit}: a repair among them is \
                 not counted"
            ),
            format!("put {limit} before it"),
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
    if rule.matches.is_for_all() && !rule.before.contains(&EarlierAccept::Established) {
        return Finding::warn(
            "limit-without-syn",
            format!("{rule} judges every packet: a stale RST itself frees the slot"),
            "add --syn (nft: ct state new) to the rule",
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
        return Finding::ok("limit-forwarded", format!("{rule}, for forwarded connections"));
    }
    let nudged = match () {
        () if rule.before.contains(&EarlierAccept::Loopback) => "loopback is accepted before it",
        () if !rule.matches.interfaces.is_empty() => "it is bound to an interface",
        () if !rule.matches.sources.is_empty() || rule.matches.is_narrowed() => {
            "not for every client"
        }
        () => return Finding::ok("limit", rule.to_string()),
    };
    Finding::ok("limit", format!("{rule}; {nudged}"))
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

/// SYN handling; `syn_recv` is how many handshakes wait.
pub fn syn(figures: &Tcp, syn_recv: u64) -> Vec<Finding> {
    let mut all = Vec::new();
    all.push(match figures.syncookies {
        Some(0) => Finding::bad(
            "syncookies-off",
            "no SYN cookies: a SYN flood fills the backlog",
            "sysctl -w net.ipv4.tcp_syncookies=1",
        ),
        Some(_) => Finding::ok("syncookies-off", "SYN cookies are on"),
        // A container may have no /proc/sys.
        None => Finding::ok("syncookies-off", "net.ipv4.tcp_syncookies cannot be read"),
    });
    if let Some(backlog) = figures.max_syn_backlog {
        let what = format!("{syn_recv} handshakes wait, backlog {backlog}");
        all.push(if syn_recv.saturating_mul(100) >= backlog.saturating_mul(FULL_WARN) {
            Finding::warn(
                "syn-backlog",
                what,
                format!("sysctl -w net.ipv4.tcp_max_syn_backlog={}", backlog.saturating_mul(2)),
            )
        } else {
            Finding::ok("syn-backlog", what)
        });
    }
    if figures.syncookies_sent > 0 {
        all.push(Finding::warn(
            "syncookies-sent",
            format!(
                "{} cookies sent and {} bad ones received since start: there was a SYN flood, or a \
                 backlog too short",
                figures.syncookies_sent, figures.syncookies_failed
            ),
            "sysctl -w net.ipv4.tcp_max_syn_backlog=4096 and a longer listen queue",
        ));
    }
    if figures.req_q_full_drop > 0 {
        all.push(Finding::bad(
            "syn-dropped",
            format!("{} SYNs dropped from a full backlog since start", figures.req_q_full_drop),
            "sysctl -w net.ipv4.tcp_syncookies=1",
        ));
    }
    all
}

const QUEUE_ADVICE: &str =
    "the application does not accept: raise its workers, its listen backlog and net.core.somaxconn";

/// One listen queue.
pub fn queue(waiting: u32, limit: u32) -> Finding {
    // netstat does not show the limit of a queue.
    if limit == 0 {
        let what = format!("{waiting} wait to be accepted");
        return match waiting {
            0 => Finding::ok("listen-queue-full", what),
            _ => Finding::warn("listen-queue-full", what, QUEUE_ADVICE),
        };
    }
    let what = format!("{waiting} of {limit} wait to be accepted");
    let advice = QUEUE_ADVICE;
    match u64::from(waiting).saturating_mul(100) {
        full if waiting > 0 && full >= u64::from(limit) * 100 => {
            Finding::bad("listen-queue-full", what, advice)
        }
        full if waiting > 0 && full >= u64::from(limit) * QUEUE_WARN => {
            Finding::warn("listen-queue-full", what, advice)
        }
        _ => Finding::ok("listen-queue-full", what),
    }
}

/// Overflows of all listen queues together.
pub fn listen_drops(figures: &Tcp) -> Finding {
    let what = format!(
        "{} overflows and {} drops of listen queues since start",
        figures.listen_overflows, figures.listen_drops
    );
    if figures.listen_overflows > 0 {
        let advice = "raise the application's listen backlog and net.core.somaxconn";
        return Finding::warn("listen-overflows", what, advice);
    }
    Finding::ok("listen-overflows", what)
}

/// The sockets of one application.
pub fn application(held: usize, close_wait: usize, unread: u64) -> Finding {
    /// A few are the ordinary end of connections.
    const SOME: usize = 10;
    let what = match unread {
        0 => format!("{close_wait} of {held} open sockets are half-closed"),
        _ => format!("{close_wait} of {held} open sockets are half-closed, {unread} bytes unread"),
    };
    if close_wait >= SOME && close_wait * 2 >= held {
        return Finding::warn(
            "half-closed-held",
            what,
            "the application does not close after its clients: look for blocked writes and its \
             keep-alive and send timeouts",
        );
    }
    Finding::ok("half-closed-held", what)
}

/// A source that holds more than its limit; `counted` are the entries that a limiter can count.
pub fn over(source: IpNet, held: usize, limit: u32, counted: usize) -> Finding {
    // Of a rule that does not go by the source.
    let whose = if source.prefix_len() == 0 { "in all".to_owned() } else { source.to_string() };
    let advice = if counted >= held {
        "all are counted: it comes down as the server closes them, or by ctkeep kill --over-limit"
    } else {
        "ctkeep reconcile makes the limit count them again; ctkeep run keeps it right"
    };
    Finding::bad(
        "source-over-limit",
        format!("{whose}: {held} sockets, limit {limit}, the rule sees {counted}"),
        advice,
    )
}

/// A list that lacks connections, as the limit itself has shown.
pub fn lacking(answered: &Answered, rule: &str) -> Option<Finding> {
    let Answered { answer, held, .. } = answered;
    let listed = usize::try_from(answer.listed()?).unwrap_or(usize::MAX);
    if answer.is_full() || listed >= *held {
        return None;
    }
    let whose =
        if answer.net.prefix_len() == 0 { "all".to_owned() } else { answer.net.to_string() };
    let to = answer.port.map_or(String::new(), |port| format!(" to port {port}"));
    let more = answer.more.unwrap_or(0);
    Some(Finding::bad(
        "limit-lacking",
        format!(
            "{whose}{to}: {held} sockets, the list of {rule} has {listed}: it lets {more} more in"
        ),
        "ctkeep recount shows the limit its open connections; ctkeep run keeps it right",
    ))
}

/// A port whose clients a limit takes for one.
pub fn clients_as_one(front: Front) -> Finding {
    let Front { behind, port, from, connections, is_gateway } = front;
    let to = behind.map_or(format!("port {port}"), |addr| Endpoint::new(addr, port).to_string());
    let (whose, place) = match (is_gateway, behind) {
        (true, _) => ("the gateway", format!("on the host or router that has {from}")),
        (false, Some(_)) => {
            ("an address of this host", "in INPUT of this host, for the published port".to_owned())
        }
        (false, None) => (
            "an address of this host",
            "in INPUT of the host on which the proxy listens, for its port".to_owned(),
        ),
    };
    Finding::warn(
        "clients-as-one",
        format!("all {connections} connections to {to} come from {from}, {whose}"),
        format!(
            "a limit for each client takes them for one: put it {place}, before the proxy \
             (docker-proxy, rootlessport, slirp4netns) or masquerade that hides their addresses"
        ),
    )
}

/// Connections that outlive their listener; `open` has the local port of each.
pub fn listener_gone(listeners: &[Socket], open: impl Iterator<Item = u16>) -> Option<Finding> {
    let listening: HashSet<u16> = listeners.iter().map(|it| it.local.port()).collect();
    let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
    for port in open.filter(|port| !listening.contains(port)) {
        *counts.entry(port).or_default() += 1;
    }
    let ports = counts.iter().map(|(port, open)| format!("{port} ({open} open sockets)"));
    let ports = ports.collect::<Vec<_>>().join(", ");
    (!counts.is_empty())
        .then(|| Finding::ok("listener-gone", format!("nothing listens any more on port {ports}")))
}

/// Open connections that conntrack does not look at, by the local port and whether it is of IPv4.
pub fn untracked(connections: impl Iterator<Item = (u16, bool)>) -> Option<Finding> {
    let mut ports: BTreeMap<u16, bool> = BTreeMap::new();
    let mut all = 0_usize;
    for (port, ipv4) in connections {
        *ports.entry(port).or_default() |= ipv4;
        all += 1;
    }
    // Rules for IPv4 alone leave IPv6 untracked on the same port.
    let name = |(port, ipv4): (&u16, &bool)| match ipv4 {
        true => port.to_string(),
        false => format!("{port} (of IPv6 clients)"),
    };
    let ports: Vec<_> = ports.iter().map(name).collect();
    (all > 0).then(|| {
        Finding::ok(
            "untracked",
            format!(
                "{all} open connections to port {} are not tracked, so no limit could count them; a \
                 rule with connlimit or ct count for the port would make conntrack see new ones",
                ports.join(", ")
            ),
        )
    })
}

/// Sockets that no process has any more.
pub fn closing(sockets: usize) -> Finding {
    Finding::ok("half-closed-held", format!("{sockets} sockets that the kernel is closing"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_table_is_judged_by_its_fill() {
        for (entries, verdict) in
            [(79, Verdict::Ok), (80, Verdict::Warn), (94, Verdict::Warn), (95, Verdict::Bad)]
        {
            let figures = Table { entries, maximum: Some(100), ..Table::default() };
            assert_eq!(fill(&figures).verdict, verdict, "{entries} %");
        }
        let unknown = conntrack(&Table { drop: 1, ..Table::default() });
        assert!(unknown.iter().all(|finding| !finding.advice.contains("max=0")));
        let advice = fill(&Table { entries: 99, maximum: Some(100), ..Table::default() }).advice;
        assert_eq!(advice, "sysctl -w net.netfilter.nf_conntrack_max=200");
    }

    #[test]
    fn a_listen_queue_is_judged_by_its_fill() {
        assert_eq!(queue(0, 0).verdict, Verdict::Ok);
        assert_eq!(queue(1, 0).verdict, Verdict::Warn, "a limit of 0 may be one that is not shown");
        assert_eq!(queue(1, 3).verdict, Verdict::Ok);
        assert_eq!(queue(2, 4).verdict, Verdict::Warn);
        assert_eq!(queue(4, 4).verdict, Verdict::Bad);
    }
}
