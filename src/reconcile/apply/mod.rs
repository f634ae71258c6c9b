//! Carries out a confirmed plan. The only place that changes entries of the scope.

pub(super) mod change;
mod hiding;
mod method;

use std::collections::HashSet;
use std::time::Instant;

use self::change::{first_step, fresh_steps, last_step, unassured};
use self::hiding::hiding;
use self::method::{Method, method};
use super::behind::{Behind, Refused, is_refused, show_alone};
use super::confirm::Confirmed;
use super::ledger::Ledger;
use super::observe::Tables;
use super::plan::{Action, ActionKind, Reason};
use super::policy::Policy;
use crate::conntrack::{Change, Entry, Status, TcpState};
use crate::error::Result;
use crate::flow::FourTuple;
use crate::netlink::Transport;
use crate::recount::{self, Hidden, Recipe, Recount, Route};
use crate::sockdiag::{Cookie, Socket, State};

/// So many repairs are under way at once: between an insert and its last step an entry is not
/// assured, and that should be short.
const CHUNK: usize = 128;

/// A connection is shown to the limits so often at most, where its entry has become assured before
/// its nudge was seen to have passed. A server answers a stray packet twice in a second
/// (`net.ipv4.tcp_invalid_ratelimit`).
const SHOWN: u32 = 3;

/// How one action ended.
#[derive(Debug)]
pub struct Outcome {
    /// The action.
    pub action: Action,
    /// Whether the table was changed as planned.
    pub result: Result<()>,
    /// Whether the limiter was asked to count again, where that was part of it.
    pub recount: Option<Result<Route>>,
    /// Its limits have it on their lists still, so it was not shown to them.
    pub is_in_place: bool,
    /// Whether the entry was made immune to stale RSTs, where that was part of it.
    pub seal: Option<Result<()>>,
}

/// What is known of the lists of limits.
#[derive(Debug, Default)]
pub struct Known {
    /// Sockets that are on the lists of all their limits.
    pub on_list: HashSet<Cookie>,
    /// Those that limits before the one that lacks them may refuse.
    pub behind: Behind,
    /// Those that no list has which will be long.
    pub of_long_lists: HashSet<Cookie>,
}

/// Carries out a confirmed plan; `ledger` learns what is held and what no longer is.
///
/// # Errors
/// A broken conversation; what was done before it is in no outcome, and the next look at the
/// tables shows it.
pub fn apply<T: Transport, R: Recount>(
    tables: &mut Tables<T>,
    recounter: &mut Option<R>,
    confirmed: &Confirmed,
    known: &Known,
    policy: &Policy,
    ledger: &mut Ledger,
    now: Instant,
) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::with_capacity(confirmed.actions().len());
    let hidden = hiding(confirmed.actions(), ledger);
    // In both directions: conntrack also believes a peer that says to be the server.
    let both = |action: &Action, hidden: Hidden| {
        [action.template.orig, action.template.reply].map(|tuple| (tuple, hidden))
    };
    // What is hidden of a connection without entry is a stranger's to conntrack, and rules drop it.
    let is_at_once = |action: &Action, hidden: Option<Hidden>| {
        hidden == Some(Hidden::FinsAndRsts) && action.kind != ActionKind::Reinsert
    };
    for (actions, hidden) in confirmed.actions().chunks(CHUNK).zip(hidden.chunks(CHUNK)) {
        let pairs = || actions.iter().zip(hidden.iter().copied());
        let at_once = pairs().filter(|(action, hidden)| is_at_once(action, *hidden));
        let at_once: Vec<_> =
            at_once.flat_map(|(action, _)| both(action, Hidden::FinsAndRsts)).collect();
        let mut raised = raise(recounter, &at_once, now);
        let before = outcomes.len();
        let ways = actions.iter().zip(hidden).map(|(action, hidden)| {
            let cookie = action.view.socket.map(|socket| socket.cookie);
            if cookie.is_some_and(|cookie| known.on_list.contains(&cookie)) {
                return Method::OnList;
            }
            // Another namespace has other numbers.
            if let (Some(socket), Some(recounter)) = (action.view.socket, recounter.as_mut())
                && !tables.sockets.is_of_member(socket.local.addr())
            {
                let FourTuple { src, dst } = action.template.orig;
                recounter.know_device(src.addr(), dst.addr(), socket.interface);
            }
            let before = cookie.and_then(|cookie| known.behind.get(&cookie));
            let is_long = cookie.is_some_and(|cookie| known.of_long_lists.contains(&cookie));
            method(action, *hidden, before, recounter.as_mut(), now).for_list(is_long)
        });
        let ways = ways.collect();
        apply_chunk(tables, recounter, actions, ways, policy, &mut outcomes, now)?;
        // The first repair of a connection does not wait for it, and of one that failed nothing is hidden.
        let done = outcomes.iter().skip(before).map(|outcome| outcome.result.is_ok());
        let later = pairs()
            .zip(done)
            .filter(|((action, hidden), is_done)| *is_done && !is_at_once(action, *hidden));
        let later: Vec<_> = later
            .flat_map(|((action, hidden), _)| hidden.map(|it| both(action, it)))
            .flatten()
            .collect();
        raised = raised.and(raise(recounter, &later, now));
        // The repair itself is done; that it may be undone again is told like a failed seal.
        if let (Err(error), Some(outcome)) = (raised, outcomes.last_mut()) {
            outcome.seal = Some(Err(error));
        }
    }
    for (outcome, hidden) in outcomes.iter().zip(hidden) {
        if outcome.result.is_err() {
            continue;
        }
        let Action { kind, view, template, .. } = outcome.action;
        if let (Some(socket), Some(Ok(_))) = (view.socket, &outcome.recount) {
            ledger.set_counted(&socket);
        }
        match (kind, view.socket) {
            (ActionKind::Release | ActionKind::Reap, _) => ledger.drop_connection(view.connection),
            // An entry that is right as it is stays the kernel's to time.
            (ActionKind::Recount, Some(Socket { state: State::Established, .. })) => {}
            (ActionKind::Extend, _) if matches!(outcome.action.reason, Reason::EntryIdle(_)) => {}
            (_, Some(socket)) => {
                ledger.hold(socket, template, now);
                if let Some(hidden) = hidden {
                    ledger.set_hidden(&socket, hidden);
                }
            }
            (_, None) => {}
        }
    }
    Ok(outcomes)
}

