//! The pure table, cell by cell, and the laws that hold for every snapshot.
//!
//! The expected table below is a document of its own: rows that a reader can hold against
//! docs/reconcile.md, each cell in exactly one of them.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod cells_of_connections;
mod confirmation;
mod laws;
mod ledger;
mod observation;
#[path = "../played/mod.rs"]
mod played;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, Status, Tcp, TcpState, Zone};
use ctkeep::flow::{Connection, FourTuple};
use ctkeep::reconcile::apply::{Known, apply};
use ctkeep::reconcile::confirm::{Confirmed, confirm};
use ctkeep::reconcile::evidence::{Evidence, TrackedPort};
use ctkeep::reconcile::ledger::{Idle, Ledger};
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::plan::{
    Action, ActionKind, Cell, NoAction, Plan, Reason, Verdict, decide, plan,
};
use ctkeep::reconcile::policy::{Policy, Scope};
use ctkeep::reconcile::snapshot::{Direction, Snapshot, View};
use ctkeep::recount::Recounter;
use ctkeep::sockdiag::{Cookie, Socket, State, States};
use played::host::Host;
use played::{Played, entry, flow, outgoing_entry, reversed_entry, socket};

/// A port of the server, which has an IPv4 address.
fn port(number: u16) -> HashSet<TrackedPort> {
    HashSet::from([TrackedPort { is_ipv4: true, number }])
}

/// What is done for each cell. Words: `-` is "whatever"; `open` is any of the eleven states,
/// `half-open` any of them but established, `begun` syn-recv, `whole` any but that; `both-fins`
/// last-ack and closing, `one-fin` all others; `alive` are the entry states that are neither
/// `closing` nor `opening`. A cookie matters where nothing else is left of a handshake.
const TABLE: &str = "
# socket       entry                    guarded expiring held tracked cookie what is done

# This host opened the connection: none of our business, whatever the socket.
  any          outgoing any             -       -        -    -       -      leave outgoing

# The socket is gone. What is held and still alive is given back; conntrack ends the rest itself.
  gone         none                     -       -        -    -       -      leave over
  gone         from-peer closing        -       -        -    -       no     leave over
  gone         from-peer alive          -       -        yes  -       -      release, socket gone
  gone         reversed any             -       -        yes  -       -      release, socket gone
  gone         from-peer alive          -       -        no   -       -      leave over-count
  gone         reversed any             -       -        no   -       -      leave over-count
# The peer has used its port again; with SYN cookies its socket comes last.
  gone         from-peer opening        -       -        -    -       -      leave handshake
# With these an RST ends no handshake.
  gone         from-peer closing        -       -        -    -       yes    revive, cookie sent

# The socket is open in a state that nobody guards: conntrack sees its packets itself. A hold stays
# as it is, without renewal, until the socket is gone.
  open         none                     no      -        -    -       -      leave not-guarded
  open         from-peer any            no      -        -    -       -      leave not-guarded
  open         reversed any             no      -        -    -       -      leave not-guarded

# The socket is guarded and conntrack has lost it.
  open         none                     yes     -        -    yes     -      reinsert, entry missing
  open         none                     yes     -        -    no      -      leave untracked
  one-fin      from-peer closing        yes     -        -    -       -      revive, entry closed
  both-fins    from-peer over           yes     -        -    -       -      revive, entry closed
  open         reversed any             yes     -        -    -       -      reverse, entry reversed
# Conntrack sees the end of a handshake before TCP: this one is of a later SYN.
  whole        from-peer opening        yes     -        -    -       -      revive, entry begun anew

# The socket is guarded and its entry lives.
  half-open    from-peer alive          yes     yes      -    -       -      extend, entry expiring
  half-open    from-peer alive          yes     no       -    -       -      leave agree
