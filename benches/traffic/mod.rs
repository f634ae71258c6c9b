//! Ordinary clients of an ordinary server, and what a process costs.

// Each program uses the part it needs.
#![allow(dead_code, unreachable_pub)]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use procfs::process::Process;
use socket2::{Domain, SockRef, Socket, Type};

use crate::lab::{Daemon, Lab, SERVER_V4, Server, wait_for};
use crate::report::{self, Target};

/// The program that is measured.
pub const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");

/// An older one to measure beside it, where `CTKEEP_BEFORE` names its path.
pub fn before() -> Option<String> {
    std::env::var("CTKEEP_BEFORE").ok()
}

/// How a client ends its connection, or that it does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With a FIN, before the server.
    Fin,
    /// With an RST (`SO_LINGER` 0).
    Rst,
    /// Not: every request comes over the same connection.
    Keepalive,
}

impl Ending {
    pub const ALL: [Self; 3] = [Self::Fin, Self::Rst, Self::Keepalive];

    pub fn name(self) -> &'static str {
        match self {
            Self::Fin => "connections closed by FIN",
            Self::Rst => "connections closed by RST",
            Self::Keepalive => "requests over one connection",
        }
    }

    /// How much of what gets done without it must be left with it.
    pub fn target(self) -> Target {
        Target::AtLeast(match self {
            Self::Fin => 0.98,
            Self::Rst => 0.97,
            Self::Keepalive => 0.99,
        })
    }
}

/// Gives clients all ports there are, and lets them use one again after a second.
pub fn widen_ports(lab: &Lab) {
    lab.client.sysctl("net/ipv4/ip_local_port_range", "1024 65535");
    lab.client.sysctl("net/ipv4/tcp_tw_reuse", "1");
}

/// A listener on the server, for [`Exchange`].
pub fn listener(lab: &Lab, port: u16) -> TcpListener {
    lab.server.within(|| TcpListener::bind((SERVER_V4, port)).expect("listener"))
}

/// Client and server of one port in one thread: every step finds its packet already delivered, so
/// that what is measured is the kernel's work and not the scheduler's.
pub struct Exchange<'a> {
    listener: &'a TcpListener,
    address: SocketAddr,
}

impl<'a> Exchange<'a> {
    pub fn new(listener: &'a TcpListener) -> Self {
        Self { listener, address: listener.local_addr().expect("address") }
    }

    /// Runs until `end`, at most `rate` times a second, and returns how often that was. To be
    /// called inside the client's namespace.
    pub fn run(&self, ending: Ending, rate: Option<f64>, end: Instant) -> usize {
        let begun = Instant::now();
        let mut pair = (ending == Ending::Keepalive).then(|| self.open());
        let mut count = 0_usize;
        loop {
            // A look at the clock now and then; a pause where the rate is ahead of it.
            if count.is_multiple_of(16) {
                let now = Instant::now();
                if now >= end {
                    return count;
                }
                if let Some(rate) = rate {
                    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
                    let due = begun + Duration::from_secs_f64(count as f64 / rate);
                    thread::sleep(due.saturating_duration_since(now));
                }
            }
            match &mut pair {
                Some(pair) => request(pair),
                None => {
                    let mut pair = self.open();
                    request(&mut pair);
                    let (client, mut server) = pair;
                    if ending == Ending::Rst {
                        SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("linger");
                    }
                    drop(client);
                    if ending == Ending::Fin {
                        let length = server.read(&mut [0; 16]).expect("end of the connection");
                        assert_eq!(length, 0, "data after the request");
                    }
                }
            }
            count += 1;
        }
    }

    fn open(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.address).expect("connect");
        let (server, _) = self.listener.accept().expect("accept");
        client.set_nodelay(true).expect("no delay");
        server.set_nodelay(true).expect("no delay");
        (client, server)
    }
}

fn request((client, server): &mut (TcpStream, TcpStream)) {
    let mut buffer = [0; 256];
    client.write_all(&[b'q'; 64]).expect("request");
    server.read_exact(buffer.get_mut(..64).unwrap_or_default()).expect("request");
    server.write_all(&[b'a'; 128]).expect("answer");
    client.read_exact(buffer.get_mut(..128).unwrap_or_default()).expect("answer");
}

