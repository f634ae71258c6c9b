//! Rows of the table: what sources, networks, ports, processes or containers hold. Pure; what is
//! open, counted and limited is the audit's word.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use serde::Serialize;

use super::filter::Filter;
use crate::audit::asked::{Answered, listed};
use crate::audit::loads::Load;
use crate::audit::processes::Holder;
use crate::audit::sources::{Measure, sources};
use crate::firewall::limits::Limiter;
use crate::flow::{Connection, Endpoint};
use crate::history::record::Source;
use crate::reconcile::snapshot::View;
use crate::sockdiag::State;

/// Prefix lengths of a network.
const NETWORK: [u8; 2] = [24, 64];

/// What a row stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fold {
    /// A source as the limits count it.
    #[default]
    Source,
    /// A /24, of IPv6 a /64.
    Network,
    /// A local port.
    Port,
    /// A process.
    Process,
    /// A container.
    Container,
}

impl Fold {
    /// All of them, in the order of the key that goes on to the next.
    pub const ALL: [Self; 5] =
        [Self::Source, Self::Network, Self::Port, Self::Process, Self::Container];

    /// Its name on the command line and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Network => "network",
            Self::Port => "port",
            Self::Process => "process",
            Self::Container => "container",
        }
    }

    /// The next one.
    #[must_use]
    pub fn next(self) -> Self {
        next(&Self::ALL, self)
    }
}

/// What rows are sorted by, the largest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Open sockets.
    #[default]
    Open,
    /// Entries that a limiter counts.
    Counted,
    /// Places that are left, the fewest first.
    Left,
    /// Half-closed sockets.
    HalfClosed,
    /// Sockets that wait to be accepted.
    Waiting,
    /// Age of the oldest half-close.
    Oldest,
    /// Bytes that wait to be read.
    RecvQueue,
    /// Bytes that wait to be acknowledged.
    SendQueue,
    /// Repairs of the last minute.
    Repairs,
    /// By name.
    Name,
}

impl Sort {
    /// All of them, in the order of the columns.
    pub const ALL: [Self; 10] = [
        Self::Open,
        Self::Counted,
        Self::Left,
        Self::HalfClosed,
        Self::Waiting,
        Self::Oldest,
        Self::RecvQueue,
        Self::SendQueue,
        Self::Repairs,
        Self::Name,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Counted => "counted",
            Self::Left => "left",
            Self::HalfClosed => "half-closed",
            Self::Waiting => "waiting",
            Self::Oldest => "oldest",
            Self::RecvQueue => "recv-q",
            Self::SendQueue => "send-q",
            Self::Repairs => "repairs",
            Self::Name => "name",
        }
    }

    /// The next one.
    #[must_use]
    pub fn next(self) -> Self {
        next(&Self::ALL, self)
    }
}

/// A connection, with what is known of its socket.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Both tables' view.
    pub view: View,
    /// Who has the socket.
    pub holder: Option<Holder>,
    /// No application has accepted it yet.
    pub waits: bool,
}

/// What one look has shown.
#[derive(Debug, Default)]
pub struct Seen {
    /// When, in RFC 3339.
    pub at: String,
    /// The namespace.
    pub netns: String,
    /// Every connection of the scope that this host has not opened.
    pub connections: Vec<Shown>,
    /// Of the past instead: what sources held.
    pub past: Vec<Source>,
    /// The limits, and what they bear.
    pub limiter: Limiter,
    /// What each of them bears.
    pub loads: Vec<Load>,
    /// What limits said, where they were asked.
    pub asked: Vec<Answered>,
    /// Seconds that sockets are known to be half-closed, by cookie.
    pub half_closed: HashMap<u64, u64>,
    /// Repairs of the last minute, by peer.
    pub repairs: HashMap<IpAddr, u64>,
    /// Whether a daemon guards the namespace.
    pub is_guarded: bool,
    /// Its defence level.
    pub level: Option<u64>,
    /// Entries of the conntrack table, and how many it takes.
    pub table: (u64, Option<u64>),
}

