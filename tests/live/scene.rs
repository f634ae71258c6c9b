//! The stage of the live tests: a limit of three, a server that holds what it gets, one client,
//! and ctkeep or not.

use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use crate::lab::{Daemon, Lab, Peer, RawConn, Server, wait_for};

/// The program under test.
pub const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");

pub const LIMIT: usize = 3;
pub const TRIES: usize = 10;
pub const PORT: u16 = 80;
pub const CLIENT: &str = "198.51.100.7";

/// For what takes milliseconds, or one sweep, unless the machine is overloaded.
pub const SOON: Duration = Duration::from_secs(60);

/// What limits the client.
#[derive(Clone, Copy, Debug)]
pub enum Limiter {
    /// `iptables -m connlimit --syn`, nothing before it.
    Connlimit,
    /// `ct count` in an nft dynamic set, which throws closed connections out by itself, once a
    /// second.
    NftSet,
    /// The usual strict ruleset: invalid packets dropped, established ones accepted, and only
    /// then the limit.
    Strict,
    /// None, and no other rule that would need conntrack.
    Nothing,
}

impl Limiter {
    fn install(self, lab: &Lab) {
        match self {
            Self::Connlimit => lab.connlimit(PORT, 3),
            Self::NftSet => {
                let rules = "table inet scene {
                    set v4 { type ipv4_addr; size 65535; flags dynamic; }
                    set v6 { type ipv6_addr; size 65535; flags dynamic; }
                    chain input {
                        type filter hook input priority 0;
                        tcp dport 80 tcp flags & (syn | ack) == syn \
                            add @v4 { ip saddr ct count over 3 } drop
                        tcp dport 80 tcp flags & (syn | ack) == syn \
                            add @v6 { ip6 saddr ct count over 3 } drop
                    }
                }";
                lab.server.feed("nft -f -", rules);
            }
            Self::Strict => {
                let rules = [
                    // The probe of `Peer::open_promptly`.
                    "-A INPUT -p tcp --dport 1 -j ACCEPT",
                    "-A INPUT -m conntrack --ctstate INVALID -j DROP",
                    "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                    "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP",
                    "-A INPUT -p tcp --syn --dport 80 -m conntrack --ctstate NEW -j ACCEPT",
                    "-P INPUT DROP",
                ];
                for rule in rules {
                    lab.server.run(&format!("iptables {rule}"));
                    let mask = "--connlimit-mask 128 --connlimit-above";
                    let rule = rule.replace("--connlimit-above", mask);
                    lab.server.run(&format!("ip6tables {rule}"));
                }
            }
            Self::Nothing => {}
        }
    }
}

pub struct Scene {
    pub lab: Lab,
    pub server: Server,
    pub peer: Peer,
    pub daemon: Option<Daemon>,
}

impl Scene {
    pub fn new(limiter: Limiter) -> Option<Self> {
        Self::with_source(limiter, CLIENT)
    }

