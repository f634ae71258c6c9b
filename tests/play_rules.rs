//! Random rule sets: what the play of a SYN says against what the running kernel does with one.
//!
//! Each rule set is loaded by the administrator's own tool into a namespace of the test. Ten sources
//! then open connections, one round after the other, and the play, which keeps count of what it
//! lets in, must never say *yes* or *no* where the kernel says the opposite.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod lab;
#[path = "lab/random_rules.rs"]
mod random_rules;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use ctkeep::firewall::Ruleset;
use ctkeep::firewall::packet::{Interface, Syn};
use ctkeep::firewall::play::{Certainty, Counts, Hit, LimitAt, Player};
use ctkeep::flow::Endpoint;
use lab::{Namespace, Server};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use random_rules::{PORTS, Random, SERVERS, SOURCES};
use socket2::{Domain, SockAddr, Socket, Type};

/// Rule sets of each kind.
const RULE_SETS: u64 = 150;
/// SYNs of each source, one after another.
const ROUNDS: usize = 3;
/// What is let in is there at once; what is dropped is never.
const QUIET: Duration = Duration::from_millis(6);
/// A list is swept once a jiffy (10 ms at 100 Hz).
const JIFFY: Duration = Duration::from_millis(11);
/// For a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(5);

/// A server with the rules, and clients with addresses of their own.
struct Stage {
    server: Namespace,
    clients: Namespace,
}

impl Stage {
    fn new() -> Option<Self> {
        if !lab::require() {
            return None;
        }
        let (server, clients) = (Namespace::new().ok()?, Namespace::new().ok()?);
        let cable = format!(
            "link set lo up\n\
             link add eth0 type veth peer name eth0 netns {}\n\
             link set eth0 up\n",
            clients.path()
        );
        server.feed("ip -batch -", &cable);
        clients.feed("ip -batch -", "link set lo up\nlink set eth0 up\n");
        let addresses = |all: &[Ipv4Addr]| {
            all.iter()
                .map(|address| format!("addr add {address}/32 dev eth0\n"))
                .collect::<String>()
        };
        let routes = "route add 198.51.100.0/24 dev eth0\nroute add 203.0.113.0/24 dev eth0\n";
        server.feed("ip -batch -", &format!("{}{routes}", addresses(&SERVERS)));
        let route = "route add 192.0.2.0/24 dev eth0\n";
        clients.feed("ip -batch -", &format!("{}{route}", addresses(&SOURCES)));
        Some(Self { server, clients })
    }
}

/// A try of one source, and its socket.
struct Try {
    source: Ipv4Addr,
    to: SocketAddrV4,
    socket: Socket,
}

impl Try {
    /// A SYN on its way.
    fn open(source: Ipv4Addr, to: SocketAddrV4) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_nonblocking(true).expect("a socket that does not wait");
        socket.bind(&SockAddr::from(SocketAddrV4::new(source, 0))).expect("an address of its own");
        let _ = socket.connect(&SockAddr::from(to));
        Self { source, to, socket }
    }

    fn port(&self) -> u16 {
        let address = self.socket.local_addr().expect("an address");
        address.as_socket().expect("an address of IP").port()
    }

    /// Whether it is connected, or refused, within this time.
    fn is_in(&self, patience: Duration) -> bool {
        let timeout = PollTimeout::try_from(patience).expect("a timeout");
        let fd = self.socket.as_fd();
        let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
        let ready = poll(&mut fds, timeout).expect("poll") > 0;
        ready && self.socket.take_error().expect("an error").is_none()
    }
}

/// A list of a limit, and the key under which it counts.
type Group = (LimitAt, Vec<u8>);

/// What the kernel's lists hold, as far as the play knows.
#[derive(Default)]
struct Lists {
    /// Connections that are open, and how many the list is for: it keeps the number that it was
    /// made with. `None` once something came there of which that cannot be told.
    open: HashMap<Group, Option<(u32, u32)>>,
    /// SYNs of this round that were counted and then dropped: they stay on a list until it is swept
    /// in another jiffy.
    dropped: HashMap<Group, u32>,
    /// How often the SYN that is being played has met a list.
    met: HashMap<Group, u32>,
}

impl Lists {
    /// Whether there is no room for one more; `None` where that hangs on the next sweep.
    fn is_full(&mut self, hit: &Hit) -> Option<bool> {
        let key = (hit.list, hit.group.clone()?);
        let first = (hit.certainty == Certainty::Sure).then_some((0, hit.limit.count));
        let (open, most) = (*self.open.entry(key.clone()).or_insert(first))?;
        let met = self.met.entry(key.clone()).or_default();
        let open = open + *met;
        *met += 1;
        let dropped = self.dropped.get(&key).copied().unwrap_or(0);
        match (open >= most, open + dropped >= most) {
            (true, _) => Some(true),
            (false, true) => None,
            (false, false) => Some(false),
        }
    }

