//! The pure table, cell by cell, and the laws that hold for every snapshot.
//!
//! The expected table below is a document of its own: rows that a reader can hold against
//! docs/reconcile.md, each cell in exactly one of them.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod played;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, Status, Tcp, TcpState, Zone};
use ctkeep::flow::FourTuple;
use ctkeep::reconcile::apply::apply;
use ctkeep::reconcile::confirm::{Confirmed, confirm};
use ctkeep::reconcile::evidence::Evidence;
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

/// What is done for each cell. Words: `-` is "whatever"; `open` is any of the eleven states,
/// `half-open` any of them but established, `half-closed` neither that nor syn-recv, `both-fins`
/// last-ack and closing, `one-fin` all others; `alive` are the entry states that are neither
/// `closing` nor `opening`.
const TABLE: &str = "
# socket       entry                    guarded expiring held tracked  what is done

# This host opened the connection: none of our business, whatever the socket.
  any          outgoing any             -       -        -    -        leave outgoing

# The socket is gone. What is held and still alive is given back; conntrack ends the rest itself.
  gone         none                     -       -        -    -        leave over
  gone         from-peer closing        -       -        -    -        leave over
  gone         from-peer alive          -       -        yes  -        release, socket gone
  gone         reversed any             -       -        yes  -        release, socket gone
  gone         from-peer alive          -       -        no   -        leave over-count
  gone         reversed any             -       -        no   -        leave over-count
# The peer has used its port again; with SYN cookies its socket comes last.
  gone         from-peer opening        -       -        -    -        leave handshake

# The socket is open in a state that nobody guards: conntrack sees its packets itself. A hold stays
# as it is, without renewal, until the socket is gone.
  open         none                     no      -        -    -        leave not-guarded
  open         from-peer any            no      -        -    -        leave not-guarded
  open         reversed any             no      -        -    -        leave not-guarded

# The socket is guarded and conntrack has lost it.
  open         none                     yes     -        -    yes      reinsert, entry missing
  open         none                     yes     -        -    no       leave untracked
  one-fin      from-peer closing        yes     -        -    -        revive, entry closed
  both-fins    from-peer over           yes     -        -    -        revive, entry closed
  open         reversed any             yes     -        -    -        reverse, entry reversed

# The socket is guarded and its entry lives.
  half-open    from-peer alive          yes     yes      -    -        extend, entry expiring
  half-open    from-peer alive          yes     no       -    -        leave agree
  half-closed  from-peer opening        yes     yes      -    -        extend, entry expiring
  half-closed  from-peer opening        yes     no       -    -        leave agree
# Of a socket that has sent its FIN behind the peer's conntrack believes no less.
  both-fins    from-peer last-ack       yes     yes      -    -        extend, entry expiring
  both-fins    from-peer last-ack       yes     no       -    -        leave agree
  established  from-peer half-closed    yes     yes      -    -        extend, entry expiring
  established  from-peer half-closed    yes     no       -    -        leave agree
  established  from-peer established    yes     yes      yes  -        extend, entry expiring
  established  from-peer established    yes     no       yes  -        leave agree
# An idle connection is the kernel's to forget, and a handshake its to finish.
  established  from-peer established    yes     -        no   -        leave agree
  established  from-peer opening        yes     -        -    -        leave handshake
  syn-recv     from-peer opening        yes     -        -    -        leave handshake
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
    done: String,
}

