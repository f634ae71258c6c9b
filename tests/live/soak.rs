//! Hours of mixed load on one daemon: attackers, honest clients, ordinary churn, reloads and
//! restarts. `make soak` runs it, for `CTKEEP_SOAK` (by default 30m).

use crate::lab;
use std::fmt::Write;
use std::fs;
use std::io::{Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Daemon, Lab, Peer, RawConn, wait_for};
use nix::sys::signal::Signal;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 40;
const PORT: u16 = 80;
/// Where ordinary connections come and go.
const CHURN: u16 = 82;
const METRICS: &str = "127.0.0.1:9815";
const ATTACKERS: [&str; 4] = ["198.51.100.1", "198.51.100.2", "198.51.100.3", "2001:db8:1::4"];
const HONEST: [&str; 6] =
    ["203.0.113.1", "203.0.113.2", "203.0.113.3", "203.0.113.4", "2001:db8:1::5", "2001:db8:1::6"];
/// From one time that the application closes everything to the next.
const ROUND: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_secs(60);

/// What came of it.
#[derive(Default)]
struct Figures {
    bursts: AtomicUsize,
    most_sockets: AtomicUsize,
    honest: AtomicUsize,
    refused: AtomicUsize,
    churned: AtomicUsize,
}

fn add(figure: &AtomicUsize, count: usize) {
    figure.fetch_add(count, Ordering::Relaxed);
}

/// Bursts from one source, with one trick after the other, until the round is over.
fn attack(peer: &Peer, until: Instant, figures: &Figures) {
    let mut held: Vec<RawConn> = Vec::new();
    for number in 0.. {
        if Instant::now() >= until {
            return;
        }
        for conn in &held {
            match number % 4 {
                0 => conn.rst_at(-6),
                1 => conn.rst_at(100),
                2 => (0..2).for_each(|_| conn.fin_at(-1)),
                _ => {
                    conn.fin_at(50);
                    conn.rst_at(-6);
                }
            }
        }
        let begun = (0..LIMIT).map(|_| peer.syn_only(PORT)).collect();
        let mut new = peer.complete(begun, Duration::from_millis(20));
        // Half of them stay as they are: the FIN with a hole is for them.
        new.iter_mut().step_by(2).for_each(RawConn::fin);
        held.extend(new);
        add(&figures.bursts, 1);
        thread::sleep(Duration::from_millis(200));
    }
}

/// A few connections at a time, that are reset or half-closed in the end.
fn visit(peer: &Peer, until: Instant, figures: &Figures) {
    let mut open: Vec<RawConn> = Vec::new();
    while Instant::now() < until {
        // Sent again when the machine is too busy to answer in half a second; a limit that counts
        // wrongly refuses them all.
        let conn = (0..10).find_map(|_| peer.connect(PORT));
        add(&figures.refused, usize::from(conn.is_none()));
        add(&figures.honest, 1);
        open.extend(conn);
        if open.len() > 4 {
            let mut oldest = open.remove(0);
            oldest.send(b"GET / HTTP/1.0\r\n\r\n");
            oldest.rst_at(0);
        }
        thread::sleep(Duration::from_millis(150));
    }
    open.iter_mut().for_each(RawConn::fin);
}

/// Set when this is dropped, be it by a failure.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Real connections with an end on both sides, one after the other.
fn churn(lab: &Lab, over: &AtomicBool, figures: &Figures) {
    let listener = lab.server.within(|| TcpListener::bind(("0.0.0.0", CHURN))).expect("a listener");
    listener.set_nonblocking(true).expect("non-blocking");
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                };
                stream.set_nonblocking(false).expect("blocking");
                let _ = stream.read_to_end(&mut Vec::new());
            }
        });
        lab.client.within(|| {
            while !over.load(Ordering::Relaxed) {
                let mut stream = TcpStream::connect((lab::SERVER_V4, CHURN)).expect("a connection");
                stream.write_all(b"hello").expect("a request");
                stream.shutdown(Shutdown::Write).expect("a FIN");
                let _ = stream.read_to_end(&mut Vec::new());
                add(&figures.churned, 1);
                thread::sleep(Duration::from_millis(5));
            }
        });
    });
}

/// What the daemon has of the machine at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    /// KiB.
    rss: u64,
    descriptors: usize,
    threads: usize,
    devices: usize,
    tables: usize,
}

fn usage(lab: &Lab, daemon: &Daemon) -> Usage {
    let directory = format!("/proc/{}", daemon.pid());
    let count = |name: &str| fs::read_dir(format!("{directory}/{name}")).expect("a list").count();
    let status = fs::read_to_string(format!("{directory}/status")).expect("its status");
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its RSS");
    let lines = |command: &str| {
        lab.server.output(command).lines().filter(|line| line.contains("ctkeep")).count()
    };
    Usage {
        rss: rss.trim().trim_end_matches(" kB").parse().expect("KiB"),
        descriptors: count("fd"),
        threads: count("task"),
        devices: lines("ip -o link"),
        tables: lines("nft list tables"),
    }
}

