//! From a stale RST on the wire to the repaired entry.
//!
//! The clock starts right before the client's `sendto`. It stops when the kernel puts the repaired
//! entry into the table (`CTA_TIMESTAMP_START`), and a second time at the kernel's timestamp of the
//! nudge on ctkeep's helper device, with which the limiter counts the connection again. Nothing is
//! added to the way of other packets, and it does not matter when this program gets to see either.
//!
//! Beside it stands what the machine itself takes: a sleeping thread that is woken by a byte in a
//! pipe. No program that is told of a packet can be faster than that.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ctkeep::Op;
use ctkeep::netlink::{Conversation, KernelSocket, Request};
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::policy::{Policy, Scope};
use ctkeep::reconcile::whole::{By, Reading};
use ctkeep::sockdiag::States;
use netlink_packet_core::{NLA_F_NESTED, NlasIterator};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use lab::{Lab, RawConn, passing};
use report::Target;
use traffic::{CTKEEP, Ending, Exchange};

/// Passes over all arms, and repairs in each.
const PASSES: usize = 3;
const REPAIRS: usize = 400;
/// Connections a second that are closed by RST beside them.
const CHURN: f64 = 15_000.0;
/// The helper device's name, as it is by default.
const DEVICE: &str = "ctkeep0";
/// Between two repairs.
const PAUSE: Duration = Duration::from_millis(3);
/// Repairs for which a source is not yet held to be an attacker: those wait for a shield first.
const INNOCENT: usize = 2;
/// A repair that takes longer counts as lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// Entries beside: a namespace has room for 262 144, unless the host gives it more.
const ENTRIES: usize = 200_000;
const READ: &str = "a table of 200 000 read without end, nflog";

/// Scrapes of the metrics a second, on one connection.
const SCRAPES: u32 = 1000;

const NFLOG: &[&str] = &["--defence", "0", "--events", "nflog"];

/// One way to run ctkeep, with or without other traffic.
struct Arm {
    name: &'static str,
    churn: bool,
    /// All connections are those of one source.
    one_source: bool,
    /// Metrics are read meanwhile.
    scraped: bool,
    /// Whole tables are read meanwhile, without end.
    read: bool,
    /// The version before is measured.
    before: bool,
    /// Without, a thread is woken and nothing else.
    args: Option<&'static [&'static str]>,
    targets: [Target; 2],
    repaired: Vec<f64>,
    counted: Vec<f64>,
    lost: usize,
    rate: f64,
}