# Of a socket that has sent its FIN behind the peer's conntrack believes no less.
  both-fins    from-peer last-ack       yes     yes      -    -       -      extend, entry expiring
  both-fins    from-peer last-ack       yes     no       -    -       -      leave agree
  established  from-peer half-closed    yes     yes      -    -       -      extend, entry expiring
  established  from-peer half-closed    yes     no       -    -       -      leave agree
  established  from-peer established    yes     yes      yes  -       -      extend, entry expiring
  established  from-peer established    yes     no       yes  -       -      leave agree
# An idle connection is the kernel's to forget, and a handshake its to finish.
  established  from-peer established    yes     -        no   -       -      leave agree
  begun        from-peer opening        yes     -        -    -       -      leave handshake
";

/// One row of [`TABLE`], split into words.
struct Row {
    text: &'static str,
    socket: &'static str,
    direction: &'static str,
    state: &'static str,
    guarded: &'static str,
    expiring: &'static str,
    held: &'static str,
    tracked: &'static str,
    cookie: &'static str,
    done: String,
}

impl Row {
    fn parse(text: &'static str) -> Self {
        let mut words = text.split_whitespace();
        let mut word = || words.next().unwrap_or_else(|| panic!("a short row: {text}"));
        let (socket, direction) = (word(), word());
        let state = if direction == "none" { "" } else { word() };
        let [guarded, expiring, held, tracked, cookie] = [(); 5].map(|()| word());
        let done = words.collect::<Vec<_>>().join(" ");
        Self { text, socket, direction, state, guarded, expiring, held, tracked, cookie, done }
    }

    fn covers(&self, cell: &Cell) -> bool {
        let answers = |word: &str, value: bool| match word {
            "yes" => value,
            "no" => !value,
            "-" => true,
            _ => panic!("{word}: {}", self.text),
        };
        let socket = match (self.socket, cell.socket) {
            ("any", _) | ("gone", None) | ("open", Some(_)) => true,
            ("half-open", Some(state)) => state != State::Established,
            ("established", Some(state)) => state == State::Established,
            ("begun", Some(state)) => state == State::SynRecv,
            ("whole", Some(state)) => state != State::SynRecv,
            ("both-fins", Some(state)) => [State::LastAck, State::Closing].contains(&state),
            ("one-fin", Some(state)) => ![State::LastAck, State::Closing].contains(&state),
            ("gone", _) | (_, None) => false,
            _ => panic!("{}", self.text),
        };
        socket
            && self.covers_entry(cell.entry)
            && answers(self.guarded, cell.guarded)
            && answers(self.expiring, cell.expiring)
            && answers(self.held, cell.held)
            && answers(self.tracked, cell.tracked)
            && answers(self.cookie, cell.cookie)
    }

    fn covers_entry(&self, entry: Option<(Direction, TcpState)>) -> bool {
        let Some((direction, state)) = entry else { return self.direction == "none" };
        let name = match direction {
            Direction::FromPeer => "from-peer",
            Direction::Reversed => "reversed",
            Direction::Outgoing => "outgoing",
        };
        let group = match state {
            TcpState::None | TcpState::SynSent | TcpState::SynRecv | TcpState::SynSent2 => {
                ["opening", ""]
            }
            TcpState::Established => ["alive", "established"],
            TcpState::FinWait | TcpState::CloseWait => ["alive", "half-closed"],
            TcpState::LastAck => ["closing", "last-ack"],
            TcpState::TimeWait | TcpState::Close => ["closing", "over"],
        };
        self.direction == name && (self.state == "any" || group.contains(&self.state))
    }
}

fn rows() -> Vec<Row> {
    let lines = TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(Row::parse).collect()
}

/// Every cell that there is.
fn cells() -> Vec<Cell> {
    let sockets = [None].into_iter().chain(State::ALL.map(Some));
    let directions = [Direction::FromPeer, Direction::Reversed, Direction::Outgoing];
    let entries: Vec<_> = [None]
        .into_iter()
        .chain(directions.into_iter().flat_map(|direction| {
            TcpState::ALL.into_iter().map(move |state| Some((direction, state)))
        }))
        .collect();
    let mut cells = Vec::new();
    for socket in sockets {
        for entry in &entries {
            for bits in 0..32_u8 {
                let [guarded, expiring, held, tracked, cookie] =
                    [1, 2, 4, 8, 16].map(|bit| bits & bit != 0);
                let entry = *entry;
                cells.push(Cell { socket, guarded, entry, expiring, held, tracked, cookie });
            }
        }
    }
    cells
}

