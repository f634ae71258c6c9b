//! Chains and rules: what a packet is asked, step by step, and what becomes of it. Pure.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::set::Set;
use super::value::{Bits, Operand};
use crate::nftables::Hook;
use crate::nftables::uapi::{NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6, NFPROTO_NETDEV};

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
    /// Its table is switched off (`flags dormant`).
    pub is_dormant: bool,
    /// Its table is one of a running ctkeep, whose rules know its own packets.
    pub is_ours: bool,
    /// Its rules, in order; thousands on some hosts, and known in several places.
    pub rules: Arc<Vec<Rule>>,
}

impl Chain {
    /// One without rules.
    pub fn new(family: Family, table: &str, name: &str, base: Option<Base>) -> Self {
        let (table, name) = (table.to_owned(), name.to_owned());
        Self { family, table, name, base, is_dormant: false, is_ours: false, rules: Arc::default() }
    }

    /// Adds a rule with these steps at its end.
    pub(super) fn push(&mut self, handle: Option<u64>, mut steps: Vec<Step>) {
        steps.shrink_to_fit();
        let position = self.rules.len() + 1;
        Arc::make_mut(&mut self.rules).push(Rule { position, handle, steps });
    }

    /// The place of one of its rules: `ip filter INPUT rule 3`.
    pub(super) fn place(&self, rule: &Rule) -> String {
        format!("{} {} {} rule {}", self.family, self.table, self.name, rule.position)
    }
}

/// The hook of a base chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Where.
    pub hook: Hook,
    /// Lower comes first.
    pub priority: i32,
    /// Drops what no rule has taken.
    pub drops: bool,
    /// It translates addresses: untracked packets do not pass it.
    pub is_nat: bool,
    /// The only devices whose packets it sees, in an ingress hook.
    pub devices: Vec<String>,
}

/// Address family of a table (`NFPROTO_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the kernel's names")]
pub enum Family {
    Ip,
    Ip6,
    Inet,
    Netdev,
    /// arp, bridge: no packets of this host's sockets.
    Other(u8),
}

impl Family {
    pub(super) fn from_kernel(number: u8) -> Self {
        match number {
            NFPROTO_INET => Self::Inet,
            NFPROTO_IPV4 => Self::Ip,
            NFPROTO_IPV6 => Self::Ip6,
            NFPROTO_NETDEV => Self::Netdev,
            other => Self::Other(other),
        }
    }

    /// The kernel's number of it.
    pub fn number(self) -> u8 {
        match self {
            Self::Inet => NFPROTO_INET,
            Self::Ip => NFPROTO_IPV4,
            Self::Ip6 => NFPROTO_IPV6,
            Self::Netdev => NFPROTO_NETDEV,
            Self::Other(other) => other,
        }
    }

    /// Whether packets of IPv4 (or else IPv6) pass tables of this family.
    pub fn covers(self, ipv4: bool) -> bool {
        match self {
            Self::Ip => ipv4,
            Self::Ip6 => !ipv4,
            Self::Inet | Self::Netdev => true,
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
            Self::Netdev => f.write_str("netdev"),
            Self::Other(number) => write!(f, "family {number}"),
        }
    }
}

/// One rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Its place in the chain, from 1.
    pub position: usize,
    /// nf_tables' number of it.
    pub handle: Option<u64>,
    /// What it does, in order; it ends at the first step that a packet does not pass.
    pub steps: Vec<Step>,
}

