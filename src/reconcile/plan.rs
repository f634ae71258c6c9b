//! Decides, from values alone, what must be done so that conntrack follows the sockets.
//!
//! No clock, no I/O, no log: the table of docs/reconcile.md as a function, which
//! tests/plan_table/main.rs walks cell by cell.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use super::evidence::{Arrival, Evidence, TrackedPort};
use super::ledger::Ledger;
use super::policy::{Policy, Scope};
use super::snapshot::{Direction, Snapshot, View};
use crate::conntrack::{Entry, TcpState, Zone};
use crate::firewall::lists::Loss;
use crate::flow::FourTuple;
use crate::sockdiag::{Socket, State};

/// The repairs of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActionKind {
    /// Lengthen the entry's timeout.
    Extend,
    /// Take an entry that conntrack believes closed back to life.
    Revive,
    /// Put a forgotten entry back.
    Reinsert,
    /// Turn an entry round that was picked up in the wrong direction.
    Reverse,
    /// Hold an entry as ESTABLISHED where it is, before a stale RST comes.
    Seal,
    /// Show the limiter a connection that both tables agree on, and that its list lacks.
    Recount,
    /// Give an entry back whose socket is gone.
    Release,
    /// Remove an entry that no socket backs.
    Reap,
}

impl ActionKind {
    /// The action's name in plans, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Extend => "extend",
            Self::Revive => "revive",
            Self::Reinsert => "reinsert",
            Self::Reverse => "reverse",
            Self::Seal => "seal",
            Self::Recount => "recount",
            Self::Release => "release",
            Self::Reap => "reap",
        }
    }

    /// Whether it brings back what conntrack had lost; the limiter may have thrown the connection
    /// out before it.
    pub fn is_repair(self) -> bool {
        matches!(self, Self::Revive | Self::Reinsert | Self::Reverse)
    }

    /// Whether the limiter must be shown the connection.
    pub fn needs_recount(self) -> bool {
        self.is_repair() || self == Self::Recount
    }
}

impl fmt::Display for ActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What the planner makes of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Something must be done.
    Act(ActionKind, Reason),
    /// Nothing to do, and why.
    Leave(NoAction),
}

/// Why something must be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The socket is open and no entry is left.
    EntryMissing,
    /// The same right behind a packet of the peer that had an entry: it has closed the entry, and a SYN
    /// on the same tuple has taken that away.
    EntryTakenAway,
    /// The socket is open and conntrack believes that it closes or has closed.
    EntryClosed(TcpState),
    /// The socket is open and conntrack believes that its handshake is under way.
    EntryBegunAnew(TcpState),
    /// The entry would expire before the lease is renewed.
    EntryExpiring,
    /// The connection is idle, and the kernel would forget its entry before the next look: it gets
    /// this much longer.
    EntryIdle(Duration),
    /// The entry takes the server for the client.
    EntryReversed,
    /// The socket of a held entry is gone.
    SocketGone,
    /// No socket has backed the entry for the grace time.
    SocketMissing,
    /// Conntrack believes that the handshake is over, and the SYN cookie that the server has sent
    /// for it is good still.
    CookieSent,
    /// The source has fooled conntrack again and again, or the table is nearly full.
    UnderAttack,
    /// A limit that is for the connection has lost its list.
    Uncounted(Loss),
    /// Conntrack learned of the connection from a packet in its middle, so no limit has counted it.
    PickedUp,
    /// A repair has been broken off.
    BrokenOff,
}

impl Reason {
    /// Whether packets of the peer have made conntrack believe what is not so.
    pub fn is_fooled(self) -> bool {
        matches!(self, Self::EntryClosed(_) | Self::EntryBegunAnew(_) | Self::EntryTakenAway)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EntryMissing => f.write_str("socket open, entry missing"),
            Self::EntryTakenAway => {
                f.write_str("socket open, its peer has done away with the entry")
            }
            Self::EntryClosed(state) | Self::EntryBegunAnew(state) => {
                write!(f, "socket open, entry in {state}")
            }
            Self::EntryIdle(_) => f.write_str("idle, the kernel would forget it"),
            Self::EntryExpiring => f.write_str("socket open, entry about to expire"),
            Self::EntryReversed => f.write_str("entry picked up in the wrong direction"),
            Self::SocketGone => f.write_str("socket gone"),
            Self::SocketMissing => f.write_str("no socket for too long"),
            Self::Uncounted(loss) => loss.fmt(f),
            Self::PickedUp => f.write_str("picked up midway, no limit has counted it"),
            Self::BrokenOff => f.write_str("a repair was broken off"),
            Self::CookieSent => f.write_str("handshake closed, its SYN cookie is good still"),
            Self::UnderAttack => f.write_str("socket half-closed, source under suspicion"),
        }
    }
}

