//! The last hour, for the status page.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime};

use super::clock;
use crate::flow::FourTuple;
use crate::reconcile::keeper::Trigger;
use crate::reconcile::plan::{Action, ActionKind, Reason};

/// From sample to sample.
pub(crate) const STEP: Duration = Duration::from_secs(10);
/// An hour of them.
pub(super) const SAMPLES: usize = 360;
/// Repairs that are shown one by one.
const LAST: usize = 20;

/// What stood at one moment, and what was done since the one before.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    pub held: f64,
    pub sources: f64,
    actions: HashMap<(ActionKind, Reason), u64>,
}

/// One action that was carried out.
#[derive(Clone, Copy, Debug)]
pub(super) struct ActionRecord {
    pub at: SystemTime,
    pub kind: ActionKind,
    pub reason: Reason,
    pub trigger: Trigger,
    /// From the peer to the server.
    pub flow: FourTuple,
}

/// Samples of an hour, oldest first, and the newest deeds, newest first.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    pub samples: VecDeque<Sample>,
    pub last: VecDeque<ActionRecord>,
    current: HashMap<(ActionKind, Reason), u64>,
}

impl History {
    /// Takes note of an action that was carried out.
    pub(super) fn done(&mut self, action: &Action, trigger: Trigger) {
        let Action { kind, reason, view, .. } = *action;
        *self.current.entry((kind, reason)).or_default() += 1;
        // Routine: a sealed connection with traffic has it at every sweep.
        if kind == ActionKind::Extend {
            return;
        }
        self.last.truncate(LAST - 1);
        let flow = view.connection.received();
        self.last.push_front(ActionRecord { at: clock(), kind, reason, trigger, flow });
    }

    /// Closes a sample.
    pub(super) fn sample(&mut self, held: f64, sources: f64) {
        while self.samples.len() >= SAMPLES {
            self.samples.pop_front();
        }
        let actions = std::mem::take(&mut self.current);
        self.samples.push_back(Sample { held, sources, actions });
    }

    /// Actions of the last hour, the most frequent first.
    pub(super) fn actions(&self) -> Vec<((ActionKind, Reason), u64)> {
        let mut sum = self.current.clone();
        for (action, count) in self.samples.iter().flat_map(|sample| &sample.actions) {
            *sum.entry(*action).or_default() += count;
        }
        let mut all: Vec<_> = sum.into_iter().collect();
        all.sort_by_key(|((kind, reason), count)| {
            (std::cmp::Reverse(*count), *kind, reason.to_string())
        });
        all
    }
}
