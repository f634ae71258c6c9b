//! Random rule sets: what the play of a SYN says against what the running kernel does with one.
//!
//! Each rule set is loaded by the administrator's own tool into a namespace of the test. Ten sources
//! then open connections, one round after the other, and the play, which keeps count of what it
//! lets in, must never say *yes* or *no* where the kernel says the opposite.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod random_rules;
mod vocabulary;

use crate::lab;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Namespace, Server};
use ctkeep::firewall::packet::{Interface, Syn};
use ctkeep::firewall::play::{Certainty, Counts, Hit, LimitAt, Player};
use ctkeep::firewall::{Family, Ruleset, parse_saved};
use ctkeep::flow::Endpoint;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use random_rules::{PORTS, Random, SERVERS, SOURCES};
use socket2::{Domain, SockAddr, Socket, Type};

/// Seeds of each tool: 150 rule sets, and those that it refuses.
const RULE_SETS: u64 = 175;
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
        let [server_mac, client_mac] = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
        let cable = format!(
            "link set lo up\n\
             link add eth0 address {server_mac} type veth peer name eth0 address {client_mac} netns {}\n\
             link set eth0 up\n",
            clients.path()
        );
        server.feed("ip -batch -", &cable);
        clients.feed("ip -batch -", "link set lo up\nlink set eth0 up\n");
        // Known neighbours: random rules drop questions for them.
        let six =
            |all: &[Ipv4Addr]| all.iter().map(|address| random_rules::six(*address)).collect();
        let (servers, sources): (Vec<_>, Vec<_>) = (six(&SERVERS), six(&SOURCES));
        let lines = |own: &[Ipv4Addr], own6: &[Ipv6Addr], others: &[Ipv6Addr], mac: &str| {
            let mut lines: Vec<String> =
                own.iter().map(|address| format!("addr add {address}/32 dev eth0")).collect();
            lines.extend(own6.iter().map(|it| format!("addr add {it}/64 dev eth0 nodad")));
            let neighbour = |it| format!("neigh add {it} lladdr {mac} dev eth0 nud permanent");
            lines.extend(others.iter().map(neighbour));
            lines.join("\n") + "\n"
        };
        let routes = "route add 198.51.100.0/24 dev eth0\nroute add 203.0.113.0/24 dev eth0\n";
        let of_server = lines(&SERVERS, &servers, &sources, client_mac);
        server.feed("ip -batch -", &format!("{of_server}{routes}"));
        let of_clients = lines(&SOURCES, &sources, &servers, server_mac);
        clients.feed("ip -batch -", &format!("{of_clients}route add 192.0.2.0/24 dev eth0\n"));
        Some(Self { server, clients })
    }

    fn serve(&self) -> Server {
        let listen: Vec<_> = PORTS.iter().map(|port| format!("[::]:{port}")).collect();
        Server::start(&self.server, &listen.join(" "))
    }

    /// A SYN of each source on its way.
    fn open(&self, families: &[bool]) -> Vec<Try> {
        let to = |at: usize, is_ipv4: bool| {
            let port = PORTS[at / 2 % PORTS.len()];
            SocketAddr::new(address(SERVERS[at % SERVERS.len()], is_ipv4), port)
        };
        let of = |is_ipv4: &bool| {
            let is_ipv4 = *is_ipv4;
            let all = SOURCES.iter().enumerate();
            all.map(move |(at, source)| Try::open(address(*source, is_ipv4), to(at, is_ipv4)))
        };
        self.clients.within(|| families.iter().flat_map(of).collect())
    }

    /// As if there had been none of them.
    fn close(&self, all: Vec<Try>, server: &mut Server) {
        for attempt in &all {
            let _ = attempt.socket.set_linger(Some(Duration::ZERO));
        }
        drop(all);
        server.reset_all();
        self.server.run("conntrack -F");
    }
}

/// The same host's by either family.
fn address(address: Ipv4Addr, is_ipv4: bool) -> IpAddr {
    if is_ipv4 { address.into() } else { random_rules::six(address).into() }
}

/// A try of one source, and its socket.
struct Try {
    source: IpAddr,
    to: SocketAddr,
    socket: Socket,
}

