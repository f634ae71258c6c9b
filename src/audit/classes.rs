//! Names for the ways in which the two tables agree or not.

use std::fmt;

use crate::reconcile::plan::{ActionKind, Cell, Rest, Verdict, decide};
use crate::reconcile::snapshot::Direction;

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
}

impl Class {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 6] = [
        Self::Agree,
        Self::EntryMissing,
        Self::EntryClosed,
        Self::EntryExpiring,
        Self::EntryReversed,
        Self::SocketMissing,
    ];

    /// The class of a cell of the action table.
    pub fn of(cell: Cell) -> Self {
        let reversed = matches!(cell.entry, Some((Direction::Reversed, _)));
        match decide(Cell { held: false, tracked: true, ..cell }) {
            Verdict::Act(ActionKind::Reinsert, _) => Self::EntryMissing,
            Verdict::Act(ActionKind::Revive, _) => Self::EntryClosed,
            Verdict::Act(ActionKind::Extend, _) => Self::EntryExpiring,
            Verdict::Act(ActionKind::Reverse, _) => Self::EntryReversed,
            Verdict::Leave(Rest::NotGuarded) if reversed => Self::EntryReversed,
            Verdict::Leave(Rest::OverCount) => Self::SocketMissing,
            Verdict::Act(
                ActionKind::Recount | ActionKind::Release | ActionKind::Reap | ActionKind::Seal,
                _,
            )
            | Verdict::Leave(_) => Self::Agree,
        }
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
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
