//! The firewall's rules, as far as they bear on connection limits: read, never changed.
//!
//! nf_tables is asked by netlink, iptables-nft rules with it (their matches stand there as xt
//! blobs, which `nft list ruleset` cannot show). Rules of the older iptables-legacy come from its
//! own save program where the kernel has such tables. What cannot be read is said.

mod expression;
mod iptables_save;
pub mod limits;
pub mod lists;
mod nft;
mod ports;
mod xt;

use std::fmt;
use std::fs;
use std::process::{Command, Stdio};

use ipnet::IpNet;

pub use iptables_save::parse as parse_saved;
pub use nft::chains as nft_chains;
pub use ports::Ports;

/// `ct state` bits, the same in nft and in xt's conntrack and state matches.
pub const STATE_ESTABLISHED: u32 = 1 << 1;
/// See [`STATE_ESTABLISHED`].
pub const STATE_NEW: u32 = 1 << 3;

/// All that could be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Chains with their rules, in the order of the kernel.
    pub chains: Vec<Chain>,
    /// What could not be read and why, one sentence each.
    pub unread: Vec<String>,
}

/// One chain of one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Address family of the table.
    pub family: Family,
    /// Table.
    pub table: String,
    /// Chain.
    pub name: String,
    /// Where the packet path enters it; `None` for a chain that is only jumped to.
    pub base: Option<Base>,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

/// The hook of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Where.
    pub hook: Hook,
    /// Lower comes first.
    pub priority: i32,
}

/// Netfilter hooks (`enum nf_inet_hooks`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the kernel's names")]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
    Ingress,
}

impl Hook {
    fn from_kernel(number: u32) -> Option<Self> {
        [Self::Prerouting, Self::Input, Self::Forward, Self::Output, Self::Postrouting]
            .into_iter()
            .chain([Self::Ingress])
            .nth(usize::try_from(number).ok()?)
    }
}

/// Address family of a table (`NFPROTO_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the kernel's names")]
pub enum Family {
    Ip,
    Ip6,
    Inet,
    /// arp, bridge, netdev: no connection tracking of this host's sockets.
    Other(u8),
}

impl Family {
    fn from_kernel(number: u8) -> Self {
        match number {
            1 => Self::Inet,
            2 => Self::Ip,
            10 => Self::Ip6,
            other => Self::Other(other),
        }
    }

    /// Whether packets of IPv4 (or else IPv6) pass tables of this family.
    pub fn covers(self, ipv4: bool) -> bool {
        match self {
            Self::Ip => ipv4,
            Self::Ip6 => !ipv4,
            Self::Inet => true,
            Self::Other(_) => false,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip => f.write_str("ip"),
            Self::Ip6 => f.write_str("ip6"),
            Self::Inet => f.write_str("inet"),
            Self::Other(number) => write!(f, "family {number}"),
        }
    }
}

/// One rule, reduced to what decides about a TCP connection to this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Its place in the chain, from 1; the parts of one verdict map share it.
    pub position: usize,
    /// Which packets it is for.
    pub matches: Match,
    /// The connection limit in it.
    pub limit: Option<Limit>,
    /// What becomes of a packet that it is for.
    pub outcome: Outcome,
}

/// Which packets a rule, or a path of rules, is for. Empty: for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// IPv4 only (`true`) or IPv6 only (`false`).
    pub ipv4: Option<bool>,
    /// IP protocol.
    pub protocol: Option<u8>,
    /// Destination ports.
    pub ports: Ports,
    /// Names of incoming interfaces; empty: any.
    pub interfaces: Vec<String>,
    /// `ct state`: one of these bits.
    pub states: Option<u32>,
    /// Opening packets only (`--syn`, `tcp flags syn`).
    pub syn: bool,
    /// Source networks: inside, or (`false`) outside of it; all must hold.
    pub sources: Vec<(IpNet, bool)>,
    /// Something else narrows it further.
    pub narrowed: bool,
}

