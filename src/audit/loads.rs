//! What each limit has to bear: the connections that it counts together.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::plays::{Group, Plays, group};
use crate::firewall::play::{Certainty, Counts, Hit, Played};
use crate::firewall::value::Answer;
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
    /// The destination, where they are counted by that.
    pub to: Option<IpNet>,
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
    /// Its rule refuses nobody: it logs, counts or marks.
    pub only_notes: bool,
    /// Of the open sockets that it counts for sure those whose client it surely refuses beyond it. Known where it
    /// has no place left, as the next is.
    pub refused: usize,
    /// Of the open sockets those whose client gets in all the same.
    pub passing: usize,
}

impl Load {
    /// Whether no rule refuses what exceeds it, as far as this is known.
    pub fn is_noted(&self) -> bool {
        self.only_notes || self.passing > 0 && self.passing == self.held
    }

    /// Whether the limit has no place left, as far as can be told.
    pub fn is_full(&self) -> bool {
        self.has_no_place() && !self.is_noted()
    }

    fn has_no_place(&self) -> bool {
        self.held > 0 && self.held.saturating_mul(self.times) >= size(self.limit)
    }

    /// Whether conntrack has fewer entries that the limit can count than it has to count of what is
    /// open; `None` where that cannot be told.
    pub fn is_uncounted(&self) -> Option<bool> {
        if self.is_noted() {
            Some(false)
        } else if self.counted < self.held_for_sure {
            Some(true)
        } else if self.counted < self.held {
            None
        } else {
            Some(false)
        }
    }

    /// Whether more is held than the limit allows, by clients that it refuses; `None` where that cannot be
    /// told. Who gets in all the same takes places of others.
    pub fn is_over(&self) -> Option<bool> {
        // Its list may have so many of them.
        let most = self.held.saturating_sub(self.passing).saturating_mul(self.times);
        if self.is_noted() || most <= size(self.limit) {
            Some(false)
        } else if self.refused > size(self.limit) {
            Some(true)
        } else {
            None
        }
    }
}

/// What each limit has to bear, group by group: connections that it counts together.
pub fn loads(views: impl IntoIterator<Item = View> + Clone, plays: &mut Plays<'_>) -> Vec<Load> {
    let mut all: Vec<_> = gather(views, plays, |_, _| {}).into_values().collect();
    all.sort_by_key(|load| (load.rule, Reverse(load.held_for_sure), Reverse(load.held), load.net));
    all
}

/// What bears more than its limit allows, with the sockets that it counts and whose clients it refuses, for sure.
pub fn overloads(
    views: impl IntoIterator<Item = View> + Clone,
    plays: &mut Plays<'_>,
) -> Vec<(Load, Vec<Socket>)> {
    let mut sockets: HashMap<Group, Vec<Socket>> = HashMap::new();
    let groups = gather(views, plays, |group, view| {
        sockets.entry(group.clone()).or_default().extend(view.socket);
    });
    let over = groups.into_iter().filter(|(_, load)| load.is_over() == Some(true));
    over.map(|(group, load)| (load, sockets.remove(&group).unwrap_or_default())).collect()
}

/// The groups of connections that limits count together; `note` is told each socket that is counted and whose
/// client is refused for sure, of those that have no place left.
fn gather(
    views: impl IntoIterator<Item = View> + Clone,
    plays: &mut Plays<'_>,
    mut note: impl FnMut(&Group, &View),
) -> HashMap<Group, Load> {
    let mut groups: HashMap<Group, Load> = HashMap::new();
    if plays.limiter.rules.is_empty() {
        return groups;
    }
    let incoming = |view: &View| !view.is_outgoing();
    for view in views.clone().into_iter().filter(incoming) {
        let (is_open, is_counted) = (is_open(&view), view.is_counted());
        if !is_open && !is_counted {
            continue;
        }
        let played = plays.of(&view);
        for Meeting { group, hit, rule, is_sure, times } in meetings(&played, plays, &view) {
            let peer = view.client().addr();
            let load = groups.entry(group.clone()).or_insert_with(|| Load {
                group,
                rule,
                net: plays.net(rule, &view),
                to: plays.to(rule, &view),
                client: Some(peer),
                port: plays.port(rule, &view),
                limit: hit.limit.count,
                held: 0,
                held_for_sure: 0,
                counted: 0,
                times: 1,
                only_notes: plays.limiter.rules.get(rule).is_some_and(|rule| rule.notes),
                refused: 0,
                passing: 0,
            });
            load.client = load.client.filter(|client| *client == peer);
            load.held += usize::from(is_open);
            load.held_for_sure += usize::from(is_open && is_sure);
            load.times = load.times.max(times);
            load.counted += usize::from(is_counted);
        }
    }
    if groups.values().any(Load::is_full) {
        for view in views.into_iter().filter(incoming).filter(is_open) {
            let played = plays.of(&view);
            for Meeting { group, hit, rule, is_sure, .. } in meetings(&played, plays, &view) {
                let Some(load) = groups.get_mut(&group).filter(|load| load.has_no_place()) else {
                    continue;
                };
                match plays.refuses(hit, rule, &view) {
                    Answer::Yes if is_sure => {
                        load.refused += 1;
                        note(&group, &view);
                    }
                    Answer::No => load.passing += 1,
                    _ => {}
                }
            }
        }
    }
    groups
}

/// A limit that counts a connection, or may.
struct Meeting<'p> {
    group: Group,
    hit: &'p Hit,
    /// Index of the rule.
    rule: usize,
    is_sure: bool,
    /// How often the connection meets the list.
    times: usize,
}

fn meetings<'p>(played: &'p Played, plays: &Plays<'_>, view: &View) -> Vec<Meeting<'p>> {
    // A list without room, and one that loses what is not tracked, measure no source.
    let hits = || played.hits.iter().filter(|hit| hit.counts == Counts::Yes);
    let one = |(at, first): (usize, &'p Hit)| {
        // By two rules of one list a socket is no second socket, though it may be counted twice.
        let is_same = |other: &&Hit| other.shares_list(first);
        if hits().take(at).any(|other| is_same(&other)) {
            return None;
        }
        // Of a rule that logs and one that drops, the latter limits.
        let found = |hit| plays.rule(hit, view).map(|index| (hit, index));
        let limits =
            |(_, at): &(_, usize)| plays.limiter.rules.get(*at).is_some_and(|it| !it.notes);
        let same = || hits().filter(is_same).filter_map(found);
        let (hit, rule) = same().find(limits).or_else(|| same().next())?;
        let certainty = hits().filter(is_same).map(|hit| hit.certainty).max();
        let is_sure = certainty > Some(Certainty::Perhaps) && hit.group.is_some();
        let times = hits().filter(is_same).count();
        Some(Meeting { group: group(hit, view), hit, rule, is_sure, times })
    };
    hits().enumerate().filter_map(one).collect()
}

pub(super) fn is_open(view: &View) -> bool {
    view.socket.is_some_and(|socket| socket.takes_a_slot())
}

pub(super) fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}
