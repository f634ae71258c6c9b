//! Decides, from values alone, what is done for a connection that this host opened.
//!
//! No clock, no I/O, no log: the table of docs/outgoing.md as a function.

use std::fmt;

use crate::conntrack::{Entry, TcpState};
use crate::flow::Connection;
use crate::sockdiag::{Opener, Socket, State};

/// The states in which the far side and this one can be silent for hours while the socket is open.
pub const HALF_CLOSED: [State; 2] = [State::CloseWait, State::FinWait2];

/// What is done to the entry of an outgoing connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    /// Lengthen its timeout.
    Extend,
    /// Take it back to the state of its socket: conntrack believes that it closes, or has closed.
    Revive,
    /// Put it back as it was: it is gone.
    Reinsert,
    /// Give it back: its socket is gone.
    Release,
}

impl Deed {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Extend, Self::Revive, Self::Reinsert, Self::Release];

    /// The name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Extend => "extend",
            Self::Revive => "revive",
            Self::Reinsert => "reinsert",
            Self::Release => "release",
        }
    }
}

/// Why the entry of an open connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loss {
    /// Another connection has one of its tuples: its port was given away.
    Taken,
    /// Conntrack has made another one of its packets, with another translation.
    Otherwise,
    /// The table is full.
    Full,
    /// The kernel has refused it for another reason.
    Refused,
}

impl Loss {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Taken, Self::Otherwise, Self::Full, Self::Refused];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Taken => "taken",
            Self::Otherwise => "otherwise",
            Self::Full => "table_full",
            Self::Refused => "refused",
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Taken => "another connection has its address and port now",
            Self::Otherwise => "it was tracked anew, and is translated otherwise",
            Self::Full => "the table is full",
            Self::Refused => "the kernel refuses it",
        })
    }
}

/// Why nothing is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoDeed {
    /// The entry outlives the next look.
    Agree,
    /// The application has closed the socket, or it is in a state whose packets conntrack sees.
    NotHalfClosed,
    /// The other end is a guarded connection of this host, whose entry is held for it.
    HeldForThePeer,
    /// No socket, and nothing to give back.
    Over,
}

/// The decision about one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Something is done.
    Act(Deed),
    /// Nothing can be done.
    Lost(Loss),
    /// Nothing is to be done.
    Leave(NoDeed),
}

/// What stands in the table for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found {
    /// Its entry, in this state.
    Same(TcpState),
    /// Its entry, of which a flow table has the state.
    Offloaded,
    /// An entry of its tuple with another translation than it had.
    Another,
}

impl Found {
    /// What `entry` is to a connection whose entry looked like `known`.
    pub fn of(entry: &Entry, known: &Entry) -> Self {
        let is_same = entry.orig == known.orig && entry.reply == known.reply;
        // Picked up at a packet of the far side: where nothing is translated it does as well.
        let is_turned = entry.orig == known.reply && entry.reply == known.orig;
        let is_its_own = is_same || is_turned && !known.is_translated();
        match entry.state() {
            _ if !is_its_own => Self::Another,
            Some(state) => Self::Same(state),
            None => Self::Offloaded,
        }
    }
}

/// All that a decision depends on, for a connection whose entry was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// State of the socket, and whether a process has it; `None` when an exact look-up shows none.
    pub socket: Option<(State, bool)>,
    /// What an exact look-up of its tuple shows in the table.
    pub entry: Option<Found>,
    /// The entry would expire before the next look.
    pub is_due: bool,
    /// Its timeout is ours: it was extended or put back.
    pub is_held: bool,
    /// The other end is a connection of the scope.
    pub peer: Peer,
}

/// What the other end of a connection is to this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Peer {
    /// Somebody else's, as far as this concerns.
    #[default]
    Elsewhere,
    /// A connection of the scope, on this host too: the entry is of both.
    InScope,
    /// The same, and the entry is held for it.
    Held,
}

