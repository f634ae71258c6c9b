//! The keeper as it runs: a played kernel, the time by hand, and a few verbs.
//!
//! Sections by what is going on: peace, packets of a peer, a failing kernel, a full table.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod beside;
#[path = "../played/mod.rs"]
mod played;
mod watched;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Conntrack, Entry, TcpState, Zone};
use ctkeep::firewall::limits::Limiter;
use ctkeep::firewall::lists::{Anew, Loss};
use ctkeep::firewall::{Family, Ruleset, parse_saved};
use ctkeep::flow::{Connection, FourTuple};
use ctkeep::netlink::Transport;
use ctkeep::reconcile::keeper::{Acted, Depth, Keeper, Settings, Sweep, Trigger, Witness};
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::plan::{Action, ActionKind};
use ctkeep::reconcile::policy::Policy;
use ctkeep::reconcile::pressure::Defence;
use ctkeep::reconcile::whole::{By, Reading, Whole};
use ctkeep::sockdiag::{Cookie, Socket, State};
use ctkeep::watch::Suspect;
use played::host::{Host, Shared};
use played::{Played, entry, flow, obliging, requests, socket};

const SECOND: Duration = Duration::from_secs(1);
const SWEEP: Duration = SECOND;
const DEEP: Duration = Duration::from_secs(30);
const EPERM: i32 = 1;
const ENOMEM: i32 = 12;

/// The kernel, which fails at will.
struct Faulty {
    kernel: Played,
    is_conntrack: bool,
    /// Dumps of the whole conntrack table fail.
    deep_fails: Rc<Cell<bool>>,
    in_deep: bool,
    /// The request that makes this 1 is refused.
    refuses: Rc<Cell<u32>>,
}

impl Transport for Faulty {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        if let Some(left) = self.refuses.get().checked_sub(1) {
            self.refuses.set(left);
        }
        if self.refuses.get() == 1 {
            self.refuses.set(0);
            return Err(io::Error::from_raw_os_error(ENOMEM));
        }
        self.in_deep = self.is_conntrack && requests(datagram).iter().any(|it| it.is_dump());
        self.kernel.send(datagram)
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        if self.in_deep && self.deep_fails.get() {
            return Err(io::Error::from_raw_os_error(ENOMEM));
        }
        self.kernel.recv(datagram)
    }
}

/// What the keeper did since it was last asked.
#[derive(Debug, Default)]
struct Deeds {
    done: Vec<(ActionKind, u16)>,
    /// Of these, limits were said to have so many on their lists.
    on_lists: usize,
    failed: usize,
    said_full: Vec<Duration>,
}

impl Witness for Deeds {
    fn seen(&mut self, _ports: &HashSet<u16>, _half_closed: Option<&[Socket]>) {}

    fn acted(&mut self, acted: Acted) {
        for outcome in &acted.outcomes {
            self.on_lists += usize::from(outcome.is_in_place);
            match outcome.result {
                Ok(()) => {
                    self.done
                        .push((outcome.action.kind, outcome.action.view.connection.remote.port()));
                }
                Err(_) => self.failed += 1,
            }
        }
        self.said_full.extend(acted.table_full);
    }

    fn planned(&mut self, _actions: &[Action], _trigger: Trigger) {}
}

/// A server with a limit, its peer at 198.51.100.7, and the keeper.
struct World {
    host: Shared,
    keeper: Keeper<Faulty>,
    deep_fails: Rc<Cell<bool>>,
    refuses: Rc<Cell<u32>>,
    now: Instant,
}

