//! What each limit has to bear: the connections that it counts together.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::plays::{Group, Plays, group};
use crate::firewall::play::{Certainty, Counts, Hit};
use crate::reconcile::snapshot::View;
use crate::sockdiag::Socket;

/// What one limit allows one group of connections, and what they take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// What the limit counts together.
    pub group: Group,
    /// Index of the rule.
    pub rule: usize,
    /// Whose connections: a source, or all of a family where the rule does not go by the source.
    pub net: IpNet,
    /// The client, where all of them are of one.
    pub client: Option<IpAddr>,
    /// The port, where they are counted for each port on its own.
    pub port: Option<u16>,
    /// How many it allows, the element's own where it has one.
    pub limit: u32,
    /// Open sockets that it counts, or may count.
    pub held: usize,
    /// Those of them that it counts for sure.
    pub held_for_sure: usize,
    /// Entries that the rule can count.
    pub counted: usize,
    /// How often one connection meets the list, at most: the kernel may count it so often.
    pub times: usize,
    /// No rule refuses what exceeds it: it is logged, counted or marked. Known of one that is full.
    pub is_noted: bool,
    /// What exceeds it may get in by a rule behind it, such as a rate. Known of one that is full.
    pub may_pass: bool,
}

impl Load {
    /// Whether the limit has no place left, as far as can be told.
    pub fn is_full(&self) -> bool {
        self.held > 0 && self.held_at_most() >= size(self.limit) && !self.is_noted
    }

    /// How many its list may have of what is open.
    fn held_at_most(&self) -> usize {
        self.held.saturating_mul(self.times)
    }

    /// Whether conntrack has fewer entries that the limit can count than it has to count of what is
    /// open; `None` where that cannot be told.
    pub fn is_uncounted(&self) -> Option<bool> {
        if self.is_noted {
            Some(false)
        } else if self.counted < self.held_for_sure {
            Some(true)
        } else if self.counted < self.held {
            None
        } else {
            Some(false)
        }
    }

    /// Whether more is held than the limit allows; `None` where that cannot be told.
    pub fn is_over(&self) -> Option<bool> {
        if self.is_noted {
            Some(false)
        } else if self.held_for_sure > size(self.limit) {
            Some(true)
        } else if self.held_at_most() > size(self.limit) {
            None
        } else {
            Some(false)
        }
    }
}

/// What each limit has to bear, group by group: connections that it counts together.
pub fn loads(views: impl IntoIterator<Item = View>, plays: &mut Plays<'_>) -> Vec<Load> {
    let mut all: Vec<_> = gather(views, plays, |_, _| {}).into_values().collect();
    all.sort_by_key(|load| (load.rule, Reverse(load.held_for_sure), Reverse(load.held), load.net));
    all
}

/// What bears more than its limit allows, with the sockets that are counted together for sure.
pub fn overloads(
    views: impl IntoIterator<Item = View>,
    plays: &mut Plays<'_>,
) -> Vec<(Load, Vec<Socket>)> {
    let mut sockets: HashMap<Group, Vec<Socket>> = HashMap::new();
    let groups = gather(views, plays, |group, view| {
        sockets.entry(group.clone()).or_default().extend(view.socket);
    });
    let over = groups.into_iter().filter(|(_, load)| load.is_over() == Some(true));
    over.map(|(group, load)| (load, sockets.remove(&group).unwrap_or_default())).collect()
}

/// The groups of connections that limits count together; `note` is told each socket that is counted
/// for sure.
fn gather(
    views: impl IntoIterator<Item = View>,
    plays: &mut Plays<'_>,
    mut note: impl FnMut(&Group, &View),
) -> HashMap<Group, Load> {
    let mut groups: HashMap<Group, Load> = HashMap::new();
    if plays.limiter.rules.is_empty() {
        return groups;
    }
    for view in views.into_iter().filter(|view| !view.is_outgoing()) {
        let (is_open, is_counted) = (is_open(&view), view.is_counted());
        if !is_open && !is_counted {
            continue;
        }
        let played = plays.of(&view);
        // A list without room, and one that loses what is not tracked, measure no source.
        let hits = || played.hits.iter().filter(|hit| hit.counts == Counts::Yes);
        for (at, first) in hits().enumerate() {
            // By two rules of one list a socket is no second socket, though it may be counted twice.
            let is_same = |other: &&Hit| (other.list, &other.group) == (first.list, &first.group);
            if hits().take(at).any(|other| is_same(&other)) {
                continue;
            }
            // Of a rule that logs and one that drops, the latter limits.
            let found = |hit| plays.rule(hit, &view).map(|index| (hit, index));
            let limits =
                |(_, at): &(_, usize)| plays.limiter.rules.get(*at).is_some_and(|it| !it.notes);
            let same = || hits().filter(is_same).filter_map(found);
            let Some((hit, index)) = same().find(limits).or_else(|| same().next()) else {
                continue;
            };
            let certainty = hits().filter(is_same).map(|hit| hit.certainty).max();
            let (peer, group) = (view.client().addr(), group(hit, &view));
            let is_sure = certainty > Some(Certainty::Perhaps) && hit.group.is_some();
            if is_open && is_sure {
                note(&group, &view);
            }
            let load = groups.entry(group.clone()).or_insert_with(|| Load {
                group,
                rule: index,
                net: plays.net(index, &view),
                client: Some(peer),
                port: plays.port(index, &view),
                limit: hit.limit.count,
                held: 0,
                held_for_sure: 0,
                counted: 0,
                times: 1,
                is_noted: plays.limiter.rules.get(index).is_some_and(|rule| rule.notes),
                may_pass: false,
            });
            load.client = load.client.filter(|client| *client == peer);
            load.held += usize::from(is_open);
            // Asked once, where it matters.
            if is_open
                && load.held == size(hit.limit.count).max(1)
                && let Some(rule) = plays.limiter.rules.get(index)
            {
                let noted = plays.is_noted(hit, rule, &view);
                (load.is_noted, load.may_pass) = (noted == Some(true), noted.is_none());
            }
            load.held_for_sure += usize::from(is_open && is_sure);
            load.times = load.times.max(hits().filter(is_same).count());
            load.counted += usize::from(is_counted);
        }
    }
    groups
}

pub(super) fn is_open(view: &View) -> bool {
    view.socket.is_some_and(|socket| socket.takes_a_slot())
}

pub(super) fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}
