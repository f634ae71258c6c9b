//! The same connections, added up for each source as a limiter would see them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;

use super::arrivals::{self, Arrivals};
use crate::firewall::limits::{Key, LimitRule, Limiter};
use crate::firewall::packet::Syn;
use crate::firewall::play::{Certainty, Counts, Hit, LimitAt, Played, Player};
use crate::firewall::tracking::translates_what_comes_in;
use crate::firewall::{Ruleset, published};
use crate::flow::Endpoint;
use crate::reconcile::evidence::{Arrival, Evidence};
use crate::reconcile::snapshot::View;
use crate::sockdiag::{Socket, State};

/// One source network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The network.
    pub net: IpNet,
    /// Sockets of the server's side by state.
    pub sockets: BTreeMap<State, usize>,
    /// Sockets that are open on the server's side: ESTABLISHED or CLOSE_WAIT.
    pub held: usize,
    /// Entries that a limiter counts.
    pub counted: usize,
    /// Open sockets without a counted entry.
    pub uncounted: usize,
    /// Counted entries without a socket.
    pub stale: usize,
    /// For how many seconds a daemon has held the oldest of its half-closed connections.
    pub oldest_half_close: Option<u64>,
    /// The limit that it is nearest to, or furthest beyond.
    pub limit: Option<u32>,
    /// Whether more sockets are held than that limit allows; `None` where that cannot be told.
    pub over_limit: Option<bool>,
    /// How many connections the list of a limit holds; `None` where it was not asked.
    pub listed: Option<Listed>,
}

/// What a limit said when it was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// So many connections of the source are on its list; where it is full, at least so many.
    pub count: u32,
    /// It lets no further one in.
    pub is_full: bool,
    /// How many it allows.
    pub limit: u32,
}

/// How sources are put together and what they are measured by.
#[derive(Clone, Copy, Debug)]
pub struct Measure<'l> {
    /// Prefix length of IPv4 sources.
    pub mask: u8,
    /// Prefix length of IPv6 sources.
    pub mask6: u8,
    /// The limit that the administrator names; goes before the rules.
    pub limit: Option<u32>,
    /// The limits that were found.
    pub limiter: &'l Limiter,
}

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
    /// No rule refuses what exceeds it: it is logged, counted or marked. Known of one that is full.
    pub is_noted: bool,
}

impl Load {
    /// Whether the limit has no place left, as far as can be told.
    pub fn is_full(&self) -> bool {
        self.held > 0 && self.held >= size(self.limit) && !self.is_noted
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
        } else if self.held > size(self.limit) {
            None
        } else {
            Some(false)
        }
    }
}

impl Measure<'_> {
    /// The source that an address belongs to.
    pub fn net(&self, addr: IpAddr) -> IpNet {
        network(addr, if addr.is_ipv4() { self.mask } else { self.mask6 })
    }
}

/// Sources of these connections, those that hurt most first. `ages` are seconds by the cookie of
/// the socket.
pub fn sources(
    views: impl IntoIterator<Item = View>,
    measure: Measure<'_>,
    loads: &[Load],
    ages: &HashMap<u64, u64>,
) -> Vec<Source> {
    let mut by_net: HashMap<IpNet, Source> = HashMap::new();
    // What this host has opened is no load of the peer's.
    for view in views.into_iter().filter(|view| !view.is_outgoing()) {
        let net = measure.net(view.client().addr());
        let source = by_net.entry(net).or_insert_with(|| Source {
            net,
            sockets: BTreeMap::new(),
            held: 0,
            counted: 0,
            uncounted: 0,
            stale: 0,
            oldest_half_close: None,
            limit: measure.limit,
            over_limit: Some(false),
            listed: None,
        });
        let counted = view.is_counted();
        source.counted += usize::from(counted);
        match view.socket {
            Some(socket) => {
                *source.sockets.entry(socket.state).or_default() += 1;
                source.held += usize::from(is_open(&view));
                source.uncounted += usize::from(is_open(&view) && !counted);
                if socket.state == State::CloseWait {
                    let age = ages.get(&socket.cookie.0).copied();
                    source.oldest_half_close = source.oldest_half_close.max(age);
                }
            }
            None => source.stale += usize::from(counted),
        }
    }
    let mut all: Vec<_> = by_net.into_values().collect();
    for source in &mut all {
        if let Some(limit) = measure.limit {
            source.over_limit = Some(source.held > size(limit));
        }
    }
    if measure.limit.is_none() {
        apply(&mut all, measure, loads);
    }
    all.sort_by_key(|source| {
        (
            Reverse(source.over_limit == Some(true)),
            Reverse(source.uncounted),
            Reverse(source.held),
            source.net,
        )
    });
    all
}

