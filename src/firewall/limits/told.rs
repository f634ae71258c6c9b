//! What a rule makes of what passes its limit, beside ending it: told of, written to a set, or no more than
//! logged. Pure.

use crate::firewall::play::Player;
use crate::firewall::{Chain, Outcome, Rule, Step};

/// Whether what passes the limit at this step is told of, by the rule itself or by the chain that
/// it leads to.
pub(super) fn tells(player: &Player<'_>, chain: &Chain, rule: &Rule, limit: usize) -> bool {
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
            let target = player.target(chain, name);
            let chain = target.and_then(|at| player.ruleset().chains.get(at));
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

/// Whether what passes the limit at this step is written to a set, by the rule itself or by the chain
/// that it leads to.
pub(super) fn remembers(player: &Player<'_>, chain: &Chain, rule: &Rule, limit: usize) -> bool {
    let remembers = |step: &Step| match step {
        Step::Note(_) => true,
        Step::Add(adding) => adding.limit.is_none(),
        _ => false,
    };
    let target = match rule.outcome() {
        Outcome::Jump(name) | Outcome::Goto(name) => player.target(chain, name),
        _ => None,
    };
    let target = target.and_then(|at| player.ruleset().chains.get(at));
    let behind = target.into_iter().flat_map(|chain| &chain.rules).flat_map(|it| &it.steps);
    rule.steps.iter().skip(limit + 1).chain(behind).any(remembers)
}

/// Whether what passes the limit at this step is logged or counted, and no more.
pub(super) fn notes(rule: &Rule, limit: usize) -> bool {
    let is_note = |step: &Step| matches!(step, Step::Log | Step::Test(_));
    rule.steps.iter().skip(limit + 1).all(is_note)
        && !matches!(rule.steps.get(limit), Some(Step::Map(..)))
}
