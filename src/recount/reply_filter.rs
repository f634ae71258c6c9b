//! Keeps nudges and seals from being answered or from leaving: our own nftables table.
//!
//! Every nudge has the same sequence number, drawn at start. A rule that answers an over-limit
//! nudge (REJECT, SYNPROXY) acknowledges that number or quotes it; such an answer is dropped before
//! conntrack sees it. A seal has another number, and is dropped right after conntrack saw it.
//!
//! A nudge that has passed all rules ends in the last chains of INPUT and FORWARD, before conntrack
//! confirms an entry that it began, and before TCP.
//!
//! The same table hides FINs, or FINs and RSTs, of certain tuples from conntrack: it sees ACKs, and
//! TCP what came (docs/attack.md).

use std::collections::HashMap;

use super::Hidden;
use crate::error::Result;
use crate::flow::FourTuple;
use crate::host::random;
use crate::nftables::hidden::{self, By, Closing};
use crate::nftables::{ChainSpec, Expr, Hook, SetSpec, Table, TableSpec, key};

const IPPROTO_ICMP: u8 = 1;
pub(super) const IPPROTO_TCP: u8 = 6;
const IPPROTO_ICMPV6: u8 = 58;

/// Offsets in a TCP header.
pub(super) const TCP_SEQ: u32 = 4;
const TCP_ACK: u32 = 8;
const TCP_FLAGS: u32 = 13;
const SYN_OR_RST: u8 = 0x02 | 0x04;
/// Where the quoted packet starts in an ICMP error.
const ICMP_QUOTE: u32 = 8;
const IPV4_HEADER: u32 = 20;
const IPV6_HEADER: u32 = 40;

const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// Sets of tuples whose FINs are hidden, IPv4 and IPv6: all that are known here.
const FINS: [&str; 2] = ["fins4", "fins6"];
/// Those among them whose RSTs are hidden too.
const RSTS: [&str; 2] = ["rsts4", "rsts6"];

/// Elements that are taken out at once.
const TOGETHER: usize = 512;

/// Before conntrack (-200) and before the raw table (-300).
const BEFORE_CONNTRACK: i32 = -310;
/// And before the shield (-310): what both want to hide the first of them hides.
const BEFORE_SHIELD: i32 = -311;
/// Right after conntrack.
const AFTER_CONNTRACK: i32 = -199;
/// Behind all rules, and before conntrack confirms an entry (`INT_MAX`).
pub(super) const LAST: i32 = i32::MAX - 1;

/// The table, and what it keeps from conntrack.
#[derive(Debug)]
pub(super) struct ReplyFilter {
    table: Table,
    hidden: HashMap<FourTuple, Hidden>,
}

/// Sequence numbers that tell our packets from everybody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MagicSeq {
    /// Of every nudge.
    pub nudge: u32,
    /// Of every seal.
    pub seal: u32,
}

impl MagicSeq {
    /// Numbers that a peer cannot guess.
    pub(super) fn draw() -> Self {
        let [a, b, c, d, e, f, g, h] = random::bits().to_be_bytes();
        Self { nudge: u32::from_be_bytes([a, b, c, d]), seal: u32::from_be_bytes([e, f, g, h]) }
    }
}

impl ReplyFilter {
    /// Makes the table in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or another process owns a table of this name.
    pub(super) fn open(name: &str, marks: MagicSeq) -> Result<Self> {
        let mut chains: Vec<_> = chains(marks).into();
        chains.extend(hide_and_show());
        chains.extend(last(marks));
        let sets = [FINS, RSTS].into_iter().flat_map(|names| {
            names.into_iter().zip([key::TUPLE_V4, key::TUPLE_V6]).map(|(name, key)| SetSpec {
                name,
                key,
                size: None,
                timeout: None,
                elements: Vec::new(),
            })
        });
        let layout = TableSpec { sets: sets.collect(), chains, ..TableSpec::default() };
        Ok(Self { table: Table::create(name, &layout)?, hidden: HashMap::new() })
    }