/// Gives each source the limit that its connections come nearest to.
fn apply(all: &mut [Source], measure: Measure<'_>, loads: &[Load]) {
    let mut nearest: HashMap<IpNet, (i64, u32, Option<bool>)> = HashMap::new();
    for load in loads {
        let Some(rule) = measure.limiter.rules.get(load.rule) else { continue };
        if rule.source_prefix().is_none() || load.is_noted {
            continue;
        }
        let left = i64::from(load.limit) - i64::try_from(load.held).unwrap_or(i64::MAX);
        let this = (left, load.limit, load.is_over());
        let best = nearest.entry(load.net).or_insert(this);
        *best = (*best).min(this);
    }
    for source in all {
        // The rule's networks and the report's may be of different size.
        let found = nearest.get(&source.net).copied().or_else(|| {
            let touches = |net: &IpNet| net.contains(&source.net) || source.net.contains(net);
            nearest.iter().filter(|(net, _)| touches(net)).map(|(_, found)| *found).min()
        });
        if let Some((_, limit, over)) = found {
            source.limit = Some(limit);
            source.over_limit = over;
        }
    }
}

/// The SYNs of connections, played through the rules: those of one source to one endpoint once.
#[derive(Debug)]
pub struct Plays<'r> {
    limiter: &'r Limiter,
    player: Player<'r>,
    arrivals: Option<&'r Arrivals>,
    behind: Option<&'r HashSet<IpAddr>>,
    siblings: Option<&'r Evidence>,
    /// Of IPv4, of IPv6.
    may_translate: [bool; 2],
    /// Several ports may lead to one endpoint, likewise.
    are_several: [bool; 2],
    played: HashMap<(IpAddr, Option<Endpoint>, Endpoint), Rc<Played>>,
}

impl<'r> Plays<'r> {
    /// Plays through these rules, in which `limiter` was found.
    pub fn new(limiter: &'r Limiter, rules: &'r Ruleset) -> Self {
        let translates = |ipv4| {
            let mut of_it = rules.chains.iter().filter(|chain| chain.family.covers(ipv4));
            of_it.any(translates_what_comes_in)
        };
        Self {
            limiter,
            player: Player::new(rules),
            arrivals: None,
            behind: None,
            siblings: None,
            may_translate: [true, false].map(translates),
            are_several: [true, false].map(|ipv4| published::are_several(rules, ipv4)),
            played: HashMap::new(),
        }
    }

    /// The same, where this is known of their siblings: a connection without an entry asked for what they
    /// asked for.
    #[must_use]
    pub fn beside(self, siblings: &'r Evidence) -> Self {
        Self { siblings: Some(siblings), ..self }
    }

    /// The same, where it is known by which devices clients come in.
    #[must_use]
    pub fn arriving(self, arrivals: &'r Arrivals) -> Self {
        Self { arrivals: Some(arrivals), ..self }
    }

    /// The same, where these addresses are of other namespaces, to which packets are forwarded.
    #[must_use]
    pub fn behind(self, behind: &'r HashSet<IpAddr>) -> Self {
        Self { behind: Some(behind), ..self }
    }

    /// The smallest limit that surely counts a connection, and the network whose connections it counts
    /// together.
    pub fn limit_of(&mut self, view: &View) -> Option<(u32, IpNet)> {
        let played = self.of(view);
        let is_sure = |hit: &&Hit| hit.counts == Counts::Yes && hit.certainty > Certainty::Perhaps;
        let hit = played.hits.iter().filter(is_sure).min_by_key(|hit| hit.limit.count)?;
        Some((hit.limit.count, self.net(self.rule(hit, view)?, view)))
    }

    /// The SYN that opened, or would open, a connection.
    fn syn(&self, view: &View) -> Syn {
        let (source, destination) = (view.client().addr(), view.connection.local);
        let has_entry = view.entry.is_some_and(|entry| entry.reply == view.connection.sent());
        let [ipv4, ipv6] = self.are_several;
        let are_several = if destination.addr().is_ipv4() { ipv4 } else { ipv6 };
        // What its siblings asked for it need not have asked for.
        let is_sure = |asked: &Endpoint| has_entry || !are_several || *asked == destination;
        let asked = self.asked(view).filter(is_sure);
        let is_forwarded = self.behind.is_some_and(|behind| behind.contains(&destination.addr()));
        let syn = Syn { asked, is_forwarded, ..Syn::new(source, destination) };
        match self.arrivals.and_then(|arrivals| arrivals.get(&arrivals::of(view))) {
            Some(interface) => Syn { interface: interface.clone(), ..syn },
            None => syn,
        }
    }

    /// What the client of a connection asked for, as rules before destination NAT see it; `None` where
    /// rules may have translated it and neither its entry nor its siblings show from what.
    pub fn asked(&self, view: &View) -> Option<Endpoint> {
        let entry = view.entry.filter(|entry| entry.reply == view.connection.sent());
        if let Some(entry) = entry {
            return Some(entry.orig.dst);
        }
        if self.siblings.is_some_and(|it| it.direct.contains(&view.connection)) {
            return Some(view.connection.local);
        }
        let siblings = self.siblings.and_then(|it| it.arrival(view, &Default::default()));
        let [ipv4, ipv6] = self.may_translate;
        let may_translate = if view.connection.local.addr().is_ipv4() { ipv4 } else { ipv6 };
        match siblings {
            Some(Arrival::Translated(asked, _)) => Some(asked),
            // A port of this host may be one that rules lead to, as well as one of a container.
            Some(Arrival::Various) | None if may_translate => None,
            _ => Some(view.connection.local),
        }
    }

