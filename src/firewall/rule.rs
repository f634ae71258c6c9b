//! Chains and rules, reduced to what decides about a TCP connection to this host. Pure.

use std::fmt;

use ipnet::IpNet;

use super::Ports;
use crate::nftables::Hook;
use crate::nftables::uapi::{NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6};

/// `ct state` bits, the same in nft and in xt's conntrack and state matches.
pub const STATE_ESTABLISHED: u32 = 1 << 1;
/// See [`STATE_ESTABLISHED`].
pub const STATE_NEW: u32 = 1 << 3;

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
    pub(super) fn from_kernel(number: u8) -> Self {
        match number {
            NFPROTO_INET => Self::Inet,
            NFPROTO_IPV4 => Self::Ip,
            NFPROTO_IPV6 => Self::Ip6,
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
