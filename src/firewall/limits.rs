//! Which connection limits the rules set, what for, and what passes before them. Pure.

use std::fmt;
use std::net::IpAddr;

use super::play::{CONNTRACK, LimitAt, NAT_DST, Player};
use super::rule::Threshold;
use super::scope::{self, Match};
use super::set::{Element, Set};
use super::value::{Field, Operand};
use super::{Base, Chain, Family, Hook, Outcome, Ports, Rule, Ruleset, Step};

/// Jumps nest at most so deep (`NFT_JUMP_STACK_SIZE`).
const DEPTH: usize = 16;
/// So many rules are walked for each base chain: rule sets of thousands of services fan out.
const STEPS: usize = 200_000;
/// So many limits are listed: each path to a limit that asks for other packets is one of its own.
const LIMITS: usize = 1000;
/// So many elements of one map, or with a limit of their own, are followed.
const ELEMENTS: usize = 256;

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

/// What a limit counts together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// Connections of a source network of this prefix length (for either family its own).
    Source(u8),
    /// The same, for each destination port on its own.
    SourceAndPort(u8),
    /// Connections to a destination network.
    Destination(u8),
    /// All that reach the rule.
    All,
    /// Something else, in words.
    Other(String),
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
    /// What leaves the chain before it, of the packets that it would be for.
    pub before: Vec<EarlierAccept>,
}

/// What a rule before a limit takes away from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EarlierAccept {
    /// What comes in by the loopback device.
    Loopback,
    /// Packets of established connections.
    Established,
    /// All packets to these ports: the limit never sees them.
    Ports(Ports),
    /// Certain packets, in words: for sure, or as far as can be told from outside.
    Some {
        /// Which.
        what: String,
        /// All of them pass.
        is_sure: bool,
    },
}

impl EarlierAccept {
    /// Whether all that it names passes.
    pub fn is_sure(&self) -> bool {
        !matches!(self, Self::Some { is_sure: false, .. })
    }

    /// Its name in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Established => "established",
            Self::Ports(_) => "ports",
            Self::Some { is_sure: true, .. } => "some",
            Self::Some { is_sure: false, .. } => "perhaps",
        }
    }
}

impl fmt::Display for EarlierAccept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("what comes in by lo"),
            Self::Established => f.write_str("packets of established connections"),
            Self::Ports(ports) => write!(f, "everything to port {ports}"),
            Self::Some { what, .. } => f.write_str(what),
        }
    }
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
    /// Ports answered by SYNPROXY.
    pub synproxied: Vec<Ports>,
    /// Rules that count, remember or log SYNs to ports that a limit is for, and so what ctkeep sends in
    /// their clients' names.
    pub witnesses: Vec<Witness>,
    /// What could not be read.
    pub unread: Vec<String>,
}

/// A rule that counts, remembers or logs SYNs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness {
    /// `ip filter INPUT rule 3`.
    pub place: String,
    /// What it does.
    pub sight: Sight,
    /// The place of the first limit behind it.
    pub before: Option<String>,
    /// The hook of its base chain.
    hook: Hook,
    matches: Match,
    /// So many limits come before it.
    limits: usize,
}

/// What a rule does with the SYNs that it sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Lets so many in a time on to what stands behind, by this match.
    Rate(String),
    /// Accepts so many in a time, by this match, which what stands behind does not see.
    Accepts(String),
    /// Remembers their sources, in this.
    Memory(String),
    /// Logs them.
    Log,
}

impl Witness {
    fn sees(&self, rule: &LimitRule) -> bool {
        // A packet is for this host or is forwarded, and meets the rules of one of the two.
        let is_elsewhere = matches!(
            (self.hook, rule.hook),
            (Hook::Input, Hook::Forward) | (Hook::Forward, Hook::Input)
        );
        !is_elsewhere && !self.matches.and(&rule.matches).never
    }
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
        for one in witnesses {
            let behind = rules.iter().skip(one.limits).find(|rule| one.sees(rule));
            one.before = behind.map(LimitRule::place);
        }
        // Behind that: it takes away what `Witness::limits` counts.
        found.merge_ways();
        found.rules.sort_by_key(|rule| rule.family == Family::Ip6);
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