    /// What the SYN of this connection met, or would meet today.
    pub fn of(&mut self, view: &View) -> Rc<Played> {
        let (syn, player) = (self.syn(view), &self.player);
        let key = (syn.source, syn.asked, syn.destination);
        let played = self.played.entry(key).or_insert_with(|| Rc::new(player.limits(&syn)));
        played.clone()
    }

    /// Whether a limit counts this connection, or may.
    pub fn is_limited(&mut self, view: &View) -> bool {
        let played = self.of(view);
        played.tracked != Some(false) && !played.hits.is_empty()
    }

    /// Whether no rule but a limit that is exceeded stops the SYN of this connection.
    pub fn only_limits_stop(&self, view: &View) -> bool {
        let admitted =
            |is_exceeded| self.player.play(&self.syn(view), &mut |_| is_exceeded).admitted;
        admitted(Some(false)) == Some(true) && admitted(Some(true)) == Some(false)
    }

    /// Whether a connection that exceeds this limit gets in all the same.
    fn is_noted(&self, hit: &Hit, rule: &LimitRule, view: &View) -> bool {
        if rule.remembers {
            return false;
        }
        rule.notes || self.is_passed(view, hit.at)
    }

    /// Whether a connection gets in though it exceeds this limit: others say how many do.
    pub fn is_passed(&self, view: &View, limit: LimitAt) -> bool {
        self.player.passes(&self.syn(view), limit) == Some(true)
    }

    /// The limits that this connection meets.
    pub fn met(&mut self, view: &View) -> Vec<Met> {
        let played = self.of(view);
        let met = |hit: &Hit| {
            let rule = self.rule(hit, view)?;
            let net = self.net(rule, view);
            let (limit, is_sure) = (hit.limit.count, hit.certainty > Certainty::Perhaps);
            let (group, port) = (group(hit, view), self.port(rule, view));
            Some(Met { group, rule, net, port, limit, is_sure })
        };
        played.hits.iter().filter_map(met).collect()
    }

    /// Whose connections a limit counts together with this one.
    fn net(&self, rule: usize, view: &View) -> IpNet {
        let prefix = self.limiter.rules.get(rule).and_then(LimitRule::source_prefix);
        network(view.client().addr(), prefix.unwrap_or(0))
    }

    /// The port, where a limit counts each on its own.
    fn port(&self, rule: usize, view: &View) -> Option<u16> {
        let key = &self.limiter.rules.get(rule)?.limit.key;
        matches!(key, Key::SourceAndPort(_)).then(|| view.connection.local.port())
    }

    /// The limit, among those that were found, in which a connection is counted.
    fn rule(&self, hit: &Hit, view: &View) -> Option<usize> {
        let (peer, port) = (view.client().addr(), view.connection.local.port());
        let rules = || self.limiter.rules.iter().enumerate().filter(|(_, it)| it.at == hit.at);
        let found = rules().find(|(_, rule)| rule.covers(peer, port)).or_else(|| rules().next());
        found.map(|(index, _)| index)
    }
}

/// A limit that a connection meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Met {
    /// What it counts together.
    pub group: Group,
    /// Index of the rule.
    pub rule: usize,
    /// Whose connections it counts together.
    pub net: IpNet,
    /// To which port, where each is counted on its own.
    pub port: Option<u16>,
    /// How many it allows, the element's own where it has one.
    pub limit: u32,
    /// Whether it counts the connection for sure.
    pub is_sure: bool,
}

/// What one list counts together: the list, its key where that is known, else the source.
pub type Group = (LimitAt, Option<Vec<u8>>, Option<IpAddr>);

fn group(hit: &Hit, view: &View) -> Group {
    // Where it cannot be told what is counted together, it is at least one source.
    let apart = hit.group.is_none().then(|| view.client().addr());
    (hit.list, hit.group.clone(), apart)
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
        for (at, hit) in hits().enumerate() {
            let Some(index) = plays.rule(hit, &view) else { continue };
            // By two rules of one list a socket is no second socket.
            let is_same = |other: &&Hit| (other.list, &other.group) == (hit.list, &hit.group);
            if hits().take(at).any(|other| is_same(&other)) {
                continue;
            }
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
                is_noted: plays.limiter.rules.get(index).is_some_and(|rule| rule.notes),
            });
            load.client = load.client.filter(|client| *client == peer);
            load.held += usize::from(is_open);
            // Asked once, where it matters.
            if is_open
                && load.held == size(hit.limit.count).max(1)
                && let Some(rule) = plays.limiter.rules.get(index)
            {
                load.is_noted = plays.is_noted(hit, rule, &view);
            }
            load.held_for_sure += usize::from(is_open && is_sure);
            load.counted += usize::from(is_counted);
        }
    }
    groups
}

fn is_open(view: &View) -> bool {
    view.socket.is_some_and(|socket| socket.takes_a_slot())
}

fn network(addr: IpAddr, bits: u8) -> IpNet {
    IpNet::new(addr, bits).unwrap_or_else(|_| IpNet::from(addr)).trunc()
}

fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}