/// Sums of what the daemon has done so far; it begins anew with a restart.
fn done(lab: &Lab) -> (f64, f64) {
    let answer = lab::http::ask(&lab.server, METRICS, "GET /metrics", "").expect("its metrics");
    let samples = lab::http::samples(&answer.body);
    let sum = |name: &str| -> f64 {
        samples.iter().filter(|(it, _)| it.starts_with(name)).map(|(_, value)| value).sum()
    };
    (sum("ctkeep_actions_total"), sum("ctkeep_sweep_errors_total"))
}

/// One life of the daemon.
struct Life {
    /// When half of it was over: by then the tables are as full as they get.
    half: Usage,
    last: Usage,
    actions: f64,
    sweep_errors: f64,
}

impl Life {
    /// Memory may move by some MiB, as the allocator likes; of the rest nothing may be more.
    fn assert_flat(&self) {
        let (half, last) = (self.half, self.last);
        assert!(last.rss <= half.rss + 2048, "{half:?} {last:?}");
        assert!(last.descriptors <= half.descriptors + 4, "{half:?} {last:?}");
        assert_eq!(last.threads, half.threads, "{half:?} {last:?}");
        assert!(last.devices <= 1 && last.tables <= 2, "{half:?} {last:?}");
    }
}

#[test]
#[ignore = "takes as long as it is told: make soak"]
fn a_long_load_leaves_nothing_behind() {
    let total = std::env::var("CTKEEP_SOAK").unwrap_or_else(|_| "30m".to_owned());
    let total = humantime::parse_duration(&total).expect("CTKEEP_SOAK is a time such as 30m");
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(PORT, u32::try_from(LIMIT).expect("a small limit"));
    let mut server = lab.serve("[::]:80");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ctkeep.toml");
    fs::write(&path, "port = [80, 82]\n").expect("a file");
    let start = || lab.daemon(CTKEEP, &["--config", path.to_str().expect("a path in UTF-8")]);
    let (attackers, honest) = (ATTACKERS.map(|a| lab.peer(a)), HONEST.map(|a| lab.peer(a)));
    let (figures, over) = (Figures::default(), AtomicBool::new(false));
    let mut lives = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| churn(&lab, &over, &figures));
        let _end = End(&over);
        let began = Instant::now();
        // Three lives: the first is asked to end, the second is killed.
        for life in 1..=3 {
            let daemon = start();
            let (mut half, mut rounds) = (None, 0);
            let born = began.elapsed();
            let end = total * life / 3;
            while rounds < 2 || began.elapsed() < end {
                let until = Instant::now() + ROUND;
                thread::scope(|scope| {
                    for peer in &attackers {
                        scope.spawn(|| attack(peer, until, &figures));
                    }
                    for peer in &honest {
                        scope.spawn(|| visit(peer, until, &figures));
                    }
                    while Instant::now() < until {
                        thread::sleep(Duration::from_secs(2));
                        for source in ATTACKERS {
                            let held = lab.open_sockets_of(source);
                            figures.most_sockets.fetch_max(held, Ordering::Relaxed);
                            // Twice the limit; the rest is for a machine under load.
                            assert!(held <= 4 * LIMIT, "{source} holds {held}");
                        }
                    }
                });
                daemon.signal(Signal::SIGHUP);
                // The application gives up; nobody answers a FIN here, so it is an RST.
                server.reset_all();
                wait_for("end of the sockets", SOON, || {
                    lab.open_sockets_of("198.51.100.1") + lab.open_sockets_of("203.0.113.1") == 0
                });
                rounds += 1;
                if began.elapsed() >= (born + end) / 2 {
                    half.get_or_insert_with(|| usage(&lab, &daemon));
                }
                assert!(!daemon.logged("panicked"), "{}", daemon.log());
                let (minutes, usage) = (began.elapsed().as_secs() / 60, usage(&lab, &daemon));
                eprintln!("{minutes} min, life {life}: {usage:?}, {} actions", done(&lab).0);
            }
            let (actions, sweep_errors) = done(&lab);
            let half = half.expect("a round in its second half");
            let lived = Life { half, last: usage(&lab, &daemon), actions, sweep_errors };
            lived.assert_flat();
            lives.push(lived);
            match life {
                1 => assert!(daemon.term().0.success()),
                _ => daemon.kill(),
            }
        }
    });
    // One lease after the end nothing of it is left; of the kernel's own only what is closing.
    drop(server);
    let held = || lab.entries().iter().filter(|entry| entry.state == "CLOSE_WAIT").count();
    wait_for("end of the last lease", 2 * SOON, || held() == 0);
    let links = lab.server.output("ip -o link show");
    assert!(!links.contains("ctkeep"), "{links}");

    let of = |figure: &AtomicUsize| figure.load(Ordering::Relaxed);
    let mut report = String::new();
    for Life { half, last, actions, sweep_errors } in &lives {
        let _ = writeln!(
            report,
            "RSS {} KiB at half, {} at the end, {} and {} descriptors, {actions} actions, \
             {sweep_errors} failed sweeps",
            half.rss, last.rss, half.descriptors, last.descriptors
        );
    }
    eprintln!(
        "{total:?}: {} bursts, at most {} sockets of one source (limit {LIMIT}); {} honest \
         connections, {} refused; {} ordinary ones\n{report}",
        of(&figures.bursts),
        of(&figures.most_sockets),
        of(&figures.honest),
        of(&figures.refused),
        of(&figures.churned),
    );
    assert_eq!(of(&figures.refused), 0, "an honest client was refused");
}
