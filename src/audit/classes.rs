//! Names for the ways in which the two tables agree or not.

use std::fmt;

use crate::reconcile::evidence::{Evidence, TrackedPort};
use crate::reconcile::plan::{ActionKind, Cell, NoAction, Verdict, decide};
use crate::reconcile::snapshot::{Direction, View};

/// How the tables stand to each other about one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// They agree, or the difference is none of the limiter's business.
    Agree,
    /// The socket is open; there is no entry.
    EntryMissing,
    /// The socket is open; conntrack believes that the connection closes or has closed.
    EntryClosed,
    /// The socket is open; the entry will expire first.
    EntryExpiring,
    /// The socket is open; the entry takes the server for the client.
    EntryReversed,
    /// The entry is alive; there is no socket.
    SocketMissing,
    /// The socket is open; there is no entry, and no sign that conntrack looks at the connection.
    Untracked,
    /// A flow table has the connection: the entry is alive, and shows neither state nor timeout.
    Offloaded,
}

impl Class {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 8] = [
        Self::Agree,
        Self::EntryMissing,
        Self::EntryClosed,
        Self::EntryExpiring,
        Self::EntryReversed,
        Self::SocketMissing,
        Self::Untracked,
        Self::Offloaded,
    ];

    /// The class of a connection by its cell of the action table, and by what its siblings show: where
    /// they have entries its own is missing, though it may be unknown how it was translated.
    pub fn of(view: &View, cell: Cell, evidence: &Evidence) -> Self {
        if view.entry.is_some_and(|entry| entry.state().is_none()) {
            return Self::Offloaded;
        }
        let mut cell = cell;
        if cell.guarded && evidence.untracked.contains(&view.connection) {
            match cell.entry {
                // A rule leaves its SYN out, and conntrack has taken it up at the next packet of the peer.
                Some((_, state))
                    if view.entry.is_some_and(|it| it.reply == view.connection.sent()) =>
                {
                    cell.entry = Some((Direction::FromPeer, state));
                }
                _ => return Self::Untracked,
            }
        }
        let reversed = matches!(cell.entry, Some((Direction::Reversed, _)));
        match decide(Cell { held: false, ..cell }) {
            Verdict::Act(ActionKind::Reinsert, _) => Self::EntryMissing,
            Verdict::Act(ActionKind::Revive, _) => Self::EntryClosed,
            Verdict::Act(ActionKind::Extend, _) => Self::EntryExpiring,
            Verdict::Act(ActionKind::Reverse, _) => Self::EntryReversed,
            Verdict::Leave(NoAction::NotGuarded) if reversed => Self::EntryReversed,
            Verdict::Leave(NoAction::OverCount) => Self::SocketMissing,
            Verdict::Leave(NoAction::Untracked)
                if evidence.tracked.contains(&TrackedPort::of(view.connection.local)) =>
            {
                Self::EntryMissing
            }
            Verdict::Leave(NoAction::Untracked) => Self::Untracked,
            Verdict::Act(
                ActionKind::Recount | ActionKind::Release | ActionKind::Reap | ActionKind::Seal,
                _,
            )
            | Verdict::Leave(_) => Self::Agree,
        }
    }

    /// The same, where it is known whether a limit is for the connection, or may be: that makes the kernel
    /// track it.
    #[must_use]
    pub fn beside_limits(self, is_limited: impl FnOnce() -> bool) -> Self {
        match self {
            Self::Untracked if is_limited() => Self::EntryMissing,
            class => class,
        }
    }

    /// Whether the tables disagree in a way that a limiter feels.
    pub fn is_disagreement(self) -> bool {
        !matches!(self, Self::Agree | Self::Untracked | Self::Offloaded)
    }

    /// The class's name in tables, JSON and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Agree => "agree",
            Self::EntryMissing => "entry-missing",
            Self::EntryClosed => "entry-closed",
            Self::EntryExpiring => "entry-expiring",
            Self::EntryReversed => "entry-reversed",
            Self::SocketMissing => "socket-missing",
            Self::Untracked => "untracked",
            Self::Offloaded => "offloaded",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::{Entry, Tcp, TcpState, Zone};
    use crate::flow::Connection;
    use crate::sockdiag::State;

    #[test]
    fn a_connection_in_a_flow_table_is_neither_missing_nor_in_disagreement() {
        let server = "192.0.2.1:80".parse().expect("an endpoint");
        let connection = Connection::new(server, "198.51.100.7:4000".parse().expect("an endpoint"));
        let entry = Entry::plain(connection.received(), Zone::default());
        let cell = Cell {
            socket: Some(State::CloseWait),
            guarded: true,
            entry: None,
            expiring: false,
            held: false,
            tracked: true,
            cookie: false,
        };
        let none = Evidence::default();
        let of = |entry, cell| Class::of(&View { connection, socket: None, entry }, cell, &none);
        assert_eq!(of(Some(entry), cell), Class::Offloaded);
        assert_eq!(of(None, cell), Class::EntryMissing);
        assert_eq!(of(None, Cell { tracked: false, ..cell }), Class::Untracked);
        let siblings =
            Evidence { tracked: [TrackedPort::of(server)].into(), ..Evidence::default() };
        let view = View { connection, socket: None, entry: None };
        let class = Class::of(&view, Cell { tracked: false, ..cell }, &siblings);
        assert_eq!(class, Class::EntryMissing, "translated, and nobody knows how");
        let tcp = Some(Tcp { state: TcpState::Close, wscale: [0; 2], flags: [0; 2] });
        let entry = Entry { tcp, ..entry };
        let closed = Cell { entry: Some((Direction::FromPeer, TcpState::Close)), ..cell };
        assert_eq!(of(Some(entry), closed), Class::EntryClosed);
        let is_one = |class: &Class| class.is_disagreement();
        assert_eq!(Class::ALL.into_iter().filter(is_one).count(), 5);
    }
}
