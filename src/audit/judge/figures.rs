//! The figures of the host: its conntrack table, its handshakes, its listen queues.

use crate::audit::figures::{Table, Tcp};
use crate::audit::finding::Finding;
use crate::flow::Endpoint;

/// A table this full, in percent, is worth a look.
const FULL_WARN: u64 = 80;

/// From here on the kernel's gc deletes closing entries (`nf_conntrack_max95`).
const FULL_BAD: u64 = 95;

/// More entries than this for each bucket make look-ups slow.
const PER_BUCKET: u64 = 8;

/// A timeout so long for all half-closed connections fills the table with those that are over.
const LONG_CLOSE_WAIT: u64 = 600;

/// By when a server that probes its idle clients has sent a packet (`net.ipv4.tcp_keepalive_time`), seconds.
const KEEPALIVE: u64 = 7200;

/// A queue this full, in percent.
const QUEUE_WARN: u64 = 50;

const QUEUE_ADVICE: &str =
    "the application does not accept: raise its workers, its listen backlog and net.core.somaxconn";

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
            "connections are picked up midway: a forgotten one may come back with client and server \
             swapped, and is not counted",
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

/// Idle connections, where a limit counts; `is_kept`: a daemon lengthens the time of those that it guards.
pub fn idle(figures: &Table, is_kept: bool) -> Option<Finding> {
    const ID: &str = "idle-timeout";
    let seconds = figures.timeout_established?;
    let what = format!("idle connections are forgotten after {seconds} s");
    Some(if seconds >= KEEPALIVE {
        Finding::ok(ID, what)
    } else if is_kept {
        Finding::ok(ID, format!("{what}; ctkeep keeps those of guarded ports"))
    } else {
        Finding::warn(
            ID,
            format!(
                "{what}: whose sockets stay open, and who is silent for so long, gets the limit again"
            ),
            "ctkeep run keeps them, or sysctl -w \
             net.netfilter.nf_conntrack_tcp_timeout_established=432000",
        )
    })
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
        let what = format!("{syn_recv} handshakes wait in all, tcp_max_syn_backlog {backlog}");
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

/// The handshakes that wait at one listener: the kernel takes as many as its queue of connections is long
/// (`inet_csk_reqsk_queue_is_full()`).
pub fn handshakes(listener: Endpoint, waiting: usize, backlog: u32) -> Option<Finding> {
    let (waiting, backlog) = (u64::try_from(waiting).unwrap_or(u64::MAX), u64::from(backlog));
    let is_near = waiting > 0 && waiting.saturating_mul(100) >= backlog.saturating_mul(FULL_WARN);
    is_near.then(|| {
        Finding::warn(
            "syn-backlog",
            format!("{listener}: {waiting} handshakes wait, its listen queue takes {backlog}"),
            "a longer listen queue of the server; net.core.somaxconn is its bound",
        )
    })
}

/// One listen queue with this backlog; `None` where it is not known (`netstat` shows none).
///
/// The kernel takes one more than the backlog before the queue is full (`sk_acceptq_is_full()`).
pub fn queue(waiting: u32, backlog: Option<u32>) -> Finding {
    const ID: &str = "listen-queue-full";
    let Some(backlog) = backlog else {
        let what = format!("{waiting} wait to be accepted");
        return match waiting {
            0 => Finding::ok(ID, what),
            _ => Finding::warn(ID, what, QUEUE_ADVICE),
        };
    };
    if waiting > backlog {
        let what = format!(
            "{waiting} wait, and the backlog is {backlog}: none more is taken until some are accepted"
        );
        return Finding::bad(ID, what, QUEUE_ADVICE);
    }
    let what = format!("{waiting} of {backlog} wait to be accepted");
    match u64::from(waiting) * 100 {
        full if waiting > 0 && full >= u64::from(backlog) * QUEUE_WARN => {
            Finding::warn(ID, what, QUEUE_ADVICE)
        }
        _ => Finding::ok(ID, what),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::finding::Verdict;

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
    fn handshakes_are_judged_by_the_queue_of_their_listener() {
        let said = |waiting, backlog| handshakes("0.0.0.0:80".parse().unwrap(), waiting, backlog);
        assert_eq!([said(0, 0), said(0, 5), said(3, 5)], [None, None, None]);
        for (waiting, backlog) in [(4, 5), (6, 5), (1, 0)] {
            let found = said(waiting, backlog).map(|it| (it.id, it.verdict));
            assert_eq!(found, Some(("syn-backlog", Verdict::Warn)), "{waiting} of {backlog}");
        }
    }

    #[test]
    fn a_listen_queue_is_judged_by_its_fill() {
        assert_eq!(queue(0, None).verdict, Verdict::Ok);
        assert_eq!(queue(1, None).verdict, Verdict::Warn, "a backlog that is not shown");
        for (waiting, backlog, verdict) in [
            (0, 0, Verdict::Ok),
            (1, 0, Verdict::Bad),
            (1, 3, Verdict::Ok),
            (2, 4, Verdict::Warn),
            (4, 4, Verdict::Warn),
            (5, 4, Verdict::Bad),
        ] {
            assert_eq!(queue(waiting, Some(backlog)).verdict, verdict, "{waiting} of {backlog}");
        }
    }
}
