//! Others read the tables of deep sweeps, and what they have read is worked through part by part.

use super::*;

const MANY: std::ops::Range<u16> = 4000..5000;

/// The daemon's keeper, and what reads for it.
fn world() -> (World, Tables<Played>) {
    let mut world = World::with(MANY);
    world.keeper.rely_on_events(Duration::MAX);
    world.sweep(Depth::Deep);
    world.keeper.read_beside();
    let reader = Host::tables(&world.host, |played, _| played);
    (world, reader)
}

impl World {
    /// Time passes until tables are to be read.
    fn reading(&mut self) -> Reading {
        let begun = self.now;
        loop {
            self.turn().0.unwrap();
            if let Some(reading) = self.keeper.reading() {
                return reading;
            }
            assert!(self.now < begun + SECOND * 1000);
        }
    }

    /// Works on until the deep sweep ends; how many turns that took.
    fn end_deep(&mut self) -> usize {
        for turns in 1.. {
            let swept = self.turn().0.unwrap();
            if swept.is_some_and(|sweep| sweep.depth == Depth::Deep && sweep.is_beside) {
                return turns;
            }
        }
        0
    }

    fn has_read(&mut self, whole: ctkeep::Result<Whole>) -> ctkeep::Result<()> {
        let mut deeds = Deeds::default();
        self.keeper.has_read(whole, self.now, &mut deeds)
    }
}

#[test]
fn events_and_shallow_sweeps_come_while_tables_are_read_and_between_parts() {
    let (mut world, mut reader) = world();
    let reading = world.reading();
    let begun = world.now;
    for port in 4000..4010 {
        world.fin(port);
        world.rst(port);
        assert_eq!(world.suspect(port).done, [(ActionKind::Revive, port)]);
        let (swept, _) = world.turn();
        assert!(swept.unwrap().is_none_or(|sweep| sweep.depth == Depth::Shallow));
    }
    world.until(|world| world.now >= begun + SECOND * 4, SECOND * 5);
    let whole = reader.read(reading);
    world.has_read(whole).unwrap();
    let mut between = 0;
    for port in 4010..4020 {
        world.fin(port);
        world.rst(port);
        assert_eq!(world.suspect(port).done, [(ActionKind::Revive, port)]);
        world.turn().0.unwrap();
        between += usize::from(world.keeper.is_sweeping_deep());
    }
    assert!(between > 3, "a thousand connections are worked through in {between} parts");
}

#[test]
fn what_was_read_is_repaired_by_exact_looks_alone() {
    let (mut world, mut reader) = world();
    world.rst(4500);
    world.rst(4501);
    let reading = world.reading();
    let whole = reader.read(reading);
    // It ends meanwhile, and its entry is right.
    world.close(4501);
    world.has_read(whole).unwrap();
    assert!(world.end_deep() >= MANY.len() / 256);
    let states = [4500, 4501].map(|port| world.state(port));
    assert_eq!(states, [Some(TcpState::Established), Some(TcpState::Close)]);
}

#[test]
fn what_half_closes_while_tables_are_read_stays_watched() {
    let (mut world, mut reader) = world();
    let reading = world.reading();
    let whole = reader.read(reading);
    let new = of(5000);
    world.host.borrow_mut().sockets.push(socket(
        &new.src.to_string(),
        &new.dst.to_string(),
        State::CloseWait,
        5000,
    ));
    world.host.borrow_mut().entries.push(entry(new, TcpState::CloseWait, 20));
    world.keeper.closing();
    world.until(|world| world.keeper.held().count() == 1, SECOND * 2);
    world.fin(4000);
    world.set(4000, TcpState::CloseWait, 3600);
    world.keeper.closing();
    world.until(|world| world.keeper.ledger().watched() == 2, SECOND * 2);
    world.has_read(whole).unwrap();
    world.end_deep();
    assert_eq!(world.keeper.ledger().watched(), 2);
}

#[test]
fn a_reason_for_another_sweep_that_comes_up_meanwhile_is_not_forgotten() {
    let (mut world, mut reader) = world();
    let reading = world.reading();
    world.keeper.events_lost(world.now);
    assert!(world.keeper.reading().is_none(), "one at a time");
    let whole = reader.read(reading);
    world.has_read(whole).unwrap();
    let ended = loop {
        if let Some(sweep) = world.turn().0.unwrap().filter(|sweep| sweep.is_beside) {
            break sweep;
        }
    };
    world.keeper.took(&ended, world.now, SECOND / 10);
    let begun = world.now;
    world.reading();
    assert!(world.now <= begun + SECOND, "a tenth of a core");
}

#[test]
fn where_dumps_are_dear_sockets_are_looked_up_between_them() {
    let (mut world, mut reader) = world();
    world.set(4700, TcpState::Close, 10);
    let begun = world.now;
    let (mut dumps, mut looks) = (0, Vec::new());
    while world.now < begun + SECOND * 2000 {
        let reading = world.reading();
        let is_dump = reading.by == By::Dump;
        let whole = reader.read(reading);
        world.has_read(whole).unwrap();
        let ended = loop {
            if let Some(sweep) = world.turn().0.unwrap().filter(|sweep| sweep.is_beside) {
                break sweep;
            }
        };
        assert_eq!(world.state(4700), Some(TcpState::Established));
        // Two million entries, and two hundred thousand sockets.
        let cost = if is_dump { SECOND * 4 } else { SECOND };
        world.now += cost;
        world.keeper.took(&ended, world.now, cost);
        dumps += usize::from(is_dump);
        looks.push(world.now);
    }
    assert_eq!(dumps, 3, "one in eight hundred seconds");
    let longest = looks.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(longest <= SECOND * 300, "{longest:?}");
    // With the dumps a hundredth of a core in the end.
    assert!(looks.len() - dumps <= 11, "{looks:?}");
}

#[test]
fn a_reading_that_fails_comes_back_later() {
    let (mut world, mut reader) = world();
    let reading = world.reading();
    let failed = Conntrack::new(obliging(|_| Err(EPERM))).size().unwrap_err();
    assert!(world.has_read(Err(failed)).is_err());
    let begun = world.now;
    drop(reading);
    let reading = world.reading();
    assert!((SECOND..SECOND * 2).contains(&(world.now - begun)));
    let whole = reader.read(reading);
    world.has_read(whole).unwrap();
    world.end_deep();
}
