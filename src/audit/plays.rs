//! The SYNs of connections, played through the rules: which limits count each, and together with what.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;

use ipnet::IpNet;

use super::arrivals::{self, Arrivals};
use crate::conntrack::Status;
use crate::firewall::limits::{Key, LimitRule, Limiter};
use crate::firewall::packet::{Interface, Syn};
use crate::firewall::play::{Certainty, Counts, Hit, LimitAt, Played, Player};
use crate::firewall::tracking::translates_what_comes_in;
use crate::firewall::value::Answer;
use crate::firewall::{Ruleset, published};
use crate::flow::Endpoint;
use crate::reconcile::evidence::{Arrival, Evidence};
use crate::reconcile::snapshot::View;

/// The SYNs of connections, played through the rules: those of one source to one endpoint once.
#[derive(Debug)]
pub struct Plays<'r> {
    pub(super) limiter: &'r Limiter,
    player: Player<'r>,
    arrivals: Option<&'r Arrivals>,
    behind: Option<&'r HashSet<IpAddr>>,
    siblings: Option<&'r Evidence>,
    /// Of IPv4, of IPv6.
    may_translate: [bool; 2],
    /// Several ports may lead to one endpoint, likewise.
    are_several: [bool; 2],
    played: HashMap<Alike, Rc<Played>>,
    /// How surely a limit refuses what exceeds it, likewise.
    refused: HashMap<(Alike, LimitAt), Answer>,
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
            refused: HashMap::new(),
        }
    }

    /// What it plays with.
    pub fn player(&self) -> &Player<'r> {
        &self.player
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
        let status = view.entry.and_then(|entry| entry.status);
        let is_expected = status.is_some_and(Status::is_expected);
        let is_taken_up = is_taken_up(view);
        let syn =
            Syn { asked, is_forwarded, is_expected, is_taken_up, ..Syn::new(source, destination) };
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
        if syn.is_forwarded && syn.interface == Interface::loopback() {
            return Rc::new(of_this_host(player.limits(&syn), view));
        }
        let key = key(&syn);
        let played = self.played.entry(key).or_insert_with(|| Rc::new(player.limits(&syn)));
        played.clone()
    }

    /// The rule that surely keeps this connection out of conntrack.
    pub fn left_out(&mut self, view: &View) -> Option<String> {
        let played = self.of(view);
        let (chain, rule) = played.notrack.filter(|_| played.tracked == Some(false))?;
        if is_taken_up(view) { None } else { self.player.place(chain, rule) }
    }

    /// Whether a limit counts this connection, or may.
    pub fn is_limited(&mut self, view: &View) -> bool {
        let played = self.of(view);
        played.tracked != Some(false) && !played.hits.is_empty()
    }

    /// Whether no rule but a limit that is exceeded stops the SYN of this connection.
    pub fn only_limits_stop(&self, view: &View) -> bool {
        let admitted =
            |is_exceeded| self.player.play(&self.syn(view), &mut |_| is_exceeded).admitted();
        admitted(Some(false)) == Some(true) && admitted(Some(true)) == Some(false)
    }

    /// How surely this limit refuses the client of a connection that exceeds it.
    pub(super) fn refuses(&mut self, hit: &Hit, rule: usize, view: &View) -> Answer {
        match self.limiter.rules.get(rule) {
            // Another rule bans by that.
            Some(rule) if rule.remembers => return Answer::Yes,
            Some(rule) if rule.notes => return Answer::No,
            _ => {}
        }
        let (syn, player) = (self.syn(view), &self.player);
        let key = (key(&syn), hit.at);
        *self.refused.entry(key).or_insert_with(|| player.exceeding(&syn, hit.at).refused)
    }

    /// Whether a connection gets in though it exceeds this limit: others say how many do.
    pub fn is_passed(&self, view: &View, limit: LimitAt) -> bool {
        self.player.exceeding(&self.syn(view), limit).admitted() == Some(true)
    }

    /// Whether a rate decides if a connection that exceeds this limit is refused.
    pub fn is_rated(&self, view: &View, limit: LimitAt) -> bool {
        self.player.exceeding(&self.syn(view), limit).refused == Answer::Sometimes
    }

    /// The limits that this connection meets.
    pub fn met(&mut self, view: &View) -> Vec<Met> {
        let played = self.of(view);
        let met = |hit: &Hit| {
            let rule = self.rule(hit, view)?;
            let net = self.net(rule, view);
            let (limit, is_sure) = (hit.limit.count, hit.certainty > Certainty::Perhaps);
            let (group, port) = (group(hit, view), self.port(rule, view));
            let is_twice = played.hits.iter().filter(|other| other.shares_list(hit)).count() > 1;
            Some(Met { group, rule, net, port, limit, is_sure, is_twice })
        };
        played.hits.iter().filter_map(met).collect()
    }

    /// Whose connections a limit counts together with this one.
    pub(super) fn net(&self, rule: usize, view: &View) -> IpNet {
        let prefix = self.limiter.rules.get(rule).and_then(LimitRule::source_prefix);
        network(view.client().addr(), prefix.unwrap_or(0))
    }

    /// The destination, as the limit sees it, where it counts by that.
    pub(super) fn to(&self, rule: usize, view: &View) -> Option<IpNet> {
        let rule = self.limiter.rules.get(rule)?;
        let Key::Destination(prefix) = rule.limit.key else { return None };
        let to = if rule.is_before_nat() { self.asked(view)? } else { view.connection.local };
        Some(network(to.addr(), prefix))
    }

    /// The port, where a limit counts each on its own.
    pub(super) fn port(&self, rule: usize, view: &View) -> Option<u16> {
        let key = &self.limiter.rules.get(rule)?.limit.key;
        matches!(key, Key::SourceAndPort(_)).then(|| view.connection.local.port())
    }

    /// The limit, among those that were found, in which a connection is counted.
    pub(super) fn rule(&self, hit: &Hit, view: &View) -> Option<usize> {
        let (peer, port) = (view.client().addr(), view.connection.local.port());
        let rules = || self.limiter.rules.iter().enumerate().filter(|(_, it)| it.at == hit.at);
        let found = rules().find(|(_, rule)| rule.covers(peer, port)).or_else(|| rules().next());
        found.map(|(index, _)| index)
    }
}