/// Why nothing is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoAction {
    /// Both tables agree.
    Agree,
    /// The handshake or its refusal is under way.
    Handshake,
    /// This host opened the connection.
    Outgoing,
    /// The socket is in a state that is not guarded, or no application has it; conntrack sees its
    /// packets itself.
    NotGuarded,
    /// There is no sign that the connection was ever tracked.
    Untracked,
    /// Rules keep the connection, or its SYN, out of conntrack, or may.
    LeftOut,
    /// An entry that no socket backs: counted, but not ours to take away.
    OverCount,
    /// No socket and no live entry.
    Over,
}

impl fmt::Display for NoAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agree => "both tables agree",
            Self::Handshake => "the handshake is under way",
            Self::Outgoing => "this host opened the connection",
            Self::NotGuarded => "the socket is in no guarded state or not in scope",
            Self::Untracked => "no sign that this connection was ever tracked",
            Self::LeftOut => "rules leave its SYN out of conntrack, or may",
            Self::OverCount => "an entry without a socket",
            Self::Over => "the connection is over",
        })
    }
}

/// One cell of the table: all that a decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// State of the socket, `None` when an exact look-up shows none.
    pub socket: Option<State>,
    /// Whether that state is guarded and the connection in scope.
    pub guarded: bool,
    /// The entry.
    pub entry: Option<(Direction, TcpState)>,
    /// The lease is due: the entry's timeout is below half of it, or, for one that we inserted,
    /// beyond it.
    pub expiring: bool,
    /// ctkeep answers for the entry.
    pub held: bool,
    /// There is evidence that the connection is tracked.
    pub tracked: bool,
    /// In scope, its handshake has not ended, and the server has sent SYN cookies a moment ago.
    pub cookie: bool,
}

/// The table.
pub fn decide(cell: Cell) -> Verdict {
    use ActionKind::*;
    use Verdict::*;

    match (cell.socket, cell.entry) {
        (_, Some((Direction::Outgoing, _))) => Leave(NoAction::Outgoing),
        (None, Some((Direction::FromPeer, state))) if cell.cookie && state.is_closing() => {
            Act(Revive, Reason::CookieSent)
        }
        (None, entry) => without_socket(entry, cell.held),
        (Some(_), _) if !cell.guarded => Leave(NoAction::NotGuarded),
        (Some(_), None) if cell.tracked => Act(Reinsert, Reason::EntryMissing),
        (Some(_), None) => Leave(NoAction::Untracked),
        (Some(_), Some((Direction::Reversed, _))) => Act(Reverse, Reason::EntryReversed),
        (Some(socket), Some((Direction::FromPeer, state))) if contradicts(socket, state) => {
            Act(Revive, Reason::EntryClosed(state))
        }
        // A socket that has not ended its handshake has none yet that conntrack could have seen.
        (Some(State::SynRecv), Some((_, state))) if state.is_opening() => {
            Leave(NoAction::Handshake)
        }
        // TCP has the last packet of the handshake after conntrack. So the peer has sent a SYN on a
        // tuple whose entry was closed or gone; without an answer even its RSTs are new to the rules.
        (Some(_), Some((Direction::FromPeer, state))) if state.is_opening() => {
            Act(Revive, Reason::EntryBegunAnew(state))
        }
        // An idle ESTABLISHED connection is the kernel's to forget, as its timeout says.
        (Some(State::Established), Some((_, TcpState::Established))) if !cell.held => {
            Leave(NoAction::Agree)
        }
        (Some(_), Some(_)) if cell.expiring => Act(Extend, Reason::EntryExpiring),
        (Some(_), Some(_)) => Leave(NoAction::Agree),
    }
}

/// Whether conntrack believes that a connection is over, or about to be, whose socket is open.
fn contradicts(socket: State, entry: TcpState) -> bool {
    match socket {
        // Both FINs are on their way: so LAST_ACK is right.
        State::LastAck | State::Closing => !entry.is_counted(),
        _ => entry.is_closing(),
    }
}

fn without_socket(entry: Option<(Direction, TcpState)>, held: bool) -> Verdict {
    match entry {
        None => Verdict::Leave(NoAction::Over),
        Some((Direction::FromPeer, state)) if state.is_closing() => Verdict::Leave(NoAction::Over),
        // Also where the tuple was held for an older socket: the peer has used its port again, and
        // with SYN cookies a connection has no socket before the end of its handshake.
        Some((Direction::FromPeer, state)) if state.is_opening() => {
            Verdict::Leave(NoAction::Handshake)
        }
        Some(_) if held => Verdict::Act(ActionKind::Release, Reason::SocketGone),
        Some(_) => Verdict::Leave(NoAction::OverCount),
    }
}

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action {
    /// What.
    pub kind: ActionKind,
    /// Why.
    pub reason: Reason,
    /// The connection as it was seen.
    pub view: View,
    /// What an entry for it must look like: the one in place, else the last one seen, else a
    /// plain one.
    pub template: Entry,
}