/// What clients got done in a while.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// By the clock on the wall.
    pub per_second: f64,
    /// By a second of processor time of clients, server, and the kernel for both.
    pub per_cpu_second: f64,
    /// That time.
    pub cpu: Duration,
    /// What ctkeep took beside it.
    pub ctkeep: Duration,
}

/// One of the hosts that are compared, and what is measured there.
pub struct Arm {
    lab: Lab,
    listeners: [TcpListener; 2],
    daemon: Option<Daemon>,
}

impl Arm {
    /// A host with limits on two ports; ctkeep with these arguments on it, or none.
    pub fn new(args: Option<&[&str]>) -> Option<Self> {
        let lab = Lab::new()?;
        lab.connlimit(80, 10_000);
        lab.connlimit(81, 10_000);
        widen_ports(&lab);
        let listeners = [80, 81].map(|port| listener(&lab, port));
        let daemon = args.map(|args| lab.daemon(CTKEEP, args));
        Some(Self { lab, listeners, daemon })
    }

    pub fn clients(&self, ending: Ending, time: Duration) -> Work {
        clients(&self.lab, &self.listeners, ending, time, self.daemon.as_ref().map(Daemon::pid))
    }
}

/// Plays every ending on each of three hosts in turn, `rounds` times over: by ending, then by host,
/// then by round. A slice is short, and each round begins with another host: what drifts, on a
/// machine shared with others, meets all of them alike.
pub fn in_turn(arms: &[Arm; 3], rounds: usize, time: Duration) -> [[Vec<Work>; 3]; 3] {
    for (arm, ending) in arms.iter().flat_map(|arm| Ending::ALL.map(|ending| (arm, ending))) {
        arm.clients(ending, time);
    }
    let mut work: [[Vec<Work>; 3]; 3] = Default::default();
    for round in 0..rounds {
        for (work, ending) in work.iter_mut().zip(Ending::ALL) {
            for turn in 0..3 {
                let number = (round + turn) % 3;
                let (arm, work) = (arms.get(number), work.get_mut(number));
                let arm = arm.expect("three");
                // Not counted: what is limited by the second has filled up since the last slice.
                arm.clients(ending, time / 4);
                work.expect("three").push(arm.clients(ending, time));
            }
        }
    }
    work
}

/// Two rows: what of `without` gets done `with`, by time, which is judged, and by processor time.
pub fn compare(name: &str, with: &[Work], without: &[Work], target: Target) {
    let rate = median_rate(with);
    let [by_time, by_cpu] = ratios(with, without);
    report::ratio(name, rate, "/s", by_time, target);
    let beside = "  by processor time, ctkeep's included";
    report::ratio(beside, rate, "/s", by_cpu, Target::None);
}

/// The median of the rates.
pub fn median_rate(work: &[Work]) -> f64 {
    report::median(&work.iter().map(|work| work.per_second).collect::<Vec<_>>())
}

/// How much of what `without` gets done `with` does: by time, and by processor time, that of ctkeep
/// included.
///
/// Medians of the ratios, round by round; but ctkeep, which works now and then, by all that it took.
fn ratios(with: &[Work], without: &[Work]) -> [f64; 2] {
    let paired = |of: fn(&Work) -> f64| {
        let rates = |work: &[Work]| work.iter().map(of).collect::<Vec<_>>();
        report::paired(&rates(with), &rates(without))
    };
    let sum = |of: fn(&Work) -> Duration, work: &[Work]| work.iter().map(of).sum::<Duration>();
    let own = |work: &[Work]| {
        1.0 + sum(|work| work.ctkeep, work).as_secs_f64() / sum(|work| work.cpu, work).as_secs_f64()
    };
    [paired(|work| work.per_second), paired(|work| work.per_cpu_second) * own(without) / own(with)]
}

