//! What ctkeep costs ordinary clients: connections a second with it and without it.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::time::Duration;

use report::Target;
use traffic::{Arm, Ending};

const ROUNDS: usize = 80;
const TIME: Duration = Duration::from_millis(100);

/// Without, and with either event source.
const ARMS: [Option<&[&str]>; 3] =
    [None, Some(&["--events", "nflog"]), Some(&["--events", "ctnetlink"])];

fn main() {
    lab::serve_if_asked();
    let arms = ARMS.map(Arm::new);
    let [Some(without), Some(nflog), Some(ctnetlink)] = arms else { return };
    let work = traffic::in_turn(&[without, nflog, ctnetlink], ROUNDS, TIME);

    report::heading("Ordinary clients on all cores; ratio to the same without ctkeep");
    for ([without, nflog, ctnetlink], ending) in work.iter().zip(Ending::ALL) {
        let name = ending.name();
        let alone = traffic::median_rate(without);
        report::figure(&format!("{name}, without ctkeep"), alone, "/s", Target::None);
        traffic::compare(&format!("{name}, nflog"), nflog, without, ending.target());
        traffic::compare(&format!("{name}, ctnetlink"), ctnetlink, without, Target::None);
    }
}