    pub fn with_source(limiter: Limiter, source: &str) -> Option<Self> {
        let lab = Lab::new()?;
        // Ten seconds by default: a busy machine may need more to see what becomes of it.
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "60");
        limiter.install(&lab);
        let server = lab.serve("[::]:80");
        let peer = lab.peer(source);
        Some(Self { lab, server, peer, daemon: None })
    }

    /// Starts `ctkeep run` with these arguments.
    pub fn guard(&mut self, args: &[&str]) {
        self.daemon = Some(self.lab.daemon(CTKEEP, args));
    }

    /// Whether `ctkeep run` has been started.
    pub fn is_guarded(&self) -> bool {
        self.daemon.is_some()
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("a guarded scene")
    }

    /// From now on ctkeep does nothing, whatever happens.
    pub fn freeze(&self) {
        if let Some(daemon) = &self.daemon {
            daemon.stop();
        }
    }

    pub fn thaw(&self) {
        if let Some(daemon) = &self.daemon {
            daemon.cont();
        }
    }

    /// Runs the program to its end in the server's namespace: exit code, stdout, stderr.
    pub fn ctkeep(&self, args: &[&str]) -> (i32, String, String) {
        self.lab.ctkeep(CTKEEP, args)
    }

    /// Tries connections one and all; returns those that were admitted.
    pub fn open(&self, count: usize) -> Vec<RawConn> {
        self.peer.open_promptly(PORT, count)
    }

    /// How many of ten tries are admitted now.
    pub fn admitted(&self) -> usize {
        self.open(TRIES).len()
    }

    /// Opens connections up to the limit.
    pub fn established(&self) -> Vec<RawConn> {
        // A limiter keeps a connection that it has just added, entry or no entry, for two ticks of
        // the kernel's clock (`find_or_evict()` in nf_conncount.c).
        const TWO_TICKS: Duration = Duration::from_millis(30);
        let conns = self.peer.hold(PORT, LIMIT);
        thread::sleep(TWO_TICKS);
        conns
    }

    /// Opens connections up to the limit and half-closes them; returns when nothing more is
    /// under way: each entry has seen the server's answer to the FIN.
    pub fn half_closed(&self) -> Vec<RawConn> {
        let mut conns = self.established();
        for conn in &mut conns {
            conn.fin();
        }
        for conn in &mut conns {
            assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
        }
        conns
    }

    /// How often ctkeep has told of this action for this connection.
    pub fn told(&self, action: &str, conn: &RawConn) -> usize {
        let client = format!("{} ", conn.client);
        let log = self.daemon().log();
        log.lines().filter(|line| line.contains(action) && line.contains(&client)).count()
    }

    /// Waits until ctkeep has told of this action for each of these connections; without ctkeep
    /// until conntrack has done its worst: the entry is gone, closed, or runs the wrong way.
    pub fn await_repair(&self, action: &str, conns: &[RawConn]) {
        for conn in conns {
            if self.daemon.is_some() {
                wait_for(action, SOON, || self.told(action, conn) > 0);
            } else {
                self.await_forgotten(conn);
            }
        }
    }

    /// Waits until the limiter has no reason to count this connection any more.
    pub fn await_forgotten(&self, conn: &RawConn) {
        wait_for("closed or absent entry", SOON, || !self.is_counted(conn));
    }

    /// Whether the entry is one that a limiter counts for the client.
    pub fn is_counted(&self, conn: &RawConn) -> bool {
        let state = self.lab.entry_state(conn);
        state.is_some_and(|state| state != "CLOSE" && state != "TIME_WAIT")
    }

    /// Whether ctkeep hides packets of the client from conntrack.
    pub fn hides(&self) -> bool {
        // The names of the sets are those of the table that does it; a watched tuple is in another.
        let rules = self.lab.server.output("nft list ruleset");
        let sets =
            rules.split("set ").filter(|set| set.starts_with("fins") || set.starts_with("rsts"));
        sets.into_iter().any(|set| set.contains(CLIENT))
    }

    /// Opens connections one after another, as many as are admitted but at most ten; each is
    /// half-closed and then followed by `trick`, which returns when ctkeep has had its say.
    ///
    /// The first refusal is followed by all the remaining tries at once, which must fail too.
    pub fn attack(&self, trick: impl Fn(&Self, &mut RawConn)) -> Vec<RawConn> {
        let mut admitted = Vec::new();
        for done in 0..TRIES {
            let Some(mut conn) = self.open(1).pop() else {
                let late = self.open(TRIES - done - 1).len();
                assert_eq!(late, 0, "admitted after a refusal");
                break;
            };
            self.lab.half_close(&mut conn);
            trick(self, &mut conn);
            admitted.push(conn);
        }
        admitted
    }

    /// Sockets that cost the server something.
    pub fn open_sockets(&self) -> usize {
        self.lab.all_sockets().iter().filter(|socket| socket.is_open()).count()
    }

    /// Ends these connections by RSTs that the server's TCP accepts.
    pub fn end(&self, conns: &[RawConn]) {
        for conn in conns {
            conn.rst(0);
        }
        for conn in conns {
            wait_for("end of a socket", SOON, || self.lab.socket_state(conn).is_none());
            self.await_forgotten(conn);
        }
    }
}

/// What the same steps gave without ctkeep and with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contrast<T> {
    pub without: T,
    pub with: T,
}

/// Plays the same steps on two stages at the same time, without ctkeep and with it.
///
/// `None` where this machine cannot run the lab.
pub fn contrast<T: Send>(
    limiter: Limiter,
    source: &str,
    args: &[&str],
    steps: impl Fn(&mut Scene) -> T + Sync,
) -> Option<Contrast<T>> {
    let name = thread::current().name().unwrap_or_default().to_owned();
    let play = |guarded: bool| {
        let mut scene = Scene::with_source(limiter, source)?;
        if guarded {
            scene.guard(args);
        }
        Some(steps(&mut scene))
    };
    thread::scope(|scope| {
        let without = thread::Builder::new()
            .name(format!("{name} (without ctkeep)"))
            .spawn_scoped(scope, || play(false))
            .expect("a thread");
        let with = play(true);
        let without = without.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Some(Contrast { without: without?, with: with? })
    })
}

/// The prefix length that names one address.
pub fn host(address: &str) -> String {
    let bits = if address.parse::<IpAddr>().expect("an address").is_ipv4() { 32 } else { 128 };
    format!("{address}/{bits}")
}
