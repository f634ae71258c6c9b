//! Connections that this host opened: a played kernel, the time by hand, and what is done for them.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod played;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, Tcp, TcpState};
use ctkeep::flow::{Connection, Endpoint, FourTuple};
use ctkeep::reconcile::ledger::Ledger;
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::outgoing::plan::{Deed, Loss};
use ctkeep::reconcile::outgoing::{By, Figures, Outgoing, Pass};
use ctkeep::reconcile::policy::{Policy, Scope};
use ctkeep::reconcile::pressure::Defence;
use ctkeep::sockdiag::{Cookie, Socket, State};
use played::host::{Host, Shared};
use played::{Played, endpoint, entry, flow, socket};

const SECOND: Duration = Duration::from_secs(1);
const FAR: &str = "198.51.100.7:443";
/// Ports that the masquerade gives, less those of the container.
const SHIFT: u16 = 20_000;

/// A container behind a masquerade, and what keeps its entries.
struct World {
    host: Shared,
    tables: Tables<Played>,
    outgoing: Outgoing,
    scope: Scope,
    policy: Policy,
    ledger: Ledger,
    dry_run: bool,
    now: Instant,
    done: Vec<(Deed, u16)>,
    lost: Vec<Loss>,
    said_full: usize,
}

/// The connection of this port of the container, as its socket sees it.
fn dialled(port: u16) -> Connection {
    Connection::new(endpoint(&format!("10.1.1.2:{port}")), endpoint(FAR))
}

fn masqueraded(port: u16, state: TcpState, seconds: u64) -> Entry {
    let connection = dialled(port);
    let host = Endpoint::new("192.0.2.1".parse().unwrap(), port + SHIFT);
    Entry {
        reply: FourTuple::new(connection.remote, host),
        mark: Some(7),
        ..entry(connection.received(), state, seconds)
    }
}

impl World {
    /// With connections of these ports, half-closed by the far side.
    fn with(ports: std::ops::Range<u16>) -> Self {
        let sockets = ports.clone().map(|port| {
            let Connection { local, remote } = dialled(port);
            socket(&local.to_string(), &remote.to_string(), State::CloseWait, u64::from(port))
        });
        let sockets = sockets.collect();
        let entries = ports.map(|port| masqueraded(port, TcpState::CloseWait, 60)).collect();
        Self::of(Host { sockets, entries, ..Host::default() })
    }

    fn of(host: Host) -> Self {
        let (host, tables) = host.open();
        let now = Instant::now();
        Self {
            host,
            tables,
            outgoing: Outgoing::new(now),
            scope: Scope { ports: HashSet::from([80]), ..Scope::default() },
            policy: Policy::default(),
            ledger: Ledger::new(Defence::Auto, 0),
            dry_run: false,
            now,
            done: Vec::new(),
            lost: Vec::new(),
            said_full: 0,
        }
    }

    fn give_back(&mut self) {
        self.go_by(SECOND * 20, |outgoing, tables, by| outgoing.give_back(tables, by)).unwrap();
    }

