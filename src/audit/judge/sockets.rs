//! Sockets: who holds them, which of them limits do not count, and what has become of their entries.

use std::collections::{BTreeMap, HashSet};

use crate::audit::asked::{Answered, Holds};
use crate::audit::finding::Finding;
use crate::audit::fronts::Front;
use crate::audit::whose::Whose;
use crate::flow::Endpoint;
use crate::reconcile::outgoing::Survey;
use crate::sockdiag::Socket;

/// What to do about connections that a limit does not see.
const RECOUNTS: &str =
    "ctkeep reconcile makes the limit count them again; ctkeep run keeps it right";
/// The kernel's own, in seconds.
const CLOSE_WAIT: u64 = 60;

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

/// Sockets that no process has any more.
pub fn closing(sockets: usize) -> Finding {
    Finding::ok("half-closed-held", format!("{sockets} sockets that the kernel is closing"))
}

/// A source that holds more than its limit; `counted` are the entries that a limiter can count.
pub fn over(source: impl Into<Whose>, held: usize, limit: u32, counted: usize) -> Finding {
    let whose: Whose = source.into();
    let advice = if counted >= held {
        "it comes down as the server closes them, or by ctkeep kill --over-limit; if rules were loaded since, \
         ctkeep recount"
    } else {
        RECOUNTS
    };
    Finding::bad(
        "source-over-limit",
        format!("{whose}: {held} sockets, limit {limit}, {counted} have an entry that counts"),
        advice,
    )
}

/// One that holds more than a limit that may not count them all.
pub fn perhaps_over(source: impl Into<Whose>, held: usize, limit: u32) -> Finding {
    let whose: Whose = source.into();
    Finding::warn(
        "source-over-limit",
        format!(
            "{whose}: {held} sockets, limit {limit}, if it is for all of them and refuses them"
        ),
        "ctkeep audit --ask says what its list holds",
    )
}

/// A limit whose list one connection meets several times: kernels that look for what is on a list once a jiffy
/// (5.19 and later, and what was backported) count it each time.
pub fn met_twice(source: impl Into<Whose>, held: usize, limit: u32, times: usize) -> Finding {
    let whose: Whose = source.into();
    let least = usize::try_from(limit).unwrap_or(usize::MAX) / times;
    Finding::warn(
        "limit-met-twice",
        format!(
            "{whose}: {held} sockets, limit {limit}, but each connection meets its list {times} times, and \
             most kernels count it as often: no more than {least} get in then"
        ),
        "let one rule alone count, and jump from it to a chain that logs and refuses",
    )
}

/// A source, not beyond its limit, of which conntrack has fewer entries that a limiter can count than
/// the limit has to count of it: for sure, or perhaps.
pub fn uncounted(
    source: impl Into<Whose>,
    held: usize,
    is_sure: bool,
    limit: u32,
    counted: usize,
) -> Finding {
    const ID: &str = "limit-uncounted";
    let what = format!(
        "{}: {held} sockets, limit {limit}, {counted} have an entry that counts",
        source.into()
    );
    if !is_sure {
        let what = format!("{what}, if it is for all of them");
        return Finding::warn(ID, what, "ctkeep audit --ask says what its list holds");
    }
    Finding::bad(ID, format!("{what}: it lets in as many more"), RECOUNTS)
}

/// Whether the two tables agree, by the names of the classes that say otherwise; `is_limited` where a
/// limit was found, or may be there.
pub fn tables(disagreeing: &[String], is_limited: bool) -> Finding {
    const ID: &str = "tables-disagree";
    let what = disagreeing.join(", ");
    match (disagreeing, is_limited) {
        ([], _) => Finding::ok(ID, "sockets and conntrack entries agree"),
        (_, true) => Finding::bad(ID, what, format!("ctkeep audit names them; {RECOUNTS}")),
        (_, false) => {
            Finding::warn(ID, what, "no limit is there to feel it; ctkeep audit names them")
        }
    }
}

/// A list that lacks connections, as the limit itself has shown, or may.
pub fn lacking(answered: &Answered, rule: &str) -> Option<Finding> {
    let Answered { answer, held, .. } = answered;
    let listed = answer.listed()?;
    let whose = answered.whose;
    let to = answer.port.map_or(String::new(), |port| format!(" to port {port}"));
    let more = answer.more.unwrap_or(0);
    let what = |held: usize| {
        format!(
            "{whose}{to}: {held} sockets, the list of {rule} has {listed}: it lets {more} more in"
        )
    };
    match (answered.holds(), held) {
        (Holds::No, Some((sure, _))) => Some(Finding::bad(
            "limit-lacking",
            what(*sure),
            "ctkeep recount shows the limit its open connections; ctkeep run keeps it right",
        )),
        (Holds::Perhaps, Some((_, most))) => Some(Finding::warn(
            "limit-lacking",
            format!("{}; whether it is for all of them cannot be told", what(*most)),
            "where it is, ctkeep recount shows the limit its open connections",
        )),
        _ => None,
    }
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
            "no limit behind that tells them apart: put it {place}, before the proxy \
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

/// Why open connections have no entry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WithoutEntry {
    /// Conntrack looks at them, and no limit is for them.
    Seen,
    /// Conntrack does not look at any of their kind.
    Unseen,
    /// This rule leaves them out.
    LeftOut(String),
}

/// Open connections without an entry, by the local port and whether they are of IPv4.
pub fn untracked(
    connections: impl Iterator<Item = (u16, bool)>,
    why: &WithoutEntry,
) -> Option<Finding> {
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
    let ports = ports.join(", ");
    (all > 0).then(|| {
        Finding::ok(
            "untracked",
            match why {
                WithoutEntry::LeftOut(place) => format!(
                    "{all} open connections to port {ports} are not tracked: {place} leaves them out, so no limit \
                     counts them"
                ),
                WithoutEntry::Seen => format!(
                    "{all} open connections to port {ports} have no entry, and no limit is for them: \
                     forgotten, or older than the rules that make conntrack look"
                ),
                WithoutEntry::Unseen => format!(
                    "{all} open connections to port {ports} are not tracked, so no limit could count \
                     them; a rule with connlimit or ct count for the port would make conntrack see new \
                     ones"
                ),
            },
        )
    })
}

/// Half-closed connections that this host opened: `kept` is what the daemon says of them, where it looks
/// after them; `timeout` is that of CLOSE_WAIT, in seconds. Rules may translate some, or not (`may_translate`).
pub fn outgoing(
    seen: Survey,
    kept: Option<[usize; 3]>,
    timeout: Option<u64>,
    may_translate: bool,
) -> Option<Finding> {
    const ID: &str = "outgoing";
    let (timeout, is_long) = (timeout?, timeout? > CLOSE_WAIT);
    let open =
        format!("{} half-closed connections that this host or its containers opened", seen.sockets);
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
        // The translation went with the entry.
        None if may_translate && seen.without_entry > 0 => Some(Finding::warn(
            ID,
            format!(
                "{open}, {} have no entry: whether they were translated, and are cut off now, cannot be told",
                seen.without_entry
            ),
            "outgoing = \"extend\" in ctkeep.toml keeps what is not lost yet: docs/outgoing.md",
        )),
        None => some.map(|()| Finding::ok(ID, open)),
    }
}