impl Row {
    fn parse(text: &'static str) -> Self {
        let mut words = text.split_whitespace();
        let mut word = || words.next().unwrap_or_else(|| panic!("a short row: {text}"));
        let (socket, direction) = (word(), word());
        let state = if direction == "none" { "" } else { word() };
        let [guarded, expiring, held, tracked] = [word(), word(), word(), word()];
        let done = words.collect::<Vec<_>>().join(" ");
        Self { text, socket, direction, state, guarded, expiring, held, tracked, done }
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
            ("syn-recv", Some(state)) => state == State::SynRecv,
            ("half-closed", Some(state)) => ![State::Established, State::SynRecv].contains(&state),
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
            for bits in 0..16_u8 {
                let [guarded, expiring, held, tracked] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
                cells.push(Cell { socket, guarded, entry: *entry, expiring, held, tracked });
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
    // No socket or one of 11 states; no entry or 3 directions of 10 states; four yes or no.
    assert_eq!(cells.len(), (1 + 11) * (1 + 3 * 10) * 16);
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
        let row = Row::parse("  gone from-peer closing - - - - x");
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
    View { flow: server_to_peer(), socket, entry }
}

fn plan_of(views: Vec<View>, ledger: &Ledger) -> Plan {
    plan(&Snapshot::new(views), &scope(), &policy(), ledger)
}

fn kinds(actions: &[Action]) -> Vec<ActionKind> {
    actions.iter().map(|action| action.kind).collect()
}

/// How values become a cell.
mod cells_of_connections {
    use super::*;

    fn verdict_of(socket: Option<Socket>, entry: Option<Entry>, ledger: &Ledger) -> Verdict {
        let view = view(socket, entry);
        let snapshot = Snapshot::new(vec![view]);
        ctkeep::reconcile::plan::verdict(&view, &snapshot.evidence, &scope(), &policy(), ledger)
    }

    #[test]
    fn an_entry_is_expiring_below_half_a_lease() {
        let lease = policy().lease.as_secs();
        for (seconds, expected) in [
            (0, Verdict::Act(ActionKind::Extend, Reason::EntryExpiring)),
            (lease / 2 - 1, Verdict::Act(ActionKind::Extend, Reason::EntryExpiring)),
            (lease / 2, Verdict::Leave(NoAction::Agree)),
            (lease, Verdict::Leave(NoAction::Agree)),
        ] {
            let entry = entry(server_to_peer(), TcpState::CloseWait, seconds);
            let verdict = verdict_of(Some(close_wait(1)), Some(entry), &Ledger::default());
            assert_eq!(verdict, expected, "{seconds} s");
        }
    }

    #[test]
    fn an_idle_entry_is_extended_before_the_kernel_forgets_it() {
        let (below, timeout) = (Duration::from_secs(60), Duration::from_secs(3600));
        let mut ledger = Ledger::default();
        ledger.set_idle(Some(Idle { below, timeout }));
        let extend = Verdict::Act(ActionKind::Extend, Reason::EntryIdle(timeout));
        let agree = Verdict::Leave(NoAction::Agree);
        let entry_of = |seconds| entry(server_to_peer(), TcpState::Established, seconds);
        for (seconds, expected) in [(0, extend), (59, extend), (60, agree), (432_000, agree)] {
            let verdict = verdict_of(Some(established(1)), Some(entry_of(seconds)), &ledger);
            assert_eq!(verdict, expected, "{seconds} s");
        }
        // By nobody who has not been asked, of no socket that is not guarded, and of none that is
        // gone; what is held has its lease.
        let nobody = Ledger::default();
        assert_eq!(verdict_of(Some(established(1)), Some(entry_of(1)), &nobody), agree);
        let handshake = Socket { state: State::SynRecv, inode: 0, ..established(1) };
        let unguarded = verdict_of(Some(handshake), Some(entry_of(1)), &ledger);
        assert_eq!(unguarded, Verdict::Leave(NoAction::NotGuarded));
        assert_eq!(
            verdict_of(None, Some(entry_of(1)), &ledger),
            Verdict::Leave(NoAction::OverCount)
        );
        ledger.hold(established(1), entry_of(1), Instant::now());
        let held = verdict_of(Some(established(1)), Some(entry_of(1)), &ledger);
        assert_eq!(held, Verdict::Act(ActionKind::Extend, Reason::EntryExpiring));
    }

    #[test]
    fn a_connection_out_of_scope_is_guarded_only_while_it_is_held() {
        let closed = entry(server_to_peer(), TcpState::Close, 9);
        let out_of_scope = Policy { exempt: vec!["198.51.100.7/32".parse().unwrap()], ..policy() };
        let view = view(Some(close_wait(1)), Some(closed));
        let mut ledger = Ledger::default();
        let plan_now =
            |ledger: &Ledger| plan(&Snapshot::new(vec![view]), &scope(), &out_of_scope, ledger);
        assert!(plan_now(&ledger).actions.is_empty());
        ledger.hold(close_wait(1), closed, Instant::now());
        assert_eq!(kinds(&plan_now(&ledger).actions), [ActionKind::Revive]);
    }

    #[test]
    fn a_state_that_the_policy_does_not_name_is_not_guarded() {
        let closed = entry(server_to_peer(), TcpState::Close, 9);
        let only_half_closed = Policy { states: States::from_iter([State::CloseWait]), ..policy() };
        for (socket, count) in [(close_wait(1), 1), (established(1), 0)] {
            let snapshot = Snapshot::new(vec![view(Some(socket), Some(closed))]);
            let plan = plan(&snapshot, &scope(), &only_half_closed, &Ledger::default());
            assert_eq!(plan.actions.len(), count, "{}", socket.state);
        }
    }

    #[test]
    fn a_missing_entry_is_put_back_only_with_evidence_that_the_port_is_tracked() {
        let missing = Some(close_wait(1));
        let mut ledger = Ledger::default();
        let reinsert = Verdict::Act(ActionKind::Reinsert, Reason::EntryMissing);
        assert_eq!(verdict_of(missing, None, &ledger), Verdict::Leave(NoAction::Untracked));

        // This connection had an entry.
        ledger.remember(&close_wait(1), entry(server_to_peer(), TcpState::CloseWait, 9));
        assert_eq!(verdict_of(missing, None, &ledger), reinsert);
        // Another one with the same tuple, which a younger socket does not inherit.
        let younger = Some(close_wait(2));
        assert_eq!(verdict_of(younger, None, &ledger), Verdict::Leave(NoAction::Untracked));

        // Another connection of the port had one.
        let mut ledger = Ledger::default();
        ledger.set_tracked(HashSet::from([443]));
        assert_eq!(verdict_of(missing, None, &ledger), Verdict::Leave(NoAction::Untracked));
        ledger.set_tracked(HashSet::from([80]));
        assert_eq!(verdict_of(missing, None, &ledger), reinsert);

        // Another connection of the port has one in this very snapshot.
        let sibling = flow(SERVER, "198.51.100.8:4000");
        let sibling = View {
            flow: sibling,
            socket: None,
            entry: Some(entry(sibling, TcpState::TimeWait, 9)),
        };
        let plan_now = plan_of(vec![view(missing, None), sibling], &Ledger::default());
        assert_eq!(kinds(&plan_now.actions), [ActionKind::Reinsert]);

        // By force.
        let forced = Policy { force: true, ..policy() };
        let snapshot = Snapshot::new(vec![view(missing, None)]);
        let plan_now = plan(&snapshot, &scope(), &forced, &Ledger::default());
        assert_eq!(kinds(&plan_now.actions), [ActionKind::Reinsert]);
    }

    #[test]
    fn the_direction_is_told_by_the_reply_tuple_and_the_flags_of_loose_pick_up() {
        let (flow, state) = (server_to_peer(), TcpState::Established);
        for (entry, direction) in [
            (entry(flow, state, 9), Direction::FromPeer),
            (reversed_entry(flow, state, 9), Direction::Reversed),
            (outgoing_entry(flow, state, 9), Direction::Outgoing),
        ] {
            assert_eq!(view(None, Some(entry)).entry_side(), Some((direction, state)));
        }
    }

    #[test]
    fn what_this_host_opened_stays_so_when_its_entry_is_forgotten() {
        let mut ledger = Ledger::default();
        ledger.set_tracked(HashSet::from([80]));
        let outgoing = outgoing_entry(server_to_peer(), TcpState::Established, 9);
        ledger.remember(&close_wait(1), outgoing);
        let verdict = verdict_of(Some(close_wait(1)), None, &ledger);
        assert_eq!(verdict, Verdict::Leave(NoAction::Outgoing));
    }

    /// With the flag that only ctkeep gives.
    fn inserted(state: TcpState, seconds: u64) -> Entry {
        let entry = entry(server_to_peer(), state, seconds);
        Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x88, 0x88], ..tcp }), ..entry }
    }

    /// The last step assures an entry; until then it has not been shown to a limit, perhaps.
    #[test]
    fn what_a_broken_off_repair_has_left_is_recounted() {
        let nobody = Ledger::default();
        let recount = Verdict::Act(ActionKind::Recount, Reason::BrokenOff);
        for (socket, state) in [
            (established(1), TcpState::Established),
            (close_wait(1), TcpState::Established),
            (close_wait(1), TcpState::CloseWait),
        ] {
            let fresh = Entry { status: Some(Status::FRESH), ..inserted(state, 60) };
            assert_eq!(verdict_of(Some(socket), Some(fresh), &nobody), recount);
            let whole = Entry { status: Some(Status::ASSURED), ..fresh };
            assert_eq!(
                verdict_of(Some(socket), Some(whole), &nobody),
                Verdict::Leave(NoAction::Agree)
            );
            let kernels =
                Entry { status: Some(Status::FRESH), ..entry(server_to_peer(), state, 60) };
            let verdict = verdict_of(Some(socket), Some(kernels), &nobody);
            assert_eq!(verdict, Verdict::Leave(NoAction::Agree));
        }
    }

    /// `nft_flow_offload_eval()` makes entries liberal both ways.
    #[test]
    fn what_a_flow_table_has_had_is_neither_ours_nor_picked_up() {
        let of_a_handshake = |state| {
            let entry = entry(server_to_peer(), state, 100);
            Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x2b, 0x2b], ..tcp }), ..entry }
        };
        let nobody = Ledger::default();
        let alive = of_a_handshake(TcpState::Established);
        assert_eq!(verdict_of(None, Some(alive), &nobody), Verdict::Leave(NoAction::OverCount));
        let agree = Verdict::Leave(NoAction::Agree);
        assert_eq!(verdict_of(Some(established(1)), Some(alive), &nobody), agree);
        let half_closed = of_a_handshake(TcpState::CloseWait);
        assert_eq!(verdict_of(Some(close_wait(1)), Some(half_closed), &nobody), agree);
        // Of a connection that this host, or a container that is guarded, has opened.
        let outgoing = Entry { orig: alive.reply, reply: alive.orig, ..alive };
        let verdict = verdict_of(Some(established(1)), Some(outgoing), &nobody);
        assert_eq!(verdict, Verdict::Leave(NoAction::Outgoing));
    }

    #[test]
    fn what_a_former_life_inserted_is_given_back_when_its_socket_is_gone() {
        let release = Verdict::Act(ActionKind::Release, Reason::SocketGone);
        let nobody = Ledger::default();
        for (entry, expected) in [
            (inserted(TcpState::CloseWait, 50), release),
            (inserted(TcpState::Established, 50), release),
            // What the kernel itself or another program made is not ours to take away.
            (entry(server_to_peer(), TcpState::CloseWait, 50), Verdict::Leave(NoAction::OverCount)),
            (
                Entry {
                    tcp: reversed_entry(server_to_peer(), TcpState::CloseWait, 50).tcp,
                    ..entry(server_to_peer(), TcpState::CloseWait, 50)
                },
                Verdict::Leave(NoAction::OverCount),
            ),
        ] {
            assert_eq!(verdict_of(None, Some(entry), &nobody), expected, "{entry:?}");
        }
    }

    #[test]
    fn an_inserted_entry_that_a_packet_has_lengthened_is_brought_back_to_its_lease() {
        let extend = Verdict::Act(ActionKind::Extend, Reason::EntryExpiring);
        let agree = Verdict::Leave(NoAction::Agree);
        let lease = policy().lease.as_secs();
        let kernels_own = entry(server_to_peer(), TcpState::Established, 432_000);
        for (socket, entry, expected) in [
            (close_wait(1), inserted(TcpState::Established, lease), agree),
            (close_wait(1), inserted(TcpState::Established, lease + 1), extend),
            (close_wait(1), inserted(TcpState::Established, 432_000), extend),
            (close_wait(1), kernels_own, agree),
            // Traffic flows: its timeout is the kernel's.
            (established(1), inserted(TcpState::Established, 432_000), agree),
        ] {
            let verdict = verdict_of(Some(socket), Some(entry), &Ledger::default());
            assert_eq!(verdict, expected, "{} {entry:?}", socket.state);
        }
    }

    #[test]
    fn what_was_closed_during_its_repair_is_repaired_again_however_well_it_looks() {
        let well = inserted(TcpState::CloseWait, 60);
        let mut ledger = Ledger::default();
        ledger.hold(close_wait(1), well, Instant::now());
        let revive = Verdict::Act(ActionKind::Revive, Reason::EntryClosed(TcpState::Close));
        ledger.distrust(&close_wait(1));
        assert_eq!(verdict_of(Some(close_wait(1)), Some(well), &ledger), revive);
        // Until it has been.
        ledger.hold(close_wait(1), well, Instant::now());
        let agree = Verdict::Leave(NoAction::Agree);
        assert_eq!(verdict_of(Some(close_wait(1)), Some(well), &ledger), agree);
        // And never for a socket that is not held.
        ledger.distrust(&close_wait(2));
        assert_eq!(verdict_of(Some(close_wait(2)), Some(well), &ledger), agree);
    }

    #[test]
    fn the_handshake_of_a_tuple_that_is_used_again_is_not_disturbed() {
        let mut ledger = Ledger::default();
        let last = entry(server_to_peer(), TcpState::CloseWait, 60);
        ledger.hold(close_wait(1), last, Instant::now());
        for state in [TcpState::SynSent, TcpState::SynRecv] {
            let handshake = entry(server_to_peer(), state, 60);
            let verdict = verdict_of(None, Some(handshake), &ledger);
            assert_eq!(verdict, Verdict::Leave(NoAction::Handshake), "{state}");
        }
    }

    #[test]
    fn a_translated_connection_is_matched_by_its_answers() {
        // Port 80 redirected to 8080: the socket knows only the latter.
        let server = flow("192.0.2.1:8080", PEER);
        let redirected = Entry { orig: flow(PEER, SERVER), ..entry(server, TcpState::Close, 9) };
        let policy = Policy { ports: HashSet::from([8080]), ..policy() };
        let socket = socket("192.0.2.1:8080", PEER, State::CloseWait, 1);
        let view = View { flow: server, socket: Some(socket), entry: Some(redirected) };
        let plan =
            plan(&Snapshot::new(vec![view]), &policy.scope(&[]), &policy, &Ledger::default());
        assert_eq!(kinds(&plan.actions), [ActionKind::Revive]);
        // And is put back as it was.
        assert_eq!(plan.actions[0].template, redirected);
    }

    #[test]
    fn a_lost_entry_is_put_back_as_it_was_last_seen() {
        let marked = Entry {
            mark: Some(7),
            zone: Zone::both(3),
            ..entry(server_to_peer(), TcpState::CloseWait, 9)
        };
        let mut ledger = Ledger::default();
        ledger.remember(&close_wait(1), marked);
        let plan = plan_of(vec![view(Some(close_wait(1)), None)], &ledger);
        assert_eq!(plan.actions[0].template, marked);
    }

    #[test]
    fn a_reversed_entry_is_turned_round_in_its_own_zone() {
        let reversed = Entry {
            zone: Zone::both(3),
            ..reversed_entry(server_to_peer(), TcpState::Established, 9)
        };
        let plan = plan_of(vec![view(Some(close_wait(1)), Some(reversed))], &Ledger::default());
        assert_eq!(kinds(&plan.actions), [ActionKind::Reverse]);
        let template = plan.actions[0].template;
        assert_eq!((template.reply, template.zone), (server_to_peer(), Zone::both(3)));
    }
}

