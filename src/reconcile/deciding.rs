//! What limits are asked, and which one stopped a probe, as its trace shows. Pure.

use super::snapshot::View;
use crate::conntrack::Zone;
use crate::firewall::Outcome;
use crate::firewall::limits::LimitRule;
use crate::recount::{Question, Step, Trace};

/// Whether one more connection like this one would be let in; in `zone` where no entry shows one.
pub fn question(view: &View, zone: Zone) -> Question {
    let entry = view.entry.filter(|entry| entry.reply == view.connection.sent());
    Question {
        client: view.connection.remote.addr(),
        server: entry.map_or(view.connection.local, |entry| entry.orig.dst),
        zone: entry.map_or(zone, |entry| entry.zone),
    }
}

/// The one of these limits, which the probe may have met, that let it in no further; `None` where
/// another rule did, or none that the kernel reports (iptables-legacy).
pub fn limit_of<'l>(trace: &Trace, met: &[&'l LimitRule]) -> Option<&'l LimitRule> {
    let end = trace.steps.iter().rev().find(|step| step.is_drop)?;
    // For what exceeds it: the packet has met it, and did not go on as if nothing was.
    let over = trace.steps.iter().rev().find_map(|step| {
        met.iter()
            .find(|rule| rule.limit.over && rule.outcome != Outcome::Continue && stands(rule, step))
    });
    // For what stays within: it would have taken the packet.
    let is_met = |rule: &LimitRule| trace.steps.iter().any(|step| stands(rule, step));
    let mut within = met.iter().filter(|rule| !rule.limit.over && !is_met(rule));
    match (over, within.next(), within.next()) {
        (Some(rule), _, _) => Some(*rule),
        // What drops it stands where the limit does: the end of the same table.
        (None, Some(rule), None) if end.table == rule.table => Some(*rule),
        _ => None,
    }
}

fn stands(rule: &LimitRule, step: &Step) -> bool {
    rule.handle.is_some()
        && rule.handle == step.rule
        && rule.family.number() == step.family
        && (&rule.table, &rule.chain) == (&step.table, &step.chain)
}
