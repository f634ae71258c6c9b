//! Carries out a confirmed plan. The only place that changes entries of the scope.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::behind::{Behind, Refused, is_refused, show_alone};
use super::confirm::Confirmed;
use super::ledger::Ledger;
use super::observe::Tables;
use super::plan::{Action, ActionKind, Reason};
use super::policy::Policy;
use super::pressure::client_of;
use crate::conntrack::{Change, Entry, Insert, Status, TcpState};
use crate::error::{Cause, Error, Op, Result};
use crate::firewall::limits::LimitRule;
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

/// What a stray RST would leave a dead connection (`nf_conntrack_tcp_timeout_close`).
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

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

/// For each of these actions, in their order: which packets of its peer are hidden from conntrack.
///
/// A peer that fools conntrack once may be the victim of a lossy line, and one of its RSTs may yet be
/// an honest one. A peer that does it again past a seal, or from several ports, is neither.
fn hiding(actions: &[Action], ledger: &Ledger) -> Vec<Option<Hidden>> {
    let mut repairs: HashMap<IpAddr, u32> = HashMap::new();
    for action in actions.iter().filter(|action| action.reason.is_fooled()) {
        *repairs.entry(client_of(action.view.connection.remote.addr())).or_default() += 1;
    }
    actions
        .iter()
        .map(|action| {
            let socket = action.view.socket?;
            let source = action.view.connection.remote.addr();
            let more = repairs.get(&client_of(source)).copied().unwrap_or(0);
            let again = ledger.hidden(&socket).is_some() || ledger.pressure().offends(source, more);
            let had_its_fin =
                matches!(socket.state, State::CloseWait | State::LastAck | State::Closing);
            match action.kind {
                _ if action.reason.is_fooled() && again => Some(Hidden::FinsAndRsts),
                _ if action.reason.is_fooled() => Some(Hidden::Fins),
                ActionKind::Reverse | ActionKind::Seal if had_its_fin => Some(Hidden::Fins),
                _ => None,
            }
        })
        .collect()
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
                        let [delete, insert] = fresh_steps(&action, seal, policy.lease);
                        // Where nothing is to be deleted the nudge meets no entry either.
                        tables.conntrack.change(&[delete])?;
                        let nudged = recounter.nudge(entry, way.route, now);
                        let inserted = tables.conntrack.change(&[insert])?;
                        outcome.result = inserted.into_iter().next().unwrap_or(Ok(()));
                        nudged
                    }
                };
                outcome.recount = Some(nudged.map(|()| way.route));
                if outcome.result.is_ok() {
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
            let replaced = tables.conntrack.change(&[replace])?;
            outcome.result = replaced.into_iter().next().unwrap_or(Ok(()));
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
            let results = tables.conntrack.change(&[last])?;
            outcome.result = results.into_iter().next().unwrap_or(Ok(()));
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

/// An entry that limits add at the nudge.
fn unassured(action: &Action, seal: bool, lease: Duration) -> Insert {
    let state = held_as(action, seal);
    Insert { like: action.template, state, status: Status::FRESH, timeout: timeout(action, lease) }
}

/// How a repair is done.
#[derive(Debug)]
enum Method<'l> {
    /// By changing the entry where it is, to one that stale RSTs leave alone: conntrack has seen the
    /// server's packets. The limiter has it on its list.
    OnList,
    /// By changing the entry where it is; the limiter counts it if it still has it.
    InPlace {
        /// A recount was wanted, and this is why there is none.
        instead_of_recount: Option<Error>,
    },
    /// By a new entry and a nudge that takes it past the limiter.
    Recount {
        /// The recipe of the recount.
        way: recount::Way,
        /// And that the entry is made immune to stale RSTs: a peer that has sent one will send
        /// more.
        seal: bool,
        /// Limits before the one that lacks it that may refuse it.
        before: &'l [LimitRule],
    },
}

impl Method<'_> {
    /// Whether the nudge must meet no entry: then no other one of the batch may wait for it.
    fn is_fresh(&self) -> bool {
        matches!(self, Self::Recount { way, .. } if way.recipe == Recipe::Fresh)
    }

    /// Where the list is long and has none of them: the kernel walks all of it at each nudge that meets an
    /// entry, and once a jiffy, or every 64, at those that meet none. One by one even so: what lacks its entry
    /// at such a walk is thrown off the list.
    fn for_list(mut self, is_long: bool) -> Self {
        if let Self::Recount { way, before: [], .. } = &mut self
            && is_long
            && way.route == Route::Ingress
        {
            way.recipe = Recipe::Fresh;
        }
        self
    }

    /// Whether its nudge meets an entry, and can be seen to pass.
    fn is_replaced_by_ingress(&self) -> bool {
        let replaced = recount::Way { route: Route::Ingress, recipe: Recipe::Replace };
        matches!(self, Self::Recount { way, .. } if *way == replaced)
    }
}