/// What the ledger remembers, and of whom.
mod ledger {
    use super::*;

    fn held(socket: Socket) -> Ledger {
        let mut ledger = Ledger::default();
        let entry = entry(socket.flow(), TcpState::CloseWait, 60);
        ledger.hold(socket, entry, Instant::now());
        ledger
    }

    #[test]
    fn a_hold_belongs_to_a_socket_and_not_to_its_tuple() {
        let ledger = held(close_wait(1));
        assert!(ledger.holds(&close_wait(1)));
        assert!(!ledger.holds(&close_wait(2)));
        assert!(ledger.holds_flow(server_to_peer()));
    }

    #[test]
    fn a_tuple_that_is_used_again_is_held_once() {
        let mut ledger = held(close_wait(1));
        let entry = entry(server_to_peer(), TcpState::CloseWait, 60);
        ledger.hold(close_wait(2), entry, Instant::now());
        assert!(ledger.holds(&close_wait(2)));
        assert!(!ledger.holds(&close_wait(1)));
        assert_eq!(ledger.held().count(), 1);
        ledger.drop_flow(server_to_peer());
        assert_eq!(ledger.held().count(), 0);
    }

    #[test]
    fn a_hold_that_is_renewed_keeps_its_age() {
        let began = Instant::now();
        let entry = entry(server_to_peer(), TcpState::CloseWait, 60);
        let mut ledger = Ledger::default();
        ledger.hold(close_wait(1), entry, began);
        ledger.hold(close_wait(1), entry, began + Duration::from_secs(30));
        assert_eq!(ledger.held().next().unwrap().since, began);
    }

