//! Limits that no packet comes to by which a client opens a connection: of what goes out, of bridges, in
//! chains that nothing leads to. Pure.

use std::collections::HashSet;

use crate::firewall::play::Player;
use crate::firewall::{Chain, Family, Hook, Match, Outcome, Rule, STATE_ESTABLISHED, Step, Test};

/// A limit that is not judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unjudged {
    /// `ip filter OUTPUT rule 3`.
    pub place: String,
    /// Why not.
    pub stands: Where,
}

/// Where such a limit stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// On the way out, for what this host opens.
    OutForNew,
    /// Behind routing, for what this host opens and what it forwards (to containers).
    Postrouting,
    /// On the way out, for answers too.
    Out,
    /// In a table of bridges, or the egress chain of a device.
    Elsewhere,
    /// In a chain that no hook leads to.
    Nowhere,
}

/// Those that are not on the way in.
pub(super) fn find(player: &Player<'_>) -> Vec<Unjudged> {
    let chains = &player.ruleset().chains;
    let numbered = || chains.iter().enumerate();
    let of = |hook: Hook| {
        let is_it = |chain: &Chain| chain.base.as_ref().is_some_and(|base| base.hook == hook);
        let bases: Vec<_> = numbered().filter(|(_, it)| is_it(it)).map(|(at, _)| at).collect();
        reached(player, &bases)
    };
    let limited: Vec<_> = numbered()
        .filter(|(_, it)| !it.is_dormant && !it.is_ours && it.rules.iter().any(has_limit))
        .collect();
    if limited.is_empty() {
        return Vec::new();
    }
    let inside = reached(player, player.bases());
    let (output, postrouting) = (of(Hook::Output), of(Hook::Postrouting));
    let mut all = Vec::new();
    for (at, chain) in limited.into_iter().filter(|(at, _)| !inside.contains(at)) {
        for rule in chain.rules.iter().filter(|rule| has_limit(rule)) {
            let stands = match chain.family {
                Family::Other(_) | Family::Netdev => Where::Elsewhere,
                _ if !output.contains(&at) && !postrouting.contains(&at) => Where::Nowhere,
                _ if !is_for_new(rule) => Where::Out,
                _ if postrouting.contains(&at) => Where::Postrouting,
                _ => Where::OutForNew,
            };
            all.push(Unjudged { place: chain.place(rule), stands });
        }
    }
    all
}

fn has_limit(rule: &Rule) -> bool {
    rule.steps.iter().any(|step| match step {
        Step::Count(_) => true,
        Step::Add(adding) => adding.limit.is_some(),
        Step::Test(Test::In { set, .. }) | Step::Map(_, set) => set.has_limits(),
        _ => false,
    })
}

/// Whether a rule is for packets that open a connection alone.
fn is_for_new(rule: &Rule) -> bool {
    let all = rule.steps.iter().fold(Match::default(), |all, step| match step {
        Step::Test(test) => all.and(&Match::of(test)),
        _ => all,
    });
    !all.never && (all.syn || all.states.is_some_and(|bits| bits & STATE_ESTABLISHED == 0))
}

/// The chains that these lead to, with themselves.
pub(in crate::firewall) fn reached(player: &Player<'_>, from: &[usize]) -> HashSet<usize> {
    let mut seen: HashSet<usize> = from.iter().copied().collect();
    let mut next = from.to_vec();
    while let Some(at) = next.pop() {
        let Some(chain) = player.ruleset().chains.get(at) else { continue };
        let mut follow = |outcome: &Outcome| {
            if let Outcome::Jump(name) | Outcome::Goto(name) = outcome
                && let Some(target) = player.target(chain, name)
                && seen.insert(target)
            {
                next.push(target);
            }
        };
        for step in chain.rules.iter().flat_map(|rule| &rule.steps) {
            match step {
                Step::Verdict(outcome) => follow(outcome),
                Step::Map(_, set) => {
                    set.elements()
                        .iter()
                        .filter_map(|it| it.verdict.as_ref())
                        .for_each(&mut follow);
                }
                _ => {}
            }
        }
    }
    seen
}
