//! Our own nftables table, built over netlink: no nft binary, no rule of other programs touched.
//!
//! The table belongs to the socket that made it (`NFT_TABLE_F_OWNER`, since 5.12): others cannot
//! flush it, and it is gone with the process, however that ends.

use std::time::Duration;

use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use super::key::{self, Field};
use super::uapi::*;
use super::{COMMENT, Expr, Hook};
use crate::error::{Cause, Op, Result};
use crate::netlink::attribute::{emitted, nested, nla, text, word};
use crate::netlink::{Conversation, KernelSocket, Request, Transport, nfgenmsg};

/// Elements in one message: an attribute holds at most 64 KiB.
const ELEMENTS: usize = 512;

/// A named set.
#[derive(Clone, Debug)]
pub struct SetSpec {
    /// Name in `nft list ruleset`.
    pub name: &'static str,
    /// What an element is made of.
    pub key: &'static [Field],
    /// Most elements; what does not fit is not added. The kernel sets aside room for all of them
    /// at once, 25 bytes each: without it a set begins small and grows.
    pub size: Option<u32>,
    /// Elements that rules add go after this time. Without it, rules add none.
    pub timeout: Option<Duration>,
    /// The elements to begin with.
    pub elements: Vec<Vec<u8>>,
}

/// What a table is made of.
#[derive(Clone, Debug, Default)]
pub struct TableSpec {
    /// Its sets.
    pub sets: Vec<SetSpec>,
    /// Its base chains.
    pub chains: Vec<ChainSpec>,
    /// Its regular chains, which others of its rules jump to.
    pub regular: Vec<RegularSpec>,
}

/// A regular chain with its rules.
#[derive(Clone, Debug)]
pub struct RegularSpec {
    /// Its name.
    pub name: &'static str,
    /// As those of a [`ChainSpec`]; at its end a jump goes on with the next rule.
    pub rules: Vec<Vec<Expr>>,
}

/// A base chain with its rules.
#[derive(Clone, Debug)]
pub struct ChainSpec {
    /// Name in `nft list ruleset`.
    pub name: &'static str,
    /// Where it sees packets.
    pub hook: Hook,
    /// Lower goes first; conntrack is at -200.
    pub priority: i32,
    /// Each rule is a list of expressions that ends in a verdict.
    pub rules: Vec<Vec<Expr>>,
}

/// A table of the `inet` family that lives as long as this value.
#[derive(Debug)]
pub struct Table<T: Transport = KernelSocket> {
    conversation: Conversation<T>,
    name: String,
    owned: bool,
}

impl Table<KernelSocket> {
    /// Makes the table with all that is in it, in one transaction, in the network namespace of the
    /// calling thread. What a dead process left under this name is replaced.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` or nf_tables is missing, or another process owns a table of this name.
    pub fn create(name: &str, layout: &TableSpec) -> Result<Self> {
        let op = Op::new("create nftables table");
        let socket = KernelSocket::open(op, NETLINK_NETFILTER)?;
        let conversation = Conversation::new(socket);
        let mut this = Self { conversation, name: name.to_owned(), owned: true };
        match this.build(op, layout, NFT_TABLE_F_OWNER) {
            // Before 5.12 tables have no owner; 5.10 knows no such flag and says EINVAL.
            Err(error) if matches!(error.errno(), Some(Errno::EOPNOTSUPP | Errno::EINVAL)) => {
                this.owned = false;
                this.build(op, layout, 0)?;
            }
            // Without CAP_NET_ADMIN it could not be seen.
            Err(error) if error.is_missing_privilege() && this.can_be_seen().unwrap_or(false) => {
                let word =
                    format!("another process owns table {name}: is a second ctkeep running?");
                return Err(op.failed(Cause::Kernel { errno: Errno::EPERM, word: Some(word) }));
            }
            result => result?,
        }
        Ok(this)
    }
}

impl<T: Transport> Table<T> {
    /// Makes the table anew with all that is in it, whether it was taken away or not, in one
    /// transaction: no packet meets half of it.
    ///
    /// # Errors
    /// As [`Table::create`].
    pub fn rebuild(&mut self, layout: &TableSpec) -> Result<()> {
        let flags = if self.owned { NFT_TABLE_F_OWNER } else { 0 };
        self.build(Op::new("make nftables table anew"), layout, flags)
    }

