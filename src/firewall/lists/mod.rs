//! The lists that limits keep, and which of them are no longer those of before.
//!
//! What a limit counts is kept with its rule, or with the element of a set, and is gone with it.
//! nf_tables numbers tables, rules and sets: other numbers, another list. A rule that is replaced
//! in its place keeps its number, and an emptied set too: that must have been heard.
//! iptables-legacy numbers nothing, so there the rules and their counters must tell.

mod legacy;
mod nft;

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use netlink_sys::protocols::NETLINK_NETFILTER;

use self::legacy::Saved;
use self::nft::{Identity, Numbers};
use super::limits::{LimitRule, Limiter};
use super::tracking::{Tracking, bears_on_tracking};
use super::{
    Chain, Family, Hook, Match, Outcome, Rule, Ruleset, Step, joined, nft_chains, parse_saved,
};
use crate::error::{Cause, Op, Result};
use crate::netlink::{Conversation, KernelSocket, Transport};

/// `NF_IP_PRI_CONNTRACK`
const CONNTRACK: i32 = -200;

/// Rules that change while they are read are read anew so often.
const ATTEMPTS: u32 = 4;

/// A set: the kernel's number of the family, table and name.
pub type SetKey = (u8, String, String);
/// A rule: the kernel's number of the family, table and the rule's own number.
pub type RuleKey = (u8, String, u64);

/// The limits of one network namespace, each with what its list is known by.
#[derive(Clone, Debug, Default)]
pub struct Lists {
    nft: Vec<(LimitRule, Identity)>,
    legacy: Vec<(Family, Saved, Vec<LimitRule>)>,
    /// The chains of nf_tables, and those of iptables-legacy, where there are limits, or some bear on
    /// tracking.
    chains: [Vec<Chain>; 2],
    /// Of nf_tables and of iptables-legacy: whether a limit could not be read, or a rule may reset a
    /// connection that is open.
    is_unclear: [bool; 2],
    /// Of both: a rule gives connections a policy of timeouts by its name (`CT --timeout`).
    name_policies: [bool; 2],
    unread: Vec<String>,
}

/// Limits, and the rules that they stand among.
#[derive(Clone, Debug, Default)]
pub struct Limited {
    /// All rules; none where there are no limits.
    pub rules: Ruleset,
    /// The limits that are meant.
    pub limits: Vec<LimitRule>,
}

impl Limited {
    /// Whether a rule hands what comes in to a program, before a limit perhaps.
    pub fn queues(&self) -> bool {
        self.queueing().next().is_some()
    }

    /// Whether one may do so before conntrack sees it. A chain that is only jumped to stands where any of
    /// its table does.
    pub fn queues_before_conntrack(&self) -> bool {
        let is_before = |chain: &Chain| {
            let base = chain.base.as_ref();
            base.is_some_and(|it| it.hook == Hook::Prerouting && it.priority < CONNTRACK)
        };
        let is_of = |chain: &Chain, other: &Chain| {
            chain.base.is_none() && (chain.family, &chain.table) == (other.family, &other.table)
        };
        let before: Vec<_> = self.rules.chains.iter().filter(|chain| is_before(chain)).collect();
        self.queueing()
            .any(|chain| is_before(chain) || before.iter().any(|other| is_of(chain, other)))
    }

    /// Chains with such rules.
    fn queueing(&self) -> impl Iterator<Item = &Chain> {
        let goes_out = |chain: &&Chain| {
            let hook = chain.base.as_ref().map(|base| base.hook);
            matches!(hook, Some(Hook::Output | Hook::Postrouting))
        };
        let queues = |chain: &&Chain| chain.rules.iter().any(|it| *it.outcome() == Outcome::Queue);
        let chains = self.rules.chains.iter().filter(move |it| !goes_out(it) && !it.is_dormant);
        chains.filter(queues)
    }
}

/// What has been heard of since the lists were read before.
#[derive(Clone, Debug, Default)]
pub struct Since {
    /// Rules that were taken away; another one may have their number.
    pub deleted: BTreeSet<RuleKey>,
    /// Sets that lost elements.
    pub emptied: BTreeSet<SetKey>,
    /// iptables-legacy ran.
    pub legacy_ran: bool,
    /// Something was missed.
    pub lost: bool,
}

/// Why the list of a limit does not hold what is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Loss {
    /// The limit is new, or its rule was made anew.
    New,
    /// It is for more connections than before.
    Wider,
    /// Elements were taken out of the set that its lists are in.
    Emptied,
    /// iptables-legacy has replaced its table.
    Replaced,
    /// It may be another list: something was missed, or iptables-legacy ran and nothing shows
    /// whether it replaced the table.
    Unknown,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::New, Self::Wider, Self::Emptied, Self::Replaced, Self::Unknown];

    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Wider => "wider",
            Self::Emptied => "emptied",
            Self::Replaced => "replaced",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::New => "limit is new",
            Self::Wider => "limit is for more connections now",
            Self::Emptied => "set of the limit was emptied",
            Self::Replaced => "table of the limit was replaced",
            Self::Unknown => "limit may have lost its list",
        })
    }
}