impl World {
    /// With connections of these ports of the peer, opened and in agreement.
    fn with(ports: std::ops::Range<u16>) -> Self {
        let mut sockets = vec![socket("0.0.0.0:80", "0.0.0.0:0", State::Listen, 1)];
        sockets.extend(ports.clone().map(|port| {
            let local = of(port);
            let (local, remote) = (local.src.to_string(), local.dst.to_string());
            socket(&local, &remote, State::Established, u64::from(port))
        }));
        let entries = ports.map(|port| entry(of(port), TcpState::Established, 432_000)).collect();
        let deep_fails = Rc::<Cell<bool>>::default();
        let refuses = Rc::<Cell<u32>>::default();
        let (host, tables) =
            Host { sockets, entries, ..Host::default() }.open_by(|kernel, is_conntrack| Faulty {
                kernel,
                is_conntrack,
                deep_fails: deep_fails.clone(),
                in_deep: false,
                refuses: refuses.clone(),
            });
        let settings = Settings {
            policy: Policy::default(),
            sweep_interval: SWEEP,
            deep_interval: DEEP,
            dry_run: false,
        };
        let now = Instant::now();
        let keeper = Keeper::new(tables, None, settings, Defence::Auto, now, || 150).unwrap();
        Self { host, keeper, deep_fails, refuses, now }
    }

    /// The peer half-closes.
    fn fin(&self, port: u16) {
        self.socket(port, State::CloseWait);
        self.set(port, TcpState::CloseWait, 60);
    }

    /// A stale RST of the peer.
    fn rst(&self, port: u16) {
        self.set(port, TcpState::Close, 10);
    }

    /// The socket gets into this state.
    fn socket(&self, port: u16, state: State) {
        let mut host = self.host.borrow_mut();
        host.sockets.iter_mut().find(|it| it.connection().sent() == of(port)).unwrap().state =
            state;
    }

    /// The entry gets into this state.
    fn set(&self, port: u16, state: TcpState, seconds: u64) {
        let mut host = self.host.borrow_mut();
        if let Some(now) = host.entries.iter_mut().find(|it| it.reply == of(port)) {
            *now = Entry { id: now.id, ..entry(of(port), state, seconds) };
        }
    }

    /// `conntrack -F`
    fn flush(&self) {
        self.host.borrow_mut().entries.clear();
    }

    /// The kernel answers so many requests and refuses the next.
    fn refuse_after(&self, whole: u32) {
        self.refuses.set(whole + 2);
    }

    /// The table takes no more entries than it has.
    fn fill_table(&self) {
        let mut host = self.host.borrow_mut();
        host.maximum = Some(host.entries.len());
    }

    /// The socket ends.
    fn close(&self, port: u16) {
        self.host.borrow_mut().sockets.retain(|socket| socket.connection().sent() != of(port));
    }

    /// An event source has seen a packet of this connection.
    fn suspect(&mut self, port: u16) -> Deeds {
        self.suspect_by(port, 0)
    }

    /// The same, where the packet came in by this device.
    fn suspect_by(&mut self, port: u16, interface: u32) -> Deeds {
        let mut deeds = Deeds::default();
        let suspects = suspects_of(port, interface);
        self.keeper.suspects(suspects, self.now, self.now, &mut deeds).unwrap();
        deeds
    }

    fn sweep(&mut self, depth: Depth) -> Deeds {
        let mut deeds = Deeds::default();
        self.keeper.sweep(depth, self.now, &mut deeds).unwrap();
        deeds
    }

    /// Time passes until something is due; what came of it.
    fn turn(&mut self) -> (ctkeep::Result<Option<Sweep>>, Deeds) {
        let due = self.keeper.next_timeout().unwrap();
        self.now = self.now.max(due);
        let mut deeds = Deeds::default();
        (self.keeper.turn(self.now, &mut deeds), deeds)
    }

    /// Turns until `is_so`, for so long at most.
    fn until(&mut self, is_so: impl Fn(&Self) -> bool, most: Duration) -> Deeds {
        let (begun, mut all) = (self.now, Deeds::default());
        while !is_so(self) {
            let (turned, mut deeds) = self.turn();
            turned.unwrap();
            all.done.append(&mut deeds.done);
            assert!(self.now - begun <= most, "not within {most:?}");
        }
        all
    }