    /// Has something done where the kernel gives an entry in CLOSE_WAIT so long.
    fn go_by<O>(
        &mut self,
        close_wait: Duration,
        act: impl FnOnce(&mut Outgoing, &mut Tables<Played>, By<'_>) -> O,
    ) -> O {
        let timeout = |state| (state == TcpState::CloseWait).then_some(close_wait);
        let by = By {
            scope: &self.scope,
            policy: &self.policy,
            ledger: &self.ledger,
            close_wait: Some(close_wait),
            timeout: &timeout,
            interval: SECOND,
            dry_run: self.dry_run,
        };
        act(&mut self.outgoing, &mut self.tables, by)
    }

    fn turn(&mut self) {
        let now = self.now;
        let Pass { done, lost, table_full } =
            self.go_by(SECOND * 60, |outgoing, tables, by| outgoing.turn(tables, by, now)).unwrap();
        let of = |orig: Endpoint| orig.port();
        let done = done.into_iter().filter(|it| it.result.is_ok());
        self.done.extend(done.map(|it| (it.deed, of(it.connection.local))));
        self.lost.extend(lost.into_iter().map(|(_, loss)| loss));
        self.said_full += usize::from(table_full.is_some());
    }

    /// Time passes: entries expire, and turns come when they are due.
    fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.turn();
            self.now += SECOND;
            self.host.borrow_mut().entries.retain_mut(|entry| {
                let left = entry.timeout.unwrap().saturating_sub(SECOND);
                entry.timeout = Some(left);
                !left.is_zero()
            });
        }
    }

    fn entry(&self, port: u16) -> Option<Entry> {
        let orig = dialled(port).sent();
        self.host.borrow().entries.iter().find(|entry| entry.orig == orig).copied()
    }

    fn state(&self, port: u16) -> Option<TcpState> {
        self.entry(port).and_then(|entry| entry.state())
    }

    fn change(&self, port: u16, change: impl Fn(&mut Entry)) {
        let orig = dialled(port).sent();
        let mut host = self.host.borrow_mut();
        change(host.entries.iter_mut().find(|entry| entry.orig == orig).unwrap());
    }

    fn change_socket(&self, port: u16, change: impl Fn(&mut Socket)) {
        let mut host = self.host.borrow_mut();
        let mut all = host.sockets.iter_mut();
        change(all.find(|socket| socket.local.port() == port).unwrap());
    }

    fn close(&self, port: u16) {
        self.host.borrow_mut().sockets.retain(|socket| socket.local.port() != port);
    }

    fn forget_all(&self) {
        self.host.borrow_mut().entries.clear();
    }

    fn take_done(&mut self) -> Vec<(Deed, u16)> {
        std::mem::take(&mut self.done)
    }
}

#[test]
fn an_entry_lives_as_long_as_its_socket_and_not_longer() {
    let mut world = World::with(40_000..40_001);
    let before = world.entry(40_000).unwrap();
    world.pass(600);
    let after = world.entry(40_000).expect("ten times the kernel's time later");
    assert_eq!(Entry { timeout: None, ..after }, Entry { timeout: None, ..before });
    assert!(world.done.iter().all(|(deed, _)| *deed == Deed::Extend), "{:?}", world.done);
    assert!((14..=16).contains(&world.done.len()), "two thirds of a minute: {:?}", world.done);
    world.close(40_000);
    world.take_done();
    world.pass(40);
    assert_eq!(world.take_done(), [(Deed::Release, 40_000)]);
    assert_eq!(world.entry(40_000), None);
    assert_eq!(world.outgoing.figures(), Figures::default());
}

#[test]
fn a_long_timeout_is_the_kernels_and_stays() {
    let mut world = World::with(40_000..40_001);
    world.change(40_000, |entry| entry.timeout = Some(SECOND * 3600));
    world.pass(60);
    world.close(40_000);
    world.pass(60);
    assert_eq!(world.done, []);
    assert_eq!(world.entry(40_000).unwrap().timeout, Some(SECOND * 3480));
}

#[test]
fn a_lost_one_is_put_back_with_its_translation_and_mark() {
    let mut world = World::with(40_000..40_003);
    world.pass(30);
    let before = world.entry(40_001).unwrap();
    world.forget_all();
    world.take_done();
    world.pass(35);
    let mut done = world.take_done();
    done.retain(|(deed, _)| *deed == Deed::Reinsert);
    assert_eq!(done.len(), 3);
    let after = world.entry(40_001).unwrap();
    assert_eq!((after.reply, after.mark, after.zone), (before.reply, before.mark, before.zone));
    assert!(!after.is_ours() && !after.is_picked_up(), "it is nobody's of the scope");
    assert_eq!(world.lost, []);
}

#[test]
fn what_was_never_seen_with_an_entry_gets_none() {
    let mut world = World::with(40_000..40_001);
    world.forget_all();
    world.pass(200);
    assert_eq!((world.done.len(), world.host.borrow().changes), (0, 0));
}

