//! Plays the SYN of one connection through the rules, in the order of the kernel. Pure.
//!
//! Each question that a rule asks is answered by yes, no, or cannot tell, so the result names the
//! limits that count the connection for sure and those that may. It assumes that the connection is
//! let in: what *may* drop a packet takes no certainty away from the limits behind it.

mod run;

use std::collections::HashMap;
use std::sync::Arc;

use self::run::Run;
use super::packet::{Packet, Syn};
use super::rule::{Chain, Outcome, Step, Test, Threshold};
use super::set::Set;
use super::value::{Answer, Field, Operand};
use super::{Family, Ruleset};
use crate::nftables::Hook;

/// Jumps nest at most so deep (`NFT_JUMP_STACK_SIZE`).
pub(super) const DEPTH: usize = 16;
/// So many rules are played for one packet.
const STEPS: usize = 100_000;

/// Conntrack's own hook (`NF_IP_PRI_CONNTRACK`): NOTRACK works before it.
pub(super) const CONNTRACK: i32 = -200;

/// Destination NAT (`NF_IP_PRI_NAT_DST`): rules before it see the port that the client asked for.
pub(super) const NAT_DST: i32 = -100;

/// Where a limit stands: chain, rule and step by their numbers in the rule set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LimitAt {
    /// Chain.
    pub chain: usize,
    /// Rule.
    pub rule: usize,
    /// Step.
    pub step: usize,
}

/// How surely something is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Certainty {
    /// It may be.
    Perhaps,
    /// It is, but for what a rate lets pass before.
    Mostly,
    /// It is.
    Sure,
}

impl Certainty {
    fn of(answer: Answer) -> Option<Self> {
        match answer {
            Answer::Yes => Some(Self::Sure),
            Answer::Sometimes => Some(Self::Mostly),
            Answer::Unknown => Some(Self::Perhaps),
            Answer::No => None,
        }
    }
}

/// A limit that a connection meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Which.
    pub at: LimitAt,
    /// Where its lists are first used: rules that name one set share them.
    pub list: LimitAt,
    /// How many, of the element's own where it has one.
    pub limit: Threshold,
    /// The group of connections that are counted together with it; `None` where that is unknown.
    pub group: Option<Vec<u8>>,
    /// How surely it is counted there.
    pub certainty: Certainty,
    /// Whether it takes the connection up.
    pub counts: Counts,
}

impl Hit {
    /// Whether another one is counted on the same list, by whatever rule.
    pub fn shares_list(&self, other: &Self) -> bool {
        (self.list, &self.group) == (other.list, &other.group)
    }
}

/// Whether a limit that sees a connection counts it from then on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Counts {
    /// It does.
    Yes,
    /// The set of its lists is full.
    NoRoom,
    /// Conntrack keeps no entry: its list loses the connection with the next look at it.
    Untracked,
}

/// What came of a SYN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Played {
    /// The limits that it meets, in their order. One that it meets twice, by two rules that share a
    /// list or by two jumps, counts it twice (`__nf_conncount_add()` looks for what it has once a
    /// jiffy).
    pub hits: Vec<Hit>,
    /// How surely a rule refuses it.
    pub refused: Answer,
    /// Whether conntrack keeps an entry of it.
    pub tracked: Option<bool>,
    /// The zone that its entry is in, where that can be told.
    pub zone: Option<u16>,
    /// The rule that takes it out of conntrack, or may.
    pub notrack: Option<(usize, usize)>,
    /// SYNPROXY answers it.
    pub is_synproxied: bool,
}

impl Played {
    /// Whether it gets in; `None` where that cannot be told, or a rate decides.
    pub fn admitted(&self) -> Option<bool> {
        match self.refused {
            Answer::No => Some(true),
            Answer::Yes => Some(false),
            Answer::Sometimes | Answer::Unknown => None,
        }
    }
}

