//! A test lab: two throw-away hosts, a real server and a client that forges every packet.
//!
//! It knows nothing about how ctkeep works inside: it drives the binary, sends packets, and looks
//! at the kernel's tables with the administrator's own tools. Everything lives in network
//! namespaces without a name, so all of it vanishes with the test process, however that ends.
//!
//! ```text
//!   lab.client                                   lab.server
//!   eth0 192.0.2.2, 2001:db8::2  ---- veth ----  eth0 192.0.2.1, 2001:db8::1
//!   owns no other address                        routes 198.51.100.0/24, 203.0.113.0/24
//!                                                and 2001:db8:1::/64 through the client
//! ```
//!
//! A [`Peer`] uses an address of the routed networks. No kernel owns it, so no kernel answers for
//! it: what the server receives from it is exactly what the test sends.

// Each test crate uses the part it needs, and `pub` marks what the lab offers to it.
#![allow(dead_code, unused_imports, unreachable_pub)]

mod batch;
mod daemon;
pub mod guests;
pub mod http;
pub mod kernel;
mod namespace;
pub mod neighbour;
pub mod passing;
mod peer;
pub mod process;
pub mod processor;
mod queue;
pub mod rules;
mod segment;
mod server;
mod tables;
mod way;
mod wire;

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

pub use daemon::Daemon;
pub use namespace::Namespace;
use neighbour::Neighbour;
pub use peer::{Peer, RawConn};
pub use queue::Queue;
pub use segment::{
    ACK, FIN, Frame, Kind, PSH, RST, SYN, Segment, with_tcp_options, with_urgent_pointer,
};
pub use server::{Server, serve_if_asked};
pub use tables::{Entry, Socket};
pub use way::Way;
pub use wire::capture;

/// The server's addresses, one a family.
pub const SERVER_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// First of the ports that peers connect from. Each connection of a lab gets one of its own, so
/// that no test meets the remains of an earlier tuple by accident.
const FIRST_CLIENT_PORT: u16 = 20_000;

/// `IPPROTO_MPTCP`
pub const IPPROTO_MPTCP: i32 = 262;

/// Two hosts joined by a cable.
pub struct Lab {
    pub server: Namespace,
    pub client: Namespace,
    next_port: Arc<AtomicU16>,
    /// What makes the server's end of the cable poll, where it takes a program.
    driver: OnceLock<Neighbour>,
}

impl Lab {
    /// Builds a lab, or says on stderr why this machine cannot and returns `None`.
    ///
    /// # Panics
    /// When the machine cannot and `CTKEEP_REQUIRE_KERNEL=1`.
    pub fn new() -> Option<Self> {
        require().then(|| Self::build().unwrap_or_else(|reason| panic!("lab: {reason}")))
    }

    fn build() -> Result<Self, String> {
        let server = Namespace::new()?;
        let client = Namespace::new()?;
        // IPv4 settings of a new namespace are copied from the machine's own. A client that
        // forwards would answer for the addresses that nobody owns with ICMP errors.
        client.try_sysctl("net/ipv4/ip_forward", "0")?;
        client.try_sysctl("net/ipv6/conf/all/forwarding", "0")?;
        // Fixed neighbours and no link-local addresses keep the cable silent: the first SYN of a
        // burst is not queued behind address resolution, and a capture shows only what was asked.
        server.try_feed(
            "ip -batch -",
            &format!(
                "link set lo up\n\
                 link add eth0 address 02:00:00:00:00:01 type veth \
                   peer name eth0 address 02:00:00:00:00:02 netns {}\n\
                 link set eth0 addrgenmode none\n",
                client.path()
            ),
        )?;
        client.try_feed(
            "ip -batch -",
            &format!(
                "link set lo up\n\
                 link set eth0 addrgenmode none\n\
                 {}",
                client_at("eth0")
            ),
        )?;
        server.try_feed("ip -batch -", &server_at("eth0", ""))?;
        // The kernel sets a link up some time after the command; until then packets are lost.
        for end in [&server, &client] {
            wait_for("carrier", Duration::from_secs(20), || {
                end.output("ip -o link show eth0").contains("state UP")
            });
        }
        let next_port = Arc::new(AtomicU16::new(FIRST_CLIENT_PORT));
        Ok(Self { server, client, next_port, driver: OnceLock::new() })
    }

    /// The rule that the whole project is about: at most `above` connections per address.
    pub fn connlimit(&self, port: u16, above: u32) {
        let rule =
            format!("-A INPUT -p tcp --syn --dport {port} -m connlimit --connlimit-above {above}");
        self.server.run(&format!("iptables {rule} --connlimit-mask 32 -j DROP"));
        self.server.run(&format!("ip6tables {rule} --connlimit-mask 128 -j DROP"));
    }