fn raise<R: Recount>(
    recounter: &mut Option<R>,
    wanted: &[(FourTuple, Hidden)],
    now: Instant,
) -> Result<()> {
    recounter.as_mut().map_or(Ok(()), |recounter| recounter.hide(wanted, now))
}

fn apply_chunk<T: Transport, R: Recount>(
    tables: &mut Tables<T>,
    recounter: &mut Option<R>,
    actions: &[Action],
    ways: Vec<Method<'_>>,
    policy: &Policy,
    outcomes: &mut Vec<Outcome>,
    now: Instant,
) -> Result<()> {
    // Before their nudge all of these are in the table, so they can go together.
    let together: Vec<_> = (actions.iter().zip(&ways).enumerate())
        .filter(|(_, (_, way))| !way.is_fresh())
        .map(|(index, (action, way))| (index, first_step(action, way, policy.lease)))
        .collect();
    let changes: Vec<_> = together.iter().map(|(_, change)| *change).collect();
    let mut results = tables.conntrack.change(&changes)?.into_iter();

    let mut chunk = Vec::with_capacity(actions.len());
    let (mut shown, mut refused) = (Vec::new(), Vec::new());
    // Programs hand on packets in the order that they get them: when the last has passed, all have.
    let last = if recounter.as_ref().is_some_and(R::is_held_up_before_conntrack) {
        ways.iter().rposition(Method::is_replaced_by_ingress)
    } else {
        None
    };
    for (index, (action, way)) in actions.iter().zip(ways).enumerate() {
        let is_in_place = matches!(way, Method::OnList);
        let (action, result) = (*action, Ok(()));
        let mut outcome = Outcome { action, result, recount: None, is_in_place, seal: None };
        if !way.is_fresh() {
            outcome.result = results.next().unwrap_or(Ok(()));
        }
        match (way, recounter.as_mut()) {
            (Method::Recount { way, seal, before }, Some(recounter)) if outcome.result.is_ok() => {
                let entry = &action.template;
                let nudged = match way.recipe {
                    Recipe::Replace if before.is_empty() && last != Some(index) => {
                        recounter.nudge(entry, way.route, now)
                    }
                    Recipe::Replace => recounter.show(entry, now).map(|asked| {
                        if !before.is_empty() && is_refused(&asked, before) {
                            refused.push(Refused { index, seal, before });
                        }
                    }),
                    Recipe::Fresh => {
                        let [delete, replace] = fresh_steps(&action, seal, policy.lease);
                        // Where nothing is to be deleted the nudge meets no entry either.
                        tables.conntrack.change(&[delete])?;
                        let nudged = recounter.nudge(entry, way.route, now);
                        outcome.result = put_back(tables, replace)?;
                        nudged
                    }
                };
                outcome.recount = Some(nudged.map(|()| way.route));
                // What met no entry and is not sealed has been put back as it is to stay.
                if outcome.result.is_ok() && (way.recipe == Recipe::Replace || seal) {
                    shown.push((index, way, seal));
                }
            }
            (Method::InPlace { instead_of_recount: Some(why) }, _) => {
                outcome.recount = Some(Err(why));
            }
            _ => {}
        }
        chunk.push(outcome);
    }
    if let Some(recounter) = recounter {
        settle(tables, recounter, &mut chunk, &shown, policy, now)?;
        show_alone(tables, recounter, &mut chunk, &refused, policy, now)?;
    }
    outcomes.append(&mut chunk);
    Ok(())
}

