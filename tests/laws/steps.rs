//! What happens in a history, and how one is drawn.

#![allow(unreachable_pub)]

use proptest::prelude::*;
use proptest::sample::select;

use crate::dialled::Harm;
use crate::world::{Events, SOURCES};

#[derive(Clone, Copy, Debug)]
pub enum Trick {
    Fin,
    FinRst,
    FinTwice,
    HoleRst,
    HoleTwice,
    Ahead,
    SynRst,
}

#[derive(Clone, Debug)]
pub enum Step {
    Burst {
        source: u8,
        trick: Trick,
        first: usize,
        many: usize,
        syns: usize,
    },
    Close {
        source: u8,
        nth: usize,
    },
    Evict {
        source: u8,
        nth: usize,
    },
    ServerSends {
        source: u8,
        nth: usize,
    },
    ExactRst {
        source: u8,
        nth: usize,
    },
    Reuse {
        source: u8,
        nth: usize,
    },
    Flood(u16),
    Wait(u64),
    Sweep {
        deep: bool,
    },
    Events(Events),
    LoseParts(Option<usize>),
    Interrupt,
    Crash,
    /// After so many calls of the kernel so many fail.
    Fail {
        calls: u32,
        times: u32,
    },
    /// The machine has slept, or ctkeep had no processor.
    Jump(u64),
    /// Another instance comes, or goes.
    Second,
    /// The server's namespace is not seen for a while, or found again.
    Namespace,
    /// Of the connections that were opened from here.
    Dialled {
        nth: u16,
        harm: Harm,
    },
}

pub fn any_source() -> impl Strategy<Value = u8> {
    select(SOURCES.to_vec())
}

pub fn any_burst() -> impl Strategy<Value = Step> {
    use Trick::*;
    let tricks = vec![Fin, FinRst, FinTwice, HoleRst, HoleTwice, Ahead, SynRst];
    (any_source(), select(tricks), 0..8_usize, 0..12_usize, 0..8_usize).prop_map(
        |(source, trick, first, many, syns)| Step::Burst { source, trick, first, many, syns },
    )
}

pub fn any_step() -> impl Strategy<Value = Step> {
    let one = || (any_source(), 0..8_usize);
    prop_oneof![
        6 => any_burst(),
        2 => one().prop_map(|(source, nth)| Step::Close { source, nth }),
        2 => one().prop_map(|(source, nth)| Step::Evict { source, nth }),
        2 => one().prop_map(|(source, nth)| Step::ServerSends { source, nth }),
        1 => one().prop_map(|(source, nth)| Step::ExactRst { source, nth }),
        1 => one().prop_map(|(source, nth)| Step::Reuse { source, nth }),
        1 => (1..40_u16).prop_map(Step::Flood),
        3 => (1..90_u64).prop_map(Step::Wait),
        2 => any::<bool>().prop_map(|deep| Step::Sweep { deep }),
        1 => any::<bool>().prop_map(|lost| {
            Step::Events(if lost { Events::Lost } else { Events::Prompt })
        }),
        1 => proptest::option::of(2..5_usize).prop_map(Step::LoseParts),
        1 => Just(Step::Interrupt),
        1 => Just(Step::Crash),
    ]
}

/// All of it, and what fails around it.
pub fn any_faulty_step() -> impl Strategy<Value = Step> {
    let events = vec![Events::Prompt, Events::Lost, Events::Doubled, Events::Late];
    prop_oneof![
        10 => any_step(),
        4 => (0..60_u32, 1..12_u32).prop_map(|(calls, times)| Step::Fail { calls, times }),
        1 => select(events).prop_map(Step::Events),
        1 => (1..200_u64).prop_map(Step::Jump),
        1 => Just(Step::Second),
    ]
}

pub fn any_harm() -> impl Strategy<Value = Step> {
    use Harm::*;
    let close = any::<bool>().prop_map(|is_seen| Close { is_seen });
    let harms = vec![FinAgain, StaleRst, Packet, Evict, GiveAway, Free];
    (0..4_u16, prop_oneof![9 => select(harms), 1 => close])
        .prop_map(|(nth, harm)| Step::Dialled { nth, harm })
}

pub fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(any_step(), 1..24)
}