impl Action {
    /// The address that limits count the connection for, as [`View::client`].
    pub fn client(&self) -> IpAddr {
        self.template.orig.src.addr()
    }
}

/// What must be done, in the order of the connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The actions.
    pub actions: Vec<Action>,
}

/// Plans for a snapshot.
pub fn plan(snapshot: &Snapshot, scope: &Scope, policy: &Policy, ledger: &Ledger) -> Plan {
    plan_for(snapshot.views.iter(), &snapshot.evidence, scope, policy, ledger)
}

/// Plans for these connections by the evidence that all of them gave.
pub fn plan_for(
    views: impl Iterator<Item = View>,
    evidence: &Evidence,
    scope: &Scope,
    policy: &Policy,
    ledger: &Ledger,
) -> Plan {
    let actions = views.filter_map(|view| match verdict(&view, evidence, scope, policy, ledger) {
        Verdict::Act(kind, reason) => {
            let template = template(&view, evidence, policy, ledger);
            Some(Action { kind, reason, view, template })
        }
        Verdict::Leave(_) => None,
    });
    Plan { actions: actions.collect() }
}

/// The decision about one connection.
pub fn verdict(
    view: &View,
    evidence: &Evidence,
    scope: &Scope,
    policy: &Policy,
    ledger: &Ledger,
) -> Verdict {
    let cell = cell(view, evidence, scope, policy, ledger);
    let entry = view.entry;
    // A flow table has the connection: the entry lives, and ctnetlink has neither state nor timeout.
    if entry.is_some_and(|entry| entry.state().is_none()) {
        return Verdict::Leave(NoAction::Agree);
    }
    // Conntrack may have picked it up at a packet that the rules do not name.
    if cell.guarded && !policy.force && evidence.untracked.contains(&view.connection) {
        return Verdict::Leave(NoAction::LeftOut);
    }
    let uncounted = view.socket.and_then(|socket| ledger.uncounted(&socket));
    let left = entry.and_then(|entry| entry.timeout);
    let idle = ledger.idle().filter(|idle| left.is_some_and(|left| left < idle.below));
    match (decide(cell), cell.entry, uncounted, idle) {
        // Beyond the table: what the operator or an attack has switched on.
        (Verdict::Leave(NoAction::OverCount), ..)
            if policy.reap.is_some()
                && entry.is_some_and(|entry| ledger.is_overdue(entry.key())) =>
        {
            Verdict::Act(ActionKind::Reap, Reason::SocketMissing)
        }
        (
            Verdict::Leave(NoAction::Agree) | Verdict::Act(ActionKind::Extend, _),
            Some((Direction::FromPeer, _)),
            Some(loss),
            _,
        ) => Verdict::Act(ActionKind::Recount, Reason::Uncounted(loss)),
        // The last step of a repair makes the entry an ordinary one: one that never came to it was
        // broken off, perhaps in a former life, and perhaps before its nudge.
        (
            Verdict::Leave(NoAction::Agree) | Verdict::Act(ActionKind::Extend, _),
            Some((Direction::FromPeer, _)),
            ..,
        ) if cell.guarded
            && entry.is_some_and(|entry| {
                entry.is_ours() && entry.status.is_some_and(|status| !status.is_assured())
            }) =>
        {
            Verdict::Act(ActionKind::Recount, Reason::BrokenOff)
        }
        // `nf_conntrack_tcp_loose`; once, for then the entry is ours.
        (
            Verdict::Leave(NoAction::Agree),
            Some((Direction::FromPeer, TcpState::Established)),
            ..,
        ) if cell.socket == Some(State::Established)
            && entry.is_some_and(|entry| entry.is_picked_up()) =>
        {
            Verdict::Act(ActionKind::Recount, Reason::PickedUp)
        }
        // A limit forgets what conntrack has forgotten, however short the administrator sets
        // `nf_conntrack_tcp_timeout_established`.
        (
            Verdict::Leave(NoAction::Agree),
            Some((Direction::FromPeer, TcpState::Established)),
            _,
            Some(idle),
        ) if cell.socket == Some(State::Established) && !cell.held => {
            Verdict::Act(ActionKind::Extend, Reason::EntryIdle(idle.timeout))
        }
        (
            Verdict::Leave(NoAction::Agree) | Verdict::Act(ActionKind::Extend, _),
            Some((Direction::FromPeer, TcpState::FinWait | TcpState::CloseWait)),
            ..,
        ) if cell.socket == Some(State::CloseWait)
            && ledger.pressure().pins_early(view.connection.remote.addr()) =>
        {
            Verdict::Act(ActionKind::Seal, Reason::UnderAttack)
        }
        (Verdict::Act(ActionKind::Reinsert, Reason::EntryMissing), ..)
            if view.socket.is_some_and(|socket| ledger.distrusts(&socket)) =>
        {
            Verdict::Act(ActionKind::Reinsert, Reason::EntryTakenAway)
        }
        (verdict, ..) => verdict,
    }
}

