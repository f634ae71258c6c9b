//! Carries out a confirmed plan. The only place that changes the conntrack table.

use std::time::{Duration, Instant};

use super::confirm::Confirmed;
use super::ledger::Ledger;
use super::observe::Tables;
use super::plan::{Action, ActionKind};
use super::policy::Policy;
use super::recount::{Recounter, Route};
use crate::conntrack::{Change, Insert, Status, TcpState};
use crate::error::Result;
use crate::netlink::Transport;
use crate::sockdiag::State;

/// So many repairs are under way at once: between an insert and its last step an entry is not
/// assured, and that should be short.
const CHUNK: usize = 128;

/// What a stray RST would leave a dead connection (`nf_conntrack_tcp_timeout_close`).
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How one action ended.
#[derive(Debug)]
pub struct Outcome {
    /// The action.
    pub action: Action,
    /// Whether the table was changed as planned.
    pub result: Result<()>,
    /// Whether the limiter was asked to count again, where that was part of it.
    pub recount: Option<Result<Route>>,
    /// Whether the entry was made immune to stale RSTs, where that was part of it.
    pub seal: Option<Result<()>>,
}

/// Carries out a confirmed plan; `ledger` learns what is held and what no longer is.
///
/// # Errors
/// A broken conversation; what was done before it is in no outcome, and the next look at the
/// tables shows it.
pub fn apply<T: Transport>(
    tables: &mut Tables<T>,
    recounter: &mut Option<Recounter>,
    confirmed: &Confirmed,
    policy: &Policy,
    ledger: &mut Ledger,
    now: Instant,
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::with_capacity(confirmed.actions().len());
    for actions in confirmed.actions().chunks(CHUNK) {
        apply_chunk(tables, recounter, actions, policy, &mut outcomes)?;
    }
    for outcome in outcomes.iter().filter(|outcome| outcome.result.is_ok()) {
        let Action { kind, view, template, .. } = outcome.action;
        match (kind, view.socket) {
            (ActionKind::Release, _) => ledger.drop_flow(view.flow),
            (_, Some(socket)) => ledger.hold(socket, template, now),
            (_, None) => {}
        }
    }
    Ok(outcomes)
}

fn apply_chunk<T: Transport>(
    tables: &mut Tables<T>,
    recounter: &mut Option<Recounter>,
    actions: &[Action],
    policy: &Policy,
    outcomes: &mut Vec<Outcome>,
) -> Result<()> {
    let recounts = recounter.is_some();
    let seals = recounter.as_ref().is_some_and(Recounter::can_seal);
    let changes: Vec<_> =
        actions.iter().map(|action| first_step(action, policy.lease, recounts, seals)).collect();
    let results = tables.conntrack.change(&changes)?;

    let mut chunk: Vec<Outcome> = actions
        .iter()
        .zip(results)
        .map(|(action, result)| Outcome { action: *action, result, recount: None, seal: None })
        .collect();
    if let Some(recounter) = recounter {
        let mut last_steps = Vec::new();
        let mut nudged = Vec::new();
        for outcome in &mut chunk {
            if outcome.result.is_ok() && outcome.action.kind.needs_recount() {
                let entry = &outcome.action.template;
                outcome.recount = Some(recounter.nudge(entry));
                let seal = is_sealed(&outcome.action, seals).then(|| recounter.seal(entry));
                let sealed = matches!(seal, Some(Ok(())));
                outcome.seal = seal;
                // After the seal: its packet has given the entry the kernel's own timeout.
                last_steps.push(last_step(&outcome.action, policy.lease, sealed));
                nudged.push(outcome);
            }
        }
        for (outcome, result) in nudged.into_iter().zip(tables.conntrack.change(&last_steps)?) {
            outcome.result = result;
        }
    }
    outcomes.append(&mut chunk);
    Ok(())
}

/// The change that an action begins with, and without a recount is.
fn first_step(action: &Action, lease: Duration, recount: bool, seals: bool) -> Change {
    let entry = action.view.entry;
    let key = entry.map_or(action.template.key(), |entry| entry.key());
    let id = entry.and_then(|entry| entry.id);
    // Unassured, so that the limiter adds it at the nudge; without one, assured at once.
    let status = if recount { Status::FRESH } else { Status::ASSURED };
    let state = held_as(action, is_sealed(action, seals));
    let insert = Insert { like: action.template, state, status, timeout: lease };
    match action.kind {
        ActionKind::Extend => Change::Extend { key, timeout: lease },
        ActionKind::Revive if recount => Change::Replace { old: key, id, new: insert },
        ActionKind::Revive => last_step(action, lease, false),
        ActionKind::Reverse => Change::Replace { old: key, id, new: insert },
        ActionKind::Reinsert => Change::Insert(insert),
        ActionKind::Release => {
            Change::Update { key, state: TcpState::Close, status: None, timeout: CLOSE_TIMEOUT }
        }
    }
}

/// The change that makes a repaired entry an ordinary one.
fn last_step(action: &Action, lease: Duration, sealed: bool) -> Change {
    Change::Update {
        key: action.template.key(),
        state: held_as(action, sealed),
        status: Some(Status::ASSURED),
        timeout: lease,
    }
}

/// Whether the entry is made immune to stale RSTs: a peer that has sent one will send more.
fn is_sealed(action: &Action, can_seal: bool) -> bool {
    can_seal && action.kind == ActionKind::Revive
}

/// The state that conntrack should see the connection in. Only ESTABLISHED can be sealed.
fn held_as(action: &Action, sealed: bool) -> TcpState {
    match action.view.socket.map(|socket| socket.state) {
        Some(State::Established) => TcpState::Established,
        _ if sealed => TcpState::Established,
        _ => TcpState::CloseWait,
    }
}