impl Try {
    /// A SYN on its way.
    fn open(source: IpAddr, to: SocketAddr) -> Self {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).expect("a socket");
        socket.set_nonblocking(true).expect("a socket that does not wait");
        socket.bind(&SockAddr::from(SocketAddr::new(source, 0))).expect("an address of its own");
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

/// How long to wait for a try: what is let in is there at once.
fn patience(said: Option<bool>, start: Instant) -> Duration {
    match said {
        Some(true) => PATIENCE,
        _ => QUIET.saturating_sub(start.elapsed()).max(Duration::from_millis(1)),
    }
}

/// A list of a limit, and the key under which it counts.
type Group = (LimitAt, Vec<u8>);

/// Connections on a list.
#[derive(Clone, Copy)]
struct List {
    /// So many at least.
    open: u32,
    /// So many more where each that met it twice is on it twice: where no jiffy passed between.
    doubled: u32,
    /// The number that it was made with, and keeps.
    most: u32,
}

impl List {
    fn of(hit: &Hit) -> Option<Self> {
        let is_sure = hit.certainty == Certainty::Sure;
        is_sure.then_some(Self { open: 0, doubled: 0, most: hit.limit.count })
    }
}

/// What the kernel's lists hold, as far as the play knows.
#[derive(Default)]
struct Lists {
    /// Open connections; `None` once something came there of which that cannot be told.
    open: HashMap<Group, Option<List>>,
    /// SYNs of this round that were counted and then dropped: they stay on a list until it is swept
    /// in another jiffy.
    dropped: HashMap<Group, u32>,
    /// How often the SYN that is being played has met a list.
    met: HashMap<Group, u32>,
    /// Lists that it was the first to meet.
    new: Vec<Group>,
    /// One of them may have refused it, or not.
    is_unsure: bool,
}

impl Lists {
    /// Whether there is no room for one more; `None` where that hangs on the next sweep.
    fn is_full(&mut self, hit: &Hit) -> Option<bool> {
        let key = (hit.list, hit.group.clone()?);
        let new = &mut self.new;
        let list = (*self.open.entry(key.clone()).or_insert_with(|| {
            new.push(key.clone());
            List::of(hit)
        }))?;
        let met = self.met.entry(key.clone()).or_default();
        let dropped = self.dropped.get(&key).copied().unwrap_or(0) + list.doubled + *met;
        *met += 1;
        match (list.open >= list.most, list.open + dropped >= list.most) {
            (true, _) => Some(true),
            (false, true) => {
                self.is_unsure = true;
                None
            }
            (false, false) => Some(false),
        }
    }

