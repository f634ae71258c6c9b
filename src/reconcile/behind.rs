//! Limits that stand behind others. One that is at its number refuses even a connection that it has on
//! its list already, where SYNs that it refused stand there too: it compares that connection's nudge with
//! its list from the front, and throws nothing off that stands behind it. So a limit behind it whose list
//! is new is shown what is open one by one, by nudges that are seen to pass or not.

use std::collections::HashMap;
use std::time::Instant;

use super::apply::Outcome;
use super::apply::change::{fresh_steps, last_step};
use super::deciding::limit_of;
use super::observe::Tables;
use super::policy::Policy;
use crate::conntrack::Change;
use crate::error::{Cause, Op, Result};
use crate::firewall::limits::LimitRule;
use crate::netlink::Transport;
use crate::recount::{Asked, Recount};
use crate::sockdiag::Cookie;

/// Connections that limits before the one with the new list may refuse, and which these are.
pub type Behind = HashMap<Cookie, Vec<LimitRule>>;

/// Times that one of them is shown. A SYN of its source in the same moment spoils a try.
const TRIES: u32 = 4;
/// So many are shown so together: a jiffy each, in which no event is read.
const TOGETHER: usize = 16;

/// A connection that a limit before the one that lacks it has refused.
pub(super) struct Refused<'l> {
    /// Its place among those that were shown.
    pub(super) index: usize,
    /// Whether its entry is made immune to stale RSTs.
    pub(super) seal: bool,
    /// The limits before.
    pub(super) before: &'l [LimitRule],
}

/// Whether a limit before has refused this nudge, or may have.
pub(super) fn is_refused(asked: &Asked, before: &[LimitRule]) -> bool {
    let before: Vec<_> = before.iter().collect();
    match asked {
        Asked::LetIn => false,
        Asked::Stopped(trace) => trace.lacks.is_some() || limit_of(trace, &before).is_some(),
    }
}

/// Shows these in a way that the limit before takes: the nudge meets no entry, so in a new jiffy it has
/// the whole list swept, the connection's own tuple included, and takes its place there again.
pub(super) fn show_alone<T: Transport, R: Recount>(
    tables: &mut Tables<T>,
    recounter: &mut R,
    outcomes: &mut [Outcome],
    refused: &[Refused<'_>],
    policy: &Policy,
    now: Instant,
) -> Result<()> {
    for (at, Refused { index, seal, before }) in refused.iter().enumerate() {
        let Some(outcome) = outcomes.get_mut(*index).filter(|it| it.result.is_ok()) else {
            continue;
        };
        let entry = outcome.action.template;
        let [_, insert] = fresh_steps(&outcome.action, *seal, policy.lease);
        let (mut tries, mut passes) = (if at < TOGETHER { TRIES } else { 0 }, false);
        while tries > 0 && !passes && outcome.result.is_ok() {
            recounter.await_sweep();
            tables.conntrack.change(&[Change::Delete { key: entry.key(), id: None }])?;
            let asked = recounter.show(&entry, now);
            outcome.result = tables.conntrack.change_one(insert)?;
            passes = !is_refused(&asked?, before);
            tries -= 1;
        }
        if !passes {
            let what = "refused by a limit before the one that lacks it".to_owned();
            let error = Op::on("recount", entry.orig).failed(Cause::Limited(what));
            outcome.recount = Some(Err(error));
        }
        if *seal && outcome.result.is_ok() {
            let sealed = recounter.seal(&entry, now);
            let last = last_step(&outcome.action, policy.lease, sealed.is_ok());
            outcome.seal = Some(sealed);
            outcome.result = tables.conntrack.change_one(last)?;
        }
    }
    Ok(())
}