impl Arm {
    fn new(name: &'static str, churn: bool, args: &'static [&'static str], judged: bool) -> Self {
        let half = if churn { 4.0 } else { 2.5 };
        let targets =
            if judged { [Target::AtMost(half), Target::AtMost(1.5)] } else { [Target::None; 2] };
        Self {
            name,
            churn,
            one_source: false,
            scraped: false,
            read: false,
            before: false,
            args: Some(args),
            targets,
            repaired: Vec::new(),
            counted: Vec::new(),
            lost: 0,
            rate: 0.0,
        }
    }
}

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 10_000);
    traffic::widen_ports(&lab);
    lab.server.sysctl("net/netfilter/nf_conntrack_timestamp", "1");
    let woken = |name, churn| Arm { args: None, ..Arm::new(name, churn, &[], false) };
    // At level 1 the connections of a repeat offender are held so that nothing is left to repair.
    let mut arms = [
        woken("idle, a thread woken by a pipe", false),
        Arm::new("idle, nflog", false, NFLOG, true),
        Arm { one_source: true, ..Arm::new("idle, nflog, one source", false, NFLOG, false) },
        Arm { before: true, ..Arm::new("idle, nflog, the version before", false, NFLOG, false) },
        Arm { scraped: true, ..Arm::new("scraped, nflog", false, NFLOG, false) },
        Arm { read: true, ..Arm::new(READ, false, NFLOG, false) },
        Arm::new("idle, ctnetlink", false, &["--defence", "0", "--events", "ctnetlink"], false),
        woken("churn, a thread woken by a pipe", true),
        Arm::new("churn, nflog", true, NFLOG, true),
        Arm { before: true, ..Arm::new("churn, nflog, the version before", true, NFLOG, false) },
        Arm::new(
            "churn, ctnetlink, real-time",
            true,
            &["--defence", "0", "--events", "ctnetlink", "--realtime"],
            false,
        ),
        Arm::new("churn, ctnetlink", true, &["--defence", "0", "--events", "ctnetlink"], false),
    ];
    let churned = traffic::listener(&lab, 81);
    let mut server = lab.serve("0.0.0.0:80");
    for _ in 0..PASSES {
        for arm in &mut arms {
            let older = traffic::before();
            let program = match (arm.before, &older) {
                (false, _) => CTKEEP,
                (true, Some(program)) => program,
                (true, None) => continue,
            };
            let daemon = arm.args.map(|args| lab.daemon(program, args));
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                let churn = arm.churn.then(|| {
                    scope.spawn(|| lab.client.within(|| churn(&Exchange::new(&churned), &stop)))
                });
                let reading =
                    arm.read.then(|| scope.spawn(|| lab.server.within(|| read_without_end(&stop))));
                let scrapes =
                    arm.scraped.then(|| scope.spawn(|| lab.server.within(|| scrape(&stop))));
                match &daemon {
                    Some(_) => measure(&lab, arm),
                    None => arm.repaired.extend(wake_ups()),
                }
                stop.store(true, Ordering::Relaxed);
                for beside in [churn, scrapes, reading].into_iter().flatten() {
                    arm.rate += beside.join().expect("other traffic") / PASSES as f64;
                }
            });
            drop(daemon);
            server.reset_all();
        }
    }

    report::heading("From a stale RST on the wire to the repaired entry");
    for arm in &arms {
        let quantiles =
            |latencies: &[f64]| [0.5, 0.99].map(|share| report::quantile(latencies, share));
        let [p50, p99] = quantiles(&arm.repaired);
        let [half, most] = arm.targets;
        if arm.repaired.is_empty() {
            continue;
        }
        let name = match arm.rate {
            0.0 => arm.name.to_owned(),
            rate => format!("{} ({rate:.0}/s)", arm.name),
        };
        let woken = arms.iter().find(|it| it.args.is_none() && it.churn == arm.churn);
        let [bare_half, bare_most] = quantiles(&woken.expect("a bare wake-up").repaired);
        report::ratio(&format!("{name}: p50"), p50, "us", p50 / bare_half, half);
        report::ratio(&format!("{name}: p99"), p99, "us", p99 / bare_most, most);
        if arm.read {
            report::figure("  in the same: p99", p99, "us", Target::AtMost(5000.0));
        }
        if arm.args.is_some() {
            let [counted_half, counted_most] = quantiles(&arm.counted);
            let bound = if arm.churn { Target::None } else { Target::AtMost(1.3) };
            report::ratio("  counted again: p50", counted_half, "us", counted_half / p50, bound);
            let ratio = counted_most / p99;
            report::ratio("  counted again: p99", counted_most, "us", ratio, Target::None);
        }
        if arm.lost > 0 {
            let lost = f64::from(u32::try_from(arm.lost).unwrap_or(u32::MAX));
            report::figure(&format!("{name}: not repaired at once"), lost, "", Target::AtMost(0.0));
        }
    }
}

/// Connections closed by RST until told to stop; how many a second.
fn churn(exchange: &Exchange<'_>, stop: &AtomicBool) -> f64 {
    const SLICE: Duration = Duration::from_millis(100);
    let begun = Instant::now();
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        count += exchange.run(Ending::Rst, Some(CHURN), Instant::now() + SLICE);
    }
    report::rate(count, begun.elapsed())
}