    fn walk(&mut self, player: &Player<'_>, at: usize) {
        let Some(chain) = player.ruleset().chains.get(at) else { return };
        let Some(base) = &chain.base else { return };
        let mut walk =
            Walk { player, base, found: self, before: Vec::new(), path: Vec::new(), steps: STEPS };
        let ipv4 = match chain.family {
            Family::Ip => Some(true),
            Family::Ip6 => Some(false),
            _ => None,
        };
        walk.chain(at, chain, &Match { ipv4, ..Match::default() });
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

    /// Whether the connections of this local port are kept out of conntrack.
    pub fn notrack(&self, port: u16) -> Option<&str> {
        let rule = self.untracked.iter().find(|(ports, _)| ports.contains(port))?;
        Some(&rule.1)
    }

    /// The limits that opening packets to a port of this host may meet.
    pub fn of_port(&self, port: u16) -> impl Iterator<Item = &LimitRule> {
        self.rules.iter().filter(move |rule| {
            rule.hook != Hook::Forward
                && (rule.is_before_nat() || rule.matches.ports.contains(port))
        })
    }
}

/// The limits of tables that are switched off, as they would be.
fn switched_off(ruleset: &Ruleset) -> Vec<LimitRule> {
    let awake = |chain: &Chain| Chain { is_dormant: false, ..chain.clone() };
    let chains = ruleset.chains.iter().filter(|chain| chain.is_dormant).map(awake).collect();
    let only = Ruleset { chains, unread: Vec::new() };
    Limiter::of(&only).rules
}

fn sets(ruleset: &Ruleset) -> impl Iterator<Item = &Set> {
    let steps = ruleset.chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.steps);
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
        format!("at most {} {}{}", self.limit.count, self.limit.key, self.matches)
    }

    /// Whether it sees ports as the client asked for them, before destination NAT.
    pub fn is_before_nat(&self) -> bool {
        self.hook == Hook::Ingress || self.hook == Hook::Prerouting && self.priority < NAT_DST
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
        let ipv4 = peer.is_ipv4();
        self.family.covers(ipv4)
            && self.matches.ipv4.is_none_or(|wanted| wanted == ipv4)
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

impl fmt::Display for Key {
    /// In words: `from each /32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(prefix) => write!(f, "from each /{prefix}"),
            Self::SourceAndPort(prefix) => write!(f, "from each /{prefix} for each port"),
            Self::Destination(prefix) => write!(f, "to each /{prefix}"),
            Self::All => f.write_str("in all"),
            Self::Other(what) => write!(f, "for each {what}"),
        }
    }
}

/// One packet path, from a base chain down.
struct Walk<'p, 'r, 'f> {
    player: &'p Player<'r>,
    base: &'r Base,
    found: &'f mut Limiter,
    /// Rules met so far that take packets off the path.
    before: Vec<Earlier>,
    /// Chains between the base chain and the rule, with both ends.
    path: Vec<&'r Chain>,
    steps: usize,
}

/// A rule that takes packets off the path.
struct Earlier {
    matches: Match,
    /// Only those that stay within a limit.
    within: Option<u32>,
}

impl<'r> Walk<'_, 'r, '_> {
    fn chain(&mut self, at: usize, chain: &'r Chain, path: &Match) {
        // The kernel takes no rules that go round in circles; a text may have some.
        if self.path.len() > DEPTH || self.path.iter().any(|on_it| std::ptr::eq(*on_it, chain)) {
            return;
        }
        self.path.push(chain);
        let mut back = Vec::new();
        for (index, rule) in chain.rules.iter().enumerate() {
            let Some(steps) = self.steps.checked_sub(1) else { break };
            self.steps = steps;
            let place = LimitAt { chain: at, rule: index, step: 0 };
            if self.rule(chain, rule, place, path, &mut back) {
                break;
            }
        }
        // What goes back to the calling chain is on the path again.
        back.into_iter().rev().for_each(|at| {
            if at < self.before.len() {
                self.before.remove(at);
            }
        });
        self.path.pop();
    }