/// One row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The source, network, port, process or container.
    pub name: String,
    /// Sockets that are open on the server's side.
    pub open: usize,
    /// Entries that a limiter counts.
    pub counted: usize,
    /// The limit that it is nearest to.
    pub limit: Option<u32>,
    /// Whether more is open than that; null where that cannot be told.
    pub over_limit: Option<bool>,
    /// How many the limit's own list holds, where it was asked.
    pub listed: Option<u32>,
    /// How many that limit allows; another one than that of `limit` may be the first to refuse.
    #[serde(skip)]
    pub listed_limit: Option<u32>,
    /// Open sockets that the peer has half-closed.
    pub half_closed: usize,
    /// Sockets that wait to be accepted.
    pub waiting: usize,
    /// Seconds since the oldest half-close, where a daemon knows.
    pub oldest_seconds: Option<u64>,
    /// Bytes that applications have not read.
    pub recv_queue: u64,
    /// Bytes that peers have not acknowledged.
    pub send_queue: u64,
    /// Repairs of the last minute, where a daemon knows.
    pub repairs: Option<u64>,
    /// The process that holds most of it.
    pub process: Option<String>,
    /// The container that holds most of it.
    pub container: Option<String>,
}

/// The sum of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Rows.
    pub rows: usize,
    /// Open sockets.
    pub open: usize,
    /// Counted entries.
    pub counted: usize,
    /// Half-closed sockets.
    pub half_closed: usize,
    /// Sockets that wait to be accepted.
    pub waiting: usize,
    /// Rows over their limit.
    pub over_limit: usize,
}

impl Totals {
    /// Of these rows.
    pub fn of(rows: &[Row]) -> Self {
        let sum = |of: fn(&Row) -> usize| rows.iter().map(of).sum();
        Self {
            rows: rows.len(),
            open: sum(|row| row.open),
            counted: sum(|row| row.counted),
            half_closed: sum(|row| row.half_closed),
            waiting: sum(|row| row.waiting),
            over_limit: rows.iter().filter(|row| row.over_limit == Some(true)).count(),
        }
    }
}

impl Seen {
    /// The rows of the connections that a filter lets through, sorted.
    pub fn rows(&self, fold: Fold, filter: &Filter, sort: Sort, is_reversed: bool) -> Vec<Row> {
        let mut groups: BTreeMap<String, Vec<&Shown>> = BTreeMap::new();
        let measure = self.measure(fold);
        for connection in self.connections.iter().filter(|it| filter.admits(it)) {
            groups.entry(group(fold, measure, connection)).or_default().push(connection);
        }
        let limits = self.limits(fold);
        let mut rows: Vec<_> =
            groups.into_iter().map(|(name, group)| self.row(name, &group, &limits)).collect();
        rows.extend(self.past_rows(fold, measure, filter));
        rows.retain(|row| row.open + row.counted + row.waiting > 0);
        rows.sort_by(|one, other| {
            let order = (key(sort, one), &one.name).cmp(&(key(sort, other), &other.name));
            if is_reversed { order.reverse() } else { order }
        });
        rows
    }

    fn past_rows(&self, fold: Fold, measure: Measure<'_>, filter: &Filter) -> Vec<Row> {
        let mut rows: BTreeMap<String, Row> = BTreeMap::new();
        let mut together = BTreeSet::new();
        for past in &self.past {
            let local = Endpoint::new(IpAddr::from([0, 0, 0, 0]), past.port);
            let connection = Connection::new(local, Endpoint::new(past.source, 0));
            let view = View { connection, socket: None, entry: None };
            let connection = Shown { view, holder: None, waits: false };
            if !filter.admits(&connection) {
                continue;
            }
            let name = group(fold, measure, &connection);
            let row = rows.entry(name.clone()).or_insert_with(|| Row { name, ..Row::default() });
            row.open += size(past.open);
            row.counted += size(past.counted);
            row.half_closed += size(past.half_closed);
            if matches!(fold, Fold::Source | Fold::Network) {
                // At several ports, or of several sources, by several limits: the smallest.
                row.limit = row.limit.into_iter().chain(past.limit).min();
                if past.limit.is_some_and(|limit| past.open > limit.into()) {
                    row.over_limit = Some(true);
                }
                if past.net.is_some() || fold == Fold::Network {
                    together.insert(row.name.clone());
                }
            }
        }
        // Two ports may have one limit together, and a network more than its sources here.
        for row in rows.values_mut().filter(|row| row.over_limit.is_none()) {
            let fits = row.limit.is_some_and(|limit| size(limit.into()) >= row.open);
            row.over_limit = (fits && !together.contains(&row.name)).then_some(false);
        }
        rows.into_values().collect()
    }