    #[test]
    fn a_hold_ends_when_the_socket_is_gone_and_its_entry_too() {
        for (entry, over) in [
            (None, true),
            (Some(entry(server_to_peer(), TcpState::Close, 9)), true),
            (Some(entry(server_to_peer(), TcpState::TimeWait, 9)), true),
            // Must be released first.
            (Some(entry(server_to_peer(), TcpState::CloseWait, 9)), false),
            (Some(entry(server_to_peer(), TcpState::Established, 9)), false),
        ] {
            let mut ledger = held(close_wait(1));
            ledger.settle(&Snapshot::new(vec![view(None, entry)]));
            assert_eq!(!ledger.holds(&close_wait(1)), over, "{entry:?}");
        }
    }

    #[test]
    fn a_hold_lasts_while_its_socket_is_open_in_whatever_state() {
        for state in State::ALL {
            let mut ledger = held(close_wait(1));
            let socket = Socket { state, ..close_wait(1) };
            ledger.settle(&Snapshot::new(vec![view(Some(socket), None)]));
            assert!(ledger.holds(&close_wait(1)), "{state}");
        }
    }

    #[test]
    fn a_hold_ends_when_another_socket_has_the_tuple() {
        let mut ledger = held(close_wait(1));
        let entry = entry(server_to_peer(), TcpState::Established, 9);
        ledger.settle(&Snapshot::new(vec![view(Some(established(2)), Some(entry))]));
        assert_eq!(ledger.held().count(), 0);
        assert!(!ledger.holds_flow(server_to_peer()));
    }

    #[test]
    fn what_was_seen_is_forgotten_with_the_socket_but_not_while_it_is_held() {
        let seen = entry(server_to_peer(), TcpState::CloseWait, 9);
        let mut ledger = held(close_wait(1));
        ledger.remember(&close_wait(2), seen);
        ledger.remember(&close_wait(3), seen);
        ledger.retain_seen(&HashSet::from([Cookie(3)]), Instant::now());
        assert!(ledger.last_entry(&close_wait(1)).is_some());
        assert!(ledger.last_entry(&close_wait(2)).is_none());
        assert!(ledger.last_entry(&close_wait(3)).is_some());
    }

    #[test]
    fn an_ordinary_established_connection_costs_no_memory() {
        let plain = entry(server_to_peer(), TcpState::Established, 432_000);
        let marked = Entry { mark: Some(7), ..plain };
        for (socket, entry, remembered) in [
            (established(1), plain, false),
            (established(1), marked, true),
            (close_wait(1), plain, true),
        ] {
            let mut ledger = Ledger::default();
            ledger.note(&Snapshot::new(vec![view(Some(socket), Some(entry))]));
            assert_eq!(ledger.last_entry(&socket).is_some(), remembered, "{socket:?} {entry:?}");
        }
    }

    #[test]
    fn the_default_zone_is_always_among_the_known_ones_and_once() {
        let mut ledger = Ledger::default();
        let in_zone = |zone| {
            let entry = Entry { zone, ..entry(server_to_peer(), TcpState::CloseWait, 9) };
            Snapshot::new(vec![view(Some(close_wait(1)), Some(entry))])
        };
        ledger.note(&in_zone(Zone::both(5)));
        ledger.note(&in_zone(Zone::default()));
        assert_eq!(ledger.zones().collect::<Vec<_>>(), [Zone::default(), Zone::both(5)]);
    }
}