    fn state(&self, port: u16) -> Option<TcpState> {
        let host = self.host.borrow();
        host.entries.iter().find(|it| it.reply == of(port)).and_then(Entry::state)
    }
}

/// An event source has seen a packet of this connection, which came in by this device.
fn suspects_of(port: u16, interface: u32) -> HashMap<Connection, Suspect> {
    let connection = Connection::of_sender(of(port));
    let suspect = Suspect {
        connection,
        interface,
        is_translated: false,
        is_spoofed: false,
        is_answered: false,
        has_waited: false,
        destroyed: None,
        at: None,
    };
    [(connection, suspect)].into()
}

/// The connection of a port of the peer, seen from the server.
fn of(port: u16) -> FourTuple {
    flow("192.0.2.1:80", &format!("198.51.100.7:{port}"))
}

mod peace {
    use super::*;

    #[test]
    fn the_first_turn_is_a_deep_sweep_and_then_each_comes_by_its_own_interval() {
        let mut world = World::with(4000..4003);
        let begun = world.now;
        let mut depths = Vec::new();
        while world.now < begun + DEEP + SECOND {
            let (swept, deeds) = world.turn();
            depths.push(swept.unwrap().unwrap().depth);
            assert_eq!(deeds.done, []);
        }
        assert_eq!(depths.first(), Some(&Depth::Deep));
        assert_eq!(depths.iter().filter(|depth| **depth == Depth::Deep).count(), 2);
        // Each a twentieth sooner than its interval, with the random number that is given here.
        assert!((31..=36).contains(&depths.len()), "{depths:?}");
    }

    #[test]
    fn what_a_sweep_took_is_added_to_its_interval_and_bounds_deep_ones() {
        let mut world = World::with(4000..4003);
        let sweep = world.turn().0.unwrap().unwrap();
        let ended = world.now + SECOND * 2;
        world.keeper.took(&sweep, ended, SECOND);
        assert!(world.keeper.next_timeout().unwrap() > ended);
        world.now = ended;
        while world.turn().0.unwrap().unwrap().depth == Depth::Shallow {}
        assert!(world.now >= ended + SECOND * 100, "a hundredth of a core");
    }
}

mod resets {
    use super::*;

    #[test]
    fn of_many_that_close_as_they_should_the_sockets_alone_are_asked_for() {
        let mut world = World::with(4000..4022);
        world.sweep(Depth::Deep);
        [4020, 4021].into_iter().for_each(|port| world.fin(port));
        world.sweep(Depth::Shallow);
        // One whose entry is held ends with the others, and one RST never gets to TCP.
        for port in 4000..4021 {
            world.close(port);
            world.rst(port);
        }
        world.rst(4021);
        let suspects = (4000..4022).flat_map(|port| suspects_of(port, 0)).collect();
        let (mut deeds, before) = (Deeds::default(), world.host.borrow().looks);
        world.keeper.suspects(suspects, world.now, world.now, &mut deeds).unwrap();
        assert_eq!(deeds.done, [(ActionKind::Revive, 4021)]);
        let looks = world.host.borrow().looks - before;
        assert!((22..32).contains(&looks), "{looks} looks at 22 connections");
        assert_eq!(world.keeper.held().count(), 1);
    }