    fn count(&mut self, hits: &[Hit], admitted: Option<bool>, is_in: bool) {
        if !is_in && (self.is_unsure || admitted.is_none()) {
            // Where it was dropped is open: another may be the first there, by another number.
            for key in self.new.drain(..) {
                self.open.insert(key, None);
            }
        }
        let mut met = HashSet::new();
        for hit in hits {
            let Some(group) = hit.group.clone() else { continue };
            let key = (hit.list, group);
            if !is_in || hit.counts != Counts::Yes {
                *self.dropped.entry(key).or_default() += 1;
                continue;
            }
            let list = self.open.entry(key.clone()).or_insert_with(|| List::of(hit));
            match list {
                Some(list) if hit.certainty == Certainty::Sure => {
                    let is_first = met.insert(key);
                    list.open += u32::from(is_first);
                    list.doubled += u32::from(!is_first);
                }
                other => *other = None,
            }
        }
    }
}

/// What the play says of a try, with what was let in before.
fn played(player: &Player<'_>, attempt: &Try, lists: &mut Lists) -> (Option<bool>, Vec<Hit>) {
    let to = Endpoint::new(attempt.to.ip(), attempt.to.port());
    let syn = Syn {
        source_port: Some(attempt.port()),
        interface: Interface::Known("eth0".to_owned(), 2),
        ..Syn::new(attempt.source, to)
    };
    lists.met.clear();
    lists.new.clear();
    lists.is_unsure = false;
    let play = player.play(&syn, &mut |hit| lists.is_full(hit));
    (play.admitted(), play.hits)
}

/// What was read of the rules, and what came of it: let in, refused, not told.
struct Reader {
    name: &'static str,
    told: [usize; 3],
}

/// Plays the same SYNs through the rules as each reader has them, and through the kernel.
fn compare(
    stage: &Stage,
    server: &mut Server,
    kind: Kind,
    rules: &str,
    rounds: usize,
    readers: &mut [Reader],
) {
    let ruleset = stage.server.within(Ruleset::read);
    assert!(ruleset.unread.is_empty(), "{:?}", ruleset.unread);
    let saved = kind.save.map(|tool| stage.server.output(tool)).unwrap_or_default();
    let saved = Ruleset { chains: parse_saved(&saved, kind.family), ..Ruleset::default() };
    let mut players: Vec<_> = [&ruleset, &saved]
        .into_iter()
        .zip(readers)
        .map(|(rules, reader)| (Player::new(rules), Lists::default(), reader))
        .collect();
    let mut open = Vec::new();
    for round in 0..rounds {
        players.iter_mut().for_each(|(_, lists, _)| lists.dropped.clear());
        let tries = stage.open(kind.are_ipv4);
        let start = Instant::now();
        for attempt in &tries {
            let plays: Vec<_> = players
                .iter_mut()
                .map(|(player, lists, _)| played(player, attempt, lists))
                .collect();
            let is_in = attempt.is_in(patience(plays[0].0, start));
            for ((admitted, hits), (_, lists, reader)) in plays.into_iter().zip(&mut players) {
                assert!(
                    admitted.is_none_or(|said| said == is_in),
                    "round {round}, {} to {}: by the {} played {admitted:?}, kernel {is_in}\n\
                     hits: {hits:?}\n{rules}",
                    attempt.source,
                    attempt.to,
                    reader.name,
                );
                reader.told[match admitted {
                    Some(true) => 0,
                    Some(false) => 1,
                    None => 2,
                }] += 1;
                lists.count(&hits, admitted, is_in);
            }
        }
        open.extend(tries);
        thread::sleep(JIFFY);
    }
    stage.close(open, server);
}

/// Makes rule sets, and how they are loaded.
#[derive(Clone, Copy)]
struct Kind {
    tool: &'static str,
    /// What takes away the rules before.
    empty: &'static str,
    /// Prints them as text, where there is a reader of that.
    save: Option<&'static str>,
    /// Of the text.
    family: Family,
    /// Families of which connections are opened.
    are_ipv4: &'static [bool],
    make: fn(&mut Random) -> String,
}

const NFT: Kind = Kind {
    tool: "nft -f -",
    empty: "flush ruleset\n",
    save: None,
    family: Family::Inet,
    are_ipv4: &[true, false],
    make: random_rules::nft,
};
const IPTABLES: Kind = Kind {
    tool: "iptables-nft-restore",
    empty: "",
    save: Some("iptables-nft-save"),
    family: Family::Ip,
    are_ipv4: &[true],
    make: random_rules::iptables,
};
const IP6TABLES: Kind = Kind {
    tool: "ip6tables-nft-restore",
    save: Some("ip6tables-nft-save"),
    family: Family::Ip6,
    are_ipv4: &[false],
    make: random_rules::ip6tables,
    ..IPTABLES
};

/// The kernel's own list, and the text of the save program.
fn readers(kind: Kind) -> Vec<Reader> {
    let names = std::iter::once("kernel's list").chain(kind.save);
    names.map(|name| Reader { name, told: [0; 3] }).collect()
}

fn play(kind: Kind, seeds: Range<u64>) {
    let Some(stage) = Stage::new() else { return };
    let mut server = stage.serve();
    let mut readers = readers(kind);
    let (all, mut refused) = (seeds.end - seeds.start, 0);
    for seed in seeds {
        let rules = (kind.make)(&mut Random::new(seed));
        let rules = format!("{}# seed {seed}\n{rules}", kind.empty);
        // Some matches exclude each other, and the tool says so.
        match stage.server.try_feed(kind.tool, &rules) {
            Ok(_) => compare(&stage, &mut server, kind, &rules, ROUNDS, &mut readers),
            Err(_) => refused += 1,
        }
    }
    assert!(refused * 2 < all, "{refused} of {all} rule sets are none to {}", kind.tool);
    let all = all - refused;
    for Reader { name, told: [yes, no, unknown] } in readers {
        println!("{name}, {all} rule sets: {yes} let in, {no} refused, {unknown} not told");
        assert!(unknown * 10 < yes + no + unknown, "{unknown} of {} not told", yes + no + unknown);
        assert!(yes * 5 > yes + no && no * 5 > yes + no, "one-sided rule sets: {yes} and {no}");
    }
}

#[test]
fn a_play_through_random_nft_rules_says_what_the_kernel_does() {
    play(NFT, 0..RULE_SETS);
}

#[test]
fn a_play_through_random_iptables_rules_says_what_the_kernel_does() {
    play(IPTABLES, 0..RULE_SETS / 2);
}

#[test]
fn a_play_through_random_ip6tables_rules_says_what_the_kernel_does() {
    play(IP6TABLES, RULE_SETS / 2..RULE_SETS);
}

/// Others than above, as many as `CTKEEP_RULE_SETS` says.
fn many() -> Range<u64> {
    let all = std::env::var("CTKEEP_RULE_SETS").ok().and_then(|all| all.parse().ok());
    let first = std::env::var("CTKEEP_RULE_SEED").ok().and_then(|seed| seed.parse().ok());
    let first = first.unwrap_or(RULE_SETS);
    first..first + all.unwrap_or(3000)
}

#[test]
#[ignore = "minutes: make play-test"]
fn the_same_for_thousands_of_nft_rules() {
    play(NFT, many());
}

#[test]
#[ignore = "minutes: make play-test"]
fn the_same_for_thousands_of_iptables_rules() {
    play(IPTABLES, many());
}

#[test]
#[ignore = "minutes: make play-test"]
fn the_same_for_thousands_of_ip6tables_rules() {
    play(IP6TABLES, many());
}

/// Every match that the tool and the kernel take; those that they do not are named.
fn whole_vocabulary(kind: Kind, told: &[&str], open: &[&str], rules: fn(&str) -> String) {
    let Some(stage) = Stage::new() else { return };
    let mut server = stage.serve();
    let mut all = readers(kind);
    let (mut unknown, mut not_told) = (Vec::new(), Vec::new());
    for (text, is_told) in told.iter().map(|t| (t, true)).chain(open.iter().map(|t| (t, false))) {
        let rules = rules(text);
        if let Err(why) = stage.server.try_feed(kind.tool, &rules) {
            unknown.push(format!("{text}: {}", why.lines().next().unwrap_or_default()));
            continue;
        }
        let before: Vec<_> = all.iter().map(|reader| reader.told[2]).collect();
        compare(&stage, &mut server, kind, &rules, 1, &mut all);
        let open = |(reader, before): (&Reader, usize)| reader.told[2] > before;
        if is_told && all.iter().zip(before).any(open) {
            not_told.push(*text);
        }
    }
    for Reader { name, told: [yes, no, unknown] } in all {
        println!("{name}: {yes} let in, {no} refused, {unknown} not told");
    }
    println!("not here: {unknown:#?}");
    assert!(not_told.is_empty(), "not told: {not_told:#?}");
    assert!(unknown.len() * 5 < told.len() + open.len(), "too few: {unknown:#?}");
}

#[test]
fn every_match_of_nft_is_played_as_the_kernel_answers_it() {
    whole_vocabulary(NFT, vocabulary::NFT_TOLD, vocabulary::NFT_OPEN, |text| {
        format!(
            "flush ruleset\ntable inet fw {{ chain input {{\n\
             type filter hook input priority 0;\ntcp flags & (syn|ack) != syn accept\n\
             {text} drop\n}}\n}}\n"
        )
    });
}

#[test]
fn every_match_of_ipv6_is_played_as_the_kernel_answers_it() {
    whole_vocabulary(NFT, vocabulary::NFT_OF_IPV6, &[], |text| {
        format!(
            "flush ruleset\ntable inet fw {{ chain input {{\n\
             type filter hook input priority 0;\ntcp flags & (syn|ack) != syn accept\n\
             {text} drop\n}}\n}}\n"
        )
    });
}

/// What is read of an entry where there is none.
#[test]
fn every_match_of_an_entry_is_played_for_an_untracked_packet() {
    let told: Vec<_> =
        vocabulary::NFT_TOLD.iter().filter(|text| text.contains("ct ")).copied().collect();
    assert!(told.len() > 10, "{told:?}");
    whole_vocabulary(NFT, &told, &[], |text| {
        format!(
            "flush ruleset\ntable inet fw {{ chain raw {{\n\
             type filter hook prerouting priority raw;\nnotrack\n}}\n\
             chain input {{\ntype filter hook input priority 0;\n\
             tcp flags & (syn|ack) != syn accept\n{text} drop\n}}\n}}\n"
        )
    });
}

#[test]
fn every_match_of_iptables_is_played_as_the_kernel_answers_it() {
    whole_vocabulary(IPTABLES, vocabulary::XT_TOLD, vocabulary::XT_OPEN, |text| {
        format!(
            "*filter\n:INPUT ACCEPT [0:0]\n\
                 -A INPUT -p tcp -m tcp ! --tcp-flags SYN,ACK SYN -j ACCEPT\n\
                 -A INPUT {text} -j DROP\nCOMMIT\n"
        )
    });
}