    fn build(&mut self, op: Op, layout: &TableSpec, flags: u32) -> Result<()> {
        let table = text(NFTA_TABLE_NAME, &self.name);
        let mark = nla(NFTA_TABLE_USERDATA, &comment(COMMENT));
        let flagged = [table.clone(), word(NFTA_TABLE_FLAGS, flags), mark];
        let mut messages = vec![
            // Creating before deleting makes the delete succeed whether it was there or not.
            message(op, NFT_MSG_NEWTABLE, NLM_F_CREATE, &flagged),
            message(op, NFT_MSG_DELTABLE, 0, &[table]),
            message(op, NFT_MSG_NEWTABLE, NLM_F_CREATE, &flagged),
        ];
        for (id, set) in (1..).zip(&layout.sets) {
            messages.push(self.new_set(op, set, id));
            if !set.elements.is_empty() {
                messages.push(self.elements(op, NFT_MSG_NEWSETELEM, set.name, &set.elements));
            }
        }
        // All chains first: rules of one go to others.
        for RegularSpec { name, .. } in &layout.regular {
            let attributes = [text(NFTA_CHAIN_TABLE, &self.name), text(NFTA_CHAIN_NAME, name)];
            messages.push(message(op, NFT_MSG_NEWCHAIN, NLM_F_CREATE, &attributes));
        }
        for chain in &layout.chains {
            let hook = [
                word(NFTA_HOOK_HOOKNUM, chain.hook as u32),
                nla(NFTA_HOOK_PRIORITY, &chain.priority.to_be_bytes()),
            ];
            let attributes = [
                text(NFTA_CHAIN_TABLE, &self.name),
                text(NFTA_CHAIN_NAME, chain.name),
                nested(NFTA_CHAIN_HOOK, &hook),
                text(NFTA_CHAIN_TYPE, "filter"),
            ];
            messages.push(message(op, NFT_MSG_NEWCHAIN, NLM_F_CREATE, &attributes));
        }
        let regular = layout.regular.iter().map(|chain| (chain.name, &chain.rules));
        let base = layout.chains.iter().map(|chain| (chain.name, &chain.rules));
        for (chain, rules) in regular.chain(base) {
            for rule in rules {
                let expressions: Vec<_> = rule.iter().map(Expr::element).collect();
                let attributes = [
                    text(NFTA_RULE_TABLE, &self.name),
                    text(NFTA_RULE_CHAIN, chain),
                    nested(NFTA_RULE_EXPRESSIONS, &expressions),
                ];
                let flags = NLM_F_CREATE | NLM_F_APPEND;
                messages.push(message(op, NFT_MSG_NEWRULE, flags, &attributes));
            }
        }
        self.transact(op, &messages)
    }

    fn new_set(&self, op: Op, set: &SetSpec, id: u32) -> Request {
        let mut attributes = vec![
            text(NFTA_SET_TABLE, &self.name),
            text(NFTA_SET_NAME, set.name),
            word(NFTA_SET_ID, id),
            word(NFTA_SET_KEY_TYPE, key::type_of(set.key)),
            word(NFTA_SET_KEY_LEN, key::length_of(set.key)),
        ];
        if let Some(size) = set.size {
            attributes.push(nested(NFTA_SET_DESC, &[word(NFTA_SET_DESC_SIZE, size)]));
        }
        if let Some(timeout) = set.timeout {
            let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            attributes.push(word(NFTA_SET_FLAGS, NFT_SET_EVAL | NFT_SET_TIMEOUT));
            attributes.push(nla(NFTA_SET_TIMEOUT, &milliseconds.to_be_bytes()));
        }
        message(op, NFT_MSG_NEWSET, NLM_F_CREATE, &attributes)
    }

    fn elements(&self, op: Op, kind: u16, set: &str, elements: &[Vec<u8>]) -> Request {
        let elements: Vec<_> = elements
            .iter()
            .map(|key| {
                let key = nested(NFTA_SET_ELEM_KEY, &[nla(NFTA_DATA_VALUE, key)]);
                nested(NFTA_LIST_ELEM, &[key])
            })
            .collect();
        let attributes = [
            text(NFTA_SET_ELEM_LIST_TABLE, &self.name),
            text(NFTA_SET_ELEM_LIST_SET, set),
            nested(NFTA_SET_ELEM_LIST_ELEMENTS, &elements),
        ];
        let flags = if kind == NFT_MSG_NEWSETELEM { NLM_F_CREATE } else { 0 };
        message(op, kind, flags, &attributes)
    }

