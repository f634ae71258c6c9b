//! One source that wants more than its limit: bursts of stale RSTs and SYNs for a minute, against
//! the stock kernel and against ctkeep, side by side.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::thread;
use std::time::{Duration, Instant};

use lab::{Lab, RawConn};
use report::Target;
use traffic::CTKEEP;

const LIMIT: u32 = 40;
const BURST: usize = 40;
const TIME: Duration = Duration::from_secs(60);
/// Sockets that prove the point: without ctkeep there is no end to them.
const ENOUGH: f64 = 8_000.0;

fn main() {
    lab::serve_if_asked();
    let (Some(stock), Some(kept)) = (Lab::new(), Lab::new()) else { return };
    let (stock, kept) = thread::scope(|scope| {
        let stock = scope.spawn(|| attack(&stock, None));
        let kept = scope.spawn(|| attack(&kept, Some(&["--port", "80"])));
        (stock.join().expect("attack"), kept.join().expect("attack"))
    });

    report::heading("One source, limit 40, bursts of RST for all held and 40 SYNs for 60 s");
    let limit = f64::from(LIMIT);
    for (name, outcome, target) in
        [("stock kernel", &stock, Target::None), ("ctkeep", &kept, Target::AtMost(2.0 * limit))]
    {
        let end = outcome.held.last().copied().unwrap_or_default();
        let half = outcome.held.get(outcome.held.len() / 2).copied().unwrap_or_default();
        println!(
            "{name}: {} bursts in {:.0} s, held after some of them: {}",
            outcome.bursts,
            outcome.time.as_secs_f64(),
            outcome.shown()
        );
        let ratio = end / limit;
        report::figure_beside(&format!("sockets held at the end, {name}"), end, "", ratio, target);
        let flat = if matches!(target, Target::None) { target } else { Target::AtMost(0.0) };
        report::figure(&format!("growth in the second half, {name}"), end - half, "", flat);
    }
    report::figure("CPU of ctkeep", kept.cpu, "%", Target::None);
}

struct Outcome {
    bursts: usize,
    time: Duration,
    /// Sockets that the server holds after each burst.
    held: Vec<f64>,
    cpu: f64,
}

impl Outcome {
    fn shown(&self) -> String {
        let some = self.held.iter().step_by((self.held.len() / 10).max(1));
        some.map(|held| format!("{held:.0}")).collect::<Vec<_>>().join(" ")
    }
}

fn attack(lab: &Lab, ctkeep: Option<&[&str]>) -> Outcome {
    lab.connlimit(80, LIMIT);
    let mut server = lab.serve("0.0.0.0:80");
    let peer = lab.peer("198.51.100.7");
    let daemon = ctkeep.map(|args| lab.daemon(CTKEEP, args));
    let used = daemon.as_ref().map(|daemon| traffic::cpu_time(daemon.pid()));
    let begun = Instant::now();
    let mut conns: Vec<RawConn> = Vec::new();
    let mut held = Vec::new();
    while begun.elapsed() < TIME && held.last().is_none_or(|held| *held < ENOUGH) {
        for conn in &conns {
            conn.rst(-5);
        }
        let mut new = peer.open(80, BURST);
        for conn in &mut new {
            conn.fin();
        }
        conns.append(&mut new);
        held.push(f64::from(u32::try_from(server.held()).expect("some thousand")));
    }
    let cpu = daemon.as_ref().zip(used).map_or(0.0, |(daemon, used)| {
        let used = traffic::cpu_time(daemon.pid()) - used;
        100.0 * used.as_secs_f64() / begun.elapsed().as_secs_f64()
    });
    Outcome { bursts: held.len(), time: begun.elapsed(), held, cpu }
}