    /// Hides these tuples' packets, seen from the peer, at least so far.
    pub(super) fn hide(&mut self, wanted: &[(FourTuple, Hidden)]) -> Result<()> {
        let mut new = HashMap::new();
        for (flow, hidden) in wanted.iter().filter(|(flow, it)| self.hidden.get(flow) < Some(it)) {
            let most = new.entry(*flow).or_insert(*hidden);
            *most = (*most).max(*hidden);
        }
        let is_new = |flow: &&FourTuple| !self.hidden.contains_key(flow);
        let fins: Vec<_> = new.keys().filter(is_new).copied().collect();
        let of_both = new.iter().filter(|(_, hidden)| **hidden == Hidden::FinsAndRsts);
        let rsts: Vec<_> = of_both.map(|(flow, _)| *flow).collect();
        self.change(FINS, &fins, Table::add)?;
        self.hidden.extend(fins.into_iter().map(|flow| (flow, Hidden::Fins)));
        self.change(RSTS, &rsts, Table::add)?;
        self.hidden.extend(rsts.into_iter().map(|flow| (flow, Hidden::FinsAndRsts)));
        Ok(())
    }

    /// Lets conntrack see these tuples again. What the kernel refuses stays in the sets, and in
    /// [`Self::hidden`], for another try.
    pub(super) fn show_again(&mut self, flows: &[FourTuple]) -> Result<()> {
        let mut result = Ok(());
        // The RSTs first: a packet is turned into what it was by the set of FINs.
        for (hidden, names) in [(Hidden::FinsAndRsts, RSTS), (Hidden::Fins, FINS)] {
            let old: Vec<_> = flows
                .iter()
                .copied()
                .filter(|flow| self.hidden.get(flow) == Some(&hidden))
                .collect();
            for flows in old.chunks(TOGETHER) {
                let removed = match self.change(names, flows, Table::remove) {
                    // One that is gone already refuses the whole chunk.
                    Err(error) if error.is_absent() => self.show_each(names, flows),
                    removed => removed,
                };
                match removed {
                    Ok(()) if hidden == Hidden::FinsAndRsts => {
                        self.hidden.extend(flows.iter().map(|flow| (*flow, Hidden::Fins)));
                    }
                    Ok(()) => {
                        for flow in flows {
                            self.hidden.remove(flow);
                        }
                    }
                    Err(error) => result = Err(error),
                }
            }
        }
        result
    }