    /// Whether no packet comes to the next rule.
    fn rule(
        &mut self,
        chain: &'r Chain,
        rule: &'r Rule,
        mut place: LimitAt,
        path: &Match,
        back: &mut Vec<usize>,
    ) -> bool {
        let mut matches = path.clone();
        let mut limited: Option<Threshold> = None;
        for (number, step) in rule.steps.iter().enumerate() {
            place.step = number;
            if matches.never {
                return false;
            }
            match step {
                Step::Test(super::Test::In { values, set, is: true })
                    if set.elements().iter().any(|element| element.limit.is_some()) =>
                {
                    limited = self.elements(chain, rule, place, (values, set), &matches);
                    matches = matches.and(&Match::of(&super::Test::In {
                        values: values.clone(),
                        set: set.clone(),
                        is: true,
                    }));
                }
                Step::Test(test) => {
                    if let super::Test::Rate(what) = test {
                        self.witness(chain, rule, &matches, rate(rule, what.clone()));
                    }
                    matches = matches.and(&Match::of(test));
                }
                Step::Count(counting) => {
                    let limit = limit(counting.limit, &counting.by, false);
                    self.limit(chain, rule, place, limit, None, matches.clone());
                    limited = Some(counting.limit);
                }
                Step::Add(adding) => {
                    matches.is_rated |= adding.is_sometimes;
                    if adding.limit.is_none() {
                        let set = format!("set {}", adding.set.name);
                        let sight =
                            if adding.is_sometimes { rate(rule, set) } else { Sight::Memory(set) };
                        self.witness(chain, rule, &matches, sight);
                    }
                    if let Some(threshold) = adding.limit {
                        let limit = limit(threshold, &adding.by, true);
                        let set = SetUse {
                            name: adding.set.name.clone(),
                            handle: adding.set.handle,
                            size: adding.set.size,
                            elements: adding.set.elements().len(),
                        };
                        self.limit(chain, rule, place, limit, Some(set), matches.clone());
                        limited = Some(threshold);
                    }
                }
                Step::Map(values, set) => {
                    self.map(chain, (values, set), &matches, limited, back);
                    return false;
                }
                Step::Notrack => self.notrack(chain, rule, &matches),
                Step::Verdict(outcome) => {
                    self.outcome(chain, outcome, &matches, limited, back);
                    return matches == *path && limited.is_none() && *outcome == Outcome::Return
                        || matches == *path && matches!(outcome, Outcome::Goto(_));
                }
                Step::Log => self.witness(chain, rule, &matches, Sight::Log),
                Step::Note(what) => {
                    self.witness(chain, rule, &matches, Sight::Memory(what.clone().into_owned()));
                }
                Step::Remove(_)
                | Step::SetMark(_)
                | Step::SetCtMark(_)
                | Step::Write(_)
                | Step::SetZone(_) => {}
            }
        }
        false
    }

