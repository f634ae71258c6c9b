//! The search for what fools conntrack: random packets against two hosts, without ctkeep and with it.
//!
//! A host that is guarded must agree with itself a moment later: an open socket has an entry that is
//! counted, a source at its limit gets nothing more, and what has ended gives its place back. A
//! finding is printed with its seed and its packets; `CTKEEP_SEARCH_SEED` plays it again, and
//! `CTKEEP_SEARCH` is how long the long search goes on.

#![allow(clippy::indexing_slicing)]

mod flood;
mod packet;
mod rules;

use std::collections::HashMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Daemon, Lab, Peer, RawConn, Server};
use packet::{Random, STAMPS, Shot};
use rules::Rules;
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const PORT: u16 = 80;
const LIMIT: usize = 3;

/// Sources that are played side by side.
const SOURCES: usize = 10;
/// Batches of one pair of hosts: no source is used twice, and two networks have so many.
const BATCHES: usize = 48;

/// Until ctkeep has seen and repaired all that a sweep finds: two sweeps.
const BOUND: Duration = Duration::from_millis(2000);

/// One host, and a way to put frames on its wire.
struct Host {
    lab: Lab,
    server: Server,
    wire: SyncDevice,
    daemon: Option<Daemon>,
}

/// What is played with one source.
struct History {
    source: String,
    shots: Vec<Shot>,
    /// After so many of them it tries to open as many connections as the limit.
    grabs: Vec<usize>,
}

/// What has become of a source's connections.
struct Outcome {
    /// Sockets that the application holds, and how they look from both tables.
    held: usize,
    lines: Vec<String>,
    /// Open sockets of which no counted entry is left.
    lost: usize,
    /// Counted entries without a socket.
    stale: usize,
    /// Handshakes that have not ended.
    begun: usize,
}

impl Host {
    fn new(rules: Rules, kernel: Kernel, args: Option<&[&str]>) -> Option<Self> {
        let lab = Lab::new()?;
        if let Some((name, value)) = kernel {
            lab.server.sysctl(name, value);
        }
        rules.install(&lab, PORT, LIMIT);
        let server = lab.serve("[::]:80");
        // What is written into the tap leaves by the cable, whatever it is.
        let wire = lab.client.within(|| {
            let mut device = DeviceBuilder::new().name("attack0").layer(Layer::L2);
            device = device.mtu(1500);
            device.build_sync().expect("a tap")
        });
        let redirect = "u32 match u32 0 0 action mirred egress redirect dev eth0";
        for line in [
            "ip link set attack0 up".to_owned(),
            "tc qdisc add dev attack0 ingress".to_owned(),
            format!("tc filter add dev attack0 parent ffff: protocol all {redirect}"),
        ] {
            lab.client.run(&line);
        }
        // Conntrack is in use before ctkeep starts.
        drop(lab.peer("203.0.113.1").hold(PORT, 1));
        let daemon = args.map(|args| lab.daemon(CTKEEP, &[&["--port", "80"], args].concat()));
        Some(Self { lab, server, wire, daemon })
    }

    fn play(&mut self, histories: &[History], setting: &Setting) -> Vec<Vec<RawConn>> {
        let peers: Vec<Peer> = histories.iter().map(|it| self.lab.peer(&it.source)).collect();
        let mut conns: Vec<Vec<RawConn>> = peers.iter().map(|it| setting.opens.begin(it)).collect();
        match setting.server {
            Does::Nothing => {}
            Does::HalfClose => self.server.shutdown_all(),
            Does::Send => self.server.send_all(b"some of an answer"),
        }
        let is_begun = setting.opens != Opens::InTheMidst;
        if is_begun {
            if setting.half_closed {
                conns.iter_mut().flatten().for_each(RawConn::fin);
                thread::sleep(Duration::from_millis(60));
            }
            conns.iter_mut().flatten().for_each(RawConn::ack_all);
        }
        let longest = histories.iter().map(|it| it.shots.len()).max().unwrap_or(0);
        for round in 0..=longest {
            if round == longest.div_ceil(2) && !is_begun {
                conns.iter().flatten().for_each(RawConn::ack);
                if setting.half_closed {
                    conns.iter_mut().flatten().for_each(RawConn::fin);
                }
            }
            let mut begun = Vec::new();
            for (index, history) in histories.iter().enumerate() {
                if let Some(shot) = history.shots.get(round)
                    && let Some(conn) = conns[index].get(shot.conn)
                {
                    for frame in shot.frames(conn) {
                        // A frame that the device refuses is as good as lost.
                        let _ = self.wire.send(&frame);
                    }
                }
                if history.grabs.contains(&round) {
                    let peer = &peers[index];
                    begun.push((index, (0..LIMIT).map(|_| peer.syn_only(PORT)).collect()));
                }
            }
            for (index, begun) in begun {
                let new = peers[index].complete(begun, Duration::from_millis(3));
                conns[index].extend(new);
            }
            thread::sleep(setting.pause);
        }
        conns
    }

