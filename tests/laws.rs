//! Laws that hold whatever happens, in whatever order: ctkeep's own observation, plan, confirmation
//! and repair, against a model of a kernel with a limiter and of peers that mean harm.
//!
//! `PROPTEST_CASES=10000 cargo test --release --test laws` for a long run.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

#[path = "laws/dialled.rs"]
mod dialled;
#[path = "laws/model.rs"]
mod model;
mod played;
#[path = "laws/steps.rs"]
mod steps;
#[path = "laws/world.rs"]
mod world;

use ctkeep::conntrack::TcpState;
use ctkeep::reconcile::policy::Policy;
use ctkeep::sockdiag::State;
use proptest::prelude::*;
use steps::{Step, Trick, any_burst, any_faulty_step, any_harm, any_step, any_steps};
use world::{LIMIT, SOURCES, World};

/// The model itself: what the stock kernel lets happen, the laws are about.
#[test]
fn without_ctkeep_every_trick_breaks_the_bound() {
    use Trick::*;
    for trick in [FinRst, FinTwice, HoleRst, HoleTwice, Ahead, SynRst] {
        let mut world = World::new(LIMIT, None, false);
        for _ in 0..6 {
            for flow in world.flows(1) {
                world.trick(flow, trick);
            }
            world.open(1, LIMIT);
        }
        let held = world.model.held_by(1);
        assert!(held > 3 * LIMIT, "{trick:?}: {held} sockets");
        assert!(!world.disagreements().is_empty(), "{trick:?}");
    }
}

/// Without what keeps them each of the connections that were opened from here loses its entry.
#[test]
fn without_ctkeep_what_was_dialled_is_lost_in_a_minute() {
    let mut world = World::with_dialled(None);
    world.model.pass(70);
    assert_eq!(world.disagreements().len(), 4, "{:?}", world.disagreements());
}

/// Plays a history and its quiet end.
fn agree_after(steps: &[Step], maximum: Option<usize>) {
    agree(World::new(LIMIT, maximum, false), steps);
}

fn agree(mut world: World, steps: &[Step]) {
    steps.iter().for_each(|step| world.play(step));
    world.assert_bystanders_untouched();
    world.rest();
    assert_eq!(world.disagreements(), Vec::<String>::new());
    if world.is_full() {
        // What has no room is tried again.
        return;
    }
    let changes = world.model.host.borrow().changes;
    world.sweep(true);
    world.sweep(false);
    assert_eq!(world.model.host.borrow().changes, changes, "a second look");
}

/// Histories that random ones have found, each a defect once.
mod found {
    use super::*;

    fn burst(source: u8, trick: Trick, first: usize, many: usize, syns: usize) -> Step {
        Step::Burst { source, trick, first, many, syns }
    }

    /// The entry was back, and its connection shown to no limit.
    #[test]
    fn a_call_that_fails_between_a_revive_and_its_nudge() {
        let steps = [
            burst(2, Trick::Fin, 6, 1, 5),
            Step::Fail { calls: 34, times: 5 },
            burst(2, Trick::Ahead, 3, 7, 1),
            Step::Fail { calls: 0, times: 7 },
            Step::Sweep { deep: true },
            burst(1, Trick::FinRst, 7, 11, 5),
            burst(2, Trick::SynRst, 1, 8, 6),
        ];
        agree_after(&steps, None);
    }

    /// What the next start finds looked well.
    #[test]
    fn an_instance_is_killed_at_any_call_of_its_repairs() {
        for calls in 0..80 {
            let steps = [
                burst(2, Trick::Fin, 0, 0, 5),
                Step::Fail { calls, times: 1000 },
                burst(2, Trick::Ahead, 0, 3, 1),
                burst(2, Trick::FinRst, 3, 2, 1),
                Step::Crash,
            ];
            agree_after(&steps, None);
        }
    }

    /// Meanwhile leases have run out, and others have taken the places: 26 connections, 24 entries.
    #[test]
    fn a_minute_without_a_processor_and_a_table_without_room() {
        let steps = [
            burst(2, Trick::Fin, 0, 0, 5),
            burst(2, Trick::FinRst, 0, 4, 4),
            burst(1, Trick::Fin, 0, 0, 5),
            burst(1, Trick::FinRst, 0, 5, 5),
            Step::Jump(60),
            burst(1, Trick::FinRst, 4, 5, 4),
        ];
        agree_after(&steps, Some(24));
    }

    #[test]
    fn a_second_instance_meets_what_the_first_has_left() {
        let steps = [
            Step::Flood(4),
            burst(1, Trick::Fin, 0, 0, 5),
            Step::Second,
            Step::Evict { source: 1, nth: 7 },
            Step::Jump(60),
            Step::Reuse { source: 1, nth: 3 },
            Step::LoseParts(Some(3)),
            Step::Second,
            Step::Sweep { deep: true },
            Step::Fail { calls: 14, times: 1 },
            Step::Sweep { deep: false },
            Step::Second,
        ];
        agree_after(&steps, None);
    }