    /// SYNs of others may have thrown them off their list (`insert_tree()`): a source gains its limit by
    /// that once.
    #[test]
    #[allow(clippy::disallowed_methods, reason = "the kernel stamps packets with the time of day")]
    fn of_one_source_no_more_than_its_limit_are_taken_to_be_on_its_list() {
        let mut world = World::with(4000..4008);
        let rules = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN \
            --dport 80 -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n";
        let chains = parse_saved(rules, Family::Ip);
        let limits = Limiter::of(&Ruleset { chains, ..Ruleset::default() }).rules;
        world.keeper.know_all_limits(Some(limits));
        world.keeper.rely_on_syns(Some(Box::new(|asked| Ok(vec![true; asked.len()]))));
        world.sweep(Depth::Deep);
        let mut fool = |ports: std::ops::Range<u16>| {
            ports.clone().for_each(|port| world.fin(port));
            ports.clone().for_each(|port| world.rst(port));
            let at = Some(std::time::SystemTime::now());
            let suspects = ports.clone().flat_map(|port| suspects_of(port, 0));
            let suspects = suspects.map(|(flow, it)| (flow, Suspect { at, ..it })).collect();
            let mut deeds = Deeds::default();
            world.keeper.suspects(suspects, Instant::now(), world.now, &mut deeds).unwrap();
            assert_eq!(deeds.done.len(), ports.len());
            ports.for_each(|port| world.close(port));
            world.sweep(Depth::Shallow);
            deeds.on_lists
        };
        assert_eq!(fool(4000..4001), 1);
        assert_eq!(fool(4001..4008), 3, "the first has ended");
    }

    /// Three whose packets have waited, and one whose packet sent them off.
    fn sent_off(world: &World) -> HashMap<Connection, Suspect> {
        (4000..4004).for_each(|port| world.fin(port));
        (4000..4004).for_each(|port| world.rst(port));
        let suspects = (4000..4004).flat_map(|port| suspects_of(port, 0));
        let urgent = Connection::of_sender(of(4002));
        let seen = |(flow, it)| (flow, Suspect { has_waited: flow != urgent, ..it });
        suspects.map(seen).collect()
    }

    #[test]
    fn what_has_waited_comes_after_what_has_not() {
        let mut world = World::with(4000..4004);
        world.sweep(Depth::Deep);
        let (suspects, mut deeds) = (sent_off(&world), Deeds::default());
        world.keeper.suspects(suspects, world.now, world.now, &mut deeds).unwrap();
        assert_eq!(deeds.done.len(), 4);
        assert_eq!(deeds.done.first(), Some(&(ActionKind::Revive, 4002)));
    }

    #[test]
    fn a_refused_look_at_the_first_leaves_nothing_of_the_others_undone() {
        let mut world = World::with(4000..4004);
        world.sweep(Depth::Deep);
        let (suspects, mut deeds) = (sent_off(&world), Deeds::default());
        world.refuse_after(0);
        world.keeper.suspects(suspects, world.now, world.now, &mut deeds).unwrap_err();
        assert_eq!(deeds.done.len(), 3);
        world.until(|it| it.state(4002) != Some(TcpState::Close), SWEEP * 2);
    }
}

mod zones {
    use super::*;

    #[test]
    fn a_zone_that_a_reload_names_is_looked_into() {
        let mut world = World::with(4000..4003);
        world.sweep(Depth::Deep);
        for entry in &mut world.host.borrow_mut().entries {
            if entry.reply == of(4000) {
                entry.zone = Zone::both(5);
            }
        }
        let settings = world.keeper.settings().clone();
        let policy = Policy { zone: 5, ..settings.policy.clone() };
        world.keeper.apply_settings(Settings { policy, ..settings });
        world.socket(4000, State::CloseWait);
        let deeds = world.sweep(Depth::Shallow);
        assert_eq!((deeds.done, deeds.failed), (vec![], 0));
    }
}

mod entries_of_helpers {
    use super::*;

    /// A data connection of FTP, say: the kernel refuses a change of the bit that says so.
    #[test]
    fn are_repaired_in_place() {
        let mut world = World::with(4000..4003);
        world.sweep(Depth::Deep);
        world.fin(4000);
        world.rst(4000);
        let expected = |world: &World| {
            let mut host = world.host.borrow_mut();
            let entry = host.entries.iter_mut().find(|it| it.reply == of(4000)).unwrap();
            entry.status.as_mut().unwrap().0 |= 1;
        };
        expected(&world);
        let deeds = world.sweep(Depth::Shallow);
        assert_eq!((deeds.done, deeds.failed), (vec![(ActionKind::Revive, 4000)], 0));
        assert_eq!(world.state(4000), Some(TcpState::CloseWait));
    }
}