    /// A third host behind the server, reached only by what the server forwards or translates:
    /// a container.
    ///
    /// ```text
    ///   lab.server  cont0 10.0.0.1, fd00::1  ---- veth ----  eth0 10.0.0.2, fd00::2  container
    /// ```
    pub fn container(&self) -> Namespace {
        let container = Namespace::new().expect("namespace of the container");
        self.server.sysctl("net/ipv4/ip_forward", "1");
        self.server.sysctl("net/ipv6/conf/all/forwarding", "1");
        self.server.feed(
            "ip -batch -",
            &format!(
                "link add cont0 address 02:00:00:00:00:03 type veth \
                   peer name eth0 address 02:00:00:00:00:04 netns {}\n\
                 link set cont0 addrgenmode none\n\
                 link set cont0 up\n\
                 addr add 10.0.0.1/24 dev cont0\n\
                 addr add fd00::1/64 dev cont0 nodad\n\
                 neigh add 10.0.0.2 lladdr 02:00:00:00:00:04 dev cont0\n\
                 neigh add fd00::2 lladdr 02:00:00:00:00:04 dev cont0\n",
                container.path()
            ),
        );
        container.feed(
            "ip -batch -",
            "link set lo up\n\
             link set eth0 addrgenmode none\n\
             link set eth0 up\n\
             addr add 10.0.0.2/24 dev eth0\n\
             addr add fd00::2/64 dev eth0 nodad\n\
             neigh add 10.0.0.1 lladdr 02:00:00:00:00:03 dev eth0\n\
             neigh add fd00::1 lladdr 02:00:00:00:00:03 dev eth0\n\
             route add default via 10.0.0.1\n\
             route add default via fd00::1\n",
        );
        container
    }

    /// Starts a server process, for example `serve("[::]:80")` for both families or
    /// `serve("0.0.0.0:80 0.0.0.0:443")` for IPv4 on two ports.
    pub fn serve(&self, listen: &str) -> Server {
        Server::start(&self.server, listen)
    }

    /// A client at `address`, which must belong to one of the routed networks. It talks to the
    /// server's address of the same family.
    pub fn peer(&self, address: &str) -> Peer {
        let source: IpAddr = address.parse().expect("address of a peer");
        let (destination, routed) = match source {
            IpAddr::V4(v4) => {
                (IpAddr::V4(SERVER_V4), matches!(v4.octets(), [198, 51, 100, _] | [203, 0, 113, _]))
            }
            IpAddr::V6(v6) => {
                (IpAddr::V6(SERVER_V6), matches!(v6.segments(), [0x2001, 0xdb8, 1, 0, ..]))
            }
        };
        assert!(routed, "no route from the server to a peer at {source}");
        Peer::new(&self.client, source, destination, &self.next_port)
    }

    /// One that talks to another address.
    pub fn peer_to(&self, source: &str, destination: &str) -> Peer {
        let [source, destination] =
            [source, destination].map(|address| address.parse().expect("an address"));
        Peer::new(&self.client, source, destination, &self.next_port)
    }

    /// A client on the server's own link, at an address that has a meaning there alone.
    pub fn link_local_peer(&self) -> Peer {
        let [server, peer] = [1, 7].map(|last| Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last));
        let at = |last, server, mac| {
            format!(
                "addr add fe80::{last}/64 dev eth0 nodad\n\
                 neigh add {server} lladdr 02:00:00:00:00:{mac} dev eth0\n"
            )
        };
        self.server.feed("ip -batch -", &at(1, peer, "02"));
        self.client.feed("ip -batch -", &at(2, server, "01"));
        Peer::new(&self.client, peer.into(), server.into(), &self.next_port)
    }

    /// What the server's TCP has counted.
    pub fn counter(&self, name: &str) -> u64 {
        let line = self.server.output(&format!("nstat -asz {name}"));
        let value = line.split_whitespace().skip_while(|word| *word != name).nth(1);
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{name}: {line}"))
    }

    /// Sends the client's FIN and waits until the server's socket has it, hence is in CLOSE_WAIT.
    pub fn half_close(&self, conn: &mut RawConn) {
        conn.fin();
        wait_for("CLOSE_WAIT", Duration::from_secs(5), || {
            self.socket_state(conn).as_deref() == Some("close-wait")
        });
    }

    /// What reaches the client's end of the cable while `action` runs: TCP and ICMP, without
    /// neighbour discovery and multicast chatter.
    pub fn client_sees(&self, action: impl FnOnce()) -> Vec<Frame> {
        wire::capture(&self.client, action)
    }

    /// Starts `program` (the ctkeep binary) in the server's namespace and waits until it has
    /// written a line with the word `ready` to stderr.
    pub fn daemon(&self, program: &str, args: &[&str]) -> Daemon {
        self.daemon_with(program, args, &[])
    }

    /// As [`Self::daemon`], with variables added to its environment.
    pub fn daemon_with(
        &self,
        program: &str,
        args: &[&str],
        environment: &[(&str, &str)],
    ) -> Daemon {
        Daemon::start(&self.server, program, args, environment)
    }

    /// Runs `program` (the ctkeep binary) to its end in the server's namespace. Returns the exit
    /// code (-1 for a signal), stdout and stderr.
    pub fn ctkeep(&self, program: &str, args: &[&str]) -> (i32, String, String) {
        daemon::run_to_end(&self.server, program, args)
    }
}