    /// Adds elements to a set; those that are there already stay.
    ///
    /// # Errors
    /// The set is full, or the table is gone.
    pub fn add(&mut self, set: &str, elements: &[Vec<u8>]) -> Result<()> {
        self.change_elements(Op::new("add to nftables set"), NFT_MSG_NEWSETELEM, set, elements)
    }

    /// Takes elements out of a set.
    ///
    /// # Errors
    /// One of them is not in it, or the table is gone.
    pub fn remove(&mut self, set: &str, elements: &[Vec<u8>]) -> Result<()> {
        self.change_elements(Op::new("remove from nftables set"), NFT_MSG_DELSETELEM, set, elements)
    }

    /// Which of these elements a set has, in their order.
    ///
    /// # Errors
    /// The table is gone, or a broken conversation.
    pub fn contains(&mut self, set: &str, elements: &[Vec<u8>]) -> Result<Vec<bool>> {
        let op = Op::new("look into nftables set");
        let get = |element: &Vec<u8>| {
            let request = self.elements(op, NFT_MSG_GETSETELEM, set, std::slice::from_ref(element));
            Request { joined: false, ..request }
        };
        let requests: Vec<_> = elements.iter().map(get).collect();
        let answers = self.conversation.batch(&requests, |_, _| Ok(()))?;
        let is_there = |answer: Result<()>| match answer {
            Ok(()) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        };
        answers.into_iter().map(is_there).collect()
    }

    /// Whether others could take the table away: it has no owner (before 5.12).
    pub fn is_exposed(&self) -> bool {
        !self.owned
    }

    /// Whether the table still exists. Others can flush one that has no owner (before 5.12).
    ///
    /// # Errors
    /// A broken conversation.
    pub fn is_there(&mut self) -> Result<bool> {
        if self.owned {
            return Ok(true);
        }
        self.can_be_seen()
    }

    fn can_be_seen(&mut self) -> Result<bool> {
        let op = Op::new("look for nftables table");
        let mut get = message(op, NFT_MSG_GETTABLE, 0, &[text(NFTA_TABLE_NAME, &self.name)]);
        get.joined = false;
        match self.conversation.query(&get, |_| Ok(())) {
            Ok(()) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn change_elements(
        &mut self,
        op: Op,
        kind: u16,
        set: &str,
        elements: &[Vec<u8>],
    ) -> Result<()> {
        for elements in elements.chunks(ELEMENTS) {
            let request = self.elements(op, kind, set, elements);
            self.transact(op, &[request])?;
        }
        Ok(())
    }

    fn transact(&mut self, op: Op, messages: &[Request]) -> Result<()> {
        let (begin, end) = edges(op);
        self.conversation.transaction(&begin, messages, &end)
    }
}

impl<T: Transport> Drop for Table<T> {
    fn drop(&mut self) {
        // An owned table goes with its socket; one without an owner must be taken away.
        if self.owned {
            return;
        }
        let op = Op::new("delete nftables table");
        let delete = message(op, NFT_MSG_DELTABLE, 0, &[text(NFTA_TABLE_NAME, &self.name)]);
        let _ = self.transact(op, &[delete]);
    }
}

/// A comment in the form that nft reads (`NFTNL_UDATA_TABLE_COMMENT`): kind, length, text with its NUL.
pub(super) fn comment(text: &str) -> Vec<u8> {
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    [&[NFTNL_UDATA_TABLE_COMMENT, length], text.as_bytes(), &[0]].concat()
}

/// What a transaction begins and ends with.
pub(super) fn edges(op: Op) -> (Request, Request) {
    let edge = |kind| Request {
        op,
        kind,
        flags: 0,
        body: nfgenmsg(0, NFNL_SUBSYS_NFTABLES).to_vec(),
        joined: true,
    };
    (edge(NFNL_MSG_BATCH_BEGIN), edge(NFNL_MSG_BATCH_END))
}

fn message(op: Op, kind: u16, flags: u16, attributes: &[DefaultNla]) -> Request {
    message_of(op, NFPROTO_INET, kind, flags, attributes)
}

pub(super) fn message_of(
    op: Op,
    family: u8,
    kind: u16,
    flags: u16,
    attributes: &[DefaultNla],
) -> Request {
    let mut body = nfgenmsg(family, 0).to_vec();
    body.extend(emitted(attributes));
    Request { op, kind: NFNL_SUBSYS_NFTABLES << 8 | kind, flags, body, joined: true }
}