/// Metrics read at a steady pace until told to stop; how many times a second.
fn scrape(stop: &AtomicBool) -> f64 {
    let stream = TcpStream::connect("127.0.0.1:9815").expect("the metrics");
    stream.set_nodelay(true).expect("no delay");
    let mut answers = BufReader::new(&stream);
    let (begun, mut count) = (Instant::now(), 0);
    while !stop.load(Ordering::Relaxed) {
        (&stream).write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("a request");
        let mut length = 0;
        loop {
            let mut line = String::new();
            answers.read_line(&mut line).expect("an answer");
            match line.trim_end().split_once(": ") {
                Some(("content-length", text)) => length = text.parse().expect("a length"),
                Some(_) => {}
                None if line.trim_end().is_empty() => break,
                None => assert!(line.starts_with("HTTP/1.1 200"), "{line}"),
            }
        }
        answers.read_exact(&mut vec![0; length]).expect("a body");
        count += 1;
        let due = begun + Duration::from_secs(1) / SCRAPES * u32::try_from(count).expect("few");
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    report::rate(count, begun.elapsed())
}

/// Reads the sockets and all entries of a large table, again and again, as the thread of a deep sweep
/// does now and then; how many times a second.
fn read_without_end(stop: &AtomicBool) -> f64 {
    let mut tables = Tables::open().expect("both tables");
    passing::fill(&mut tables.conntrack, 0..ENTRIES);
    // Two ports, so that the kernel does not filter.
    let scope = Scope { ports: [80, 443].into(), ..Scope::default() };
    let (begun, mut count) = (Instant::now(), 0);
    while !stop.load(Ordering::Relaxed) {
        let reading = Reading {
            by: By::Dump,
            scope: scope.clone(),
            policy: Policy::default(),
            aside: States::default(),
            of_members: Vec::new(),
            theirs: HashSet::new(),
            tracking: None,
        };
        tables.read(reading).expect("a reading");
        count += 1;
    }
    report::rate(count, begun.elapsed())
}

/// Microseconds from the write of one thread to the wake-up of another, as often as repairs are
/// measured and with the same pauses.
fn wake_ups() -> Vec<f64> {
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    thread::scope(|scope| {
        let sleeper = scope.spawn(move || {
            let woken = |_| reader.read_exact(&mut [0]).map(|()| now()).expect("a byte");
            (0..REPAIRS).map(woken).collect::<Vec<_>>()
        });
        let write = |_| {
            thread::sleep(PAUSE);
            let sent = now();
            writer.write_all(&[0]).expect("a byte");
            sent
        };
        let sent: Vec<_> = (0..REPAIRS).map(write).collect();
        let woken = sleeper.join().expect("the sleeper");
        sent.iter().zip(woken).map(|(sent, woken)| (woken - *sent).as_secs_f64() * 1e6).collect()
    })
}

fn measure(lab: &Lab, arm: &mut Arm) {
    lab.server.within(|| {
        let nudges = Nudges::open();
        let mut conntrack = Births::open();
        let mut peer = lab.peer("198.51.100.10");
        for number in 0..REPAIRS {
            if !arm.one_source && number % INNOCENT == 0 {
                peer = lab.peer(&format!("198.51.100.{}", 10 + number / INNOCENT));
            }
            let Some(mut conn) = peer.connect(80) else { panic!("connection refused") };
            conn.fin();
            thread::sleep(PAUSE);
            let sent = now();
            conn.rst(-5);
            let micros = |time: Duration| (time.as_secs_f64() - sent.as_secs_f64()) * 1e6;
            let nudged = nudges.wait(conn.client.port());
            match (conntrack.born(&conn).filter(|born| *born > sent), nudged) {
                (Some(born), Some(nudged)) => {
                    arm.repaired.push(micros(born));
                    arm.counted.push(micros(nudged));
                }
                _ => arm.lost += 1,
            }
        }
    });
}

/// Asks the kernel when an entry came into the table.
struct Births(Conversation<KernelSocket>);

impl Births {
    fn open() -> Self {
        let op = Op::new("open conntrack");
        Self(Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER).expect("socket")))
    }

    /// Since the epoch; `None` where there is no entry.
    fn born(&mut self, conn: &RawConn) -> Option<Duration> {
        const CT_GET: u16 = 0x101; // NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
        const CTA_TIMESTAMP: u16 = 20;
        const CTA_TIMESTAMP_START: u16 = 1;
        let (SocketAddr::V4(client), SocketAddr::V4(server)) = (conn.client, conn.server) else {
            panic!("this bench speaks IPv4");
        };
        // nfgenmsg; the tuple: addresses, protocol and ports.
        let mut body = vec![2, 0, 0, 0];
        let addresses = [nla(1, &client.ip().octets()), nla(2, &server.ip().octets())].concat();
        let ports = [
            nla(1, &[6]),
            nla(2, &client.port().to_be_bytes()),
            nla(3, &server.port().to_be_bytes()),
        ];
        let tuple = [nested(1, &addresses), nested(2, &ports.concat())].concat();
        body.extend(nested(1, &tuple));
        let op = Op::new("conntrack get");
        let request = Request { op, kind: CT_GET, flags: 0, body, joined: false };
        let mut born = None;
        let answer = self.0.look_up(&[request], |_, frame| {
            let start = value(frame.payload.get(4..).unwrap_or_default(), CTA_TIMESTAMP)
                .and_then(|nest| value(nest, CTA_TIMESTAMP_START));
            let start = start.and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
            born = start.map(Duration::from_nanos);
            Ok(())
        });
        answer.expect("conntrack look-up");
        born
    }
}