    /// Compares both tables, connection by connection.
    fn outcomes(&self, conns: &[Vec<RawConn>]) -> Vec<Outcome> {
        let sockets: HashMap<(SocketAddr, SocketAddr), String> = self
            .lab
            .all_sockets()
            .into_iter()
            .map(|it| ((it.remote, it.local), it.state))
            .collect();
        let entries: HashMap<(SocketAddr, SocketAddr), (String, u64)> = self
            .lab
            .entries()
            .into_iter()
            .map(|entry| (entry.orig, (entry.state, entry.timeout)))
            .collect();
        let mut outcomes = Vec::new();
        for of_source in conns {
            let mut outcome = Outcome { held: 0, lines: Vec::new(), lost: 0, stale: 0, begun: 0 };
            for conn in of_source {
                let socket = sockets.get(&(conn.client, conn.server)).map(String::as_str);
                let entry = entries.get(&(conn.client, conn.server));
                let held = matches!(
                    socket,
                    Some("established" | "close-wait" | "fin-wait-1" | "fin-wait-2")
                );
                let counted =
                    entry.is_some_and(|(state, _)| state != "CLOSE" && state != "TIME_WAIT");
                outcome.held += usize::from(held);
                outcome.lost += usize::from(held && !counted);
                // A SYN that the limit lets in and TCP drops leaves such an entry on any host; whether it is let in
                // depends on what else is open.
                let is_of_syn = entry.is_some_and(|(state, _)| state == "SYN_SENT");
                outcome.stale += usize::from(socket.is_none() && counted && !is_of_syn);
                outcome.begun += usize::from(socket == Some("syn-recv"));
                outcome.lines.push(format!("{} {socket:?} {entry:?}", conn.client.port()));
            }
            outcomes.push(outcome);
        }
        outcomes
    }
}

#[derive(Clone, Copy, Debug)]
enum Does {
    Nothing,
    HalfClose,
    Send,
}

/// How a source's first connections are begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opens {
    AtOnce,
    WithTimestamps,
    /// The handshake ends when half of the packets have been sent.
    InTheMidst,
}

impl Opens {
    fn begin(self, peer: &Peer) -> Vec<RawConn> {
        const ANSWER: Duration = Duration::from_millis(100);
        match self {
            Self::AtOnce => peer.hold(PORT, LIMIT),
            Self::WithTimestamps => {
                let begun = (0..LIMIT).map(|_| peer.syn_with_options(PORT, &STAMPS)).collect();
                peer.complete(begun, ANSWER)
            }
            Self::InTheMidst => {
                let begun = (0..LIMIT).map(|_| peer.syn_only(PORT)).collect();
                peer.half_open(begun, ANSWER)
            }
        }
    }
}

/// A setting of the server's that administrators change, if it is not the kernel's own.
type Kernel = Option<(&'static str, &'static str)>;

const COOKIES: Kernel = Some(("net/ipv4/tcp_syncookies", "2"));

const KERNELS: [Kernel; 8] = [
    None,
    None,
    None,
    COOKIES,
    Some(("net/netfilter/nf_conntrack_tcp_be_liberal", "1")),
    Some(("net/netfilter/nf_conntrack_checksum", "0")),
    Some(("net/netfilter/nf_conntrack_tcp_loose", "0")),
    Some(("net/ipv4/tcp_timestamps", "0")),
];

/// What all sources of a batch have in common.
#[derive(Clone, Copy, Debug)]
struct Setting {
    kernel: Kernel,
    opens: Opens,
    is_ipv6: bool,
    server: Does,
    half_closed: bool,
    pause: Duration,
}