/// The table.
pub fn decide(cell: Cell) -> Verdict {
    use Verdict::*;

    let is_live = |state: TcpState| !state.is_closing() && !state.is_opening();
    match (cell.socket, cell.entry) {
        // Where the other end is of this host, too, its own socket says when that is over.
        (None, Some(Found::Same(state)))
            if cell.is_held && is_live(state) && cell.peer == Peer::Elsewhere =>
        {
            Act(Deed::Release)
        }
        (None, _) => Leave(NoDeed::Over),
        (Some((state, has_process)), _) if !HALF_CLOSED.contains(&state) || !has_process => {
            Leave(NoDeed::NotHalfClosed)
        }
        (Some(_), None) if cell.peer == Peer::Held => Leave(NoDeed::HeldForThePeer),
        (Some(_), None) => Act(Deed::Reinsert),
        (Some(_), Some(Found::Another)) => Lost(Loss::Otherwise),
        (Some(_), Some(Found::Offloaded)) => Leave(NoDeed::Agree),
        (Some(_), Some(Found::Same(_))) if cell.peer == Peer::Held => Leave(NoDeed::HeldForThePeer),
        // A FIN that comes again, an RST that TCP does not take.
        (Some(_), Some(Found::Same(state))) if !is_live(state) => Act(Deed::Revive),
        (Some(_), Some(Found::Same(_))) if cell.is_due => Act(Deed::Extend),
        (Some(_), Some(Found::Same(_))) => Leave(NoDeed::Agree),
    }
}

/// Who opened a connection, where its entry shows it: one that conntrack has made of a SYN. What was picked
/// up midway runs in the direction of the packet that came first, and so does what was put back.
pub fn opener(entry: &Entry, connection: Connection) -> Option<Opener> {
    if entry.is_picked_up() || entry.is_ours() {
        None
    } else if entry.orig == connection.sent() {
        Some(Opener::Here)
    } else if entry.reply == connection.sent() {
        Some(Opener::Peer)
    } else {
        None
    }
}

/// How the entry of a connection that was opened here looks in its own direction; `None` where it runs
/// the other way and is translated: how it was before does not show.
pub fn as_opened(entry: &Entry, connection: Connection) -> Option<Entry> {
    if entry.orig == connection.sent() {
        return Some(*entry);
    }
    let is_turned = entry.reply == connection.sent() && !entry.is_translated();
    let swapped = |tcp: crate::conntrack::Tcp| crate::conntrack::Tcp {
        wscale: [tcp.wscale[1], tcp.wscale[0]],
        flags: [tcp.flags[1], tcp.flags[0]],
        ..tcp
    };
    is_turned.then(|| Entry {
        orig: entry.reply,
        reply: entry.orig,
        tcp: entry.tcp.map(swapped),
        ..*entry
    })
}