/// Puts an entry in whose place there is none, as a rule: that takes one message. Else what has begun there
/// is replaced.
fn put_back<T: Transport>(tables: &mut Tables<T>, replace: Change) -> Result<Result<()>> {
    if let Change::Replace { new, .. } = replace
        && tables.conntrack.change_one(Change::Insert(new))?.is_ok()
    {
        return Ok(Ok(()));
    }
    tables.conntrack.change_one(replace)
}

/// Makes the entries of connections that were shown to their limits ordinary ones; one that a limit
/// may not have taken, or throws off its list again, is shown once more before.
fn settle<T: Transport, R: Recount>(
    tables: &mut Tables<T>,
    recounter: &mut R,
    chunk: &mut [Outcome],
    shown: &[(usize, recount::Way, bool)],
    policy: &Policy,
    now: Instant,
) -> Result<()> {
    let entry = |index: &usize| {
        chunk.get(*index).map(|it| (it.action.template.orig, it.action.template.zone))
    };
    let keys: Vec<_> = shown.iter().filter_map(|(index, ..)| entry(index)).collect();
    let found = tables.conntrack.get(&keys)?;
    let mut last_steps = Vec::new();
    for ((index, way, seal), entry) in shown.iter().zip(found) {
        let Some(outcome) = chunk.get_mut(*index) else { continue };
        let is_spoilt = way.recipe == Recipe::Replace
            && matches!(outcome.recount, Some(Ok(_)))
            && entry.is_some_and(|entry| is_spoilt(&entry));
        let mut tries = 1;
        while is_spoilt && tries < SHOWN && outcome.result.is_ok() {
            let Action { template: entry, .. } = outcome.action;
            let new = unassured(&outcome.action, *seal, policy.lease);
            let replace = Change::Replace { old: entry.key(), id: None, new };
            outcome.result = tables.conntrack.change_one(replace)?;
            outcome.recount = Some(recounter.nudge(&entry, way.route, now).map(|()| way.route));
            tries += 1;
            if !is_assured(tables, &entry)? {
                break;
            }
        }
        if outcome.result.is_err() {
            continue;
        }
        let action = &outcome.action;
        outcome.seal = seal.then(|| recounter.seal(&action.template, now));
        let sealed = matches!(outcome.seal, Some(Ok(())));
        // After the seal: its packet has given the entry the kernel's own timeout.
        let last = last_step(action, policy.lease, sealed);
        if is_spoilt {
            // Before the next nudge has the list throw it out: once a jiffy it is swept.
            outcome.result = tables.conntrack.change_one(last)?;
        } else {
            last_steps.push((*index, last));
        }
    }
    let changes: Vec<_> = last_steps.iter().map(|(_, change)| *change).collect();
    for ((index, _), result) in last_steps.into_iter().zip(tables.conntrack.change(&changes)?) {
        if let Some(outcome) = chunk.get_mut(index) {
            outcome.result = result;
        }
    }
    Ok(())
}

/// Whether the list may lack the connection of an entry whose nudge has passed: its packets had made
/// it assured before; or its limit rejects with a reset, which closes the entry of a nudge over it
/// (`nf_ct_set_closing()`), and the next nudge of the source had the list throw it out.
fn is_spoilt(entry: &Entry) -> bool {
    entry.status.is_some_and(Status::is_assured) || entry.state() == Some(TcpState::Close)
}

/// Whether packets of the connection have made its entry one that limits pass over, perhaps before
/// the nudge: an answer of the server and an ACK, which what is hidden of the peer is to conntrack.
fn is_assured<T: Transport>(tables: &mut Tables<T>, entry: &Entry) -> Result<bool> {
    let found = tables.conntrack.get(&[(entry.orig, entry.zone)])?;
    let status = found.into_iter().next().flatten().and_then(|entry| entry.status);
    Ok(status.is_some_and(Status::is_assured))
}