mod idle_connections {
    use super::*;

    #[test]
    fn are_given_the_kernels_own_timeout_before_it_ends_and_are_not_held() {
        let mut world = World::with(4000..4003);
        let hour = SECOND * 3600;
        world.keeper.idle_timeout = Some(hour);
        let timeout = |world: &World| world.host.borrow().entries[0].timeout;
        let both = |world: &mut World| {
            [Depth::Shallow, Depth::Deep].map(|depth| world.sweep(depth).done).concat()
        };
        world.set(4000, TcpState::Established, 61);
        assert_eq!(both(&mut world), []);
        world.set(4000, TcpState::Established, 59);
        assert_eq!(both(&mut world), [(ActionKind::Extend, 4000)]);
        assert_eq!(timeout(&world), Some(hour));
        assert_eq!(both(&mut world), []);
        assert_eq!(world.keeper.held().count(), 0);
        // Sweeps that come late look further ahead.
        world.now += DEEP * 10;
        world.set(4000, TcpState::Established, 599);
        assert_eq!(both(&mut world), [(ActionKind::Extend, 4000)]);
        // What the administrator gives is not enough from sweep to sweep.
        world.keeper.idle_timeout = Some(SECOND * 20);
        world.now += DEEP;
        world.set(4000, TcpState::Established, 20);
        assert_eq!(both(&mut world), [(ActionKind::Extend, 4000)]);
        assert_eq!(timeout(&world), Some(DEEP * 4));
    }

    #[test]
    fn are_looked_at_before_a_kernel_that_forgets_within_a_second_does() {
        let mut world = World::with(4000..4003);
        let is_extended = |world: &World| world.host.borrow().entries[0].timeout > Some(SECOND);
        world.keeper.idle_timeout = Some(SECOND);
        world.keeper.forgets.open = Some(SECOND);
        world.sweep(Depth::Deep);
        for _ in 0..3 {
            // A packet gives it the kernel's own, whatever it had.
            world.set(4000, TcpState::Established, 1);
            world.until(is_extended, SECOND / 2);
        }
    }

    #[test]
    fn and_half_closed_ones_too() {
        let mut world = World::with(4000..4003);
        let is_extended = |world: &World| world.host.borrow().entries[0].timeout > Some(SECOND);
        world.keeper.rely_on_events(Duration::MAX);
        world.keeper.forgets.half_closed = Some(SECOND);
        world.sweep(Depth::Deep);
        world.fin(4000);
        world.sweep(Depth::Shallow);
        for _ in 0..3 {
            world.set(4000, TcpState::CloseWait, 1);
            world.until(is_extended, SECOND / 2);
        }
    }
}

mod flow_tables {
    use super::*;

    /// ctnetlink tells neither state nor timeout of what a flow table has.
    #[test]
    fn an_entry_without_a_state_is_alive() {
        let mut world = World::with(4000..4003);
        for entry in &mut world.host.borrow_mut().entries {
            (entry.tcp, entry.timeout) = (None, None);
        }
        for depth in [Depth::Deep, Depth::Shallow] {
            let deeds = world.sweep(depth);
            assert_eq!((deeds.done, deeds.failed), (vec![], 0));
        }
        world.socket(4000, State::CloseWait);
        assert_eq!(world.sweep(Depth::Shallow).done, []);
    }
}

mod packets {
    use super::*;