/// The cell that a connection stands in.
pub fn cell(
    view: &View,
    evidence: &Evidence,
    scope: &Scope,
    policy: &Policy,
    ledger: &Ledger,
) -> Cell {
    let socket = view.socket;
    // What a former life inserted is ours to give back too.
    let ours = view.entry.is_some_and(|entry| entry.is_ours());
    let held = match socket {
        Some(socket) => ledger.holds(&socket),
        None => ours || ledger.holds_connection(view.connection),
    };
    let half_closed = socket.is_some_and(|socket| socket.state != State::Established);
    let seen = socket.and_then(|socket| ledger.last_entry(&socket));
    // What this host opened stays so when its entry is forgotten, or picked up anew.
    let last = View { entry: seen, ..*view }.entry_side();
    let was_outgoing = last.filter(|(direction, _)| *direction == Direction::Outgoing);
    let is_outgoing = evidence
        .opened_here
        .contains(&view.connection)
        .then_some((Direction::Outgoing, TcpState::None));
    let entry = is_outgoing.or(was_outgoing).or(view.entry_side());
    let in_scope = scope.contains(policy, view.connection) || held;
    let distrusted = socket.is_some_and(|socket| ledger.distrusts(&socket));
    let entry = match entry {
        Some((Direction::FromPeer, _)) if distrusted => {
            Some((Direction::FromPeer, TcpState::Close))
        }
        entry => entry,
    };
    let port = TrackedPort::of(view.connection.local);
    // An RST that TCP does not take leaves the rest of the handshake to come.
    let is_closed = entry.is_some_and(|(_, state)| state.is_closing());
    let guards = |socket: &Socket| {
        policy.guards(socket)
            || policy.states.contains(socket.state)
                && socket.state == State::SynRecv
                && (is_closed || ledger.holds(socket))
    };
    let may_have_a_cookie = |entry: &Entry| {
        let status = entry.status;
        status.is_some_and(|it| ledger.may_have_a_cookie(view.connection, it.is_assured()))
    };
    Cell {
        socket: socket.map(|socket| socket.state),
        guarded: in_scope && socket.as_ref().is_some_and(guards),
        cookie: in_scope && view.entry.as_ref().is_some_and(may_have_a_cookie),
        entry,
        expiring: view.entry.and_then(|entry| entry.timeout).is_some_and(|timeout| {
            timeout < policy.renew_below()
                // A packet can lengthen a sealed entry to days; without us it must not last.
                || ours && half_closed && timeout > policy.lease
        }),
        held,
        tracked: seen.is_some()
            || evidence.arrival(view, ledger.arrivals()) != Some(Arrival::Various)
                && (policy.force
                    || evidence.tracked.contains(&port)
                    || evidence.direct_and_limited.contains(&view.connection)
                    || ledger.is_tracked(port)),
    }
}

/// What an entry for this connection must look like.
fn template(view: &View, evidence: &Evidence, policy: &Policy, ledger: &Ledger) -> Entry {
    let last = view.socket.and_then(|socket| ledger.last_entry(&socket));
    let right_way = |entry: &Entry| entry.reply == view.connection.sent();
    view.entry.filter(right_way).or(last.filter(right_way)).unwrap_or_else(|| {
        // A reversed entry shows its zone; else the zone that siblings are in, if it is one; else
        // the one that the administrator names.
        let (first, siblings) = match evidence.arrival(view, ledger.arrivals()) {
            Some(Arrival::Direct(zone)) => (view.connection.local, Some(zone)),
            Some(Arrival::Translated(first, zone)) => (first, Some(zone)),
            Some(Arrival::Various) | None => (view.connection.local, evidence.zone()),
        };
        let zone = view.entry.map(|entry| entry.zone).or(siblings);
        let zone = zone.unwrap_or(Zone::both(policy.zone));
        let orig = FourTuple::new(view.connection.remote, first);
        Entry { orig, ..Entry::plain(view.connection.received(), zone) }
    })
}
