//! From a stale RST on the wire to the repaired entry.
//!
//! The clock starts right before the client's `sendto`. It stops at the kernel's timestamp of the
//! nudge on ctkeep's helper device: ctkeep sends it when the entry is back in the table, so the
//! figure is an upper bound for that. Nothing is added to the way of other packets, and it does
//! not matter when this program gets to see the nudge.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Conntrack, Zone};
use ctkeep::flow::{Endpoint, FourTuple};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg, setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use lab::{Lab, Peer, RawConn};
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
/// A repair that takes longer counts as lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// One way to run ctkeep, with or without other traffic.
struct Arm {
    name: &'static str,
    churn: bool,
    args: &'static [&'static str],
    targets: [Target; 2],
    latencies: Vec<f64>,
    lost: usize,
    rate: f64,
}

impl Arm {
    fn new(name: &'static str, churn: bool, args: &'static [&'static str], judged: bool) -> Self {
        let targets =
            if judged { [Target::AtMost(40.0), Target::AtMost(150.0)] } else { [Target::None; 2] };
        Self { name, churn, args, targets, latencies: Vec::new(), lost: 0, rate: 0.0 }
    }
}

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 10_000);
    traffic::widen_ports(&lab);
    // At level 1 this source would soon be a repeat offender, whose connections are held so that
    // nothing is left to repair.
    let mut arms = [
        Arm::new("idle, nflog", false, &["--defence", "0", "--events", "nflog"], true),
        Arm::new("idle, ctnetlink", false, &["--defence", "0", "--events", "ctnetlink"], false),
        Arm::new("churn, nflog", true, &["--defence", "0", "--events", "nflog"], true),
        Arm::new(
            "churn, ctnetlink, real-time",
            true,
            &["--defence", "0", "--events", "ctnetlink", "--realtime"],
            true,
        ),
        Arm::new("churn, ctnetlink", true, &["--defence", "0", "--events", "ctnetlink"], false),
    ];
    let churned = traffic::listener(&lab, 81);
    let mut server = lab.serve("0.0.0.0:80");
    let peer = lab.peer("198.51.100.7");
    for _ in 0..PASSES {
        for arm in &mut arms {
            let daemon = lab.daemon(CTKEEP, arm.args);
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                let churn = arm.churn.then(|| {
                    scope.spawn(|| lab.client.within(|| churn(&Exchange::new(&churned), &stop)))
                });
                measure(&lab, &peer, arm);
                stop.store(true, Ordering::Relaxed);
                if let Some(churn) = churn {
                    arm.rate += churn.join().expect("churn") / PASSES as f64;
                }
            });
            drop(daemon);
            server.reset_all();
        }
    }

    report::heading("From a stale RST on the wire to the repaired entry");
    for arm in &arms {
        let [p50, p99] = [0.5, 0.99].map(|share| report::quantile(&arm.latencies, share));
        let [half, most] = arm.targets;
        let name = match arm.rate {
            0.0 => arm.name.to_owned(),
            rate => format!("{} ({rate:.0} connections/s)", arm.name),
        };
        report::figure(&format!("{name}: p50"), p50, "us", half);
        report::figure(&format!("{name}: p99"), p99, "us", most);
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

fn measure(lab: &Lab, peer: &Peer, arm: &mut Arm) {
    lab.server.within(|| {
        let nudges = Nudges::open();
        let mut conntrack = Conntrack::open().expect("conntrack");
        for _ in 0..REPAIRS {
            let Some(mut conn) = peer.connect(80) else { panic!("connection refused") };
            conn.fin();
            thread::sleep(PAUSE);
            let sent = now();
            conn.rst(-5);
            match nudges.wait(conn.client.port()) {
                Some(nudged) if is_alive(&mut conntrack, &conn) => {
                    arm.latencies.push((nudged.as_secs_f64() - sent.as_secs_f64()) * 1e6);
                }
                _ => arm.lost += 1,
            }
        }
    });
}

fn is_alive(conntrack: &mut Conntrack, conn: &RawConn) -> bool {
    let end = |addr: std::net::SocketAddr| Endpoint::new(addr.ip(), addr.port());
    let flow = FourTuple::new(end(conn.client), end(conn.server));
    let found = conntrack.get(&[(flow, Zone::default())]).expect("look-up");
    found.into_iter().flatten().any(|entry| entry.state().is_some_and(|state| state.is_counted()))
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