/// A rule set made ready to be played.
#[derive(Clone, Debug)]
pub struct Player<'r> {
    ruleset: &'r Ruleset,
    named: HashMap<(Family, &'r str, &'r str), usize>,
    /// Base chains in the order of hooks and priorities.
    bases: Vec<usize>,
    /// Where a set that limits keep their lists in is used first, by its place in memory.
    lists: HashMap<*const Set, LimitAt>,
    /// The same as `bases`, but for those that have nothing to say about limits and tracking.
    telling: Vec<usize>,
}

impl<'r> Player<'r> {
    /// Makes a rule set ready.
    pub fn new(ruleset: &'r Ruleset) -> Self {
        let chains = ruleset.chains.iter().enumerate();
        let named = chains
            .clone()
            .map(|(at, chain)| ((chain.family, chain.table.as_str(), chain.name.as_str()), at))
            .collect();
        let is_incoming =
            |hook| matches!(hook, Hook::Ingress | Hook::Prerouting | Hook::Input | Hook::Forward);
        let order = |chain: &Chain| {
            let base = chain.base.as_ref()?;
            let family = !matches!(chain.family, Family::Other(_));
            // NAT chains are called at one priority for all (`nf_nat_inet_fn()`).
            let priority = if base.is_nat { (NAT_DST, base.priority) } else { (base.priority, 0) };
            let early = base.hook != Hook::Ingress;
            // Ours change no SYN, but to look so it would take to know all that they look at.
            (family && !chain.is_dormant && !chain.is_ours && is_incoming(base.hook))
                .then_some((early, base.hook, priority))
        };
        let mut bases: Vec<_> =
            chains.rev().filter_map(|(at, chain)| Some((order(chain)?, at))).collect();
        // Of one priority the newest is called first (`nf_hook_entries_grow()`).
        bases.sort_by_key(|(order, _)| *order);
        let bases = bases.into_iter().map(|(_, at)| at).collect();
        let mut this = Self { ruleset, named, bases, lists: lists(ruleset), telling: Vec::new() };
        this.telling = this.bases.iter().copied().filter(|at| this.tells(*at)).collect();
        this
    }

    /// Whether a chain, or one that it leads to, bears on limits, marks or tracking.
    fn tells(&self, base: usize) -> bool {
        let mut seen = vec![base];
        let mut next = 0;
        while let Some(at) = seen.get(next).copied() {
            next += 1;
            let Some(chain) = self.ruleset.chains.get(at) else { continue };
            for step in chain.rules.iter().flat_map(|rule| &rule.steps) {
                let (is_telling, targets) = match step {
                    Step::Count(_) | Step::Add(_) | Step::Remove(_) => (true, Vec::new()),
                    Step::SetMark(_) | Step::SetCtMark(_) => (true, Vec::new()),
                    Step::Write(_) | Step::SetZone(_) | Step::Notrack => (true, Vec::new()),
                    Step::Verdict(outcome) => (*outcome == Outcome::Synproxy, vec![outcome]),
                    Step::Test(Test::In { set, .. }) => (set.has_limits(), Vec::new()),
                    Step::Map(_, set) => {
                        let verdicts = set.elements().iter().filter_map(|e| e.verdict.as_ref());
                        (set.has_limits(), verdicts.collect())
                    }
                    Step::Test(_) | Step::Log | Step::Note(_) | Step::Leads(_) => {
                        (false, Vec::new())
                    }
                };
                if is_telling {
                    return true;
                }
                for outcome in targets {
                    if let Outcome::Jump(name) | Outcome::Goto(name) = outcome
                        && let Some(target) = self.target(chain, name)
                        && !seen.contains(&target)
                    {
                        seen.push(target);
                    }
                }
            }
        }
        false
    }