    /// The connections of a row.
    pub fn members(&self, fold: Fold, filter: &Filter, name: &str) -> Vec<&Shown> {
        let measure = self.measure(fold);
        let is_member = |it: &&Shown| filter.admits(it) && group(fold, measure, it) == name;
        self.connections.iter().filter(is_member).collect()
    }

    /// Open sockets, whatever is filtered.
    pub fn open(&self) -> usize {
        let views = self.connections.iter().map(|it| it.view);
        let all = sources(views, self.everything(), &[], &HashMap::new());
        let past = self.past.iter().map(|past| size(past.open));
        all.iter().map(|part| part.held).chain(past).sum()
    }

    /// No source apart from another.
    fn everything(&self) -> Measure<'_> {
        Measure { mask: 0, mask6: 0, limit: None, limiter: &self.limiter }
    }

    fn measure(&self, fold: Fold) -> Measure<'_> {
        let [mask, mask6] = match fold {
            Fold::Network => NETWORK,
            _ => {
                [self.limiter.prefix(true).unwrap_or(32), self.limiter.prefix(false).unwrap_or(128)]
            }
        };
        Measure { mask, mask6, limit: None, limiter: &self.limiter }
    }

    /// Limits go by the whole of a source, whatever is filtered.
    fn limits(&self, fold: Fold) -> HashMap<String, (Option<u32>, Option<bool>)> {
        if !matches!(fold, Fold::Source | Fold::Network) {
            return HashMap::new();
        }
        let views = self.connections.iter().map(|it| it.view);
        let all = sources(views, self.measure(fold), &self.loads, &HashMap::new());
        all.into_iter().map(|it| (it.net.to_string(), (it.limit, it.over_limit))).collect()
    }

    fn row(
        &self,
        name: String,
        group: &[&Shown],
        limits: &HashMap<String, (Option<u32>, Option<bool>)>,
    ) -> Row {
        let views = group.iter().map(|it| it.view);
        let parts = sources(views, self.everything(), &[], &self.half_closed);
        let mut row = Row { name, ..Row::default() };
        for part in parts {
            row.open += part.held;
            row.counted += part.counted;
            row.half_closed += part.sockets.get(&State::CloseWait).copied().unwrap_or(0);
            row.oldest_seconds = row.oldest_seconds.max(part.oldest_half_close);
        }
        let sockets = || group.iter().filter_map(|it| it.view.socket);
        row.waiting = group.iter().filter(|it| it.waits).count();
        row.recv_queue = sockets().map(|socket| u64::from(socket.recv_queue)).sum();
        row.send_queue = sockets().map(|socket| u64::from(socket.send_queue)).sum();
        if self.is_guarded {
            let mut peers: Vec<_> = group.iter().map(|it| it.view.client().addr()).collect();
            peers.sort_unstable();
            peers.dedup();
            row.repairs = Some(peers.iter().filter_map(|peer| self.repairs.get(peer)).sum());
        }
        let holders = || group.iter().filter_map(|it| it.holder.as_ref());
        row.process = most(holders().map(Holder::process));
        row.container = most(holders().filter_map(|it| it.container.clone()));
        if let Some((limit, over)) = limits.get(&row.name) {
            (row.limit, row.over_limit) = (*limit, *over);
            let said = row.name.parse().ok().and_then(|net| listed(net, &self.asked));
            row.listed = said.map(|it| it.count);
            row.listed_limit = said.map(|it| it.limit);
        }
        row
    }
}

fn key(sort: Sort, row: &Row) -> Reverse<i128> {
    let size = |n: usize| i128::try_from(n).unwrap_or(i128::MAX);
    Reverse(match sort {
        Sort::Open => size(row.open),
        Sort::Counted => size(row.counted),
        Sort::Left => row.limit.map_or(i128::MIN, |limit| size(row.open) - i128::from(limit)),
        Sort::HalfClosed => size(row.half_closed),
        Sort::Waiting => size(row.waiting),
        Sort::Oldest => row.oldest_seconds.map_or(-1, i128::from),
        Sort::RecvQueue => row.recv_queue.into(),
        Sort::SendQueue => row.send_queue.into(),
        Sort::Repairs => row.repairs.map_or(-1, i128::from),
        Sort::Name => 0,
    })
}