/// A limit whose list does not hold what is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anew {
    /// The limit.
    pub rule: LimitRule,
    /// Why.
    pub loss: Loss,
}

impl Lists {
    /// Reads the limits of the network namespace that the calling thread is in; those of nf_tables
    /// are taken from `known`, where nothing was heard of them since.
    ///
    /// # Errors
    /// The kernel refused, or the rules changed all the while. What else cannot be read is in
    /// [`Lists::unread`].
    pub fn read(known: Option<&Self>) -> Result<Self> {
        let mut this = match known {
            Some(known) => Self {
                nft: known.nft.clone(),
                chains: [known.chains[0].clone(), Vec::new()],
                is_unclear: [known.is_unclear[0], false],
                name_policies: [known.name_policies[0], false],
                ..Self::default()
            },
            None => open_and_read_nft()?,
        };
        for family in [Family::Ip, Family::Ip6] {
            match Saved::read(family) {
                Ok(None) => {}
                Ok(Some(saved)) => {
                    let chains = parse_saved(saved.text(), family);
                    let ruleset = Ruleset { chains, unread: Vec::new() };
                    let (limits, is_unclear) = limits(&ruleset);
                    this.is_unclear[1] |= is_unclear;
                    this.name_policies[1] |= saved.names_policy();
                    this.legacy.push((family, saved, at(limits, this.chains[1].len())));
                    this.chains[1].extend(ruleset.chains);
                }
                Err(what) => this.unread.push(what),
            }
        }
        let is_limited = this.limits().next().is_some();
        if is_limited && known.is_some_and(|known| known.limits().next().is_none()) {
            // These were not kept.
            let nft = open_and_read_nft()?;
            (this.nft, this.is_unclear[0]) = (nft.nft, nft.is_unclear[0]);
            this.name_policies[0] = nft.name_policies[0];
            let [chains, _] = nft.chains;
            this.chains[0] = chains;
        }
        for chains in &mut this.chains {
            // Most hosts have nothing that bears on tracking: their rules are not kept.
            if !is_limited && !chains.iter().any(bears_on_tracking) {
                *chains = Vec::new();
            }
        }
        Ok(this)
    }

    /// Those limits that are `wanted`, with all rules.
    pub fn limited(&self, wanted: impl Fn(&LimitRule) -> bool) -> Limited {
        if self.limits().next().is_none() {
            return Limited::default();
        }
        let of_nft = self.nft.iter().map(|(rule, _)| rule.clone());
        let of_legacy = self.legacy.iter().flat_map(|(_, _, rules)| rules.iter().cloned());
        let chains = self.joined();
        let mut of_legacy = at(of_legacy.collect(), self.chains[0].len());
        for rule in &mut of_legacy {
            if let Some(chain) = chains.get(rule.at.chain) {
                rule.table.clone_from(&chain.table);
            }
        }
        let limits = of_nft.chain(of_legacy).filter(wanted).collect();
        Limited { rules: Ruleset { chains, unread: self.unread.clone() }, limits }
    }

    /// What the rules say of conntrack; `None` where they say nothing.
    pub fn tracking(&self) -> Option<Tracking> {
        Tracking::of(self.joined(), |_| self.limits().cloned().collect())
    }

    fn joined(&self) -> Vec<Chain> {
        let [nft, legacy] = self.chains.clone();
        joined(nft, legacy)
    }

    /// All limits.
    pub fn limits(&self) -> impl Iterator<Item = &LimitRule> {
        let nft = self.nft.iter().map(|(rule, _)| rule);
        nft.chain(self.legacy.iter().flat_map(|(_, _, rules)| rules))
    }

    /// Whether all limits are known, and no rule closes the entry of an open connection, by a reset for a
    /// packet that is no SYN.
    pub fn is_clear(&self) -> bool {
        self.unread.is_empty() && !self.is_unclear.contains(&true)
    }

    /// Whether a rule gives connections a policy of timeouts by its name (`CT --timeout`).
    pub fn name_policies(&self) -> bool {
        self.name_policies.contains(&true)
    }

    /// What could not be read, and why.
    pub fn unread(&self) -> &[String] {
        &self.unread
    }