/// How two tables become one snapshot.
mod observation {
    use super::*;

    fn views(snapshot: &Snapshot) -> Vec<View> {
        snapshot.views.iter().collect()
    }

    fn whole(host: Host) -> Snapshot {
        let (_, mut tables) = host.open();
        let open = States::from_iter([State::CloseWait, State::Established]);
        tables.whole(&scope(), &policy(), open).unwrap()
    }

    fn half_closed(host: Host, ledger: &Ledger) -> Snapshot {
        let (_, mut tables) = host.open();
        look_at_half_closed(&mut tables, ledger)
    }

    /// What a sweep looks at that has seen nothing before.
    fn look_at_half_closed(tables: &mut Tables<Played>, ledger: &Ledger) -> Snapshot {
        let sockets = tables.half_closed(&scope(), &policy(), ledger).unwrap();
        let lookups = ledger.clone().compare(&sockets, false);
        tables.exactly(&lookups, ledger).unwrap().into_snapshot()
    }

    #[test]
    fn sockets_meet_their_entries_in_both_families_and_each_remains_alone_without_the_other() {
        let v6 = flow("[2001:db8::1]:80", "[2001:db8:1::7]:4000");
        let socket_v6 = Socket { cookie: Cookie(2), ..socket_of(v6) };
        let entry_v6 = entry(v6, TcpState::CloseWait, 60);
        let alone = flow(SERVER, "198.51.100.8:4000");
        let entry_alone = entry(alone, TcpState::Established, 60);
        let host = Host {
            sockets: vec![close_wait(1), socket_v6],
            entries: vec![entry_v6, entry_alone],
            ..Host::default()
        };
        let expected = [
            view(Some(close_wait(1)), None),
            View { flow: v6, socket: Some(socket_v6), entry: Some(entry_v6) },
            View { flow: alone, socket: None, entry: Some(entry_alone) },
        ];
        assert_eq!(views(&whole(host)), expected);
    }

    fn socket_of(flow: FourTuple) -> Socket {
        socket(&flow.src.to_string(), &flow.dst.to_string(), State::CloseWait, 1)
    }

    #[test]
    fn what_is_out_of_scope_is_left_out() {
        let other_port = flow("192.0.2.1:22", PEER);
        let loopback = flow("127.0.0.1:80", "127.0.0.1:4000");
        let host = Host {
            sockets: vec![socket_of(other_port), socket_of(loopback)],
            entries: [other_port, loopback].map(|f| entry(f, TcpState::Close, 9)).to_vec(),
            ..Host::default()
        };
        assert_eq!(views(&whole(host.clone())), []);
        assert_eq!(views(&half_closed(host, &Ledger::default())), []);
    }

    #[test]
    fn an_entry_between_two_ports_in_scope_is_one_connection() {
        let between = flow(SERVER, "198.51.100.7:443");
        let (socket, entry) = (socket_of(between), entry(between, TcpState::CloseWait, 60));
        let host = Host { sockets: vec![socket], entries: vec![entry], ..Host::default() };
        let expected = View { flow: between, socket: Some(socket), entry: Some(entry) };
        assert_eq!(views(&whole(host)), [expected]);
    }

    #[test]
    fn of_two_zones_the_entry_that_the_limiter_counts_goes_first() {
        let counted =
            Entry { zone: Zone::both(5), ..entry(server_to_peer(), TcpState::CloseWait, 60) };
        let closed = entry(server_to_peer(), TcpState::Close, 9);
        let reversed = Entry {
            zone: Zone::both(6),
            ..reversed_entry(server_to_peer(), TcpState::Established, 300)
        };
        for entries in [[counted, closed, reversed], [reversed, closed, counted]] {
            let host =
                Host { sockets: vec![close_wait(1)], entries: entries.to_vec(), ..Host::default() };
            assert_eq!(views(&whole(host)), [view(Some(close_wait(1)), Some(counted))]);
        }
    }

    #[test]
    fn a_sweep_of_half_closed_sockets_never_walks_the_table_of_entries() {
        let alive = entry(server_to_peer(), TcpState::CloseWait, 60);
        let ordinary = flow(SERVER, "198.51.100.8:4000");
        let host = Host {
            sockets: vec![
                close_wait(1),
                Socket { state: State::Established, ..socket_of(ordinary) },
            ],
            entries: vec![alive, entry(ordinary, TcpState::Established, 60)],
            ..Host::default()
        };
        let (host, mut tables) = host.open();
        let snapshot = look_at_half_closed(&mut tables, &Ledger::default());
        assert_eq!(views(&snapshot), [view(Some(close_wait(1)), Some(alive))]);
        assert_eq!(host.borrow().walks, 0);
    }

    #[test]
    fn a_held_socket_that_the_dump_lacks_is_looked_up() {
        let alive = entry(server_to_peer(), TcpState::CloseWait, 60);
        let mut ledger = Ledger::default();
        ledger.hold(close_wait(1), alive, Instant::now());
        ledger.look_at(&close_wait(1), Instant::now());
        let last_ack = Socket { state: State::LastAck, ..close_wait(1) };
        for (sockets, skipped, found) in [
            // Skipped by the dump, in another state by now, gone.
            (vec![close_wait(1)], vec![Cookie(1)], Some(close_wait(1))),
            (vec![last_ack], vec![], Some(last_ack)),
            (vec![], vec![], None),
        ] {
            let host = Host { sockets, skipped, entries: vec![alive], ..Host::default() };
            assert_eq!(views(&half_closed(host, &ledger)), [view(found, Some(alive))]);
        }
    }

    #[test]
    fn an_entry_is_found_in_every_zone_that_was_ever_seen() {
        for zone in [Zone::both(5), Zone { orig: 6, reply: 0 }, Zone { orig: 0, reply: 7 }] {
            let there = Entry { zone, ..entry(server_to_peer(), TcpState::Close, 9) };
            let host =
                Host { sockets: vec![close_wait(1)], entries: vec![there], ..Host::default() };
            let mut ledger = Ledger::default();
            ledger.note(&whole(host.clone()));
            let expected = view(Some(close_wait(1)), Some(there));
            assert_eq!(views(&half_closed(host, &ledger)), [expected], "{zone:?}");
        }
    }
}