/// What connections that are played alike have in common.
type Alike = (IpAddr, Option<Endpoint>, Endpoint, [bool; 2]);

fn key(syn: &Syn) -> Alike {
    (syn.source, syn.asked, syn.destination, [syn.is_expected, syn.is_taken_up])
}

/// Conntrack has an entry of the connection that was not begun by its SYN.
fn is_taken_up(view: &View) -> bool {
    view.entry.is_some_and(|it| it.reply == view.connection.sent() && it.is_picked_up())
}

/// What a container has from an address of this host: it opened that itself, which passes OUTPUT alone, or the
/// address hides a client (masquerade), which only the entry shows.
fn of_this_host(played: Played, view: &View) -> Played {
    let opened_here = view.entry.is_some();
    let perhaps = |hit: Hit| Hit { group: None, certainty: Certainty::Perhaps, ..hit };
    let hits = played.hits.into_iter().filter(|_| !opened_here).map(perhaps);
    Played { hits: hits.collect(), ..played }
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
    /// Whether the connection meets its list more than once, and may be counted as often.
    pub is_twice: bool,
}

/// What one list counts together: the list, its key where that is known, else the source.
pub type Group = (LimitAt, Option<Vec<u8>>, Option<IpAddr>);

pub(super) fn group(hit: &Hit, view: &View) -> Group {
    // Where it cannot be told what is counted together, it is at least one source.
    let apart = hit.group.is_none().then(|| view.client().addr());
    (hit.list, hit.group.clone(), apart)
}

pub(super) fn network(addr: IpAddr, bits: u8) -> IpNet {
    IpNet::new(addr, bits).unwrap_or_else(|_| IpNet::from(addr)).trunc()
}