    fn count(&mut self, hits: Vec<Hit>, is_in: bool) {
        for hit in hits {
            let Some(group) = hit.group else { continue };
            let key = (hit.list, group);
            let is_sure = hit.certainty == Certainty::Sure;
            if is_in && hit.counts == Counts::Yes {
                let first = Some((0, hit.limit.count)).filter(|_| is_sure);
                let list = self.open.entry(key).or_insert(first);
                *list = list.map(|(open, most)| (open + 1, most)).filter(|_| is_sure);
            } else {
                *self.dropped.entry(key).or_default() += 1;
            }
        }
    }
}

/// What the play says of a try, with what was let in before.
fn played(player: &Player<'_>, attempt: &Try, lists: &mut Lists) -> (Option<bool>, Vec<Hit>) {
    let to = Endpoint::new(IpAddr::V4(*attempt.to.ip()), attempt.to.port());
    let syn = Syn {
        source_port: Some(attempt.port()),
        interface: Interface::Known("eth0".to_owned(), 2),
        ..Syn::new(IpAddr::V4(attempt.source), to)
    };
    lists.met.clear();
    let play = player.play(&syn, &mut |hit| lists.is_full(hit));
    (play.admitted, play.hits)
}

fn compare(stage: &Stage, server: &mut Server, tool: &str, rules: &str, told: &mut [usize; 3]) {
    stage.server.feed(tool, rules);
    let ruleset = stage.server.within(Ruleset::read);
    assert!(ruleset.unread.is_empty(), "{:?}", ruleset.unread);
    let player = Player::new(&ruleset);
    let mut lists = Lists::default();
    let mut open = Vec::new();
    for round in 0..ROUNDS {
        lists.dropped.clear();
        let tries: Vec<Try> = stage.clients.within(|| {
            let to = |at: usize| {
                SocketAddrV4::new(SERVERS[at % SERVERS.len()], PORTS[at / 2 % PORTS.len()])
            };
            SOURCES.iter().enumerate().map(|(at, source)| Try::open(*source, to(at))).collect()
        });
        let start = Instant::now();
        for attempt in &tries {
            let (admitted, hits) = played(&player, attempt, &mut lists);
            told[match admitted {
                Some(true) => 0,
                Some(false) => 1,
                None => 2,
            }] += 1;
            let patience = match admitted {
                Some(true) => PATIENCE,
                _ => QUIET.saturating_sub(start.elapsed()).max(Duration::from_millis(1)),
            };
            let is_in = attempt.is_in(patience);
            assert!(
                admitted.is_none_or(|said| said == is_in),
                "round {round}, {} to {}: played {admitted:?}, kernel {is_in}\nhits: {hits:?}\n\
                 {rules}",
                attempt.source,
                attempt.to
            );
            lists.count(hits, is_in);
        }
        open.extend(tries);
        thread::sleep(JIFFY);
    }
    for attempt in &open {
        let _ = attempt.socket.set_linger(Some(Duration::ZERO));
    }
    drop(open);
    server.reset_all();
    stage.server.run("conntrack -F");
}

fn half_of_three_hundred(tool: &str, empty: &str, make: fn(&mut Random) -> String) {
    let Some(stage) = Stage::new() else { return };
    let listen: Vec<_> = PORTS.iter().map(|port| format!("0.0.0.0:{port}")).collect();
    let mut server = Server::start(&stage.server, &listen.join(" "));
    let mut told = [0; 3];
    for seed in 0..RULE_SETS {
        let rules = make(&mut Random::new(seed));
        compare(&stage, &mut server, tool, &format!("{empty}{rules}"), &mut told);
    }
    let [yes, no, unknown] = told;
    println!("{tool}: {yes} let in, {no} refused, {unknown} not told");
    assert!(unknown * 10 < yes + no + unknown, "{unknown} of {} not told", yes + no + unknown);
    assert!(yes * 5 > yes + no && no * 5 > yes + no, "one-sided rule sets: {yes} and {no}");
}

#[test]
fn a_play_through_random_nft_rules_says_what_the_kernel_does() {
    half_of_three_hundred("nft -f -", "flush ruleset\n", random_rules::nft);
}

#[test]
fn a_play_through_random_iptables_rules_says_what_the_kernel_does() {
    half_of_three_hundred("iptables-nft-restore", "", random_rules::iptables);
}
