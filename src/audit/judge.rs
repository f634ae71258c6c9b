//! Judges figures, rules, devices and units. Pure: the thresholds stand here and in docs/doctor.md.

use super::figures::{Table, Tcp};
use super::finding::Finding;
use super::limiter::{Before, LimitRule, Limiter};
use crate::host::link::Link;
use crate::host::ruleset::{Hook, Ports};
use crate::host::unit::Unit;

/// A table this full, in percent, is worth a look.
const FULL_WARN: u64 = 80;
/// From here on the kernel's gc deletes closing entries (`nf_conntrack_max95`).
const FULL_BAD: u64 = 95;
/// More entries than this for each bucket make look-ups slow.
const PER_BUCKET: u64 = 8;
/// A timeout so long for all half-closed connections fills the table with those that are over.
const LONG_CLOSE_WAIT: u64 = 600;
/// A queue this full, in percent.
const QUEUE_WARN: u64 = 50;

/// The conntrack table and its settings.
pub fn conntrack(figures: &Table) -> Vec<Finding> {
    let mut all = vec![fill(figures)];
    if figures.drop > 0 {
        all.push(Finding::warn(
            "table-dropped",
            format!("{} packets dropped for want of an entry since start", figures.drop),
            format!(
                "sysctl -w net.netfilter.nf_conntrack_max={}",
                figures.maximum.unwrap_or(0).saturating_mul(2)
            ),
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
            "entries older than the first listener never send events",
            "sysctl -w net.netfilter.nf_conntrack_events=1",
        )),
        None => {}
    }
    if let Some(seconds) = figures.timeout_close_wait {
        all.push(if seconds > LONG_CLOSE_WAIT {
            Finding::warn(
                "close-wait-timeout",
                format!("half-closed connections stay {seconds} s, with a socket or without"),
                "sysctl -w net.netfilter.nf_conntrack_tcp_timeout_close_wait=60 and let ctkeep run \
                 hold those that have one",
            )
        } else {
            Finding::ok("close-wait-timeout", format!("half-closed connections stay {seconds} s"))
        });
    }
    all
}

fn fill(figures: &Table) -> Finding {
    let entries = figures.entries;
    let Some(maximum) = figures.maximum.filter(|maximum| *maximum > 0) else {
        return Finding::ok("table-full", format!("{entries} entries"));
    };
    let percent = entries.saturating_mul(100) / maximum;
    let what = format!("{entries} of {maximum} entries ({percent} %)");
    let more = format!("sysctl -w net.netfilter.nf_conntrack_max={}", maximum.saturating_mul(2));
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
    if limiter.rules.is_empty() {
        all.push(Finding::warn(
            "no-limit",
            "no connlimit or ct count rule was found",
            "name the limit yourself: ctkeep audit --limit N",
        ));
    }
    for rule in &limiter.rules {
        all.push(one_limit(rule));
    }
    for port in ports {
        if let Some(place) = limiter.notrack(*port)
            && !limiter.synproxied.iter().any(|ports| ports.contains(*port))
        {
            all.push(Finding::bad(
                "port-untracked",
                format!("port {port} is not tracked ({place}): no limit can count it"),
                "delete the NOTRACK rule, or leave the port out of ctkeep: --port",
            ));
        }
    }
    all
}

