//! Which rules a probe met: the reports of nf_tables for a packet with `nftrace` set.
//!
//! Rules of nft and of iptables-nft are reported, those of iptables-legacy are not.

use netlink_packet_core::{DecodeError, NlasIterator, parse_string};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::probe::probes;
use super::reply_filter::MagicSeq;
use crate::error::{Op, Result};
use crate::netlink::{Conversation, Frame, KernelSocket, drain};
use crate::nftables::uapi::*;
use crate::nftables::{ChainSpec, Expr, Hook, Table, TableSpec, dump};

/// Before defragmentation (-400), which is before everything else.
const BEFORE_ALL: i32 = -450;
/// Datagrams read at most: a probe meets some hundred rules.
const LIMIT: usize = 65_536;
/// Above it is the number of the queue (`NF_VERDICT_MASK`).
const VERDICT_MASK: u64 = 0xff;
/// `struct nfgenmsg`.
const HEADER: usize = 4;

/// The way of one probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The rules that took it on, and the policies, in their order.
    pub steps: Vec<Step>,
    /// Why nothing is reported.
    pub lacks: Option<String>,
}

impl Trace {
    /// Whether the probe ended at one of them.
    pub(super) fn is_dropped(&self) -> bool {
        self.steps.iter().any(|step| step.is_drop)
    }

    /// Whether a program has been handed it.
    pub(super) fn is_queued(&self) -> bool {
        self.steps.iter().any(|step| step.is_queue)
    }
}

/// A rule or policy that a packet met.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// `ip`, `ip6`, `inet`, ...: the number of the family.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Its handle; `None` is the chain's policy, or its end.
    pub rule: Option<u64>,
    /// The packet ends there.
    pub is_drop: bool,
    /// A program of the host has it, and decides (NFQUEUE).
    pub is_queue: bool,
}

/// Has the ways of probes reported, in one network namespace, for as long as it lives.
#[derive(Debug)]
pub(super) struct Tracer {
    socket: KernelSocket,
    datagram: Vec<u8>,
    /// Which tables are our own.
    nftables: Conversation<KernelSocket>,
    _table: Table,
}

impl Tracer {
    /// `name` is that of our own table. While it is there, each rule of the host costs a little more.
    pub(super) fn open(name: &str, marks: MagicSeq) -> Result<Self> {
        let op = Op::new("listen to traces");
        let socket = KernelSocket::open(op, NETLINK_NETFILTER)?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        socket.join(NFNLGRP_NFTRACE).map_err(|error| op.io(error))?;
        let mut rule = probes(marks);
        rule.extend([Expr::Constant(vec![1]), Expr::Trace]);
        let traced = ChainSpec {
            name: "traced",
            hook: Hook::Prerouting,
            priority: BEFORE_ALL,
            rules: vec![rule],
        };
        let layout = TableSpec { chains: vec![traced], ..TableSpec::default() };
        let table = Table::create(&format!("{name}-trace"), &layout)?;
        let op = Op::new("open nftables netlink");
        // Kept: closing one waits for all processors.
        let nftables = Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?);
        Ok(Self { socket, datagram: Vec::new(), nftables, _table: table })
    }

    /// What has been reported since it was read before, but of our own tables. The kernel reports
    /// while it handles the packet, so of a probe that has ended it is all.
    pub(super) fn read(&mut self) -> Result<Trace> {
        let mut steps = Vec::new();
        let op = Op::new("read traces");
        drain(&mut self.socket, &mut self.datagram, LIMIT, op, |frame| {
            steps.extend(step(frame)?);
            Ok(())
        })?;
        if steps.is_empty() {
            return Ok(Trace::default());
        }
        let tables = dump::tables(&mut self.nftables)?.unwrap_or_default();
        let ours: Vec<_> = tables.into_iter().filter(|table| table.is_ours).collect();
        steps.retain(|step: &Step| !ours.iter().any(|table| table.name == step.table));
        Ok(Trace { steps, lacks: None })
    }
}

fn step(frame: Frame<'_>) -> std::result::Result<Option<Step>, DecodeError> {
    if frame.kind != NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_TRACE {
        return Ok(None);
    }
    let short = || DecodeError::from("cut short");
    let number =
        |value: &[u8]| value.iter().take(8).fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
    let mut step = Step { family: *frame.payload.first().ok_or_else(short)?, ..Step::default() };
    for attribute in NlasIterator::new(frame.payload.get(HEADER..).ok_or_else(short)?) {
        let attribute = attribute?;
        let value = attribute.value();
        match attribute.kind() {
            NFTA_TRACE_TABLE => step.table = parse_string(value)?,
            NFTA_TRACE_CHAIN => step.chain = parse_string(value)?,
            NFTA_TRACE_RULE_HANDLE => step.rule = Some(number(value)),
            NFTA_TRACE_VERDICT => {
                for part in NlasIterator::new(value) {
                    let part = part?;
                    if part.kind() == NFTA_VERDICT_CODE {
                        let code = number(part.value());
                        step.is_drop = code == u64::from(NF_DROP);
                        step.is_queue = code & VERDICT_MASK == u64::from(NF_QUEUE);
                    }
                }
            }
            NFTA_TRACE_POLICY => step.is_drop = number(value) == u64::from(NF_DROP),
            _ => {}
        }
    }
    Ok(Some(step))
}
