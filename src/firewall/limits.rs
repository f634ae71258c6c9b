//! Which connection limits the rules set, and what passes before them. Pure.

use std::fmt;

use crate::firewall::{
    Base, Chain, Family, Hook, Key, Limit, Match, Outcome, Ports, Rule, Ruleset,
};

/// Jumps nest at most so deep (`NFT_JUMP_STACK_SIZE`).
const DEPTH: usize = 16;
/// So many rules are walked for each base chain: rule sets of thousands of services fan out.
const STEPS: usize = 200_000;
/// So many limits are told of: each path to a limit that asks for other packets is one of its own.
const LIMITS: usize = 1000;
/// Conntrack's own hook (`NF_IP_PRI_CONNTRACK`): NOTRACK works before it.
const CONNTRACK: i32 = -200;
/// Destination NAT (`NF_IP_PRI_NAT_DST`): rules before it see the port that the client asked for.
const NAT_DST: i32 = -100;
const TCP: u8 = 6;

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
    /// What leaves the chain before it, of the packets that it would be for.
    pub before: Vec<Before>,
}

/// What a rule before a limit takes away from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Before {
    /// What comes in by the loopback device.
    Loopback,
    /// Packets of established connections.
    Established,
    /// All packets to these ports: the limit never sees them.
    Ports(Ports),
}

impl Before {
    /// Its name in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Established => "established",
            Self::Ports(_) => "ports",
        }
    }
}

/// All that the rules say about limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limiter {
    /// Limits, in the order that a packet meets them.
    pub rules: Vec<LimitRule>,
    /// Ports whose packets are not tracked, each with the place of the rule.
    pub untracked: Vec<(Ports, String)>,
    /// Ports answered by SYNPROXY.
    pub synproxied: Vec<Ports>,
    /// What could not be read.
    pub unread: Vec<String>,
}

impl Limiter {
    /// Finds the limits in a rule set.
    pub fn of(ruleset: &Ruleset) -> Self {
        let mut found = Self { unread: ruleset.unread.clone(), ..Self::default() };
        let mut bases: Vec<(&Chain, Base)> = ruleset
            .chains
            .iter()
            .filter_map(|chain| Some((chain, chain.base?)))
            .filter(|(chain, base)| {
                matches!(base.hook, Hook::Prerouting | Hook::Input | Hook::Forward)
                    && !matches!(chain.family, Family::Other(_))
            })
            .collect();
        bases.sort_by_key(|(_, base)| (base.hook, base.priority));
        for (chain, base) in bases {
            let mut walk = Walk {
                ruleset,
                base,
                found: &mut found,
                before: Vec::new(),
                path: Vec::new(),
                steps: STEPS,
            };
            walk.chain(chain, &Match::default());
        }
        found
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
}

impl LimitRule {
    /// `ip filter INPUT rule 3`.
    pub fn place(&self) -> String {
        format!("{} {} {} rule {}", self.family, self.table, self.chain, self.position)
    }

    /// Whether it sees ports as the client asked for them, before destination NAT.
    pub fn is_before_nat(&self) -> bool {
        self.hook == Hook::Prerouting && self.priority < NAT_DST
    }

    /// Prefix length of the sources that are counted together; `None` where it is not by source.
    pub fn source_prefix(&self) -> Option<u8> {
        match self.limit.key {
            Key::Source(prefix) | Key::SourceAndPort(prefix) => Some(prefix),
            _ => None,
        }
    }

    /// Whether a connection of this peer to this port is one that it counts.
    pub fn covers(&self, peer: std::net::IpAddr, port: u16) -> bool {
        let ipv4 = peer.is_ipv4();
        self.family.covers(ipv4)
            && self.matches.ipv4.is_none_or(|wanted| wanted == ipv4)
            && self.matches.ports.contains(port)
            && self.matches.sources.iter().all(|(net, inside)| net.contains(&peer) == *inside)
            && !self
                .before
                .iter()
                .any(|before| matches!(before, Before::Ports(p) if p.contains(port)))
    }
}

impl fmt::Display for LimitRule {
    /// `at most 40 from each /32 to port 80 (ip filter INPUT rule 3)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {}", self.limit.count)?;
        match self.limit.key {
            Key::Source(prefix) => write!(f, " from each /{prefix}")?,
            Key::SourceAndPort(prefix) => write!(f, " from each /{prefix} for each port")?,
            Key::Destination(prefix) => write!(f, " to each /{prefix}")?,
            Key::All => f.write_str(" in all")?,
            Key::Other => f.write_str(" by another key")?,
        }
        let port = if self.matches.ports.is_all() { "any port" } else { "port " };
        write!(f, " to {port}")?;
        if !self.matches.ports.is_all() {
            write!(f, "{}", self.matches.ports)?;
        }
        write!(f, " ({})", self.place())
    }
}

/// Whether no client and no interface is left out.
fn is_for_everybody(matches: &Match) -> bool {
    !matches.narrowed && matches.interfaces.is_empty() && matches.sources.is_empty()
}

/// One packet path, from a base chain down.
struct Walk<'r> {
    ruleset: &'r Ruleset,
    base: Base,
    found: &'r mut Limiter,
    /// Rules met so far that take packets off the path.
    before: Vec<Match>,
    /// Chains between the base chain and the rule, with both ends.
    path: Vec<&'r Chain>,
    steps: usize,
}