    #[test]
    fn a_stale_rst_is_repaired_at_its_event_and_looked_at_again() {
        let mut world = World::with(4000..4003);
        world.sweep(Depth::Deep);
        world.fin(4000);
        world.rst(4000);
        assert_eq!(world.suspect(4000).done, [(ActionKind::Revive, 4000)]);
        assert_eq!(world.state(4000), Some(TcpState::CloseWait));
        // TCP takes an exact one a moment later.
        world.close(4000);
        let (swept, deeds) = world.turn();
        assert!(swept.unwrap().is_none(), "a second look, no sweep");
        assert_eq!(deeds.done, [(ActionKind::Release, 4000)]);
    }

    #[test]
    fn what_seems_to_have_fooled_an_open_connection_is_given_a_moment() {
        let mut world = World::with(4000..4003);
        world.sweep(Depth::Deep);
        world.rst(4000);
        world.rst(4001);
        assert_eq!(world.suspect(4000).done, []);
        assert_eq!(world.suspect(4001).done, []);
        // An ordinary RST: TCP has seen it by now.
        world.close(4000);
        assert_eq!(world.turn().1.done, [(ActionKind::Revive, 4001)]);
    }
}

mod bound_to_a_device {
    use super::*;

    const ETH0: u32 = 7;
    const ETH1: u32 = 8;

    /// The connection of port 4000, by a listener that is bound to a device.
    fn bound() -> World {
        let world = World::with(4000..4003);
        for socket in &mut world.host.borrow_mut().sockets {
            if socket.connection().sent() == of(4000) {
                socket.interface = ETH0;
            }
        }
        world
    }

    /// What another instance, or a former life, holds.
    fn make_ours(world: &World, port: u16) {
        let mut host = world.host.borrow_mut();
        let entry = host.entries.iter_mut().find(|it| it.reply == of(port)).unwrap();
        entry.tcp.as_mut().unwrap().flags = [0x88, 0x88];
        assert!(entry.is_ours());
    }

    #[test]
    fn its_first_event_finds_it_by_the_device_of_the_packet() {
        let mut world = bound();
        world.fin(4000);
        world.rst(4000);
        assert_eq!(world.suspect_by(4000, ETH0).done, [(ActionKind::Revive, 4000)]);
    }

    #[test]
    fn packets_by_another_device_and_events_without_one_find_what_a_dump_has_shown() {
        for device in [0, ETH1] {
            let mut world = bound();
            world.sweep(Depth::Deep);
            world.fin(4000);
            world.rst(4000);
            assert_eq!(world.suspect_by(4000, device).done, [(ActionKind::Revive, 4000)]);
            // Held, it is known for good.
            world.rst(4000);
            assert_eq!(world.suspect_by(4000, ETH1).done, [(ActionKind::Revive, 4000)]);
        }
    }

    #[test]
    fn what_is_not_held_is_never_given_back_for_a_guess() {
        let mut world = bound();
        make_ours(&world, 4000);
        for device in [0, ETH1, ETH0] {
            assert_eq!(world.suspect_by(4000, device).done, [], "{device}");
        }
        // Without a socket it is the deep sweep that gives it back.
        make_ours(&world, 4001);
        world.close(4001);
        assert_eq!(world.suspect(4001).done, []);
        assert_eq!(world.sweep(Depth::Deep).done, [(ActionKind::Release, 4001)]);
    }
}

mod a_failing_kernel {
    use super::*;

    /// Whichever request of its look is refused: no sweep but a deep one looks at such a connection.
    #[test]
    fn an_open_connection_whose_event_could_not_be_followed_is_looked_at_again_soon() {
        for whole in 0..12 {
            let mut world = World::with(4000..4003);
            world.turn().0.unwrap();
            world.rst(4001);
            let begun = world.now;
            world.refuse_after(whole);
            let mut deeds = Deeds::default();
            let _ = world.keeper.suspects(suspects_of(4001, 0), world.now, world.now, &mut deeds);
            while world.now < begun + SWEEP * 3 {
                let (_, _) = world.turn();
            }
            assert_eq!(world.state(4001), Some(TcpState::Established), "refused after {whole}");
        }
    }