    fn show_each(&mut self, names: [&'static str; 2], flows: &[FourTuple]) -> Result<()> {
        for flow in flows {
            match self.change(names, &[*flow], Table::remove) {
                Err(error) if !error.is_absent() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether others can take the table away, so that a nudge may yet reach TCP.
    pub(super) fn is_exposed(&self) -> bool {
        self.table.is_exposed()
    }

    /// Whether the table is still there. One with an owner cannot be taken away (since 5.12).
    pub(super) fn is_there(&mut self) -> Result<bool> {
        self.table.is_there()
    }

    /// The tuples in the sets.
    pub(super) fn hidden(&self) -> impl Iterator<Item = FourTuple> {
        self.hidden.keys().copied()
    }

    fn change(
        &mut self,
        [ipv4, ipv6]: [&'static str; 2],
        flows: &[FourTuple],
        change: impl Fn(&mut Table, &str, &[Vec<u8>]) -> Result<()>,
    ) -> Result<()> {
        for (set, is_ipv4) in [(ipv4, true), (ipv6, false)] {
            let of_family = flows.iter().filter(|flow| flow.is_ipv4() == is_ipv4);
            let keys: Vec<_> = of_family.map(|flow| key::of(*flow)).collect();
            if !keys.is_empty() {
                change(&mut self.table, set, &keys)?;
            }
        }
        Ok(())
    }
}

fn chains(marks: MagicSeq) -> [ChainSpec; 2] {
    let answered = marks.nudge.wrapping_add(1).to_be_bytes().to_vec();
    let quoted = marks.nudge.to_be_bytes().to_vec();
    let is = |protocol: u8| [Expr::L4Proto, Expr::Equals(vec![protocol])];
    let at = |offset: u32, bytes: &[u8]| [Expr::transport(offset, 4), Expr::Equals(bytes.to_vec())];
    // What nearly every packet fails comes first: each expression costs every packet.
    let answer_of_tcp = [
        &at(TCP_ACK, &answered)[..],
        &is(IPPROTO_TCP),
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
    let seal = [&at(TCP_SEQ, &marks.seal.to_be_bytes())[..], &is(IPPROTO_TCP), &[Expr::Drop]];
    let (mut answers, mut seals) = (
        vec![answer_of_tcp, quote(IPPROTO_ICMP, IPV4_HEADER), quote(IPPROTO_ICMPV6, IPV6_HEADER)],
        vec![seal.concat()],
    );
    // In the same chains: one more at a hook costs each packet more than these rules do.
    let [hide, show] = own_resets();
    answers.extend(hide);
    seals.extend(show);
    let chain = |name, priority, rules| ChainSpec { name, hook: Hook::Output, priority, rules };
    [chain("answers", BEFORE_CONNTRACK, answers), chain("seals", AFTER_CONNTRACK, seals)]
}

/// Nudges have passed all rules here, and go no further.
fn last(marks: MagicSeq) -> [ChainSpec; 2] {
    [("last-input", Hook::Input), ("last-forward", Hook::Forward)].map(|(name, hook)| ChainSpec {
        name,
        hook,
        priority: LAST,
        rules: vec![vec![
            // What nearly every packet fails comes first.
            Expr::transport(TCP_SEQ, 4),
            Expr::Equals(marks.nudge.to_be_bytes().to_vec()),
            Expr::L4Proto,
            Expr::Equals(vec![IPPROTO_TCP]),
            Expr::Drop,
        ]],
    })
}

/// Packets of these tuples do not close their entries, and reach TCP as they came. Never a SYN: a
/// port that is used again must be seen.
fn hide_and_show() -> [ChainSpec; 2] {
    let [mut hide, mut show] = beginnings();
    for Family { fins, rsts, key } in families() {
        let found = |set| [&key[..], &[Expr::In(set)]].concat();
        hide.push(hidden::without_urgent_data(&found(fins)));
        for closing in Closing::ALL {
            let set = if closing == Closing::Fin { fins } else { rsts };
            hide.push(closing.hide(By::Tuple, &found(set)));
            show.push(closing.show(By::Tuple, &found(fins)));
        }
        hide.extend(Closing::ALL.map(|closing| closing.unmask(By::Tuple, &found(fins))));
    }
    let (hook, back) = hidden::BACK;
    let chain = |name, priority, rules| ChainSpec { name, hook, priority, rules };
    [chain("hide", BEFORE_SHIELD, hide), chain("show", back, show)]
}

/// The same of the server's own RSTs that answer an ACK: before the handshake of TCP Fast Open ends
/// they end nothing, however often they come, and else there is no socket any more.
fn own_resets() -> [Vec<Vec<Expr>>; 2] {
    let [mut hide, mut show] = beginnings();
    for Family { fins, rsts, key } in families() {
        let found = |set| [&key[..], &[Expr::In(set)]].concat();
        hide.push(Closing::Rst.hide(By::Tuple, &found(rsts)));
        show.push(Closing::Rst.show(By::Tuple, &found(fins)));
    }
    [hide, show]
}

/// What has nothing to hide, or to show, leaves first: it is what most packets are.
fn beginnings() -> [Vec<Vec<Expr>>; 2] {
    let not_tcp = vec![Expr::L4Proto, Expr::Differs(vec![IPPROTO_TCP]), Expr::Accept];
    // Of whatever protocol.
    [vec![hidden::ordinary(), not_tcp.clone()], vec![hidden::never_hidden(), not_tcp]]
}

/// The sets of one family, and what loads a packet's key in them.
struct Family {
    fins: &'static str,
    rsts: &'static str,
    key: Vec<Expr>,
}

fn families() -> [Family; 2] {
    let [fins4, fins6] = FINS;
    let [rsts4, rsts6] = RSTS;
    let key = |family, load: &[Expr]| [&[Expr::NfProto, Expr::Equals(vec![family])], load].concat();
    [
        Family { fins: fins4, rsts: rsts4, key: key(NFPROTO_IPV4, &key::load_v4()) },
        Family { fins: fins6, rsts: rsts6, key: key(NFPROTO_IPV6, &key::load_v6()) },
    ]
}