fn nla(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).expect("a short attribute");
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    nla(NLA_F_NESTED | kind, value)
}

/// The value of an attribute among others.
fn value(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let found = NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == kind)?;
    found.into_inner().get(4..found.length().into())
}

/// The clock that packets are stamped by.
fn now() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).expect("clock"))
}

/// Sees what comes in by the helper device.
struct Nudges(Socket);

impl Nudges {
    fn open() -> Self {
        // A socket for one protocol would come after the device's redirect, and see nothing.
        const ETH_P_ALL: u16 = 0x0003;
        let protocol = Protocol::from(i32::from(ETH_P_ALL.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol)).expect("socket");
        let device = if_nametoindex(DEVICE).expect("the helper device");
        socket.attach_filter(&only_from(device)).expect("filter");
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true).expect("timestamps");
        socket.set_nonblocking(true).expect("non-blocking");
        Self(socket)
    }

    /// When the nudge of this client port came.
    fn wait(&self, port: u16) -> Option<Duration> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            poll(&mut ready, PollTimeout::from(10_u8)).expect("poll");
            while let Some((client, time)) = self.next() {
                if client == port {
                    return Some(time);
                }
            }
            if Instant::now() >= deadline {
                return None;
            }
        }
    }

    fn next(&self) -> Option<(u16, Duration)> {
        let mut packet = [0; 128];
        let mut control = nix::cmsg_space!(nix::sys::time::TimeSpec);
        let mut parts = [IoSliceMut::new(&mut packet)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut control), flags)
        {
            Ok(message) => message,
            Err(Errno::EAGAIN) => return None,
            Err(errno) => panic!("nudges: {errno}"),
        };
        let time = message.cmsgs().expect("control messages").find_map(|part| match part {
            ControlMessageOwned::ScmTimestampns(time) => Some(Duration::from(time)),
            _ => None,
        })?;
        // The source port, behind an IPv4 header without options.
        let port = packet.get(20..22)?.try_into().ok()?;
        Some((u16::from_be_bytes(port), time))
    }
}

/// Classic BPF: keep what comes in by this interface.
fn only_from(device: u32) -> [SockFilter; 4] {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const SKF_AD_IFINDEX: u32 = 0xffff_f000 + 8; // linux/filter.h
    [
        SockFilter::new(LOAD_WORD, 0, 0, SKF_AD_IFINDEX),
        SockFilter::new(JUMP_EQUAL, 0, 1, device),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}