/// A plan is made from dumps, and dumps lie: what exact look-ups do not show is not done.
mod confirmation {
    use super::*;

    /// Plans for what the dumps said, and confirms it on a host where `now` is true.
    fn confirmed(said: Vec<View>, now: Host, ledger: &Ledger) -> Confirmed {
        let evidence = Snapshot::new(said.clone()).evidence;
        let planned = plan_of(said, ledger);
        assert!(!planned.actions.is_empty(), "nothing to confirm");
        let (_, mut tables) = now.open();
        confirm(&mut tables, &planned, &evidence, &scope(), &policy(), ledger).unwrap()
    }

    fn closed() -> Entry {
        entry(server_to_peer(), TcpState::Close, 9)
    }

    fn alive() -> Entry {
        entry(server_to_peer(), TcpState::CloseWait, 60)
    }

    /// Some other connection of the port is tracked.
    fn tracked() -> Ledger {
        let mut ledger = Ledger::default();
        ledger.set_tracked(HashSet::from([80]));
        ledger
    }

    fn host(sockets: Vec<Socket>, entries: Vec<Entry>) -> Host {
        Host { sockets, entries, ..Host::default() }
    }

    #[test]
    fn what_is_still_so_is_confirmed() {
        let said = vec![view(Some(close_wait(1)), Some(closed()))];
        let now = host(vec![close_wait(1)], vec![closed()]);
        let confirmed = confirmed(said, now, &Ledger::default());
        assert_eq!(kinds(confirmed.actions()), [ActionKind::Revive]);
    }

    #[test]
    fn an_empty_plan_asks_nothing() {
        let mut tables = Tables {
            conntrack: ctkeep::conntrack::Conntrack::new(played::script(|_| panic!("a send"))),
            sockets: ctkeep::sockdiag::SockDiag::new(played::script(|_| panic!("a send"))),
            homes: Vec::new(),
            tracking: None,
        };
        let ledger = Ledger::default();
        let confirmed = confirm(
            &mut tables,
            &Plan::default(),
            &Evidence::default(),
            &scope(),
            &policy(),
            &ledger,
        )
        .unwrap();
        assert!(confirmed.actions().is_empty());
    }

    #[test]
    fn nothing_is_done_for_a_socket_that_is_gone() {
        for entries in [vec![], vec![closed()], vec![alive()]] {
            for said in [None, Some(closed())] {
                let said = vec![view(Some(close_wait(1)), said)];
                let confirmed = confirmed(said, host(vec![], entries.clone()), &tracked());
                assert_eq!(confirmed.actions(), [], "{entries:?}");
            }
        }
    }

    #[test]
    fn nothing_is_done_for_a_socket_of_which_only_the_listener_is_left() {
        let said = vec![view(Some(close_wait(1)), Some(closed()))];
        let listener = socket("0.0.0.0:80", "0.0.0.0:0", State::Listen, 9);
        let confirmed = confirmed(said, host(vec![listener], vec![closed()]), &Ledger::default());
        assert_eq!(confirmed.actions(), []);
    }

    #[test]
    fn nothing_is_done_for_a_socket_that_has_left_the_guarded_states() {
        for state in [State::LastAck, State::FinWait1, State::TimeWait] {
            let said = vec![view(Some(close_wait(1)), Some(closed()))];
            // Its application has closed it.
            let now = host(vec![Socket { state, inode: 0, ..close_wait(1) }], vec![closed()]);
            let confirmed = confirmed(said, now, &Ledger::default());
            assert_eq!(confirmed.actions(), [], "{state}");
        }
    }

    #[test]
    fn nothing_is_done_for_an_entry_that_was_repaired_meanwhile() {
        for said in [None, Some(closed())] {
            let said = vec![view(Some(close_wait(1)), said)];
            let now = host(vec![close_wait(1)], vec![alive()]);
            assert_eq!(confirmed(said, now, &tracked()).actions(), []);
        }
    }

    #[test]
    fn nothing_is_done_for_a_tuple_that_a_sound_connection_has_taken_over() {
        let said = vec![view(Some(close_wait(1)), Some(closed()))];
        let fresh = entry(server_to_peer(), TcpState::Established, 432_000);
        let now = host(vec![established(2)], vec![fresh]);
        assert_eq!(confirmed(said, now, &Ledger::default()).actions(), []);
    }

    #[test]
    fn a_younger_socket_inherits_nothing_from_the_one_that_was_seen() {
        // The old connection's entry had a mark; the new one's has not been seen.
        let mut ledger = tracked();
        ledger.remember(&close_wait(1), Entry { mark: Some(7), ..alive() });
        let said = vec![view(Some(close_wait(1)), None)];
        let confirmed = confirmed(said, host(vec![close_wait(2)], vec![]), &ledger);
        let [action] = confirmed.actions() else { panic!("one action") };
        assert_eq!(action.view.socket, Some(close_wait(2)));
        assert_eq!(action.template, Entry::plain(server_to_peer().inverse(), Zone::default()));
    }

    #[test]
    fn a_hold_of_another_socket_is_no_reason_to_release_the_entry_of_this_one() {
        let mut ledger = Ledger::default();
        ledger.hold(close_wait(1), alive(), Instant::now());
        // The dump missed the tuple's new socket.
        let said = vec![view(None, Some(alive()))];
        let now = host(vec![established(2)], vec![alive()]);
        assert_eq!(confirmed(said, now, &ledger).actions(), []);
    }

    #[test]
    fn a_held_entry_is_not_released_because_a_dump_missed_its_socket() {
        let mut ledger = Ledger::default();
        ledger.hold(close_wait(1), alive(), Instant::now());
        let said = vec![view(None, Some(alive()))];
        assert_eq!(kinds(&plan_of(said.clone(), &ledger).actions), [ActionKind::Release]);
        let now = host(vec![close_wait(1)], vec![alive()]);
        assert_eq!(confirmed(said, now, &ledger).actions(), []);
    }

