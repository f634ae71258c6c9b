//! What a worker has done, counted: for its last log line, and for whoever publishes it.

use std::collections::BTreeMap;

use crate::reconcile::apply::Outcome;

/// Counts since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Done, by action; `recount` and `seal` beside those of the plan.
    pub actions: BTreeMap<&'static str, u64>,
    /// Failed, by action and reason.
    pub errors: BTreeMap<(&'static str, &'static str), u64>,
    /// Nudges by route.
    pub recounts: BTreeMap<&'static str, u64>,
    /// Repairs before which the limiter may have thrown the connection out.
    pub late_repairs: u64,
    /// Sweeps that ended well.
    pub sweeps: u64,
    /// Sweeps that did not.
    pub sweep_errors: u64,
    /// Times that the kernel dropped events.
    pub event_overruns: u64,
}

impl Tally {
    /// Counts one action.
    pub(super) fn add(&mut self, outcome: &Outcome) {
        let kind = outcome.action.kind;
        match &outcome.result {
            Ok(()) => {
                *self.actions.entry(kind.name()).or_default() += 1;
                self.late_repairs += u64::from(kind.needs_recount());
            }
            Err(error) => *self.errors.entry((kind.name(), error.reason())).or_default() += 1,
        }
        match &outcome.recount {
            Some(Ok(route)) => {
                *self.actions.entry("recount").or_default() += 1;
                *self.recounts.entry(route.name()).or_default() += 1;
            }
            Some(Err(error)) => {
                *self.errors.entry(("recount", error.reason())).or_default() += 1;
            }
            None => {}
        }
        match &outcome.seal {
            Some(Ok(())) => *self.actions.entry("seal").or_default() += 1,
            Some(Err(error)) => *self.errors.entry(("seal", error.reason())).or_default() += 1,
            None => {}
        }
    }
}