    #[test]
    fn a_deep_sweep_that_fails_comes_back_ever_later_and_keeps_no_shallow_one_out() {
        let mut world = World::with(4000..4003);
        world.sweep(Depth::Deep);
        world.deep_fails.set(true);
        let begun = world.now;
        let (mut failed, mut shallow) = (0, 0);
        while world.now < begun + DEEP * 4 {
            match world.turn().0 {
                Ok(swept) => {
                    assert_eq!(swept.unwrap().depth, Depth::Shallow);
                    shallow += 1;
                }
                Err(_) => failed += 1,
            }
        }
        assert!((4..=12).contains(&failed), "{failed} failed deep sweeps in two minutes");
        assert!(shallow > 110, "{shallow} shallow sweeps in two minutes");
        world.deep_fails.set(false);
        world.flush();
        while world.turn().0.unwrap().unwrap().depth == Depth::Shallow {}
        assert_eq!(world.state(4000), Some(TcpState::Established));
    }
}

mod a_question_to_a_limit {
    use super::*;

    #[test]
    fn waits_for_what_the_last_one_has_cost_whatever_is_shown_meanwhile() {
        let mut world = World::with(4000..4003);
        world.keeper.no_questions_before(world.now + SECOND * 10);
        world.keeper.doubt_limits(world.now).unwrap();
        assert!(!world.keeper.check_is_due(world.now + SECOND * 9));
        assert!(world.keeper.check_is_due(world.now + SECOND * 10));
    }

    #[test]
    fn waits_until_all_is_shown_that_a_limit_lacks() {
        let mut world = World::with(4000..4600);
        world.sweep(Depth::Deep);
        world.keeper.doubt_limits(world.now).unwrap();
        world.keeper.limits_lost(vec![limit()], world.now, world.now);
        let mut parts = 0;
        while world.keeper.recount_is_due(world.now) {
            world.now += SECOND * 10;
            assert!(!world.keeper.check_is_due(world.now), "after {parts} parts");
            world.keeper.recount(world.now, &mut Deeds::default()).unwrap();
            parts += 1;
        }
        assert!(parts > 1, "all of them in one part");
        assert!(world.keeper.check_is_due(world.now));
    }

    /// A limit with a new list.
    fn limit() -> Anew {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 80 --syn -m connlimit \
                    --connlimit-above 3 --connlimit-mask 32 --connlimit-saddr -j DROP\nCOMMIT\n";
        let chains = parse_saved(text, Family::Ip);
        let mut rules = Limiter::of(&Ruleset { chains, ..Ruleset::default() }).rules;
        Anew { rule: rules.pop().unwrap(), loss: Loss::New }
    }
}

mod a_full_table {
    use super::*;

    #[test]
    fn inserts_rest_once_for_a_batch_and_longer_each_time() {
        let mut world = World::with(4000..4010);
        world.sweep(Depth::Deep);
        world.flush();
        world.fill_table();
        let deeds = world.sweep(Depth::Deep);
        assert_eq!((deeds.failed, deeds.said_full), (10, vec![SECOND]));
        let deeds = world.sweep(Depth::Deep);
        assert_eq!(deeds.failed, 0, "they rest");
        world.now += SECOND;
        assert_eq!(world.sweep(Depth::Deep).failed, 10, "after a second they are tried again");
        world.now += SECOND;
        assert_eq!(world.sweep(Depth::Deep).failed, 0, "and rest for two");
        world.host.borrow_mut().maximum = None;
        world.now += SECOND;
        assert_eq!(world.sweep(Depth::Deep).done.len(), 10);
    }

    #[test]
    fn a_repair_that_failed_is_no_offence_of_its_source() {
        let mut world = World::with(4000..4010);
        world.sweep(Depth::Deep);
        world.flush();
        world.fill_table();
        world.sweep(Depth::Deep);
        let source = of(4000).dst.addr();
        assert!(!world.keeper.ledger().pressure().offends(source, 0));
    }
}