fn method<'l>(
    action: &Action,
    hidden: Option<Hidden>,
    before: Option<&'l Vec<LimitRule>>,
    recounter: Option<&mut impl Recount>,
    now: Instant,
) -> Method<'l> {
    let Some(recounter) = recounter.filter(|_| action.kind.needs_recount()) else {
        return Method::InPlace { instead_of_recount: None };
    };
    let entry = &action.template;
    let seal = action.kind == ActionKind::Revive && action.view.socket.is_some()
        || hidden == Some(Hidden::FinsAndRsts)
        || action.kind == ActionKind::Recount && is_held_as_established(action);
    match recounter.way(entry, now) {
        Err(error) => Method::InPlace { instead_of_recount: Some(error) },
        Ok(_) if !recounter.admit(entry, now) => {
            let what = "nudged too often, repaired in place".to_owned();
            let error = Op::on("recount", entry.orig).failed(Cause::Limited(what));
            Method::InPlace { instead_of_recount: Some(error) }
        }
        Ok(way) => {
            let before =
                before.filter(|_| way.route == Route::Ingress).map_or(&[][..], Vec::as_slice);
            Method::Recount { way, seal: seal && recounter.can_seal(), before }
        }
    }
}

/// What surrounds a nudge that meets no entry. The second step replaces whatever has begun in
/// between: an entry that the nudge left behind, one that a packet of the connection was picked
/// up as.
pub(super) fn fresh_steps(action: &Action, seal: bool, lease: Duration) -> [Change; 2] {
    let old = action.view.entry.map_or(action.template.key(), |entry| entry.key());
    let id = action.view.entry.and_then(|entry| entry.id);
    let (state, timeout) = (held_as(action, seal), timeout(action, lease));
    let new = Insert { like: action.template, state, status: Status::ASSURED, timeout };
    [Change::Delete { key: old, id }, Change::Replace { old: action.template.key(), id: None, new }]
}

/// The change that a repair begins with, and in place is.
fn first_step(action: &Action, way: &Method<'_>, lease: Duration) -> Change {
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

/// The status of an entry that is kept where it is.
fn assured(action: &Action) -> Status {
    let status = action.view.entry.and_then(|entry| entry.status);
    status.map_or(Status::ASSURED, Status::assured)
}

/// The change that makes a repaired entry an ordinary one.
pub(super) fn last_step(action: &Action, lease: Duration, sealed: bool) -> Change {
    Change::Update {
        key: action.template.key(),
        state: held_as(action, sealed),
        status: Some(Status::ASSURED),
        timeout: timeout(action, lease),
    }
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
fn is_held_as_established(action: &Action) -> bool {
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
pub(super) fn believed(state: State) -> TcpState {
    match state {
        // Accepted before the end of its handshake (TCP Fast Open): the rest of that changes nothing.
        State::Established | State::SynRecv => TcpState::Established,
        State::FinWait1 => TcpState::FinWait,
        State::LastAck | State::Closing => TcpState::LastAck,
        _ => TcpState::CloseWait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::{Entry, Zone};
    use crate::flow::Connection;
    use crate::reconcile::plan::Reason;
    use crate::reconcile::snapshot::View;

    fn revive(port: u16) -> Action {
        let connection = Connection::new(
            "192.0.2.1:80".parse().unwrap(),
            format!("198.51.100.7:{port}").parse().unwrap(),
        );
        let socket = Socket {
            local: connection.local,
            remote: connection.remote,
            state: State::CloseWait,
            cookie: Cookie(u64::from(port)),
            inode: 1,
            uid: 0,
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        };
        let entry = Entry::plain(connection.received(), Zone::default());
        Action {
            kind: ActionKind::Revive,
            reason: Reason::EntryClosed(TcpState::Close),
            view: View { connection, socket: Some(socket), entry: Some(entry) },
            template: entry,
        }
    }

    #[test]
    fn the_first_repair_hides_fins_and_the_next_rsts_too() {
        let mut ledger = Ledger::default();
        let action = revive(4000);
        let socket = action.view.socket.unwrap();
        assert_eq!(hiding(&[action], &ledger), [Some(Hidden::Fins)]);
        ledger.hold(socket, action.template, Instant::now());
        ledger.set_hidden(&socket, Hidden::Fins);
        assert_eq!(hiding(&[action], &ledger), [Some(Hidden::FinsAndRsts)]);
    }

    #[test]
    fn a_source_of_many_repairs_is_hidden_at_once() {
        let actions: Vec<_> = (4000..4003).map(revive).collect();
        let ledger = Ledger::default();
        assert_eq!(hiding(&actions, &ledger), [Some(Hidden::FinsAndRsts); 3]);
        assert_eq!(hiding(actions.get(..2).unwrap(), &ledger), [Some(Hidden::Fins); 2]);
    }
}
