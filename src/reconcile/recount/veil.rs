//! Keeps nudges and seals from being answered or from leaving: our own nftables table.
//!
//! Every nudge has the same sequence number, drawn at start. A rule that answers an over-limit
//! nudge (REJECT, SYNPROXY) acknowledges that number or quotes it; such an answer is dropped before
//! conntrack sees it. A seal has another number, and is dropped right after conntrack saw it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

use crate::error::Result;
use crate::nftables::{Chain, Expr, Hook, Layout, Table};

const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_ICMPV6: u8 = 58;

/// Offsets in a TCP header.
const TCP_SEQ: u32 = 4;
const TCP_ACK: u32 = 8;
const TCP_FLAGS: u32 = 13;
const SYN_OR_RST: u8 = 0x02 | 0x04;
/// Where the quoted packet starts in an ICMP error.
const ICMP_QUOTE: u32 = 8;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;

/// Before conntrack (-200) and before the raw table (-300).
const BEFORE_CONNTRACK: i32 = -310;
/// Right after conntrack.
const AFTER_CONNTRACK: i32 = -199;

/// The table, and the numbers that it goes by.
#[derive(Debug)]
pub(super) struct Veil {
    _table: Table,
    marks: Marks,
}

/// Sequence numbers that tell our packets from everybody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    /// Of every nudge.
    pub nudge: u32,
    /// Of every seal.
    pub seal: u32,
}

impl Marks {
    /// Numbers that a peer cannot guess.
    pub(super) fn draw() -> Self {
        // The standard library seeds its hashers from the kernel's random numbers.
        let bits = RandomState::new().build_hasher().finish().to_be_bytes();
        let [a, b, c, d, e, f, g, h] = bits;
        Self { nudge: u32::from_be_bytes([a, b, c, d]), seal: u32::from_be_bytes([e, f, g, h]) }
    }
}

impl Veil {
    /// Makes the table in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or another process owns a table of this name.
    pub(super) fn open(name: &str, marks: Marks) -> Result<Self> {
        let layout = Layout { chains: chains(marks).into(), ..Layout::default() };
        Ok(Self { _table: Table::create(name, &layout)?, marks })
    }

    pub(super) fn marks(&self) -> Marks {
        self.marks
    }
}

fn chains(marks: Marks) -> [Chain; 2] {
    let answered = marks.nudge.wrapping_add(1).to_be_bytes().to_vec();
    let quoted = marks.nudge.to_be_bytes().to_vec();
    let is = |protocol: u8| [Expr::L4Proto, Expr::Equals(vec![protocol])];
    let at = |offset: u32, bytes: &[u8]| [Expr::transport(offset, 4), Expr::Equals(bytes.to_vec())];
    let answer_of_tcp = [
        &is(IPPROTO_TCP)[..],
        &at(TCP_ACK, &answered),
        &[
            Expr::transport(TCP_FLAGS, 1),
            Expr::Mask(vec![SYN_OR_RST]),
            Expr::Differs(vec![0]),
            Expr::Drop,
        ],
    ]
    .concat();
    let quote = |protocol: u8, header: u32| {
        [&is(protocol)[..], &at(ICMP_QUOTE + header + TCP_SEQ, &quoted), &[Expr::Drop]].concat()
    };
    let seal = [&is(IPPROTO_TCP)[..], &at(TCP_SEQ, &marks.seal.to_be_bytes()), &[Expr::Drop]];
    [
        Chain {
            name: "answers",
            hook: Hook::Output,
            priority: BEFORE_CONNTRACK,
            rules: vec![
                answer_of_tcp,
                quote(IPPROTO_ICMP, IPV4_HEADER),
                quote(IPPROTO_ICMPV6, IPV6_HEADER),
            ],
        },
        Chain {
            name: "seals",
            hook: Hook::Output,
            priority: AFTER_CONNTRACK,
            rules: vec![seal.concat()],
        },
    ]
}
