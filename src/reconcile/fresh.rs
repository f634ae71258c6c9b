//! Nudges that meet no entry: it is taken away, the nudge passes the limits as a new connection's SYN would,
//! and the entry is put back.

use std::time::{Duration, Instant};

use super::apply::{Outcome, held_as, timeout};
use super::observe::Tables;
use super::plan::Action;
use crate::conntrack::{Change, Insert, Status};
use crate::error::Result;
use crate::netlink::Transport;
use crate::recount::{Recount, Route};

/// So many connections of one long list lack their entries at once. The kernel walks the list at the first
/// of their nudges and not again in that jiffy.
const TOGETHER: usize = 64;

/// A connection that is shown so.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fresh {
    /// Its place in the chunk.
    pub(super) index: usize,
    pub(super) route: Route,
    /// Whether its entry is made immune to stale RSTs.
    pub(super) seal: bool,
    /// The walk through its list takes longer than the nudges of many.
    pub(super) is_long: bool,
}

/// Shows these: one by one, so that each lacks its entry as shortly as can be, but those of a long list
/// together.
pub(super) fn show<T: Transport, R: Recount>(
    tables: &mut Tables<T>,
    recounter: &mut R,
    chunk: &mut [Outcome],
    all: &[Fresh],
    lease: Duration,
    now: Instant,
) -> Result<()> {
    let (long, short): (Vec<_>, Vec<_>) = all.iter().partition(|one| one.is_long);
    for group in short.chunks(1).chain(long.chunks(TOGETHER)) {
        let steps = |one: &Fresh| chunk.get(one.index).map(|it| steps(&it.action, one.seal, lease));
        let (deletes, inserts): (Vec<_>, Vec<_>) =
            group.iter().filter_map(steps).map(|[delete, insert]| (delete, insert)).unzip();
        // Where nothing is to be deleted the nudge meets no entry either.
        tables.conntrack.change(&deletes)?;
        for Fresh { index, route, .. } in group {
            if let Some(outcome) = chunk.get_mut(*index) {
                let nudged = recounter.nudge(&outcome.action.template, *route, now);
                outcome.recount = Some(nudged.map(|()| *route));
            }
        }
        for (one, inserted) in group.iter().zip(tables.conntrack.change(&inserts)?) {
            if let Some(outcome) = chunk.get_mut(one.index) {
                outcome.result = inserted;
            }
        }
    }
    Ok(())
}

/// What surrounds such a nudge. The second step replaces whatever has begun in between: an entry that the
/// nudge left behind, one that a packet of the connection was picked up as.
pub(super) fn steps(action: &Action, seal: bool, lease: Duration) -> [Change; 2] {
    let old = action.view.entry.map_or(action.template.key(), |entry| entry.key());
    let id = action.view.entry.and_then(|entry| entry.id);
    let (state, timeout) = (held_as(action, seal), timeout(action, lease));
    let new = Insert { like: action.template, state, status: Status::ASSURED, timeout };
    [Change::Delete { key: old, id }, Change::Replace { old: action.template.key(), id: None, new }]
}
