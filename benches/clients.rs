//! What ctkeep costs ordinary clients: connections a second with it and without it.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::time::Duration;

use lab::Lab;
use report::Target;
use traffic::{CTKEEP, Ending, Work};

const ROUNDS: usize = 9;
const TIME: Duration = Duration::from_millis(700);

/// Without, and with either event source.
const ARMS: [Option<&str>; 3] = [None, Some("nflog"), Some("ctnetlink")];

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 10_000);
    lab.connlimit(81, 10_000);
    traffic::widen_ports(&lab);
    let work = traffic::in_turn(&lab, ROUNDS, TIME, |arm| {
        let source = ARMS.get(arm).copied().flatten();
        source.map(|source| lab.daemon(CTKEEP, &["--events", source]))
    });

    show("Ordinary clients on all cores, by time", &work, |work| work.per_second);
    show("The same, by CPU time of everything together", &work, |work| work.per_cpu_second);
}

fn show(title: &str, work: &[[Vec<Work>; 3]; 3], rate: impl Fn(&Work) -> f64) {
    report::heading(&format!("{title}; ratio to the same without ctkeep"));
    for (arms, ending) in work.iter().zip(Ending::ALL) {
        let rates = arms.each_ref().map(|work| work.iter().map(&rate).collect::<Vec<_>>());
        let [without, nflog, ctnetlink] = &rates;
        let target = Target::AtLeast(if ending == Ending::Keepalive { 0.98 } else { 0.95 });
        let name = ending.name();
        let alone = report::median(without);
        report::figure(&format!("{name}, without ctkeep"), alone, "/s", Target::None);
        for (source, rates, target) in
            [("nflog", nflog, target), ("ctnetlink", ctnetlink, Target::None)]
        {
            let ratio = report::paired(rates, without);
            let name = format!("{name}, {source}");
            report::ratio(&name, report::median(rates), "/s", ratio, target);
        }
    }
}