/// One exchange on each listener at once, each on a processor of its own.
pub fn clients(
    lab: &Lab,
    listeners: &[TcpListener],
    ending: Ending,
    time: Duration,
    daemon: Option<u32>,
) -> Work {
    let ctkeep = || daemon.map_or(Duration::ZERO, cpu_time);
    let (begun, used) = (Instant::now(), ctkeep());
    let end = begun + time;
    let (count, cpu) = thread::scope(|scope| {
        let all: Vec<_> = listeners
            .iter()
            .enumerate()
            .map(|(number, listener)| {
                scope.spawn(move || {
                    lab.client.within(|| {
                        stay_on(number);
                        let used = report::cpu();
                        let count = Exchange::new(listener).run(ending, None, end);
                        (count, report::cpu() - used)
                    })
                })
            })
            .collect();
        let all = all.into_iter().map(|clients| clients.join().expect("clients"));
        all.fold((0, Duration::ZERO), |(all, time), (count, cpu)| (all + count, time + cpu))
    });
    Work {
        per_second: report::rate(count, begun.elapsed()),
        per_cpu_second: report::rate(count, cpu),
        cpu,
        ctkeep: ctkeep() - used,
    }
}

fn stay_on(processor: usize) {
    let mut set = CpuSet::new();
    let processors = thread::available_parallelism().map_or(1, usize::from);
    set.set(processor % processors).expect("a processor's number");
    // Where it is not permitted the figures are noisier.
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

/// Gives the client machine these many addresses of 198.51.100.0/24.
pub fn own_addresses(lab: &Lab, count: u8) -> Vec<Ipv4Addr> {
    let all: Vec<_> = (1..=count).map(|last| Ipv4Addr::new(198, 51, 100, last)).collect();
    let commands: String = all.iter().map(|a| format!("addr add {a}/32 dev lo\n")).collect();
    lab.client.feed("ip -batch -", &commands);
    all
}

/// Opens `count` connections from `sources` in turn and closes the client's side of each: the
/// server's sockets stay in CLOSE_WAIT.
pub fn half_close(lab: &Lab, server: &mut Server, port: u16, sources: &[Ipv4Addr], count: usize) {
    const AT_ONCE: usize = 1_000;
    let begun = server.held();
    let mut sources = sources.iter().cycle();
    let mut opened = 0;
    while opened < count {
        let now = AT_ONCE.min(count - opened);
        lab.client.within(|| {
            for source in sources.by_ref().take(now) {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
                // The port is chosen at connect, when the other end is known.
                setsockopt(&socket, sockopt::IpBindAddressNoPort, &true).expect("late port");
                let from = SocketAddr::new(IpAddr::V4(*source), 0);
                socket.bind(&from.into()).expect("bind");
                let to = SocketAddr::new(IpAddr::V4(SERVER_V4), port);
                socket.connect(&to.into()).expect("connect");
            }
        });
        opened += now;
        wait_for("accepted connections", Duration::from_secs(10), || {
            server.held() >= begun + opened
        });
    }
}

/// Processor time that a process has used so far.
pub fn cpu_time(pid: u32) -> Duration {
    let tasks = process(pid).tasks().expect("threads of the process");
    let spent = tasks.flatten().filter_map(|task| task.schedstat().ok());
    Duration::from_nanos(spent.map(|spent| spent.sum_exec_runtime).sum())
}

/// What share of one core a process uses while `action` runs, in percent.
pub fn cpu_percent<T>(pid: u32, action: impl FnOnce() -> T) -> (f64, T) {
    let (begun, used) = (Instant::now(), cpu_time(pid));
    let result = action();
    let used = cpu_time(pid) - used;
    (100.0 * used.as_secs_f64() / begun.elapsed().as_secs_f64(), result)
}

/// Resident memory of a process in megabytes (10^6 bytes).
pub fn resident(pid: u32) -> f64 {
    let kibibytes = process(pid).status().expect("status of the process").vmrss.unwrap_or(0);
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let bytes = (kibibytes * 1024) as f64;
    bytes / 1e6
}

fn process(pid: u32) -> Process {
    Process::new(i32::try_from(pid).expect("a process id")).expect("the process")
}

/// How many changes the daemon has made to the kernel's table, by that line; `None` without it.
pub fn all_done(log: &str) -> Option<usize> {
    let line = log.lines().find(|line| line.contains("done so far"))?;
    let actions = line.split("actions={").nth(1)?.split('}').next()?;
    Some(
        actions.split(", ").filter_map(|pair| pair.rsplit(' ').next()?.parse::<usize>().ok()).sum(),
    )
}