impl Rule {
    /// What becomes of a packet that passes all of its steps.
    pub fn outcome(&self) -> &Outcome {
        self.steps.iter().find_map(Step::outcome).unwrap_or(&Outcome::Continue)
    }
}

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on only with certain packets.
    Test(Test),
    /// Count the connection; go on with those that exceed the limit, or that stay within.
    Count(Counting),
    /// Add the packet's key to a set; where it is full, do not go on.
    Add(Adding),
    /// Take it out again.
    Remove(Arc<Set>),
    /// What the map says; a packet without an element goes on to the next rule.
    Map(Vec<Operand>, Arc<Set>),
    /// The mark becomes this, or nothing that can be told.
    SetMark(Option<Operand>),
    /// The same for the entry's mark.
    SetCtMark(Option<Operand>),
    /// These bytes of its headers become others.
    Write(Operand),
    /// Its entry is in this zone, or in one that cannot be told.
    SetZone(Option<u16>),
    /// Not tracked.
    Notrack,
    /// Written to a log.
    Log,
    /// Remembered by a match or target of xt: by `recent`, by a set.
    Note(Cow<'static, str>),
    /// The end of the rule.
    Verdict(Outcome),
    /// Behind the end of one that translates the destination: the port that it leads to, or the one that was asked
    /// for. Without that it cannot be told.
    Leads(Option<u16>),
}

impl Step {
    /// What it reads of the packet.
    pub(super) fn operands(&self) -> &[Operand] {
        match self {
            Self::Test(Test::Within { value, .. })
            | Self::SetMark(Some(value))
            | Self::SetCtMark(Some(value)) => std::slice::from_ref(value),
            Self::Test(Test::In { values, .. }) | Self::Map(values, _) => values,
            Self::Count(counting) => &counting.by,
            Self::Add(adding) => &adding.by,
            _ => &[],
        }
    }

    fn outcome(&self) -> Option<&Outcome> {
        match self {
            Self::Verdict(outcome) => Some(outcome),
            _ => None,
        }
    }
}

/// What a rule asks of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// A value, or its first bytes, lies between these two, or (`false`) does not.
    Within {
        /// The value.
        value: Operand,
        /// The least.
        from: Bits,
        /// The greatest.
        to: Bits,
        /// Inside, or outside.
        is: bool,
    },
    /// Values are in a set, or (`false`) are not.
    In {
        /// The values.
        values: Vec<Operand>,
        /// The set.
        set: Arc<Set>,
        /// In it, or not.
        is: bool,
    },
    /// A rate or a quota: some packets of each source pass.
    Rate(String),
    /// What cannot be told from outside.
    Unclear(String),
    /// No packet passes.
    Never,
}

impl Test {
    /// `value == with`
    pub fn equals(value: Operand, with: Bits) -> Self {
        Self::Within { value, from: with, to: with, is: true }
    }

    /// Some of these bits are set.
    pub fn any_of(value: Operand, bits: u128) -> Self {
        let zero = Bits::number(0, value.length);
        Self::Within { value: value.masked(bits), from: zero, to: zero, is: false }
    }

    /// Turned round, if so.
    #[must_use]
    pub fn not_if(self, turned: bool) -> Self {
        match self {
            Self::Within { value, from, to, is } => {
                Self::Within { value, from, to, is: is != turned }
            }
            Self::In { values, set, is } => Self::In { values, set, is: is != turned },
            same => same,
        }
    }
}

/// A limit in a rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counting {
    /// How many.
    pub limit: Threshold,
    /// Connections of equal values are counted together. Empty: all.
    pub by: Vec<Operand>,
}

/// A packet's key is added to a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adding {
    /// The key.
    pub by: Vec<Operand>,
    /// The set.
    pub set: Arc<Set>,
    /// Connections are counted for each element.
    pub limit: Option<Threshold>,
    /// Elements have a rate.
    pub is_sometimes: bool,
}

/// What becomes of a packet that a rule is for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Refused with a TCP reset: conntrack closes the packet's entry for it
    /// (`nf_ct_set_closing()`).
    Reset,
    /// Back to the calling chain.
    Return,
    /// On to another chain, and back at its end.
    Jump(String),
    /// On to another chain.
    Goto(String),
    /// Answered by SYNPROXY.
    Synproxy,
    /// A program decides.
    Queue,
}

/// The number in xt's `connlimit` or nft's `ct count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threshold {
    /// Connections.
    pub count: u32,
    /// `connlimit-above`, `ct count over`: the rule is for what exceeds the count; else for what
    /// stays within.
    pub over: bool,
}