impl<'r> Walk<'r> {
    fn chain(&mut self, chain: &'r Chain, path: &Match) {
        // The kernel takes no rules that go round in circles; a text may have some.
        if self.path.len() > DEPTH || self.path.iter().any(|on_it| std::ptr::eq(*on_it, chain)) {
            return;
        }
        self.path.push(chain);
        self.rules(chain, path);
        self.path.pop();
    }

    fn rules(&mut self, chain: &'r Chain, path: &Match) {
        for rule in &chain.rules {
            let Some(steps) = self.steps.checked_sub(1) else { return };
            self.steps = steps;
            let matches = path.and(&rule.matches);
            if matches.protocol.is_some_and(|protocol| protocol != TCP)
                || matches.ports.is_empty()
                || self.is_contradiction(path, rule)
            {
                continue;
            }
            if let Some(limit) = rule.limit {
                self.limit(chain, rule, limit, matches.clone());
            }
            match &rule.outcome {
                Outcome::Jump(name) | Outcome::Goto(name) => {
                    if let Some(next) = self.named(chain, name) {
                        self.chain(next, &matches);
                    }
                }
                Outcome::Accept if rule.limit.is_none() => self.before.push(matches),
                Outcome::Notrack
                    if self.base.priority < CONNTRACK && is_for_everybody(&matches) =>
                {
                    let place = format!(
                        "{} {} {} rule {}",
                        chain.family, chain.table, chain.name, rule.position
                    );
                    self.found.untracked.push((matches.ports, place));
                }
                Outcome::Synproxy => self.found.synproxied.push(matches.ports),
                _ => {}
            }
            // What is behind a jump for everything that never comes back is out of reach only for
            // a goto; a base chain's rules go on otherwise.
            if matches!(rule.outcome, Outcome::Goto(_)) && rule.matches == Match::default() {
                return;
            }
        }
    }

    fn is_contradiction(&self, path: &Match, rule: &Rule) -> bool {
        matches!((path.ipv4, rule.matches.ipv4), (Some(a), Some(b)) if a != b)
    }

    fn named(&self, from: &Chain, name: &str) -> Option<&'r Chain> {
        self.ruleset.chains.iter().find(|chain| {
            chain.family == from.family && chain.table == from.table && chain.name == name
        })
    }

    fn limit(&mut self, chain: &Chain, rule: &Rule, limit: Limit, matches: Match) {
        let mut before: Vec<Before> = Vec::new();
        let reaches = |earlier: &&Match| !earlier.ports.and(&matches.ports).is_empty();
        for earlier in self.before.iter().filter(|earlier| !earlier.narrowed).filter(reaches) {
            let kind = if earlier.is_loopback() {
                Before::Loopback
            } else if earlier.is_established() {
                Before::Established
            } else if earlier.interfaces.is_empty()
                && earlier.sources.is_empty()
                && earlier.ipv4.is_none_or(|ipv4| matches.ipv4 == Some(ipv4))
                && (earlier.states.is_none() || earlier.is_opening())
                && (!earlier.syn || matches.is_opening())
            {
                Before::Ports(earlier.ports.and(&matches.ports))
            } else {
                continue;
            };
            if !before.contains(&kind) {
                before.push(kind);
            }
        }
        let found = LimitRule {
            family: chain.family,
            table: chain.table.clone(),
            chain: chain.name.clone(),
            position: rule.position,
            hook: self.base.hook,
            priority: self.base.priority,
            limit,
            matches,
            outcome: rule.outcome.clone(),
            before,
        };
        if self.found.rules.len() < LIMITS {
            if !self.found.rules.contains(&found) {
                self.found.rules.push(found);
            }
            return;
        }
        let rest = format!("limits beyond the first {LIMITS}");
        if !self.found.unread.contains(&rest) {
            self.found.unread.push(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::parse_saved;

    #[test]
    fn rules_that_go_round_in_circles_have_an_end() {
        let goto = "-A limits -p tcp -g limits\n".repeat(3);
        let text = format!(
            "*filter\n:INPUT DROP [0:0]\n:limits - [0:0]\n-A INPUT -g limits\n{goto}\
             -A limits -p tcp -m connlimit --connlimit-above 40 -j DROP\n"
        );
        let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
        let places: Vec<_> = Limiter::of(&ruleset).rules.iter().map(LimitRule::place).collect();
        assert_eq!(places, ["ip filter limits rule 4"]);
    }

    #[test]
    fn one_limit_on_many_paths_is_told_of_a_thousand_times_at_most() {
        let mut text = "*filter\n:INPUT DROP [0:0]\n".to_owned();
        for level in 0..11 {
            let (from, to) = (["INPUT".to_owned(), format!("c{level}")], level + 1);
            let from = &from[usize::from(level > 0)];
            let jump = |net| format!("-A {from} -s 10.{level}.{net}.0/24 -j c{to}\n");
            text.push_str(&format!(":c{to} - [0:0]\n{}{}", jump(0), jump(1)));
        }
        text.push_str("-A c11 -p tcp -m connlimit --connlimit-above 40 -j DROP\n");
        let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
        let limiter = Limiter::of(&ruleset);
        assert_eq!((limiter.rules.len(), limiter.unread.len()), (LIMITS, 1));
    }
}
