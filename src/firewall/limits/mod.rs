//! Which connection limits the rules set, what for, and what passes before them. Pure.

mod earlier;
mod key;
mod told;
mod unjudged;
mod walk;
mod witness;

use std::fmt;
use std::net::IpAddr;

pub use self::earlier::EarlierAccept;
pub use self::key::Key;
pub(super) use self::unjudged::reached;
pub use self::unjudged::{Unjudged, Where};
pub use self::witness::{Sight, Witness};
use super::play::{CONNTRACK, LimitAt, NAT_DST, Player};
use super::set::Set;
use super::{Chain, Family, Hook, Match, Outcome, Ports, Ruleset, Step};

/// How many connections, and of what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Connections.
    pub count: u32,
    /// `connlimit-above`, `ct count over`: the rule is for what exceeds the count; else for what
    /// stays within.
    pub over: bool,
    /// Connections of equal keys are counted together.
    pub key: Key,
    /// It names no key at all (`ct count over 5`), where others say that all is meant (mask 0).
    pub is_keyless: bool,
    /// Counted in a dynamic set: the kernel sweeps it every second, with no packet at all.
    pub dynamic: bool,
}

/// The set that a limit keeps its lists in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetUse {
    /// Its name.
    pub name: String,
    /// The kernel's number of it.
    pub handle: u64,
    /// Most elements.
    pub size: Option<u32>,
    /// Elements now.
    pub elements: usize,
}

impl SetUse {
    /// Whether a source that is not in it finds no place.
    pub fn is_full(&self) -> bool {
        self.size.is_some_and(|size| self.elements >= usize::try_from(size).unwrap_or(usize::MAX))
    }
}

/// A limit, where it stands, and which connections it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitRule {
    /// Family of its table.
    pub family: Family,
    /// Its table.
    pub table: String,
    /// The chain that it stands in.
    pub chain: String,
    /// Its place in the chain, from 1.
    pub position: usize,
    /// nf_tables' number of its rule.
    pub handle: Option<u64>,
    /// Where it stands in the rule set that it was found in.
    pub at: LimitAt,
    /// The set that its lists are in.
    pub set: Option<SetUse>,
    /// The base chain's hook.
    pub hook: Hook,
    /// The base chain's priority.
    pub priority: i32,
    /// What it counts.
    pub limit: Limit,
    /// Which packets reach it and are counted.
    pub matches: Match,
    /// What becomes of the packets that it is for.
    pub outcome: Outcome,
    /// What exceeds it is written to a log or a set, or marked: who exceeds it may be banned.
    pub tells: bool,
    /// Its rule has no verdict on what passes it, and changes nothing that another rule could look at: it
    /// logs or counts.
    pub notes: bool,
    /// Its rule writes to a set what passes it: another rule may ban it.
    pub remembers: bool,
    /// What leaves the chain before it, of the packets that it would be for.
    pub before: Vec<EarlierAccept>,
}

/// All that the rules say about limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limiter {
    /// Limits, in the order that a packet meets them, those for IPv6 alone at the end.
    pub rules: Vec<LimitRule>,
    /// Limits in tables that are switched off.
    pub dormant: Vec<LimitRule>,
    /// Ports whose packets are not tracked, each with the place of the rule.
    pub untracked: Vec<(Ports, String)>,
    /// Ports of which SYNs alone are not tracked, each with the place of the rule.
    pub untracked_syns: Vec<(Ports, String)>,
    /// What else is not tracked: packets of some clients, or to some destinations.
    pub untracked_of_some: Vec<Match>,
    /// Ports answered by SYNPROXY.
    pub synproxied: Vec<Ports>,
    /// Rules that count, remember or log SYNs to ports that a limit is for, and so what ctkeep sends in
    /// their clients' names.
    pub witnesses: Vec<Witness>,
    /// Limits that no packet comes to by which a client opens a connection.
    pub unjudged: Vec<Unjudged>,
    /// What could not be read.
    pub unread: Vec<String>,
}

impl Limiter {
    /// Finds the limits in a rule set.
    pub fn of(ruleset: &Ruleset) -> Self {
        let mut found = Self { unread: ruleset.unread.clone(), ..Self::default() };
        let player = Player::new(ruleset);
        for at in player.bases() {
            found.walk(&player, *at);
        }
        let Self { rules, witnesses, .. } = &mut found;
        // A limit's own rule is reported by what it logs or sets of packets that exceed it.
        let of_limits = |one: &Witness| {
            rules.iter().any(|rule| one.sees(rule))
                && rules.iter().all(|it| it.place() != one.place)
        };
        witnesses.retain(of_limits);
        for one in witnesses.iter_mut() {
            let mut behind = rules.iter().skip(one.limits);
            let behind = behind.find(|rule| one.sees(rule) && one.keeps_from(rule));
            one.is_of_nat &= behind.is_some_and(|rule| !one.is_beside(rule));
            one.before = behind.map(LimitRule::place);
        }
        witnesses.retain(|one| !one.is_choice());
        // Behind that: it takes away what `Witness::limits` counts.
        found.merge_ways();
        found.rules.sort_by_key(|rule| rule.family == Family::Ip6);
        found.unjudged = unjudged::find(&player);
        if ruleset.chains.iter().any(|chain| chain.is_dormant) {
            found.dormant = switched_off(ruleset);
        }
        for set in sets(ruleset).filter_map(|set| set.unread.as_ref()) {
            if !found.unread.contains(set) {
                found.unread.push(set.clone());
            }
        }
        found
    }