    /// The rule set.
    pub fn ruleset(&self) -> &'r Ruleset {
        self.ruleset
    }

    /// The chain that a rule of `from` names.
    pub(super) fn target(&self, from: &Chain, name: &str) -> Option<usize> {
        self.named.get(&(from.family, from.table.as_str(), name)).copied()
    }

    /// Base chains in the order that packets meet them.
    pub(super) fn bases(&self) -> &[usize] {
        &self.bases
    }

    /// Whether a limit, or what decides about one, looks at the device that packets come in by.
    pub fn asks_for_interfaces(&self) -> bool {
        let of_interface =
            |value: &Operand| matches!(value.field, Field::InterfaceName | Field::InterfaceIndex);
        let steps = self.ruleset.chains.iter().flat_map(|chain| chain.rules.iter());
        !self.telling.is_empty()
            && steps.flat_map(|rule| &rule.steps).any(|step| match step {
                Step::Test(Test::Within { value, .. }) => of_interface(value),
                Step::Test(Test::In { values, .. }) | Step::Map(values, _) => {
                    values.iter().any(of_interface)
                }
                Step::Count(counting) => counting.by.iter().any(of_interface),
                Step::Add(adding) => adding.by.iter().any(of_interface),
                _ => false,
            })
    }

    /// The limits that may count this connection, and how surely each does, while none of them is
    /// exceeded. Chains that have nothing to say about that are left out.
    pub fn limits(&self, syn: &Syn) -> Played {
        self.run(syn, &self.telling, None, &mut |hit| Some(hit.limit.count == 0))
    }

    /// The whole way of a SYN; `exceeded` knows whether a limit has no place for it.
    pub fn play(&self, syn: &Syn, exceeded: &mut dyn FnMut(&Hit) -> Option<bool>) -> Played {
        self.run(syn, &self.bases, None, exceeded)
    }

    /// How a SYN fares that comes to this limit and exceeds it, and no other: where it gets in, the limit is not
    /// what says how many do. What a rate takes away in another rule before does not come to it.
    pub fn exceeding(&self, syn: &Syn, limit: LimitAt) -> Played {
        let exceeds = &mut |hit: &Hit| Some(hit.at == limit || hit.limit.count == 0);
        let played = self.run(syn, &self.bases, Some(limit), exceeds);
        match played.hits.iter().any(|hit| hit.at == limit) {
            true => played,
            // By a jump for as much as a rate.
            false => self.play(syn, exceeds),
        }
    }

    /// The words for a rule by its place.
    pub fn place(&self, chain: usize, rule: usize) -> Option<String> {
        let chain = self.ruleset.chains.get(chain)?;
        chain.rules.get(rule).map(|rule| chain.place(rule))
    }

    fn run(
        &self,
        syn: &Syn,
        bases: &[usize],
        comes_to: Option<LimitAt>,
        exceeded: &mut dyn FnMut(&Hit) -> Option<bool>,
    ) -> Played {
        let mut run = Run {
            player: self,
            packet: Packet::new(syn),
            played: Played { tracked: Some(true), ..Played::default() },
            dead: Answer::No,
            added: Vec::new(),
            is_proxys: false,
            is_stolen: false,
            steps: STEPS,
            comes_to,
            exceeded,
        };
        run.way(bases);
        if run.is_stolen {
            run.packet = Packet::new(syn);
            (run.is_stolen, run.is_proxys) = (false, true);
            run.way(bases);
        }
        run.played.refused = run.dead;
        run.played.tracked = run.packet.is_tracked;
        run.played.zone = run.packet.zone;
        run.played
    }
}

fn lists(ruleset: &Ruleset) -> HashMap<*const Set, LimitAt> {
    let mut all = HashMap::new();
    for (chain, rules) in ruleset.chains.iter().map(|chain| &chain.rules).enumerate() {
        for (rule, steps) in rules.iter().map(|rule| &rule.steps).enumerate() {
            for (step, set) in steps.iter().map(set_of).enumerate() {
                if let Some(set) = set {
                    all.entry(Arc::as_ptr(set)).or_insert(LimitAt { chain, rule, step });
                }
            }
        }
    }
    all
}

/// The set that a limit may keep its lists in.
fn set_of(step: &Step) -> Option<&Arc<Set>> {
    match step {
        Step::Add(adding) => Some(&adding.set),
        Step::Test(Test::In { set, .. }) | Step::Map(_, set) if set.has_limits() => Some(set),
        _ => None,
    }
}
