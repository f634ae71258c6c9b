//! What the shield costs ordinary clients, a packet, and a host that is flooded.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::time::{Duration, Instant};

use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use lab::{ACK, FIN, Lab, RST, SYN, Segment};
use report::Target;
use traffic::{Arm, CTKEEP, Ending};

const ROUNDS: usize = 80;
const SLICE: Duration = Duration::from_millis(100);
const FLOOD_ROUNDS: usize = 9;
const TIME: Duration = Duration::from_millis(700);
/// Without ctkeep; with sweeps alone; with sweeps and the shield. The event source has its own
/// price, which is that of the benchmark `clients`.
const ARMS: [Option<&[&str]>; 3] =
    [None, Some(&["--events", "off"]), Some(&["--events", "off", "--shield", "on"])];
const FLOODS: [(&str, u8); 4] = [("SYN", SYN), ("RST", RST), ("FIN", FIN | ACK), ("ACK", ACK)];

fn main() {
    lab::serve_if_asked();
    if !ctkeep::shield::IS_BUILT_IN {
        eprintln!("built without the shield: make shield-tools");
        return;
    }
    let arms = ARMS.map(Arm::new);
    let [Some(stock), Some(sweeps), Some(shield)] = arms else { return };
    let arms = [stock, sweeps, shield];
    clients(&arms);
    let [_, _, shield] = &arms;
    packets(shield);
    drop(arms);
    floods();
}

fn clients(arms: &[Arm; 3]) {
    let work = traffic::in_turn(arms, ROUNDS, SLICE);
    report::heading("Ordinary clients on all cores");
    for ([stock, sweeps, shield], ending) in work.iter().zip(Ending::ALL) {
        let name = ending.name();
        let alone = traffic::median_rate(stock);
        report::figure(&format!("{name}, stock"), alone, "/s", Target::None);
        let beside = format!("{name}, shield : sweeps alone");
        traffic::compare(&beside, shield, sweeps, ending.target());
        traffic::compare(&format!("{name}, shield : stock"), shield, stock, Target::None);
    }
}

/// The rates of the three arms, by round.
fn rows(name: &str, [stock, sweeps, shield]: &[Vec<f64>; 3], target: Target) {
    report::figure(&format!("{name}, stock"), report::median(stock), "/s", Target::None);
    let median = report::median(shield);
    let own = report::paired(shield, sweeps);
    report::ratio(&format!("{name}, shield : sweeps alone"), median, "/s", own, target);
    let all = report::paired(shield, stock);
    report::ratio(&format!("{name}, shield : stock"), median, "/s", all, Target::None);
}

/// By the kernel's own statistics, which cost some nanoseconds themselves.
fn packets(shield: &Arm) {
    report::heading("The program's time for a packet, by run_time_ns / run_cnt");
    let _statistics = enable_stats(Stats::RunTime).expect("statistics of programs");
    for ending in Ending::ALL {
        let before = used();
        shield.clients(ending, TIME);
        report::figure(ending.name(), per_packet(before, used()), "ns", Target::None);
    }
}

/// Time and packets of the program that is loaded now.
fn used() -> (Duration, u64) {
    let ours = loaded_programs().flatten().filter(|it| it.name_as_str() == Some("ctkeep_shield"));
    ours.map(|it| (it.run_time(), it.run_count()))
        .fold((Duration::ZERO, 0), |(time, count), (more, again)| (time + more, count + again))
}

fn per_packet(before: (Duration, u64), after: (Duration, u64)) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let count = (after.1 - before.1) as f64;
    (after.0 - before.0).as_secs_f64() * 1e9 / count
}

/// Packets of connections that nobody has, as fast as one core sends them.
fn floods() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 10_000);
    report::heading("Packets of unknown connections from one core, by its CPU time");
    let _listener = traffic::listener(&lab, 80);
    let peer = lab.peer("198.51.100.7");
    let flood = |flags: u8| {
        let end = Instant::now() + TIME;
        let used = report::cpu();
        let mut count = 0_usize;
        while Instant::now() < end {
            for _ in 0..64 {
                let number = u32::try_from(count % 60_000).unwrap_or_default();
                peer.send(&Segment {
                    source: ([198, 51, 100, 7], 1024 + u16::try_from(number).unwrap_or(0)).into(),
                    destination: (lab::SERVER_V4, 80).into(),
                    seq: number << 8,
                    ack: 1,
                    flags,
                    payload: Vec::new(),
                });
                count += 1;
            }
        }
        report::rate(count, report::cpu() - used)
    };
    for (name, flags) in FLOODS {
        let mut rates: [Vec<f64>; 3] = Default::default();
        for round in 0..FLOOD_ROUNDS {
            for turn in 0..3 {
                let arm = (round + turn) % 3;
                let _daemon = ARMS.get(arm).copied().flatten().map(|args| lab.daemon(CTKEEP, args));
                lab.server.run("conntrack -F");
                rates.get_mut(arm).expect("three arms").push(flood(flags));
            }
        }
        rows(&format!("{name} flood"), &rates, Target::AtLeast(0.9));
    }
}