impl Match {
    /// Packets that pass both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let both = |a: Option<u32>, b: Option<u32>| match (a, b) {
            (Some(a), Some(b)) => Some(a & b),
            (one, another) => one.or(another),
        };
        Self {
            ipv4: self.ipv4.or(other.ipv4),
            protocol: self.protocol.or(other.protocol),
            ports: self.ports.and(&other.ports),
            interfaces: [self.interfaces.as_slice(), &other.interfaces].concat(),
            states: both(self.states, other.states),
            syn: self.syn || other.syn,
            sources: [self.sources.as_slice(), &other.sources].concat(),
            narrowed: self.narrowed || other.narrowed,
        }
    }

    /// Whether it is for nothing but what comes in by the loopback device.
    pub fn is_loopback(&self) -> bool {
        !self.interfaces.is_empty() && self.interfaces.iter().all(|name| name == "lo")
    }

    /// Whether packets of established connections pass it, and opening ones do not.
    pub fn is_established(&self) -> bool {
        self.states.is_some_and(|bits| bits & STATE_ESTABLISHED != 0 && bits & STATE_NEW == 0)
    }

    /// Whether only opening packets pass it.
    pub fn is_opening(&self) -> bool {
        let states = |bits| bits & STATE_NEW != 0 && bits & STATE_ESTABLISHED == 0;
        self.syn || self.states.is_some_and(states)
    }
}

/// What becomes of a packet that a rule is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Outcome {
    /// The next rule.
    #[default]
    Continue,
    /// Accepted, as far as this base chain goes.
    Accept,
    /// Dropped in silence.
    Drop,
    /// Refused with an answer on the wire.
    Reject,
    /// Back to the calling chain.
    Return,
    /// On to another chain, and back at its end.
    Jump(String),
    /// On to another chain.
    Goto(String),
    /// Not tracked.
    Notrack,
    /// Answered by SYNPROXY.
    Synproxy,
}

/// A connection limit: xt's `connlimit`, or nft's `ct count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Connections.
    pub count: u32,
    /// `connlimit-above`, `ct count over`: the rule is for what exceeds the count; else for what
    /// stays within.
    pub over: bool,
    /// What is counted together.
    pub key: Key,
    /// Counted in a dynamic set: the kernel sweeps it every second, with no packet at all.
    pub dynamic: bool,
}

/// What a limit counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Connections of a source network of this prefix length (for either family its own).
    Source(u8),
    /// The same, for each destination port on its own.
    SourceAndPort(u8),
    /// Connections to a destination network.
    Destination(u8),
    /// All that reach the rule.
    All,
    /// Something else.
    Other,
}

impl Ruleset {
    /// Reads the rules of the network namespace that the calling thread is in.
    pub fn read() -> Self {
        let mut all = Self::default();
        match nft::read() {
            Ok(chains) => all.chains = chains,
            Err(error) => all.unread.push(format!("nftables rules: {error}")),
        }
        all.read_legacy("/proc/thread-self/net/ip_tables_names", "iptables", Family::Ip);
        all.read_legacy("/proc/thread-self/net/ip6_tables_names", "ip6tables", Family::Ip6);
        all
    }

    /// The save program reads only tables that exist, so it makes none.
    fn read_legacy(&mut self, names: &str, tool: &str, family: Family) {
        let tables = fs::read_to_string(names).unwrap_or_default();
        if tables.trim().is_empty() {
            return;
        }
        let program = format!("{tool}-legacy-save");
        match Command::new(&program).stdin(Stdio::null()).stderr(Stdio::null()).output() {
            Ok(output) if output.status.success() => {
                self.chains.extend(parse_saved(&String::from_utf8_lossy(&output.stdout), family));
            }
            Ok(output) => self.unread.push(format!("legacy rules: {program}: {}", output.status)),
            Err(error) => self.unread.push(format!(
                "legacy rules in table {}: {program}: {error}; install iptables",
                tables.split_whitespace().collect::<Vec<_>>().join(", ")
            )),
        }
    }
}