    fn map(
        &mut self,
        chain: &'r Chain,
        (values, set): (&[Operand], &'r Set),
        matches: &Match,
        limited: Option<Threshold>,
        back: &mut Vec<usize>,
    ) {
        let mut seen: Vec<(Match, &Outcome)> = Vec::new();
        let otherwise = set.otherwise().map(|element| (Match::default(), element));
        let keyed = set.keyed().iter().map(|e| (Match::of_element(values, e), e));
        for (asked, element) in keyed.chain(otherwise).take(ELEMENTS) {
            let Some(outcome) = &element.verdict else { continue };
            let all = matches.and(&asked);
            if !all.never && !seen.contains(&(all.clone(), outcome)) {
                self.outcome(chain, outcome, &all, limited, back);
                seen.push((all, outcome));
            }
        }
    }

    fn outcome(
        &mut self,
        chain: &'r Chain,
        outcome: &Outcome,
        matches: &Match,
        limited: Option<Threshold>,
        back: &mut Vec<usize>,
    ) {
        if matches.never {
            return;
        }
        match outcome {
            Outcome::Jump(name) | Outcome::Goto(name) => {
                if let Some(at) = self.player.target(chain, name)
                    && let Some(next) = self.player.ruleset().chains.get(at)
                {
                    self.chain(at, next, matches);
                }
            }
            Outcome::Accept | Outcome::Return | Outcome::Queue => {
                // What exceeds a limit has been counted there.
                if limited.is_some_and(|limit| limit.over) {
                    return;
                }
                if *outcome == Outcome::Return && self.path.len() > 1 {
                    back.push(self.before.len());
                }
                let within = limited.map(|limit| limit.count);
                self.before.push(Earlier { matches: matches.clone(), within });
            }
            Outcome::Synproxy if !matches.without_syn => {
                self.found.synproxied.push(matches.ports.clone());
            }
            Outcome::Synproxy
            | Outcome::Continue
            | Outcome::Drop
            | Outcome::Reject
            | Outcome::Reset => {}
        }
    }

    /// A rule that sees SYNs.
    fn witness(&mut self, chain: &Chain, rule: &Rule, matches: &Match, sight: Sight) {
        let is_of_hosts = matches!(self.base.hook, Hook::Prerouting | Hook::Input | Hook::Forward);
        if !is_of_hosts || chain.is_ours {
            return;
        }
        // What is sent in a client's name is a SYN that conntrack takes for the first of a connection.
        if matches.never || !matches.may_open() || matches.is_loopback() {
            return;
        }
        let place =
            format!("{} {} {} rule {}", chain.family, chain.table, chain.name, rule.position);
        let limits = self.found.rules.len();
        let (hook, matches) = (self.base.hook, matches.clone());
        let found = Witness { place, sight, before: None, hook, matches, limits };
        let is_known = |known: &Witness| {
            known.place == found.place && known.sight == found.sight && known.hook == found.hook
        };
        if self.found.witnesses.len() < LIMITS && !self.found.witnesses.iter().any(is_known) {
            self.found.witnesses.push(found);
        }
    }

    fn notrack(&mut self, chain: &Chain, rule: &Rule, matches: &Match) {
        let is_early = self.base.hook == Hook::Prerouting && self.base.priority < CONNTRACK;
        if is_early && matches.may_open() && matches.is_for_everybody() && !matches.is_rated {
            let place =
                format!("{} {} {} rule {}", chain.family, chain.table, chain.name, rule.position);
            self.found.untracked.push((matches.ports.clone(), place));
        }
    }

    /// Limits of the elements of a set that is looked up.
    fn elements(
        &mut self,
        chain: &Chain,
        rule: &Rule,
        place: LimitAt,
        (values, set): (&[Operand], &Set),
        matches: &Match,
    ) -> Option<Threshold> {
        let mut last = None;
        let own = |element: &Element| Some((element.limit?, Match::of_element(values, element)));
        for (threshold, asked) in set.elements().iter().filter_map(own).take(ELEMENTS) {
            let all = matches.and(&asked);
            if !all.never {
                let limit = limit(threshold, values, false);
                self.limit(chain, rule, place, limit, None, all);
            }
            last = Some(threshold);
        }
        last
    }

    /// Whether what passes the limit at this step is told of, by the rule itself or by the chain that
    /// it leads to.
    fn tells(&self, chain: &Chain, rule: &Rule, limit: usize) -> bool {
        let is_note = |step: &Step| match step {
            Step::Log | Step::Note(_) => true,
            Step::Add(adding) => adding.limit.is_none(),
            _ => false,
        };
        let over = rule.steps.get(limit).is_some_and(|step| match step {
            Step::Count(counting) => counting.limit.over,
            Step::Add(adding) => adding.limit.is_some_and(|limit| limit.over),
            _ => false,
        });
        if !over {
            return false;
        }
        match rule.outcome() {
            // Without a verdict it is there to mark, to log, to write down.
            Outcome::Continue => true,
            Outcome::Jump(name) | Outcome::Goto(name) => {
                let target = self.player.target(chain, name);
                let chain = target.and_then(|at| self.player.ruleset().chains.get(at));
                let plain = |rule: &Rule| {
                    let ends =
                        matches!(rule.outcome(), Outcome::Drop | Outcome::Reject | Outcome::Reset);
                    ends && !rule.steps.iter().any(is_note)
                };
                !chain.is_some_and(|chain| chain.rules.iter().all(plain))
            }
            _ => rule.steps.iter().skip(limit + 1).any(is_note),
        }
    }

    fn limit(
        &mut self,
        chain: &Chain,
        rule: &Rule,
        at: LimitAt,
        limit: Limit,
        set: Option<SetUse>,
        matches: Match,
    ) {
        // No packet that opens a connection comes to it.
        if matches.without_syn {
            return;
        }
        let found = LimitRule {
            family: chain.family,
            table: chain.table.clone(),
            chain: chain.name.clone(),
            position: rule.position,
            handle: rule.handle,
            at,
            set,
            hook: self.base.hook,
            priority: self.base.priority,
            limit,
            before: earlier(&self.before, &matches),
            matches,
            outcome: rule.outcome().clone(),
            tells: self.tells(chain, rule, at.step),
        };
        if self.found.rules.len() < LIMITS {
            self.found.add(found);
            return;
        }
        let rest = format!("limits beyond the first {LIMITS}");
        if !self.found.unread.contains(&rest) {
            self.found.unread.push(rest);
        }
    }
}

impl Limiter {
    /// The same limit by another way is another row, but where only its ports differ.
    fn add(&mut self, found: LimitRule) {
        let same = |known: &&mut LimitRule| {
            known.at == found.at
                && known.limit == found.limit
                && known.before == found.before
                && (known.hook, known.priority) == (found.hook, found.priority)
                && known.matches
                    == Match { ports: known.matches.ports.clone(), ..found.matches.clone() }
        };
        match self.rules.iter_mut().find(same) {
            Some(known) => known.matches.ports = known.matches.ports.or(&found.matches.ports),
            None => self.rules.push(found),
        }
    }
}

/// What leaves before a limit, of the packets that it would be for.
fn earlier(all: &[Earlier], matches: &Match) -> Vec<EarlierAccept> {
    let mut before: Vec<EarlierAccept> = Vec::new();
    for Earlier { matches: earlier, within } in all {
        if earlier.and(matches).never && !earlier.is_established() {
            continue;
        }
        let is_sure = !earlier.is_narrowed() && !earlier.is_rated;
        let kind = if within.is_some() || !is_sure {
            if earlier.is_established() {
                // Packets that open a translated connection may pass, too.
                let alone = Match { or_translated: false, ..earlier.clone() };
                if !earlier.or_translated || within.is_some() || earlier.is_rated {
                    continue;
                }
                if !alone.is_narrowed() && !before.contains(&EarlierAccept::Established) {
                    before.push(EarlierAccept::Established);
                }
            }
            let rest = match within {
                Some(count) => format!(" within {count} connections"),
                None => String::new(),
            };
            let what = format!("what goes{earlier}{rest}");
            EarlierAccept::Some { what, is_sure: is_sure && within.is_some() }
        } else if earlier.is_loopback() {
            EarlierAccept::Loopback
        } else if earlier.is_established() {
            EarlierAccept::Established
        } else if !earlier.may_open() {
            continue;
        } else if earlier.is_for_everybody()
            && earlier.asked.is_all()
            && earlier.ipv4.is_none_or(|ipv4| matches.ipv4 == Some(ipv4))
        {
            EarlierAccept::Ports(earlier.ports.and(&matches.ports))
        } else {
            EarlierAccept::Some { what: format!("what goes{earlier}"), is_sure: true }
        };
        if !before.contains(&kind) {
            before.push(kind);
        }
    }
    before
}

/// What a rate in a rule does with SYNs: one without a verdict lets them all go on.
fn rate(rule: &Rule, what: String) -> Sight {
    match rule.outcome() {
        Outcome::Accept | Outcome::Queue => Sight::Accepts(what),
        Outcome::Continue => Sight::Memory(what),
        _ => Sight::Rate(what),
    }
}

fn limit(threshold: Threshold, by: &[Operand], dynamic: bool) -> Limit {
    let Threshold { count, over } = threshold;
    Limit { count, over, key: key(by), is_keyless: by.is_empty(), dynamic }
}

/// The key of what a rule counts by.
fn key(by: &[Operand]) -> Key {
    let address = |value: &Operand| {
        let of_source = match (value.field, value.length) {
            (Field::Ip(12), 4) | (Field::Ip(8), 16) | (Field::CtSource(true), _) => true,
            (Field::Ip(16), 4) | (Field::Ip(24), 16) => false,
            _ => return None,
        };
        Some((of_source, value.prefix()?))
    };
    let is_port =
        |value: &Operand| value.field == Field::Tcp(2) && value.length == 2 && value.is_plain();
    let named = || Key::Other(by.iter().map(scope::words).collect::<Vec<_>>().join(" and "));
    match by {
        [] => Key::All,
        [one] => match address(one) {
            Some((_, 0)) => Key::All,
            Some((true, prefix)) => Key::Source(prefix),
            Some((false, prefix)) => Key::Destination(prefix),
            None => named(),
        },
        [one, port] if is_port(port) => match address(one) {
            Some((true, prefix)) => Key::SourceAndPort(prefix),
            _ => named(),
        },
        _ => named(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::parse_saved;

    #[test]
    fn rules_that_go_round_in_circles_have_an_end() {
        let goto = "-A limits -p tcp -m mark --mark 1 -g limits\n".repeat(3);
        let text = format!(
            "*filter\n:INPUT DROP [0:0]\n:limits - [0:0]\n-A INPUT -g limits\n{goto}\
             -A limits -p tcp -m connlimit --connlimit-above 40 -j DROP\n"
        );
        let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
        let places: Vec<_> = Limiter::of(&ruleset).rules.iter().map(LimitRule::place).collect();
        assert_eq!(places, ["ip filter limits rule 4"]);
    }

    /// A packet that opens a translated connection is both new and DNAT.
    #[test]
    fn what_is_for_translated_connections_is_for_those_that_open() {
        let limit = |rules: &str| {
            let text = format!("*filter\n:FORWARD DROP [0:0]\n{rules}\nCOMMIT\n");
            let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
            Limiter::of(&ruleset)
        };
        let counts = "-p tcp -m connlimit --connlimit-above 3 --connlimit-mask 32 -j DROP";
        for states in ["DNAT", "SNAT,DNAT", "RELATED,ESTABLISHED,DNAT", "NEW,DNAT"] {
            let ctstate = format!("-A FORWARD -m conntrack --ctstate {states}");
            let of_it = limit(&format!("{ctstate} {counts}"));
            assert!(of_it.rules.iter().all(|rule| rule.matches.may_open()), "{states}");
            assert_eq!(of_it.rules.len(), 1, "{states}");
            let behind = limit(&format!("{ctstate} -j ACCEPT\n-A FORWARD {counts}"));
            let before: Vec<_> = behind.rules[0].before.iter().map(EarlierAccept::name).collect();
            let wanted: &[&str] = match states {
                "RELATED,ESTABLISHED,DNAT" => &["established", "perhaps"],
                _ => &["perhaps"],
            };
            assert_eq!(before, wanted, "{states}");
        }
        let none = limit(&format!(
            "-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A FORWARD {counts}"
        ));
        assert_eq!(none.rules[0].before, [EarlierAccept::Established]);
    }

    #[test]
    fn one_limit_on_many_paths_is_listed_a_thousand_times_at_most() {
        let mut text = "*filter\n:INPUT DROP [0:0]\n".to_owned();
        for level in 0..11 {
            let (from, to) = (["INPUT".to_owned(), format!("c{level}")], level + 1);
            let from = &from[usize::from(level > 0)];
            let jump = |side, net| format!("-A {from} -{side} 10.{level}.{net}.0/24 -j c{to}\n");
            text.push_str(&format!(
                ":c{to} - [0:0]\n{}{}",
                jump("m x ! -s", 0),
                jump("m y ! -s", 1)
            ));
        }
        text.push_str("-A c11 -p tcp -m connlimit --connlimit-above 40 -j DROP\n");
        let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
        let limiter = Limiter::of(&ruleset);
        assert_eq!((limiter.rules.len(), limiter.unread.len()), (LIMITS, 1));
    }
}
