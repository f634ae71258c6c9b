//! The event source names what packets do, so that not everything is looked at by the clock.

use super::*;

const HELD: std::ops::Range<u16> = 4000..4600;
const HALF_A_LEASE: Duration = Duration::from_secs(30);

/// Half-closed connections, all of them held.
fn held() -> World {
    let mut world = World::with(HELD);
    world.keeper.rely_on_events(Duration::MAX);
    world.sweep(Depth::Deep);
    for port in HELD {
        world.fin(port);
        world.set(port, TcpState::CloseWait, 20);
    }
    world.until(|world| world.keeper.held().count() == HELD.len(), SECOND * 2);
    world
}

impl World {
    /// So much time passes; how many entries and sockets were asked for one by one.
    fn pass(&mut self, time: Duration) -> usize {
        let (begun, before) = (self.now, self.host.borrow().looks);
        while self.keeper.next_timeout().is_some_and(|due| due <= begun + time) {
            self.turn().0.unwrap();
        }
        self.now = begun + time;
        self.host.borrow().looks - before
    }
}

#[test]
fn what_is_held_is_looked_at_when_its_lease_wants_it_and_by_samples() {
    let mut world = held();
    let looks = world.pass(SECOND * 10);
    assert!(looks <= 2 * 32 * 11, "{looks} looks at two tables in ten seconds of peace");
    let changes = world.host.borrow().changes;
    for entry in &mut world.host.borrow_mut().entries {
        entry.timeout = Some(HALF_A_LEASE - SECOND);
    }
    world.pass(HALF_A_LEASE - SECOND * 10 + SECOND * 3);
    let extended = world.host.borrow().changes - changes;
    assert_eq!(extended, HELD.len(), "each once, before half of its lease is over");
    let seconds = |entry: &Entry| entry.timeout.unwrap().as_secs();
    assert!(world.host.borrow().entries.iter().all(|entry| seconds(entry) == 60));
}

#[test]
fn a_flush_is_noticed_by_the_next_sweep_and_all_are_put_back() {
    let mut world = held();
    world.pass(SECOND * 5);
    world.flush();
    let all = |world: &World| world.host.borrow().entries.len() == HELD.len();
    let deeds = world.until(all, SECOND);
    assert!(deeds.done.iter().all(|(kind, _)| *kind == ActionKind::Reinsert), "{deeds:?}");
}

#[test]
fn a_single_entry_that_somebody_deletes_is_put_back_within_half_a_lease() {
    let mut world = held();
    for port in [4000, 4300, 4599] {
        world.pass(SECOND * 5);
        world.host.borrow_mut().entries.retain(|entry| entry.reply != of(port));
        let back = move |world: &World| world.state(port).is_some();
        world.until(back, HALF_A_LEASE + SECOND * 2);
    }
}

#[test]
fn it_is_put_back_by_the_next_sweep_where_its_source_opens_a_connection() {
    let mut world = held();
    world.pass(SECOND * 5);
    world.host.borrow_mut().entries.retain(|entry| entry.reply != of(4599));
    world.keeper.opening([of(4599).dst.addr()]);
    world.until(|world| world.state(4599).is_some(), SECOND);
}

#[test]
fn the_end_of_a_socket_is_noticed_by_the_next_sweep() {
    let mut world = held();
    world.pass(SECOND * 5);
    world.close(4100);
    let is_released = |world: &World| world.state(4100) == Some(TcpState::Close);
    world.until(is_released, SECOND);
    assert_eq!(world.keeper.held().count(), HELD.len() - 1);
}

#[test]
fn an_end_that_is_told_is_looked_at_at_once_and_acted_upon_only_where_it_is_true() {
    let mut world = held();
    world.keeper.rely_on_ends(true);
    world.close(4100);
    let (mut deeds, now) = (Deeds::default(), world.now);
    let told = [4100, 4101, 9999].map(Cookie);
    world.keeper.ended(&told, now, &mut deeds).unwrap();
    assert_eq!(deeds.done, [(ActionKind::Release, 4100)]);
    assert_eq!(world.state(4101), Some(TcpState::CloseWait));
}

#[test]
fn half_closed_sockets_are_asked_for_where_one_has_closed_and_else_every_ten_sweeps() {
    let mut world = held();
    let dumps = |world: &mut World, time| {
        let before = world.host.borrow().half_closed;
        world.pass(time);
        world.host.borrow().half_closed - before
    };
    assert!(dumps(&mut world, SECOND * 9) >= 9, "ends are not told");
    world.keeper.rely_on_ends(true);
    assert!(dumps(&mut world, SECOND * 10) <= 1);
    world.keeper.closing();
    assert_eq!(dumps(&mut world, SECOND * 4), 2);
    world.keeper.rely_on_events(SECOND * 5);
    assert!(dumps(&mut world, SECOND * 4) >= 4, "by the clock without the packet log");
}

#[test]
fn questions_for_half_closed_sockets_take_a_hundredth_of_a_core() {
    let mut world = held();
    world.keeper.rely_on_ends(true);
    let before = world.host.borrow().half_closed;
    let begun = world.now;
    while world.now < begun + SECOND * 60 {
        // Something closes all the time.
        world.keeper.closing();
        if let Some(sweep) = world.turn().0.unwrap() {
            world.now += SECOND / 25;
            world.keeper.took(&sweep, world.now, SECOND / 25);
        }
    }
    let dumps = world.host.borrow().half_closed - before;
    assert!((12..=16).contains(&dumps), "{dumps} questions of 40 ms in a minute");
}

#[test]
fn a_socket_that_changes_its_state_is_looked_at() {
    let mut world = held();
    world.pass(SECOND * 5);
    world.socket(4100, State::LastAck);
    world.set(4100, TcpState::LastAck, 5);
    let has_time = |world: &World| {
        let host = world.host.borrow();
        let entry = host.entries.iter().find(|it| it.reply == of(4100)).unwrap();
        entry.timeout.unwrap() == SECOND * 60
    };
    world.until(has_time, SECOND);
}

/// Behind a hole, say: it has closed the entry, and the socket is open.
#[test]
fn a_connection_whose_fin_tcp_has_not_taken_is_looked_at_by_the_next_sweep() {
    let mut world = World::with(4000..4003);
    world.keeper.rely_on_events(Duration::MAX);
    world.sweep(Depth::Deep);
    world.set(4000, TcpState::CloseWait, 8);
    let is_extended = |world: &World| world.host.borrow().entries[0].timeout > Some(SECOND * 8);
    world.pass(SECOND * 3);
    assert!(!is_extended(&world), "the control");
    world.keeper.have_begun_to_close(suspects_of(4000, 0).into_values());
    world.until(is_extended, SECOND);
}

#[test]
fn lost_events_are_made_up_for_by_a_look_at_all() {
    let mut world = held();
    world.pass(SECOND * 5);
    world.rst(4200);
    world.keeper.events_lost(world.now);
    world.until(|world| world.state(4200) == Some(TcpState::CloseWait), SECOND);
    let before = world.host.borrow().looks;
    world.pass(SECOND);
    let looks = world.host.borrow().looks - before;
    assert!(looks >= 2 * HELD.len(), "{looks}");
}

#[test]
fn without_events_each_sweep_looks_at_all() {
    let mut world = held();
    world.keeper.rely_on_events(Duration::ZERO);
    world.keeper.suspect_all();
    world.pass(SECOND);
    for port in [4000, 4599] {
        world.rst(port);
        let is_revived = move |world: &World| world.state(port) == Some(TcpState::CloseWait);
        world.until(is_revived, SECOND);
    }
}