/// A verdict in the words of the table.
fn words(verdict: Verdict, cell: &Cell) -> String {
    match verdict {
        Verdict::Leave(rest) => {
            let rest = match rest {
                NoAction::Agree => "agree",
                NoAction::Handshake => "handshake",
                NoAction::Outgoing => "outgoing",
                NoAction::NotGuarded => "not-guarded",
                NoAction::Untracked => "untracked",
                NoAction::LeftOut => "left out",
                NoAction::OverCount => "over-count",
                NoAction::Over => "over",
            };
            format!("leave {rest}")
        }
        Verdict::Act(kind, reason) => {
            let reason = match reason {
                Reason::EntryMissing => "entry missing",
                Reason::EntryClosed(state) => {
                    assert_eq!(Some(state), cell.entry.map(|(_, state)| state), "{cell:?}");
                    "entry closed"
                }
                Reason::EntryBegunAnew(state) => {
                    assert_eq!(Some(state), cell.entry.map(|(_, state)| state), "{cell:?}");
                    "entry begun anew"
                }
                Reason::CookieSent => "cookie sent",
                Reason::EntryExpiring => "entry expiring",
                Reason::EntryReversed => "entry reversed",
                Reason::SocketGone => "socket gone",
                beyond => panic!("{beyond:?} is no reason of the table: {cell:?}"),
            };
            format!("{kind}, {reason}")
        }
    }
}

#[test]
fn every_cell_is_decided_as_the_table_says() {
    let (rows, cells) = (rows(), cells());
    // No socket or one of 11 states; no entry or 3 directions of 10 states; five yes or no.
    assert_eq!(cells.len(), (1 + 11) * (1 + 3 * 10) * 32);
    let mut used = HashSet::new();
    for cell in &cells {
        let covering: Vec<_> = rows.iter().filter(|row| row.covers(cell)).collect();
        let texts = || covering.iter().map(|row| row.text).collect::<Vec<_>>().join("\n");
        assert_eq!(covering.len(), 1, "rows for {cell:?}:\n{}", texts());
        assert_eq!(words(decide(*cell), cell), covering[0].done, "{cell:?}\n{}", texts());
        used.insert(covering[0].text);
    }
    assert_eq!(used.len(), rows.len(), "a row that no cell needs");
}

#[test]
fn states_that_the_table_calls_closing_are_those_that_the_entry_calls_so() {
    for state in TcpState::ALL {
        let row = Row::parse("  gone from-peer closing - - - - - x");
        assert_eq!(row.covers_entry(Some((Direction::FromPeer, state))), state.is_closing());
    }
}

const SERVER: &str = "192.0.2.1:80";
const PEER: &str = "198.51.100.7:4000";

fn policy() -> Policy {
    Policy { ports: HashSet::from([80, 443]), ..Policy::default() }
}

fn scope() -> Scope {
    policy().scope(&[])
}

fn server_to_peer() -> FourTuple {
    flow(SERVER, PEER)
}

fn close_wait(cookie: u64) -> Socket {
    socket(SERVER, PEER, State::CloseWait, cookie)
}

fn established(cookie: u64) -> Socket {
    socket(SERVER, PEER, State::Established, cookie)
}

fn view(socket: Option<Socket>, entry: Option<Entry>) -> View {
    View { connection: Connection::of_sender(server_to_peer()), socket, entry }
}

fn plan_of(views: Vec<View>, ledger: &Ledger) -> Plan {
    plan(&Snapshot::new(views), &scope(), &policy(), ledger)
}

fn kinds(actions: &[Action]) -> Vec<ActionKind> {
    actions.iter().map(|action| action.kind).collect()
}
