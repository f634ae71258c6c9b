//! How soon a limit counts again after a reload: many sources, and many connections of one.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};
use tun_rs::{DeviceBuilder, Layer};

use lab::rules::input;
use lab::{Lab, http, wait_for};
use report::Target;
use traffic::CTKEEP;

const SOON: Duration = Duration::from_secs(60);
/// Those of the clients.
const FIRST_PORT: u32 = 1024;
/// The first of their addresses.
const SOURCES: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
/// Connections of one source.
const MANY: u32 = 50_000;
/// Sources of which further connections are tried at the end, until one is refused.
const TRIED: usize = 20;

fn main() {
    lab::serve_if_asked();
    report::heading("From a reload of the rules to the last connection that is counted again");
    reload(500, 10, 5, None, Target::AtMost(500.0));
    // What no program can save.
    let kernel = kernel_alone(MANY);
    report::figure("a list of 50000, the kernel alone", kernel, "ms", Target::None);
    // Minutes of a processor would have to be earned before another.
    reload(1, MANY, 1, Some(kernel), Target::AtMost(5000.0));
}

/// What the kernel alone takes for so many connections of one source: their SYNs one after another, by a device
/// of this program, to the same rule. Nothing else is done, and their entries stay.
fn kernel_alone(many: u32) -> f64 {
    let Some(lab) = Lab::new() else { return 0.0 };
    let limit = format!("-m connlimit --connlimit-above {many} --connlimit-mask 32");
    let rules = input(&[&format!("INPUT -p tcp --syn --dport 80 {limit} -j DROP")]);
    lab.server.feed("iptables-restore", &rules);
    // Nobody listens there. The answer would close the entry.
    lab.server.run("iptables -t raw -A OUTPUT -p tcp --sport 80 -j DROP");
    let device = lab.server.within(|| {
        let device = DeviceBuilder::new().name("syns").layer(Layer::L3).enable(true);
        device.build_sync().expect("a device")
    });
    lab.server.run("ip route add 198.18.0.0/15 dev syns");
    let syn = |number| {
        let port = u16::try_from(FIRST_PORT + number).expect("a port");
        let builder = PacketBuilder::ipv4(SOURCES.octets(), lab::SERVER_V4.octets(), 64);
        let builder = builder.tcp(port, 80, 1, 64_240).syn();
        let mut packet = Vec::new();
        builder.write(&mut packet, &[]).expect("a packet");
        packet
    };
    let syns: Vec<_> = (0..many).map(syn).collect();
    let begun = Instant::now();
    for syn in &syns {
        device.send(syn).expect("sent");
    }
    let took = milliseconds(begun.elapsed());
    let entries = lab.server.output("sysctl -n net.netfilter.nf_conntrack_count");
    println!("{} entries of {many} SYNs", entries.trim());
    took
}

/// Clients of so many addresses, with so many connections each: what their limit allows. `kernel` is what the
/// kernel alone takes.
fn reload(sources: u32, each: u32, rounds: usize, kernel: Option<f64>, target: Target) {
    let Some(lab) = Lab::new() else { return };
    traffic::widen_ports(&lab);
    // Every address of it is the client's.
    lab.client.run("ip route add local 198.18.0.0/15 dev lo");
    lab.server.run("ip route add 198.18.0.0/15 via 192.0.2.2");
    let limit = format!("-m connlimit --connlimit-above {each} --connlimit-mask 32");
    let rules = input(&[&format!("INPUT -p tcp --syn --dport 80 {limit} -j DROP")]);
    // What is to be opened is not limited: a list of 50 000 is gone through once a jiffy.
    let tracked = input(&["INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"]);
    lab.server.feed("iptables-restore", &tracked);
    // Nobody accepts: what waits is open and limited like the rest, and needs no descriptors.
    lab.server.sysctl("net/core/somaxconn", "65535");
    let address = SocketAddr::from((lab::SERVER_V4, 80));
    let listener = lab.server.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.bind(&address.into()).expect("its address");
        socket.listen(65_535).expect("a listener");
        socket
    });
    let of = |number: u32| Ipv4Addr::from(u32::from(SOURCES) + number);
    lab.client.within(|| {
        for number in 0..sources * each {
            // By a port of its own: to look for a free one takes ever longer.
            let port = u16::try_from(FIRST_PORT + number / sources).expect("a port");
            let client = connect(of(number % sources), port, address).expect("a connection");
            // Gone without a packet.
            setsockopt(&client, sockopt::TcpRepair, &1).expect("repair mode");
        }
    });
    // As the kernel has them: a handshake may fail on a busy machine.
    let open = lab.server.output("ss -Htn state established sport = :80").lines().count();
    println!("{open} of {} are open", sources * each);
    let all = f64::from(u32::try_from(open).expect("few"));
    // What tests read of its log is no part of what it does elsewhere.
    let daemon = lab.daemon_with(CTKEEP, &[], &[("CTKEEP_LOG", "info")]);
    let (mut took, mut cost) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        // What following the rules may cost is earned again.
        thread::sleep(Duration::from_secs(if round == 1 { 2 } else { 30 }));
        let (before, worked) = (shown(&lab), traffic::cpu_time(daemon.pid()));
        lab.server.feed("iptables-restore", &rules);
        let begun = Instant::now();
        wait_for("all of them shown", SOON, || shown(&lab) >= before + all);
        took.push(milliseconds(begun.elapsed()));
        cost.push(milliseconds(traffic::cpu_time(daemon.pid()) - worked));
    }
    let name = format!("{} connections of {sources} sources", sources * each);
    let median = report::quantile(&took, 0.5);
    match kernel {
        Some(kernel) => report::figure_beside(&name, median, "ms", median / kernel, target),
        None => report::figure(&name, median, "ms", target),
    }
    report::figure("  the slowest", report::quantile(&took, 1.0), "ms", Target::None);
    // What it takes beside other work says little of the program.
    report::figure("  processor time", report::quantile(&cost, 0.5), "ms", Target::None);
    thread::sleep(Duration::from_secs(1));
    let tried = (0..sources).step_by(usize::try_from(sources).expect("few").div_ceil(TRIED));
    // By a port that has no connection: a SYN by one that has gets an ACK, the RST that answers it closes
    // the connection, and the next SYN rightly takes its place.
    let unused = u16::try_from(FIRST_PORT + each).expect("a port")..u16::MAX;
    let let_in = lab.client.within(|| {
        // Held until the end, so that each of them is one that its limit lacks.
        let of_one = |source| unused.clone().map_while(move |port| connect(source, port, address));
        let held: Vec<_> = tried.flat_map(|number| of_one(of(number))).collect();
        held.len()
    });
    let let_in = f64::from(u32::try_from(let_in).expect("few"));
    report::figure("  let in beyond the limit", let_in, "", Target::AtMost(0.0));
    drop((daemon, listener));
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// Connections that were shown to their limit so far.
fn shown(lab: &Lab) -> f64 {
    let answer = http::ask(&lab.server, "127.0.0.1:9815", "GET /metrics", "").expect("metrics");
    let name = "ctkeep_actions_total{action=\"recount\"}";
    http::samples(&answer.body).get(name).copied().expect("a metric")
}

/// From this address and port; `None` where it is refused.
fn connect(source: Ipv4Addr, port: u16, to: SocketAddr) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&SocketAddr::from((source, port)).into()).expect("its address");
    let connected = socket.connect_timeout(&to.into(), Duration::from_millis(200));
    connected.ok().map(|()| socket.into())
}