/// The server's end: its addresses at a device, in a VRF by the words that `ip route` has for it.
fn server_at(device: &str, vrf: &str) -> String {
    format!(
        "link set {device} up\n\
         addr add 192.0.2.1/24 dev {device}\n\
         addr add 2001:db8::1/64 dev {device} nodad\n\
         neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev {device}\n\
         neigh replace 2001:db8::2 lladdr 02:00:00:00:00:02 dev {device}\n\
         route replace 198.51.100.0/24 via 192.0.2.2 {vrf}\n\
         route replace 203.0.113.0/24 via 192.0.2.2 {vrf}\n\
         route replace 2001:db8:1::/64 via 2001:db8::2 {vrf}\n"
    )
}

fn client_at(device: &str) -> String {
    format!(
        "link set {device} up\n\
         addr add 192.0.2.2/24 dev {device}\n\
         addr add 2001:db8::2/64 dev {device} nodad\n\
         neigh replace 192.0.2.1 lladdr 02:00:00:00:00:01 dev {device}\n\
         neigh replace 2001:db8::1 lladdr 02:00:00:00:00:01 dev {device}\n"
    )
}

/// Whether this machine can run the lab. Says why not on stderr, with a running number.
///
/// # Panics
/// When it cannot and `CTKEEP_REQUIRE_KERNEL=1`: in CI a missing feature is a failure.
pub fn require() -> bool {
    static CAPABLE: OnceLock<Result<(), String>> = OnceLock::new();
    let Err(reason) = CAPABLE.get_or_init(probe) else {
        return true;
    };
    skip(reason);
    false
}

/// Says on stderr why the test is skipped, with a running number.
///
/// # Panics
/// When `CTKEEP_REQUIRE_KERNEL` is `1` or `all`.
pub fn skip(reason: &str) {
    skip_unless(&["1", "all"], reason);
}

/// The same for what a kernel may well be built without.
///
/// # Panics
/// When `CTKEEP_REQUIRE_KERNEL=all`, as in the guests of `make test-kernels`.
pub fn skip_rare(reason: &str) {
    skip_unless(&["all"], reason);
}

fn skip_unless(required: &[&str], reason: &str) {
    static SKIPPED: AtomicUsize = AtomicUsize::new(0);
    let value = std::env::var("CTKEEP_REQUIRE_KERNEL").unwrap_or_default();
    assert!(
        !required.contains(&value.as_str()),
        "required (CTKEEP_REQUIRE_KERNEL={value}) and impossible: {reason}"
    );
    let number = SKIPPED.fetch_add(1, Ordering::Relaxed) + 1;
    let test = thread::current().name().unwrap_or("main").to_owned();
    let line = format!("SKIPPED {number}: {test}: {reason}\n");
    // Written to the descriptor itself: the test harness swallows what the print macros write in
    // a test that passes, and a skip must be seen.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Tries once everything that the tests take for granted.
fn probe() -> Result<(), String> {
    let lab = Lab::build()?;
    for family in ["iptables", "ip6tables"] {
        lab.server.try_run(&format!(
            "{family} -A INPUT -p tcp --syn -m connlimit --connlimit-above 9 -j DROP"
        ))?;
    }
    lab.server.try_run("nft list ruleset")?;
    lab.server.try_run("conntrack -L -p tcp -o id,extended")?;
    lab.server.try_run("ss -Htan")?;
    Ok(())
}

/// What shows a program another time of the wall's clock, by the offset in this file (`+400d`).
pub fn faketime(clock: &str) -> [(&'static str, &str); 4] {
    [
        ("LD_PRELOAD", "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"),
        ("FAKETIME_TIMESTAMP_FILE", clock),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("FAKETIME_NO_CACHE", "1"),
    ]
}

/// Polls `condition` until it holds.
///
/// # Panics
/// When it does not hold within `timeout`; the message names `what` was awaited.
pub fn wait_for(what: &str, timeout: Duration, condition: impl FnMut() -> bool) {
    assert!(holds_within(timeout, condition), "no {what} in {timeout:?}");
}

/// Polls `condition` until it holds; false when it does not within `timeout`.
pub fn holds_within(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if condition() {
            return true;
        }
        let waited = start.elapsed();
        if waited >= timeout {
            return false;
        }
        // To look costs more than to wait, most of all in an emulated machine.
        thread::sleep(Duration::from_millis(5).max(waited / 10));
    }
}