    /// The limits whose lists are not those that they had in `before`.
    pub fn anew(&self, before: &Self, since: &Since) -> Vec<Anew> {
        let mut reach: HashMap<&Identity, Vec<&LimitRule>> = HashMap::new();
        for (rule, identity) in &before.nft {
            reach.entry(identity).or_default().push(rule);
        }
        let of_nft = self.nft.iter().filter_map(|(rule, identity)| {
            let loss = match reach.get(identity) {
                None => Loss::New,
                Some(_) if identity.is_deleted(since) => Loss::New,
                Some(_) if identity.is_emptied(since) => Loss::Emptied,
                Some(_) if since.lost => Loss::Unknown,
                Some(rules) if rules.iter().any(|known| is_same_reach(known, rule)) => return None,
                Some(_) => Loss::Wider,
            };
            Some(Anew { rule: rule.clone(), loss })
        });
        let of_legacy = self.legacy.iter().flat_map(|(family, saved, rules)| {
            let known = before.legacy.iter().find(|(known, _, _)| known == family);
            rules.iter().filter_map(move |rule| {
                let loss = match known {
                    None => Loss::New,
                    Some((_, known, _)) if saved.is_replaced(known, &rule.table) => Loss::Replaced,
                    Some(_) if since.legacy_ran || since.lost => Loss::Unknown,
                    Some(_) => return None,
                };
                Some(Anew { rule: rule.clone(), loss })
            })
        });
        of_nft.chain(of_legacy).collect()
    }
}

fn open_and_read_nft() -> Result<Lists> {
    let op = Op::new("open nftables netlink");
    read_nft(&mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?))
}

fn read_nft<T: Transport>(conversation: &mut Conversation<T>) -> Result<Lists> {
    for _ in 0..ATTEMPTS {
        let numbers = Numbers::read(conversation)?;
        let chains = nft_chains(conversation)?;
        // Places are the same in both readings if nothing changed from the first to the last.
        if nft::generation(conversation)? == numbers.generation() {
            let ruleset = Ruleset { chains, unread: Vec::new() };
            let known = |rule: LimitRule| {
                let identity = numbers.identity(&rule);
                (rule, identity)
            };
            let (limits, is_unclear) = limits(&ruleset);
            let nft = limits.into_iter().map(known).collect();
            let is_unclear = [is_unclear, false];
            let name_policies = [numbers.names_policy(), false];
            let chains = [ruleset.chains, Vec::new()];
            return Ok(Lists { nft, chains, is_unclear, name_policies, ..Lists::default() });
        }
    }
    Err(Op::new("read nft rules").failed(Cause::Interrupted { attempts: ATTEMPTS }))
}

/// The limits, and whether there may be more to know.
fn limits(ruleset: &Ruleset) -> (Vec<LimitRule>, bool) {
    let found = Limiter::of(ruleset);
    let is_unclear = !found.unread.is_empty() || may_reset(&ruleset.chains);
    (found.rules, is_unclear)
}

/// Rules that answer other packets than SYNs with a reset.
fn may_reset(chains: &[Chain]) -> bool {
    let is_syn = |step: &Step| matches!(step, Step::Test(test) if Match::of(test).syn);
    let resets = |rule: &Rule| *rule.outcome() == Outcome::Reset && !rule.steps.iter().any(is_syn);
    chains.iter().any(|chain| chain.rules.iter().any(resets))
}

/// The limits, where so many chains stand before theirs.
fn at(mut limits: Vec<LimitRule>, before: usize) -> Vec<LimitRule> {
    limits.iter_mut().for_each(|rule| rule.at.chain += before);
    limits
}

/// Whether the same packets reach a limit.
fn is_same_reach(one: &LimitRule, other: &LimitRule) -> bool {
    one.matches == other.matches
        && one.before == other.before
        && (one.hook, one.priority) == (other.hook, other.priority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_stands_before_conntrack_in_the_raw_table_and_in_its_chains() {
        let limited = |text: &str| {
            let chains = parse_saved(text, Family::Ip);
            let rules = Ruleset { chains, ..Ruleset::default() };
            let limited = Limited { rules, limits: Vec::new() };
            (limited.queues(), limited.queues_before_conntrack())
        };
        let queue = "-p tcp -j NFQUEUE --queue-num 0\nCOMMIT\n";
        let raw = "*raw\n:PREROUTING ACCEPT [0:0]\n";
        assert_eq!(limited(&format!("{raw}-A PREROUTING {queue}")), (true, true));
        let jump = ":IDS - [0:0]\n-A PREROUTING -j IDS\n";
        assert_eq!(limited(&format!("{raw}{jump}-A IDS {queue}")), (true, true));
        let mangle = "*mangle\n:PREROUTING ACCEPT [0:0]\n";
        assert_eq!(limited(&format!("{mangle}-A PREROUTING {queue}")), (true, false));
        let output = "*raw\n:OUTPUT ACCEPT [0:0]\n";
        assert_eq!(limited(&format!("{output}-A OUTPUT {queue}")), (false, false));
    }
}
