//! What an action changes in the table: the entry that conntrack is to have, and in what state.

use std::time::Duration;

use super::method::Method;
use crate::conntrack::{Change, Insert, Status, TcpState};
use crate::reconcile::plan::{Action, ActionKind, Reason};
use crate::sockdiag::State;

/// What a stray RST would leave a dead connection (`nf_conntrack_tcp_timeout_close`).
pub(in crate::reconcile) const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The change that a repair begins with, and in place is.
pub(super) fn first_step(action: &Action, way: &Method<'_>, lease: Duration) -> Change {
    let (entry, lease) = (action.view.entry, timeout(action, lease));
    let key = entry.map_or(action.template.key(), |entry| entry.key());
    let id = entry.and_then(|entry| entry.id);
    let (status, sealed) = match way {
        // Unassured, so that the limiter adds it at the nudge.
        Method::Recount { seal, .. } => (Status::FRESH, *seal),
        Method::OnList => (Status::ASSURED, true),
        Method::InPlace { .. } => (Status::ASSURED, false),
    };
    let state = held_as(action, sealed);
    let insert = Insert { like: action.template, state, status, timeout: lease };
    match (action.kind, way) {
        // What cannot be recounted stays as it is.
        (ActionKind::Extend, _) | (ActionKind::Recount, Method::InPlace { .. }) => {
            Change::Extend { key, timeout: lease }
        }
        (ActionKind::Revive, Method::InPlace { .. } | Method::OnList) => {
            Change::Update { key, state, status: Some(assured(action)), timeout: lease }
        }
        (ActionKind::Revive | ActionKind::Reverse | ActionKind::Recount, _) => {
            Change::Replace { old: key, id, new: insert }
        }
        (ActionKind::Reinsert, _) => Change::Insert(insert),
        (ActionKind::Seal, _) => Change::Update {
            key,
            state: TcpState::Established,
            status: Some(assured(action)),
            timeout: lease,
        },
        (ActionKind::Reap, _) => Change::Delete { key, id },
        (ActionKind::Release, _) => {
            Change::Update { key, state: TcpState::Close, status: None, timeout: CLOSE_TIMEOUT }
        }
    }
}

/// What surrounds a nudge that meets no entry. The second step replaces whatever has begun in
/// between: an entry that the nudge left behind, one that a packet of the connection was picked
/// up as.
pub(in crate::reconcile) fn fresh_steps(
    action: &Action,
    seal: bool,
    lease: Duration,
) -> [Change; 2] {
    let old = action.view.entry.map_or(action.template.key(), |entry| entry.key());
    let id = action.view.entry.and_then(|entry| entry.id);
    let (state, timeout) = (held_as(action, seal), timeout(action, lease));
    let new = Insert { like: action.template, state, status: Status::ASSURED, timeout };
    [Change::Delete { key: old, id }, Change::Replace { old: action.template.key(), id: None, new }]
}

/// An entry that limits add at the nudge.
pub(super) fn unassured(action: &Action, seal: bool, lease: Duration) -> Insert {
    let state = held_as(action, seal);
    Insert { like: action.template, state, status: Status::FRESH, timeout: timeout(action, lease) }
}

/// The change that makes a repaired entry an ordinary one.
pub(in crate::reconcile) fn last_step(action: &Action, lease: Duration, sealed: bool) -> Change {
    Change::Update {
        key: action.template.key(),
        state: held_as(action, sealed),
        status: Some(Status::ASSURED),
        timeout: timeout(action, lease),
    }
}

/// The status of an entry that is kept where it is.
fn assured(action: &Action) -> Status {
    let status = action.view.entry.and_then(|entry| entry.status);
    status.map_or(Status::ASSURED, Status::assured)
}

/// How long the entry lives from now on: what agrees keeps the time that the kernel gave it.
fn timeout(action: &Action, lease: Duration) -> Duration {
    if let Reason::EntryIdle(timeout) = action.reason {
        return timeout;
    }
    let left = action.view.entry.and_then(|entry| entry.timeout);
    match (action.kind, action.view.socket.map(|socket| socket.state)) {
        (ActionKind::Recount, Some(State::Established)) => left.unwrap_or(lease),
        _ => lease,
    }
}

/// Whether a half-closed connection is held as one that is not, so that stale RSTs leave it alone.
pub(super) fn is_held_as_established(action: &Action) -> bool {
    let half_closed = action.view.socket.is_some_and(|socket| socket.state != State::Established);
    let state = action.view.entry.and_then(|entry| entry.state());
    half_closed && state == Some(TcpState::Established)
}

/// The state that conntrack should see the connection in. Only ESTABLISHED can be sealed.
fn held_as(action: &Action, sealed: bool) -> TcpState {
    match action.view.socket {
        Some(_) if sealed => TcpState::Established,
        Some(socket) => believed(socket.state),
        None if action.reason == Reason::CookieSent => TcpState::SynRecv,
        None => TcpState::CloseWait,
    }
}

/// What conntrack believes of a connection whose socket is in this state, when it has seen all of
/// its packets.
pub(in crate::reconcile) fn believed(state: State) -> TcpState {
    match state {
        // Accepted before the end of its handshake (TCP Fast Open): the rest of that changes nothing.
        State::Established | State::SynRecv => TcpState::Established,
        State::FinWait1 => TcpState::FinWait,
        State::LastAck | State::Closing => TcpState::LastAck,
        _ => TcpState::CloseWait,
    }
}