/// Whether a socket of a list can be one whose entry is kept.
pub fn is_candidate(socket: &Socket) -> bool {
    HALF_CLOSED.contains(&socket.state) && socket.inode != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::uapi::IP_CT_TCP_SIMULTANEOUS_OPEN;
    use crate::conntrack::{Tcp, Zone};
    use crate::flow::{Endpoint, FourTuple};

    fn cells() -> impl Iterator<Item = Cell> {
        let sockets = State::ALL.into_iter().flat_map(|state| [(state, true), (state, false)]);
        let sockets: Vec<_> = sockets.map(Some).chain([None]).collect();
        let same = TcpState::ALL.into_iter().map(Found::Same);
        let entries: Vec<_> =
            same.chain([Found::Offloaded, Found::Another]).map(Some).chain([None]).collect();
        sockets.into_iter().flat_map(move |socket| {
            entries.clone().into_iter().flat_map(move |entry| {
                [Peer::Elsewhere, Peer::InScope, Peer::Held].into_iter().flat_map(move |peer| {
                    (0..4).map(move |bits| Cell {
                        socket,
                        entry,
                        is_due: bits & 1 != 0,
                        is_held: bits & 2 != 0,
                        peer,
                    })
                })
            })
        })
    }

    fn is_open(cell: &Cell) -> bool {
        matches!(cell.socket, Some((State::CloseWait | State::FinWait2, true)))
    }

    #[test]
    fn nothing_is_lengthened_or_put_back_but_for_a_half_closed_socket_of_a_process() {
        for cell in cells().filter(|cell| !is_open(cell)) {
            let verdict = decide(cell);
            assert!(
                matches!(verdict, Verdict::Leave(_) | Verdict::Act(Deed::Release)),
                "{cell:?}: {verdict:?}"
            );
        }
    }

    #[test]
    fn what_is_given_back_was_held_is_alive_and_has_no_socket() {
        for cell in cells() {
            if decide(cell) == Verdict::Act(Deed::Release) {
                assert!(cell.socket.is_none() && cell.is_held, "{cell:?}");
                assert_eq!(cell.peer, Peer::Elsewhere, "{cell:?}");
                assert!(matches!(cell.entry, Some(Found::Same(state)) if state.is_counted()));
            }
        }
    }

    #[test]
    fn an_entry_that_is_held_for_its_other_end_is_never_touched() {
        for cell in cells().filter(|cell| cell.peer == Peer::Held) {
            assert!(!matches!(decide(cell), Verdict::Act(_)), "{cell:?}");
        }
    }

    #[test]
    fn an_open_connection_keeps_an_entry_in_every_state_but_one_translated_otherwise() {
        for cell in cells().filter(is_open).filter(|cell| cell.peer != Peer::Held) {
            let wanted = match cell.entry {
                None => Verdict::Act(Deed::Reinsert),
                Some(Found::Another) => Verdict::Lost(Loss::Otherwise),
                Some(Found::Offloaded) => Verdict::Leave(NoDeed::Agree),
                Some(Found::Same(
                    TcpState::Established | TcpState::FinWait | TcpState::CloseWait,
                )) => match cell.is_due {
                    true => Verdict::Act(Deed::Extend),
                    false => Verdict::Leave(NoDeed::Agree),
                },
                Some(Found::Same(_)) => Verdict::Act(Deed::Revive),
            };
            assert_eq!(decide(cell), wanted, "{cell:?}");
        }
    }

    fn end(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    /// What a container's SYN makes behind a masquerade.
    fn masqueraded() -> (Connection, Entry) {
        let connection = Connection::new(end("10.1.1.2:40000"), end("198.51.100.7:443"));
        let tcp = Some(Tcp { state: TcpState::CloseWait, wscale: [7, 8], flags: [0x03, 0x03] });
        let reply = FourTuple::new(end("198.51.100.7:443"), end("192.0.2.1:61000"));
        (connection, Entry { reply, tcp, ..Entry::plain(connection.sent(), Zone::default()) })
    }

    #[test]
    fn a_handshake_shows_who_opened_and_what_was_picked_up_midway_does_not() {
        let (connection, entry) = masqueraded();
        assert_eq!(opener(&entry, connection), Some(Opener::Here));
        let seen_by_the_server = Connection::of_sender(entry.reply);
        assert_eq!(opener(&entry, seen_by_the_server), Some(Opener::Peer));
        let tcp = |flags| Some(Tcp { state: TcpState::Established, wscale: [0; 2], flags });
        for flags in [[0x0a; 2], [0x08 | IP_CT_TCP_SIMULTANEOUS_OPEN; 2]] {
            assert_eq!(opener(&Entry { tcp: tcp(flags), ..entry }, connection), None, "{flags:?}");
        }
    }

    #[test]
    fn another_translation_is_another_entry() {
        let (connection, entry) = masqueraded();
        assert_eq!(Found::of(&entry, &entry), Found::Same(TcpState::CloseWait));
        let port = FourTuple::new(entry.reply.src, end("192.0.2.1:61001"));
        assert_eq!(Found::of(&Entry { reply: port, ..entry }, &entry), Found::Another);
        let plain = Entry { reply: connection.received(), ..entry };
        assert_eq!(Found::of(&plain, &entry), Found::Another);
        // Picked up at the far side's packet.
        let turned = Entry { orig: plain.reply, reply: plain.orig, ..plain };
        assert_eq!(Found::of(&turned, &plain), Found::Same(TcpState::CloseWait));
        assert_eq!(Found::of(&turned, &entry), Found::Another);
        let again = as_opened(&turned, connection).unwrap();
        assert_eq!((again.orig, again.reply), (plain.orig, plain.reply));
        assert_eq!(again.tcp.unwrap().wscale, [8, 7]);
    }
}