#[test]
fn a_port_that_was_given_away_is_left_and_reported_once() {
    let mut world = World::with(40_000..40_001);
    world.pass(3);
    let reply = world.entry(40_000).unwrap().reply;
    world.forget_all();
    let other = flow("10.1.9.9:5000", FAR);
    let other = Entry { reply, ..entry(other.inverse(), TcpState::Established, 10_000) };
    world.host.borrow_mut().entries.push(other);
    world.pass(300);
    assert_eq!((world.entry(40_000), world.lost.as_slice()), (None, [Loss::Taken].as_slice()));
    assert_eq!(world.outgoing.figures(), Figures { outgoing: 1, held: 0, lost: 1 });
    assert_eq!(world.host.borrow().entries.len(), 1);
    // When it is free again, it is put back.
    world.forget_all();
    world.pass(40);
    assert_eq!(world.entry(40_000).unwrap().reply, reply);
    assert_eq!(world.outgoing.figures(), Figures { outgoing: 1, held: 1, lost: 0 });
}

#[test]
fn one_that_was_tracked_anew_with_another_translation_is_not_touched() {
    let mut world = World::with(40_000..40_001);
    world.pass(3);
    world.change(40_000, |entry| {
        entry.reply.dst = endpoint("192.0.2.1:1");
        entry.timeout = Some(SECOND * 500);
        entry.tcp = Some(Tcp { state: TcpState::Established, wscale: [0; 2], flags: [0x0a; 2] });
    });
    let before = world.host.borrow().changes;
    world.pass(200);
    assert_eq!(world.lost, [Loss::Otherwise]);
    assert_eq!(world.host.borrow().changes, before);
}

#[test]
fn what_peers_opened_and_what_is_in_scope_is_none_of_it() {
    let sockets = vec![
        // On a port that is not guarded.
        socket("192.0.2.1:8080", "198.51.100.9:4000", State::CloseWait, 1),
        socket("192.0.2.1:80", "198.51.100.9:4001", State::CloseWait, 2),
        // Opened from here, at a guarded port.
        socket("192.0.2.1:80", "198.51.100.9:4002", State::CloseWait, 3),
        socket("127.0.0.1:5000", "127.0.0.1:8080", State::CloseWait, 4),
        // Picked up in this direction, and accepted.
        socket("192.0.2.1:8080", "198.51.100.9:4003", State::CloseWait, 5),
    ];
    let sent = |socket: &Socket| socket.connection().sent();
    let mut entries: Vec<_> =
        sockets.iter().map(|it| entry(sent(it), TcpState::CloseWait, 20)).collect();
    for index in [2, 3] {
        entries[index] = entry(sent(&sockets[index]).inverse(), TcpState::CloseWait, 20);
    }
    entries[4] = played::reversed_entry(sent(&sockets[4]), TcpState::Established, 20);
    let mut world = World::of(Host { sockets, entries, ..Host::default() });
    world.pass(100);
    assert_eq!((world.done.len(), world.host.borrow().changes), (0, 0));
    assert_eq!(world.outgoing.figures(), Figures::default());
}

#[test]
fn of_one_that_was_picked_up_tcp_says_who_opened_it() {
    let mut world = World::with(40_000..40_002);
    for port in [40_000, 40_001] {
        world.change(port, |entry| {
            entry.tcp = Some(Tcp { state: TcpState::CloseWait, wscale: [0; 2], flags: [0x0a; 2] });
        });
    }
    world.host.borrow_mut().opened_here.push(Cookie(40_000));
    world.pass(100);
    assert_eq!((world.entry(40_000).is_some(), world.entry(40_001)), (true, None));
}

#[test]
fn what_no_process_has_is_left_to_the_kernel() {
    let mut world = World::with(40_000..40_003);
    world.change_socket(40_000, |socket| (socket.state, socket.inode) = (State::FinWait2, 0));
    world.change_socket(40_001, |socket| socket.state = State::FinWait2);
    world.pass(100);
    assert_eq!(world.entry(40_000), None);
    assert!(world.entry(40_001).is_some() && world.entry(40_002).is_some());
    // The application closes: conntrack sees the FIN, and nothing is renewed.
    world.change_socket(40_002, |socket| (socket.state, socket.inode) = (State::LastAck, 0));
    world.change(40_002, |entry| {
        entry.timeout = Some(SECOND * 30);
        entry.tcp = entry.tcp.map(|tcp| Tcp { state: TcpState::LastAck, ..tcp });
    });
    world.take_done();
    world.pass(31);
    assert_eq!(world.entry(40_002), None);
    assert!(world.take_done().iter().all(|(_, port)| *port != 40_002));
}

