//! What a rule makes of what passes its limit, beside ending it: told of, written to a set, or no more than
//! logged. Pure.

use crate::firewall::play::Player;
use crate::firewall::{Chain, Outcome, Rule, Step};

/// Whether what passes the limit at this step is told of, by the rule itself or by the chain that
/// it leads to.
pub(super) fn tells(player: &Player<'_>, chain: &Chain, rule: &Rule, limit: usize) -> bool {
    let is_note = |step: &Step| *step == Step::Log || is_written(step);
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
            let is_end = |outcome: &Outcome| {
                let refuses = matches!(outcome, Outcome::Drop | Outcome::Reject | Outcome::Reset);
                // Some are let go on.
                refuses || matches!(outcome, Outcome::Accept | Outcome::Return)
            };
            let plain = |rule: &Rule| is_end(rule.outcome()) && !rule.steps.iter().any(is_note);
            !led_to(player, chain, rule).is_some_and(|chain| chain.rules.iter().all(plain))
        }
        _ => rule.steps.iter().skip(limit + 1).any(is_note),
    }
}

/// Whether what passes the limit at this step is written to a set, by the rule itself or by the chain
/// that it leads to.
pub(super) fn remembers(player: &Player<'_>, chain: &Chain, rule: &Rule, limit: usize) -> bool {
    let rules = led_to(player, chain, rule).into_iter().flat_map(|chain| &chain.rules);
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
    let is_note = |step: &Step| matches!(step, Step::Log | Step::Test(_));
    rule.steps.iter().skip(limit + 1).all(is_note)
        && !matches!(rule.steps.get(limit), Some(Step::Map(..)))
}