    #[test]
    fn the_action_follows_what_is_there_now_and_not_what_was_said() {
        let said = vec![view(Some(close_wait(1)), Some(closed()))];
        for (now, kind) in [
            (None, ActionKind::Reinsert),
            (
                Some(reversed_entry(server_to_peer(), TcpState::Established, 300)),
                ActionKind::Reverse,
            ),
            (Some(entry(server_to_peer(), TcpState::CloseWait, 3)), ActionKind::Extend),
        ] {
            let now = host(vec![close_wait(1)], now.into_iter().collect());
            let confirmed = confirmed(said.clone(), now, &Ledger::default());
            assert_eq!(kinds(confirmed.actions()), [kind]);
        }
    }

    #[test]
    fn evidence_of_the_plan_holds_for_its_confirmation() {
        // The sibling that proves tracking is no part of the plan, so nobody asks for it again.
        let sibling = flow(SERVER, "198.51.100.8:4000");
        let said = vec![
            view(Some(close_wait(1)), None),
            View {
                flow: sibling,
                socket: None,
                entry: Some(entry(sibling, TcpState::Established, 99)),
            },
        ];
        let now = host(vec![close_wait(1)], vec![]);
        let confirmed = confirmed(said, now, &Ledger::default());
        assert_eq!(kinds(confirmed.actions()), [ActionKind::Reinsert]);
    }

    #[test]
    fn nothing_is_confirmed_when_a_question_stays_unanswered() {
        let planned = plan_of(vec![view(Some(close_wait(1)), Some(closed()))], &Ledger::default());
        let ledger = Ledger::default();
        for silent in [true, false] {
            let quiet = || played::script(|_| vec![]);
            let absent = || played::obliging(|_| Err(played::ENOENT));
            let mut tables = Tables {
                conntrack: ctkeep::conntrack::Conntrack::new(if silent {
                    quiet()
                } else {
                    absent()
                }),
                sockets: ctkeep::sockdiag::SockDiag::new(if silent { absent() } else { quiet() }),
                homes: Vec::new(),
                tracking: None,
            };
            let answer =
                confirm(&mut tables, &planned, &Evidence::default(), &scope(), &policy(), &ledger);
            assert!(answer.is_err(), "{answer:?}");
        }
    }
}

mod laws {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    /// A connection of some peer with one of our ports, or a port out of scope.
    fn any_flow() -> impl Strategy<Value = FourTuple> {
        (select(vec![80_u16, 443, 22]), 1..6_u8, 4000..4004_u16).prop_map(|(port, host, remote)| {
            flow(&format!("192.0.2.1:{port}"), &format!("198.51.100.{host}:{remote}"))
        })
    }

    fn any_socket(flow: FourTuple) -> impl Strategy<Value = Socket> {
        let connected: Vec<_> = States::connected().iter().collect();
        (select(connected), 1..4_u64).prop_map(move |(state, cookie)| Socket {
            state,
            ..socket(&flow.src.to_string(), &flow.dst.to_string(), State::CloseWait, cookie)
        })
    }