fn one_limit(rule: &LimitRule) -> Finding {
    let hidden = rule.before.iter().filter_map(|before| match before {
        Before::Ports(ports) => Some(ports.clone()),
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
    if !rule.matches.is_opening() && !rule.before.contains(&Before::Established) {
        return Finding::warn(
            "limit-without-syn",
            format!("{rule} judges every packet: a stale RST itself frees the slot"),
            "add --syn (nft: ct state new) to the rule",
        );
    }
    if rule.hook == Hook::Forward {
        return Finding::ok("limit-forwarded", format!("{rule}, of what is forwarded"));
    }
    let nudged = match () {
        () if rule.before.contains(&Before::Loopback) => "loopback is accepted before it",
        () if !rule.matches.interfaces.is_empty() => "it is bound to an interface",
        () if !rule.matches.sources.is_empty() || rule.matches.narrowed => "not for every client",
        () => return Finding::ok("limit", rule.to_string()),
    };
    Finding::ok("limit", format!("{rule}; {nudged}"))
}

/// Devices that packets seem to come in by, and do not: those of a bridge, bond or VRF come in by
/// that one.
pub fn devices(links: &[Link], limiter: &Limiter) -> Vec<Finding> {
    let master = |link: &Link| links.iter().find(|other| Some(other.index) == link.master);
    let port_of = |name: &str| links.iter().find(|link| link.name == name).and_then(master);
    let mut all = Vec::new();
    for rule in &limiter.rules {
        let masters: Vec<_> =
            rule.matches.interfaces.iter().filter_map(|name| port_of(name)).collect();
        if let Some(master) = masters.first()
            && masters.len() == rule.matches.interfaces.len()
        {
            all.push(Finding::bad(
                "limit-interface",
                format!(
                    "{rule} is for {}, whose packets come in by {} {}: it never counts one",
                    rule.matches.interfaces.join(", "),
                    master.kind,
                    master.name
                ),
                format!("name {} in the rule", master.name),
            ));
        }
    }
    for link in links {
        let ports = links.iter().filter(|port| port.master == Some(link.index));
        let ports: Vec<_> = ports.map(|port| port.name.as_str()).collect();
        let what = match ports.as_slice() {
            [] => format!("{} {}", link.kind, link.name),
            ports => format!("{} {} of {}", link.kind, link.name, ports.join(", ")),
        };
        match link.kind.as_str() {
            "vrf" => all.push(Finding::warn(
                "ingress-device",
                format!("{what}: its clients are not in the main routing table"),
                "recount is not tested there: after a repair, compare by ctkeep audit",
            )),
            "bridge" | "bond" if !ports.is_empty() => {
                all.push(Finding::ok("ingress-device", format!("{what}: nudges come in by it")));
            }
            "vlan" => {
                all.push(Finding::ok("ingress-device", format!("{what}: nudges come in by it")));
            }
            _ => {}
        }
    }
    all
}

/// What the service may use. Thresholds: twice what 100 000 held connections in a few namespaces
/// take.
pub fn unit(unit: &Unit) -> Vec<Finding> {
    const TASKS: u64 = 32;
    const MEMORY_MIB: u64 = 256;
    const CPU: u64 = 50;
    const FILES: u64 = 256;
    let bounds = [
        ("unit-limits", "TasksMax", unit.tasks, TASKS, ""),
        ("unit-limits", "MemoryMax", unit.memory.map(|bytes| bytes >> 20), MEMORY_MIB, "M"),
        ("unit-limits", "CPUQuota", unit.cpu, CPU, "%"),
        ("open-files", "LimitNOFILE", unit.files, FILES, ""),
    ];
    let judge = |(id, name, bound, needed, sign): (_, &str, Option<u64>, u64, &str)| {
        let bound = bound?;
        Some(if bound < needed {
            Finding::warn(
                id,
                format!("process {}: {name}={bound}{sign}, tight with many connections", unit.pid),
                format!("{name}={needed}{sign} in the systemd unit"),
            )
        } else {
            Finding::ok(id, format!("{name}={bound}{sign}"))
        })
    };
    bounds.into_iter().filter_map(judge).collect()
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
        _ => Finding::ok("syncookies-off", "SYN cookies are on"),
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

/// One listen queue.
pub fn queue(waiting: u32, limit: u32) -> Finding {
    let what = format!("{waiting} of {limit} wait to be accepted");
    let advice = "the application does not accept: raise its workers, its listen backlog and \
                  net.core.somaxconn";
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

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::host::ruleset::{Family, Key, Limit, Match, Outcome};

    #[test]
    fn a_table_is_judged_by_its_fill() {
        for (entries, verdict) in
            [(79, Verdict::Ok), (80, Verdict::Warn), (94, Verdict::Warn), (95, Verdict::Bad)]
        {
            let figures = Table { entries, maximum: Some(100), ..Table::default() };
            assert_eq!(fill(&figures).verdict, verdict, "{entries} %");
        }
        let advice = fill(&Table { entries: 99, maximum: Some(100), ..Table::default() }).advice;
        assert_eq!(advice, "sysctl -w net.netfilter.nf_conntrack_max=200");
    }

    #[test]
    fn a_limit_bound_to_a_port_of_a_bridge_never_counts() {
        let link = |index, name: &str, kind: &str, master| {
            let (name, kind) = (name.to_owned(), kind.to_owned());
            Link { index, name, kind, master, is_loopback: false }
        };
        let links = [
            link(2, "eth0", "", Some(3)),
            link(3, "br0", "bridge", None),
            link(4, "eth1", "", None),
        ];
        let verdicts = |interface: &str| {
            let rule = LimitRule {
                family: Family::Ip,
                table: "filter".to_owned(),
                chain: "INPUT".to_owned(),
                position: 1,
                hook: Hook::Input,
                priority: 0,
                limit: Limit { count: 3, over: true, key: Key::Source(32), dynamic: false },
                matches: Match { interfaces: vec![interface.to_owned()], ..Match::default() },
                outcome: Outcome::Drop,
                before: Vec::new(),
            };
            let limiter = Limiter { rules: vec![rule], ..Limiter::default() };
            devices(&links, &limiter).iter().map(|f| (f.id, f.verdict)).collect::<Vec<_>>()
        };
        let bridge = ("ingress-device", Verdict::Ok);
        assert_eq!(verdicts("eth0"), [("limit-interface", Verdict::Bad), bridge]);
        assert_eq!(verdicts("br0"), [bridge]);
        assert_eq!(verdicts("eth1"), [bridge]);
    }

    #[test]
    fn a_service_is_judged_by_what_it_may_use() {
        let of = |unit: &Unit| {
            let findings = super::unit(unit);
            findings.iter().map(|f| (f.id, f.verdict)).collect::<Vec<_>>()
        };
        assert_eq!(of(&Unit::default()), []);
        let tight = Unit { tasks: Some(4), memory: Some(1 << 30), ..Unit::default() };
        assert_eq!(of(&tight), [("unit-limits", Verdict::Warn), ("unit-limits", Verdict::Ok)]);
        let few = Unit { files: Some(64), ..Unit::default() };
        assert_eq!(of(&few), [("open-files", Verdict::Warn)]);
    }

    #[test]
    fn a_listen_queue_is_judged_by_its_fill() {
        assert_eq!(queue(0, 0).verdict, Verdict::Ok);
        assert_eq!(queue(1, 3).verdict, Verdict::Ok);
        assert_eq!(queue(2, 4).verdict, Verdict::Warn);
        assert_eq!(queue(4, 4).verdict, Verdict::Bad);
    }
}