/// One batch: what is wrong in the end.
fn batch(hosts: &mut [Host; 2], setting: Setting, number: usize, random: &mut Random) -> Tally {
    let histories: Vec<History> = (0..SOURCES)
        .map(|index| {
            let host = number * SOURCES + index;
            let source = match host {
                _ if setting.is_ipv6 => format!("2001:db8:1::{:x}", host + 2),
                0..240 => format!("198.51.100.{}", host + 2),
                _ => format!("203.0.113.{}", host - 240 + 2),
            };
            let count = 1 + random.below(8);
            let shots: Vec<_> = (0..count).map(|_| Shot::draw(random, LIMIT)).collect();
            let grabs = (0..count).filter(|_| random.once_in(3)).collect();
            History { source, shots, grabs }
        })
        .collect();
    let mut tally = Tally::default();
    let [stock, guarded] = hosts;
    let stock_conns = stock.play(&histories, &setting);
    let conns = guarded.play(&histories, &setting);
    thread::sleep(BOUND);
    let by_stock = stock.outcomes(&stock_conns);
    let mut outcomes = guarded.outcomes(&conns);
    tally.fooled = by_stock.iter().filter(|outcome| outcome.lost > 0).count();
    // A place that a cookie may still ask for stays taken for a lease. A connection may have ended by an RST that
    // conntrack calls invalid, and a SYN that only the stock host had room for have begun it anew.
    let is_stale = |outcome: &Outcome, stock: &Outcome| {
        outcome.stale > stock.stale + stock.begun && setting.kernel != COOKIES
    };
    let is_wrong =
        |outcome: &Outcome, stock: &Outcome| outcome.lost > 0 || is_stale(outcome, stock);
    if outcomes.iter().zip(&by_stock).any(|(outcome, stock)| is_wrong(outcome, stock)) {
        // A machine under load gets another chance.
        thread::sleep(BOUND);
        outcomes = guarded.outcomes(&conns);
    }
    for (index, (outcome, stock)) in outcomes.iter().zip(&by_stock).enumerate() {
        let mut wrong = Vec::new();
        if outcome.lost > 0 {
            wrong.push(format!("{} open sockets are not counted", outcome.lost));
        }
        if is_stale(outcome, stock) {
            wrong.push(format!("{} entries stay without a socket", outcome.stale));
        }
        if outcome.held >= LIMIT && outcome.lost == 0 {
            let peer = guarded.lab.peer(&histories[index].source);
            let begun = vec![peer.syn_only(PORT)];
            let admitted = peer.complete(begun, Duration::from_millis(30));
            if !admitted.is_empty() {
                wrong.push(format!("{} held, and one more is let in", outcome.held));
            }
        }
        if outcome.held > 4 * LIMIT {
            wrong.push(format!("{} held at a limit of {LIMIT}", outcome.held));
        }
        if wrong.is_empty() {
            continue;
        }
        let mut text = format!("{setting:?} {}: {}\n", histories[index].source, wrong.join(", "));
        for (round, shot) in histories[index].shots.iter().enumerate() {
            let grabs = if histories[index].grabs.contains(&round) { " then SYNs" } else { "" };
            let _ = writeln!(text, "    {shot:?}{grabs}");
        }
        let _ = writeln!(text, "  guarded: {:?}\n  stock: {:?}", outcome.lines, stock.lines);
        tally.findings.push(text);
    }
    drop(conns);
    for host in hosts {
        host.server.reset_all();
    }
    tally.histories = SOURCES;
    tally
}

#[derive(Default)]
struct Tally {
    histories: usize,
    /// Those that made the stock kernel lose a connection.
    fooled: usize,
    findings: Vec<String>,
}

/// Plays until the time is up, each pair of hosts with rules, events and a seed of its own.
fn search(seed: u64, time: Duration) -> Tally {
    let begun = Instant::now();
    let mut all = Tally::default();
    let mut pair = seed;
    while begun.elapsed() < time {
        let mut random = Random(pair);
        let (rules, kernel) = (random.of(&Rules::ALL), random.of(&KERNELS));
        let args: &[&str] = random.of(&[
            &["--events", "nflog"][..],
            &["--events", "nflog"],
            &["--events", "ctnetlink"],
            &["--shield", "auto"],
        ]);
        let hosts = [None, Some(args)].map(|args| Host::new(rules, kernel, args));
        let [Some(stock), Some(guarded)] = hosts else {
            return all;
        };
        let mut hosts = [stock, guarded];
        for number in 0..BATCHES {
            if begun.elapsed() >= time {
                break;
            }
            let setting = Setting {
                kernel,
                opens: random.of(&[Opens::AtOnce, Opens::WithTimestamps, Opens::InTheMidst]),
                is_ipv6: random.once_in(3),
                server: random.of(&[Does::Nothing, Does::Nothing, Does::HalfClose, Does::Send]),
                half_closed: random.once_in(2),
                pause: Duration::from_millis(random.of(&[0, 0, 2, 30, 300])),
            };
            let tally = batch(&mut hosts, setting, number, &mut random);
            all.histories += tally.histories;
            all.fooled += tally.fooled;
            for finding in tally.findings {
                eprintln!("FINDING seed {pair} batch {number} {rules:?} {args:?}: {finding}");
                all.findings.push(finding);
            }
        }
        eprintln!(
            "seed {pair} {rules:?} {args:?}: {} histories so far, {} fooled the stock kernel, {} findings",
            all.histories,
            all.fooled,
            all.findings.len()
        );
        if hosts[1].daemon.as_mut().is_some_and(Daemon::has_ended) {
            panic!("the daemon has ended");
        }
        pair = pair.wrapping_add(1);
    }
    all
}

fn seed(otherwise: u64) -> u64 {
    let named = std::env::var("CTKEEP_SEARCH_SEED").ok();
    named.map_or(otherwise, |text| text.parse().expect("a number"))
}

#[test]
fn a_short_search_finds_nothing() {
    let all = search(seed(1), Duration::from_secs(8));
    assert!(all.findings.is_empty(), "{}", all.findings.join("\n"));
}

/// `make attack-search`.
#[test]
#[ignore = "long: `make attack-search` says how long"]
fn a_long_search() {
    let time = std::env::var("CTKEEP_SEARCH").unwrap_or_else(|_| "30m".to_owned());
    let time = humantime::parse_duration(&time).expect("CTKEEP_SEARCH is a time such as 30m");
    let all = search(seed(1), time);
    assert!(all.findings.is_empty(), "{} findings", all.findings.len());
}