    /// A limit that opening packets come to is no other one for those that come another way: of what
    /// is untracked, say.
    fn merge_ways(&mut self) {
        let opening = self.rules.iter().filter(|rule| rule.matches.may_open());
        let opening: Vec<_> = opening.map(|rule| (rule.at, rule.hook)).collect();
        self.rules.retain(|it| it.matches.may_open() || !opening.contains(&(it.at, it.hook)));
    }

    /// Prefix length that all limits by source of one family count by, where they agree.
    pub fn prefix(&self, ipv4: bool) -> Option<u8> {
        let mut found = self
            .rules
            .iter()
            .filter(|rule| rule.family.covers(ipv4))
            .filter(|rule| rule.matches.ipv4.is_none_or(|wanted| wanted == ipv4))
            .filter_map(LimitRule::source_prefix)
            // One for both families may count by an address of the other.
            .filter(|bits| *bits <= if ipv4 { 32 } else { 128 });
        let first = found.next()?;
        found.all(|prefix| prefix == first).then_some(first)
    }

    /// The rule that keeps the connections of this local port out of conntrack.
    pub fn notrack(&self, port: u16) -> Option<&str> {
        place(&self.untracked, port)
    }

    /// The rule that keeps their SYNs alone out of it.
    pub fn notrack_of_syns(&self, port: u16) -> Option<&str> {
        place(&self.untracked_syns, port)
    }

    /// The limits that opening packets to a port of this host may meet.
    pub fn of_port(&self, port: u16) -> impl Iterator<Item = &LimitRule> {
        self.rules.iter().filter(move |rule| {
            rule.hook != Hook::Forward
                && (rule.is_before_nat() || rule.matches.ports.contains(port))
        })
    }
}

fn place(rules: &[(Ports, String)], port: u16) -> Option<&str> {
    rules.iter().find(|(ports, _)| ports.contains(port)).map(|(_, place)| place.as_str())
}

/// The limits of tables that are switched off, as they would be.
fn switched_off(ruleset: &Ruleset) -> Vec<LimitRule> {
    let awake = |chain: &Chain| Chain { is_dormant: false, ..chain.clone() };
    let chains = ruleset.chains.iter().filter(|chain| chain.is_dormant).map(awake).collect();
    let only = Ruleset { chains, unread: Vec::new() };
    Limiter::of(&only).rules
}

fn sets(ruleset: &Ruleset) -> impl Iterator<Item = &Set> {
    let steps =
        ruleset.chains.iter().flat_map(|chain| chain.rules.iter()).flat_map(|rule| &rule.steps);
    steps.filter_map(|step| match step {
        Step::Test(super::Test::In { set, .. }) | Step::Map(_, set) => Some(set.as_ref()),
        Step::Add(adding) => Some(adding.set.as_ref()),
        _ => None,
    })
}

impl LimitRule {
    /// `ip filter INPUT rule 3`.
    pub fn place(&self) -> String {
        format!("{} {} {} rule {}", self.family, self.table, self.chain, self.position)
    }

    /// How many it allows, by what it counts, and what it is for.
    pub fn words(&self) -> String {
        let all = if self.matches.is_for_all_protocols() { ", of any protocol" } else { "" };
        format!("at most {} {}{}{all}", self.limit.count, self.limit.key, self.matches)
    }

    /// Whether it is for clients of IPv4, or else of IPv6.
    pub fn is_of(&self, ipv4: bool) -> bool {
        self.family.covers(ipv4) && self.matches.ipv4.is_none_or(|wanted| wanted == ipv4)
    }

    /// Whether it sees ports as the client asked for them, before destination NAT.
    pub fn is_before_nat(&self) -> bool {
        self.hook == Hook::Ingress || self.hook == Hook::Prerouting && self.priority < NAT_DST
    }

    /// Whether it stands before conntrack: rules there know no state.
    pub fn is_before_conntrack(&self) -> bool {
        let is_early = self.hook == Hook::Prerouting && self.priority < CONNTRACK;
        self.hook == Hook::Ingress || is_early
    }

    /// Prefix length of the sources that are counted together; `None` where it is not by source.
    pub fn source_prefix(&self) -> Option<u8> {
        match self.limit.key {
            Key::Source(prefix) | Key::SourceAndPort(prefix) => Some(prefix),
            _ => None,
        }
    }

    /// Whether a connection of this peer to this port is one that it may count.
    pub fn covers(&self, peer: IpAddr, port: u16) -> bool {
        self.is_of(peer.is_ipv4())
            && self.matches.ports.contains(port)
            && self.matches.sources.iter().all(|(net, inside)| net.contains(&peer) == *inside)
            && !self
                .before
                .iter()
                .any(|before| matches!(before, EarlierAccept::Ports(p) if p.contains(port)))
    }
}

impl fmt::Display for LimitRule {
    /// `at most 40 from each /32 to port 80 (ip filter INPUT rule 1)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.words(), self.place())
    }
}