/// The row that a connection belongs to.
fn group(fold: Fold, measure: Measure<'_>, connection: &Shown) -> String {
    let holder = connection.holder.as_ref();
    match fold {
        Fold::Source | Fold::Network => measure.net(connection.view.client().addr()).to_string(),
        Fold::Port => format!(":{}", connection.view.connection.local.port()),
        Fold::Process => holder.map_or("-".to_owned(), Holder::process),
        Fold::Container => {
            holder.and_then(|it| it.container.clone()).unwrap_or_else(|| "-".to_owned())
        }
    }
}

/// The one behind `this`, and behind the last the first.
fn next<V: Copy + PartialEq>(all: &[V], this: V) -> V {
    let behind = all.iter().cycle().skip_while(|it| **it != this).nth(1);
    behind.copied().unwrap_or(this)
}

fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn most(names: impl Iterator<Item = String>) -> Option<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use ipnet::IpNet;

    use super::super::fixture::{connection, seen};
    use super::*;
    use crate::audit::asked::Answer;
    use crate::firewall::play::LimitAt;

    #[test]
    fn rows_add_up_by_whatever_they_are_folded() {
        let seen = seen();
        let all = Filter::default();
        for fold in Fold::ALL {
            let totals = Totals::of(&seen.rows(fold, &all, Sort::Open, false));
            assert_eq!((totals.open, totals.half_closed), (6, 2), "{fold:?}");
        }
        let names = |fold| {
            let rows = seen.rows(fold, &all, Sort::Open, false);
            rows.into_iter().map(|row| format!("{} {}", row.name, row.open)).collect::<Vec<_>>()
        };
        assert_eq!(names(Fold::Network), ["198.51.100.0/24 5", "2001:db8:1::/64 1"]);
        assert_eq!(names(Fold::Port), [":80 4", ":443 2"]);
        assert_eq!(names(Fold::Process), ["7/nginx 6"]);
        let left = seen.rows(Fold::Source, &all, Sort::Name, true);
        assert_eq!(left[0].name, "2001:db8:1::7/128");
        assert_eq!(seen.members(Fold::Port, &all, ":443").len(), 2);
    }

    #[test]
    fn what_is_oldest_and_what_waits_is_the_groups() {
        let mut seen = seen();
        seen.half_closed = [(1, 30), (2, 40)].into();
        seen.is_guarded = true;
        seen.repairs = [("198.51.100.7".parse().unwrap(), 3)].into();
        seen.connections.push(connection("198.51.100.7:99", 80, State::Established, 99));
        seen.connections[6].waits = true;
        let rows = seen.rows(Fold::Source, &Filter::default(), Sort::Repairs, false);
        assert_eq!(
            (rows[0].oldest_seconds, rows[0].waiting, rows[0].repairs),
            (Some(40), 1, Some(3))
        );
        assert_eq!(rows[1].repairs, Some(0));
    }

    #[test]
    fn what_a_list_of_others_holds_is_not_said_of_a_source() {
        let mut seen = seen();
        let [one, other]: [IpAddr; 2] =
            ["198.51.100.7", "198.51.100.8"].map(|addr| addr.parse().unwrap());
        // By something else than the source: counted together are the connections of one client.
        let all: IpNet = "0.0.0.0/0".parse().unwrap();
        let group = (LimitAt { chain: 0, rule: 0, step: 0 }, None, Some(one));
        let limit = Some((0, 40));
        let (more, decides) = (Some(31), String::new());
        let answer = Answer { group, net: all, port: None, more, at_least: None, limit, decides };
        let clients = [one].into();
        let asked = Answered {
            rule: 0,
            whose: all.into(),
            clients,
            held: None,
            is_at_limit: false,
            answer,
        };
        seen.asked = vec![asked];
        let rows = seen.rows(Fold::Source, &Filter::default(), Sort::Open, false);
        let of = |addr: IpAddr| {
            let row = rows.iter().find(|row| row.name == format!("{addr}/32")).unwrap();
            (row.listed, row.listed_limit)
        };
        assert_eq!((of(one), of(other)), ((Some(9), Some(40)), (None, None)));
    }
}