#[test]
fn a_fin_that_comes_again_and_a_stale_rst_end_nothing() {
    let mut world = World::with(40_000..40_003);
    world.pass(3);
    let closes = [TcpState::LastAck, TcpState::TimeWait, TcpState::Close];
    for (port, state) in (40_000..).zip(closes) {
        world.change(port, |entry| {
            entry.tcp = entry.tcp.map(|tcp| Tcp { state, ..tcp });
            entry.timeout = Some(SECOND * 35);
        });
    }
    world.pass(60);
    for port in 40_000..40_003 {
        assert_eq!(world.state(port), Some(TcpState::CloseWait), "{port}");
    }
}

#[test]
fn a_full_table_is_said_once_and_put_back_when_there_is_room() {
    let mut world = World::with(40_000..40_010);
    world.pass(3);
    world.forget_all();
    world.host.borrow_mut().maximum = Some(0);
    let before = world.host.borrow().changes;
    world.pass(50);
    assert_eq!((world.said_full, world.lost.len()), (1, 10));
    assert!(world.host.borrow().changes - before < 20, "no storm");
    world.host.borrow_mut().maximum = None;
    world.pass(60);
    assert_eq!(world.host.borrow().entries.len(), 10);
    assert_eq!(world.outgoing.figures(), Figures { outgoing: 10, held: 10, lost: 0 });
}

#[test]
fn the_entry_of_another_socket_on_the_same_tuple_is_not_given_back() {
    let mut world = World::with(40_000..40_001);
    world.pass(45);
    assert_eq!(world.outgoing.figures().held, 1);
    // Ended and opened anew between two lists.
    world.change_socket(40_000, |socket| {
        (socket.cookie, socket.state) = (Cookie(9), State::Established);
    });
    world.change(40_000, |entry| {
        entry.tcp = entry.tcp.map(|tcp| Tcp { state: TcpState::Established, ..tcp });
        entry.timeout = Some(SECOND * 1000);
    });
    world.take_done();
    world.pass(60);
    assert_eq!((world.take_done().len(), world.state(40_000)), (0, Some(TcpState::Established)));
}

#[test]
fn one_that_lists_skip_is_there_still() {
    let mut world = World::with(40_000..40_001);
    world.pass(45);
    world.host.borrow_mut().skipped.push(Cookie(40_000));
    world.pass(300);
    assert!(world.entry(40_000).is_some());
    assert!(world.done.iter().all(|(deed, _)| *deed == Deed::Extend));
}

/// And nothing that was not lengthened.
#[test]
fn at_the_end_what_was_lengthened_gets_the_kernels_own_time() {
    let mut world = World::with(40_000..40_002);
    world.change(40_001, |entry| entry.timeout = Some(SECOND * 3600));
    world.pass(45);
    world.give_back();
    let left = |port| world.entry(port).unwrap().timeout.unwrap();
    assert_eq!((left(40_000), left(40_001)), (SECOND * 20, SECOND * 3555));
}

#[test]
fn a_dry_run_plans_and_changes_nothing() {
    let mut world = World { dry_run: true, ..World::with(40_000..40_001) };
    world.pass(59);
    assert_eq!(
        (world.done.as_slice(), world.host.borrow().changes),
        (&[(Deed::Extend, 40_000)][..], 0)
    );
}

/// What each costs in two minutes: three times a look and a change.
#[test]
fn an_idle_one_is_looked_at_when_its_lease_wants_it() {
    let mut world = World::with(40_000..41_000);
    world.pass(120);
    let before = (world.host.borrow().looks, world.host.borrow().changes);
    world.pass(120);
    let host = world.host.borrow();
    let (looks, changes) = (host.looks - before.0, host.changes - before.1);
    assert!(looks <= 2 * 1000 * 3, "{looks} questions for entry and socket in two minutes");
    assert!(changes <= 1000 * 3, "{changes}");
    assert_eq!(host.entries.len(), 1000);
}