    /// The socket of a repair that was broken off has ended, and another one has its tuple: it was
    /// repaired twice at once, and the second time failed.
    #[test]
    fn the_tuple_of_a_repair_that_was_broken_off_is_used_again() {
        let steps = [
            burst(1, Trick::Fin, 0, 0, 4),
            Step::Fail { calls: 0, times: 1 },
            burst(1, Trick::FinRst, 0, 2, 0),
            Step::Fail { calls: 48, times: 3 },
            Step::Sweep { deep: true },
            Step::Reuse { source: 1, nth: 4 },
            Step::Evict { source: 1, nth: 3 },
        ];
        agree_after(&steps, None);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").map_or(60, |cases| cases.parse().unwrap())
    ))]

    /// Whatever happened: when it is over, and after one look at everything, the tables agree, every
    /// open connection is counted, and a second look finds nothing to do. On the way no connection
    /// was touched that is not guarded ([`Watched::assert_guarded`]).
    #[test]
    fn after_quiet_the_tables_agree(
        steps in any_steps(),
        maximum in proptest::option::of(24..60_usize),
    ) {
        agree_after(&steps, maximum);
    }

    /// The same, where any call fails at any time, events are lost, doubled and late, the clock jumps
    /// and two instances work on one table.
    #[test]
    fn after_faults_and_quiet_the_tables_agree(
        steps in proptest::collection::vec(any_faulty_step(), 1..32),
        maximum in proptest::option::of(24..60_usize),
    ) {
        agree_after(&steps, maximum);
    }

    /// The same, where the server is in a container that comes and goes as ctkeep sees it.
    #[test]
    fn after_namespaces_came_and_went_the_tables_agree(
        steps in proptest::collection::vec(prop_oneof![
            6 => any_faulty_step(),
            1 => Just(Step::Namespace),
        ], 1..32),
    ) {
        agree(World::with_a_container(), &steps);
    }

    /// The same beside connections that a container has opened: each of those that is open has its entry,
    /// with its translation, or another one has its port; one that has ended has none. Neither direction
    /// touches an entry of the other ([`Dialled::turn`], [`Watched::assert_guarded`]).
    #[test]
    fn after_quiet_both_directions_agree(
        steps in proptest::collection::vec(prop_oneof![
            1 => any_step(),
            1 => any_harm(),
            1 => (1..90_u64).prop_map(Step::Wait),
        ], 1..48),
        maximum in proptest::option::of(24..60_usize),
    ) {
        agree(World::with_dialled(maximum), &steps);
    }

    /// What ctkeep has put into the table goes with it: but for open connections that conntrack has
    /// seen the packets of, nothing that counts outlives a lease.
    #[test]
    fn without_ctkeep_a_held_entry_expires_within_a_lease(steps in any_steps()) {
        let mut world = World::new(LIMIT, None, false);
        steps.iter().for_each(|step| world.play(step));
        world.line.loses.set(None);
        world.sweep(true);
        world.model.pass(Policy::default().lease.as_secs());
        let entries = world.model.host.borrow().entries.clone();
        for entry in entries.iter().filter(|entry| entry.is_ours()) {
            let state = world.model.socket(entry.reply).map(|socket| socket.state);
            let is_closing = entry.state().is_some_and(TcpState::is_closing);
            prop_assert!(is_closing || state == Some(State::Established), "{entry:?}, {state:?}");
        }
    }

    /// In whatever order the kernel lists its tables.
    #[test]
    fn the_order_of_a_dump_changes_nothing(steps in any_steps()) {
        let run = |reversed| {
            let mut world = World::new(LIMIT, None, reversed);
            // A part that is lost is another one in another order.
            let sound = steps.iter().filter(|step| !matches!(step, Step::LoseParts(_)));
            sound.for_each(|step| world.play(step));
            world.rest();
            world.tables()
        };
        prop_assert_eq!(run(false), run(true));
    }

    /// docs/attack.md: bursts that are further apart than ctkeep's reaction gain one limit, and two
    /// connections that are fooled again before their source is known.
    #[test]
    fn a_source_holds_at_most_twice_the_limit(
        bursts in proptest::collection::vec(prop_oneof![
            6 => any_burst(),
            1 => (1..90_u64).prop_map(Step::Wait),
            1 => any::<bool>().prop_map(|deep| Step::Sweep { deep }),
        ], 1..40),
        limit in 3..12_usize,
    ) {
        let mut world = World::new(limit, None, false);
        for step in &bursts {
            world.play(step);
            for source in SOURCES {
                let held = world.model.held_by(source);
                prop_assert!(held <= 2 * limit + 2, "{held} sockets, limit {limit}");
            }
        }
    }
}
