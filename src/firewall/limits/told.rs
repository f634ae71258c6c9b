//! What a rule makes of what passes its limit, beside ending it: told of, written to a set, or no more than
//! logged. Pure.

use crate::firewall::play::{DEPTH, Player};
use crate::firewall::{Chain, Outcome, Rule, Step};

/// Whether what passes the limit at this step is told of, by the rule itself or by the chain that
/// it leads to.
pub(super) fn tells(player: &Player<'_>, chain: &Chain, rule: &Rule, limit: usize) -> bool {
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
        Outcome::Jump(_) | Outcome::Goto(_) => {
            !led_to(player, chain, rule).is_some_and(|chain| is_silent(player, chain, DEPTH))
        }
        _ => rule.steps.iter().skip(limit + 1).any(is_note),
    }
}

/// Whether every rule of a chain, and of those that it leads to, ends in a verdict and tells nothing.
fn is_silent(player: &Player<'_>, chain: &Chain, depth: usize) -> bool {
    let ends = |rule: &Rule| match rule.outcome() {
        Outcome::Jump(_) | Outcome::Goto(_) => {
            let next = led_to(player, chain, rule).filter(|_| depth > 0);
            next.is_some_and(|next| is_silent(player, next, depth - 1))
        }
        outcome => matches!(
            outcome,
            // Some may be let go on.
            Outcome::Drop | Outcome::Reject | Outcome::Reset | Outcome::Accept | Outcome::Return
        ),
    };
    chain.rules.iter().all(|rule| ends(rule) && !rule.steps.iter().any(is_note))
}

fn is_note(step: &Step) -> bool {
    *step == Step::Log || is_written(step)
}

/// Whether what passes the limit at this step is written to a set, by the rule itself or by the chain
/// that it leads to.
pub(super) fn remembers(player: &Player<'_>, chain: &Chain, rule: &Rule, limit: usize) -> bool {
    let rules = led_to(player, chain, rule).into_iter().flat_map(|chain| chain.rules.iter());
    let behind = rules.flat_map(|it| &it.steps);
    rule.steps.iter().skip(limit + 1).chain(behind).any(is_written)
}

/// Whether a step writes the packet to a set or a list, which is no limit's.
fn is_written(step: &Step) -> bool {
    match step {
        Step::Note(_) => true,
        Step::Add(adding) => adding.limit.is_none(),
        _ => false,
    }
}

/// The chain that a rule leads to.
fn led_to<'r>(player: &Player<'r>, chain: &Chain, rule: &Rule) -> Option<&'r Chain> {
    let (Outcome::Jump(name) | Outcome::Goto(name)) = rule.outcome() else { return None };
    player.ruleset().chains.get(player.target(chain, name)?)
}

/// Whether what passes the limit at this step is logged or counted, and no more.
pub(super) fn notes(rule: &Rule, limit: usize) -> bool {
    let is_none = |step: &Step| matches!(step, Step::Log | Step::Test(_));
    rule.steps.iter().skip(limit + 1).all(is_none)
        && !matches!(rule.steps.get(limit), Some(Step::Map(..)))
}