    /// As this program makes them.
    fn inserted_entry(flow: FourTuple, state: TcpState, seconds: u64) -> Entry {
        let entry = entry(flow, state, seconds);
        Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x88, 0x88], ..tcp }), ..entry }
    }

    fn any_entry(flow: FourTuple) -> impl Strategy<Value = Entry> {
        let make = select(vec![entry, inserted_entry, reversed_entry, outgoing_entry]);
        let zones = vec![Zone::default(), Zone::both(2), Zone { orig: 2, reply: 0 }];
        (make, select(TcpState::ALL.to_vec()), 0..120_u64, select(zones)).prop_map(
            move |(make, state, seconds, zone)| Entry { zone, ..make(flow, state, seconds) },
        )
    }

    fn any_view() -> impl Strategy<Value = View> {
        any_flow().prop_flat_map(|flow| {
            (
                Just(flow),
                proptest::option::weighted(0.8, any_socket(flow)),
                proptest::option::weighted(0.8, any_entry(flow)),
            )
                .prop_map(|(flow, socket, entry)| View { flow, socket, entry })
        })
    }

    /// Each connection once.
    fn any_views() -> impl Strategy<Value = Vec<View>> {
        proptest::collection::vec(any_view(), 0..12).prop_map(|mut views| {
            views.sort_by_key(|view| view.flow);
            views.dedup_by_key(|view| view.flow);
            // A cookie belongs to one socket.
            for (view, cookie) in views.iter_mut().zip(1..) {
                if let Some(socket) = &mut view.socket {
                    socket.cookie = Cookie(cookie);
                }
            }
            views
        })
    }

    /// A ledger that holds, or has seen, some of these connections.
    fn any_ledger(views: &[View]) -> impl Strategy<Value = Ledger> + use<> {
        let views = views.to_vec();
        let count = views.len();
        (proptest::collection::vec(0..4_u8, count), any::<bool>()).prop_map(
            move |(choices, tracked)| {
                let mut ledger = Ledger::default();
                for (view, choice) in views.iter().zip(choices) {
                    let gone = socket(
                        &view.flow.src.to_string(),
                        &view.flow.dst.to_string(),
                        State::CloseWait,
                        99,
                    );
                    let socket = view.socket.unwrap_or(gone);
                    let last = entry(view.flow, TcpState::CloseWait, 60);
                    match choice {
                        0 => ledger.hold(socket, view.entry.unwrap_or(last), Instant::now()),
                        1 => ledger.remember(&socket, last),
                        _ => {}
                    }
                }
                if tracked {
                    ledger.set_tracked(HashSet::from([80]));
                }
                ledger
            },
        )
    }

    fn any_situation() -> impl Strategy<Value = (Vec<View>, Ledger)> {
        any_views().prop_flat_map(|views| {
            let ledger = any_ledger(&views);
            (Just(views), ledger)
        })
    }

    /// A connection about which both tables agree.
    fn agreeing_view() -> impl Strategy<Value = View> {
        let live = vec![TcpState::Established, TcpState::FinWait, TcpState::CloseWait];
        let opening = vec![TcpState::SynSent, TcpState::SynRecv, TcpState::SynSent2];
        let closing = vec![TcpState::LastAck, TcpState::TimeWait, TcpState::Close];
        let rules: Vec<(Vec<Option<State>>, Vec<TcpState>)> = vec![
            (vec![Some(State::CloseWait), Some(State::Established)], live),
            (vec![Some(State::Established), Some(State::SynRecv)], opening),
            (
                vec![None, Some(State::LastAck), Some(State::TimeWait), Some(State::FinWait2)],
                closing,
            ),
        ];
        let closing_states = [State::LastAck, State::TimeWait, State::FinWait2];
        (any_flow(), select(rules)).prop_flat_map(move |(flow, (sockets, states))| {
            (select(sockets), select(states), 30..400_u64).prop_map(
                move |(state, entry_state, seconds)| View {
                    flow,
                    socket: state.map(|state| {
                        let (local, remote) = (flow.src.to_string(), flow.dst.to_string());
                        let socket = socket(&local, &remote, state, 1);
                        // What is closing has been closed by its application.
                        let inode = if closing_states.contains(&state) { 0 } else { socket.inode };
                        Socket { inode, ..socket }
                    }),
                    entry: Some(entry(flow, entry_state, seconds)),
                },
            )
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

        #[test]
        fn a_plan_does_not_depend_on_the_order_of_the_snapshot(
            ((views, ledger), order) in any_situation().prop_flat_map(|(views, ledger)| {
                let order = Just(views.clone()).prop_shuffle();
                ((Just(views), Just(ledger)), order)
            })
        ) {
            let sorted = |mut plan: Plan| {
                plan.actions.sort_by_key(|action| action.view.flow);
                plan
            };
            prop_assert_eq!(sorted(plan_of(views, &ledger)), sorted(plan_of(order, &ledger)));
        }

        #[test]
        fn nothing_is_planned_for_what_is_neither_guarded_nor_held(
            (views, ledger) in any_situation()
        ) {
            for action in plan_of(views, &ledger).actions {
                let View { flow, socket, .. } = action.view;
                match socket {
                    Some(socket) => {
                        prop_assert!(policy().states.contains(socket.state));
                        prop_assert!(scope().contains(&policy(), flow) || ledger.holds(&socket));
                    }
                    None => {
                        let inserted = action.view.entry.is_some_and(|entry| entry.is_ours());
                        prop_assert!(inserted || ledger.holds_flow(flow));
                    }
                }
            }
        }

        #[test]
        fn nothing_is_planned_where_both_tables_agree(
            views in proptest::collection::vec(agreeing_view(), 0..12)
        ) {
            prop_assert_eq!(plan_of(views, &Ledger::default()).actions, []);
        }

        #[test]
        fn nothing_is_planned_for_a_connection_that_this_host_opened(
            (views, ledger) in any_situation()
        ) {
            for action in plan_of(views, &ledger).actions {
                let side = action.view.entry_side();
                prop_assert!(!matches!(side, Some((Direction::Outgoing, _))), "{action:?}");
            }
        }

        #[test]
        fn an_open_socket_is_never_released_and_a_gone_one_never_repaired(
            (views, ledger) in any_situation()
        ) {
            for action in plan_of(views, &ledger).actions {
                let release = action.kind == ActionKind::Release;
                prop_assert_eq!(release, action.view.socket.is_none());
            }
        }

        #[test]
        fn what_is_put_back_runs_from_the_peer_to_the_server(
            (views, ledger) in any_situation()
        ) {
            for action in plan_of(views, &ledger).actions {
                prop_assert_eq!(action.template.reply, action.view.flow);
            }
        }

        #[test]
        fn one_connection_gets_one_action_at_most((views, ledger) in any_situation()) {
            let actions = plan_of(views, &ledger).actions;
            let flows: HashSet<_> = actions.iter().map(|action| action.view.flow).collect();
            prop_assert_eq!(flows.len(), actions.len());
        }

        /// Observed, planned, confirmed, carried out: then there is nothing left to do, and
        /// whatever was not in a plan is as it was.
        #[test]
        fn a_plan_that_is_carried_out_leaves_nothing_to_do((views, ledger) in any_situation()) {
            let mut ledger = ledger;
            // Zones that nobody has seen are not asked for.
            for view in &views {
                ledger.note(&Snapshot::new(vec![*view]));
            }
            let before = Host {
                sockets: views.iter().filter_map(|view| view.socket).collect(),
                entries: views.iter().filter_map(|view| view.entry).collect(),
                ..Host::default()
            };
            let (host, mut tables) = before.clone().open();
            let (scope, policy) = (scope(), policy());
            let mut touched = HashSet::new();
            for round in 0.. {
                let changes = host.borrow().changes;
                let snapshot = tables.whole(&scope, &policy, States::connected()).unwrap();
                let planned = plan(&snapshot, &scope, &policy, &ledger);
                if planned.actions.is_empty() {
                    break;
                }
                // An entry that was put back is evidence that its port is tracked, so connections
                // that were left alone for want of it follow in a second round, the last one.
                prop_assert!(round < 2, "{:?}", planned.actions);
                let reinserts =
                    planned.actions.iter().all(|action| action.kind == ActionKind::Reinsert);
                prop_assert!(round == 0 || reinserts, "{:?}", planned.actions);

                let confirmed =
                    confirm(&mut tables, &planned, &snapshot.evidence, &scope, &policy, &ledger).unwrap();
                // Nothing has changed in between.
                prop_assert_eq!(kinds(confirmed.actions()), kinds(&planned.actions));
                prop_assert_eq!(host.borrow().changes, changes, "looking changes nothing");

                let outcomes =
                    apply(&mut tables, &mut None::<Recounter>, &confirmed, &policy, &mut ledger, Instant::now())
                        .unwrap();
                for outcome in &outcomes {
                    prop_assert!(outcome.result.is_ok(), "{:?}", outcome);
                }
                touched.extend(planned.actions.iter().map(|action| action.view.flow));
            }
            let untouched = |host: &Host| {
                let of_nobody = |entry: &&Entry| {
                    !touched.contains(&entry.reply) && !touched.contains(&entry.orig)
                };
                let mut rest: Vec<_> = host.entries.iter().copied().filter(|e| of_nobody(&e))
                    .collect();
                rest.sort_by_key(Entry::key);
                rest
            };
            prop_assert_eq!(untouched(&before), untouched(&host.borrow()));
        }
    }
}
