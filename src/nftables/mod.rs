//! Our own nftables table, built over netlink: no nft binary, no rule of anybody else touched.
//!
//! The table belongs to the socket that made it (`NFT_TABLE_F_OWNER`, since 5.12): others cannot
//! flush it, and it is gone with the process, however that ends.

mod expr;
mod uapi;

use netlink_packet_core::{DefaultNla, Emitable, NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterProtoFamily};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use crate::error::{Op, Result};
use crate::netlink::{Connection, KernelSocket, Request, Transport};

pub use expr::Expr;
use uapi::*;

/// The packet hooks that our chains are in (`enum nf_inet_hooks`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// Packets from the wire, before routing.
    Prerouting = 0,
    /// Packets that this host sends.
    Output = 3,
}

/// A base chain with its rules.
#[derive(Clone, Debug)]
pub struct Chain {
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
    connection: Connection<T>,
    name: String,
}

impl Table<KernelSocket> {
    /// Makes the table with its chains, in one transaction, in the network namespace of the
    /// calling thread. What a dead process left under this name is replaced.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` or nf_tables is missing, or another process owns a table of this name.
    pub fn create(name: &str, chains: &[Chain]) -> Result<Self> {
        let op = Op::new("create nftables table");
        let socket = KernelSocket::open(op, NETLINK_NETFILTER)?;
        let mut this = Self { connection: Connection::new(socket), name: name.to_owned() };
        match this.build(op, chains, NFT_TABLE_F_OWNER) {
            // Before 5.12 tables have no owner.
            Err(error) if error.errno() == Some(Errno::EOPNOTSUPP) => this.build(op, chains, 0)?,
            result => result?,
        }
        Ok(this)
    }
}

impl<T: Transport> Table<T> {
    fn build(&mut self, op: Op, chains: &[Chain], flags: u32) -> Result<()> {
        let table = text(NFTA_TABLE_NAME, &self.name);
        let flagged = [table.clone(), word(NFTA_TABLE_FLAGS, flags)];
        let mut messages = vec![
            // Creating before deleting makes the delete succeed whether it was there or not.
            message(op, NFT_MSG_NEWTABLE, NLM_F_CREATE, &flagged),
            message(op, NFT_MSG_DELTABLE, 0, &[table]),
            message(op, NFT_MSG_NEWTABLE, NLM_F_CREATE, &flagged),
        ];
        for chain in chains {
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
            for rule in &chain.rules {
                let expressions: Vec<_> = rule.iter().map(Expr::element).collect();
                let attributes = [
                    text(NFTA_RULE_TABLE, &self.name),
                    text(NFTA_RULE_CHAIN, chain.name),
                    nested(NFTA_RULE_EXPRESSIONS, &expressions),
                ];
                let flags = NLM_F_CREATE | NLM_F_APPEND;
                messages.push(message(op, NFT_MSG_NEWRULE, flags, &attributes));
            }
        }
        self.transact(op, &messages)
    }

    fn transact(&mut self, op: Op, messages: &[Request]) -> Result<()> {
        let edge =
            |kind| Request { op, kind, flags: 0, body: header(0, NFNL_SUBSYS), joined: true };
        let (begin, end) = (edge(NFNL_MSG_BATCH_BEGIN), edge(NFNL_MSG_BATCH_END));
        self.connection.transaction(&begin, messages, &end)
    }
}

impl<T: Transport> Drop for Table<T> {
    fn drop(&mut self) {
        // An owned table goes with its socket; one without an owner must be taken away.
        let op = Op::new("delete nftables table");
        let delete = message(op, NFT_MSG_DELTABLE, 0, &[text(NFTA_TABLE_NAME, &self.name)]);
        let _ = self.transact(op, &[delete]);
    }
}

fn message(op: Op, kind: u16, flags: u16, attributes: &[DefaultNla]) -> Request {
    let mut body = header(NFPROTO_INET, 0);
    let start = body.len();
    body.resize(start + attributes.buffer_len(), 0);
    attributes.emit(body.get_mut(start..).unwrap_or_default());
    Request { op, kind: NFNL_SUBSYS << 8 | kind, flags, body, joined: true }
}

fn header(family: u8, resource: u16) -> Vec<u8> {
    let header = NetfilterHeader::new(NetfilterProtoFamily::from(family), 0, resource);
    let mut body = vec![0; header.buffer_len()];
    header.emit(&mut body);
    body
}

fn text(kind: u16, text: &str) -> DefaultNla {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    DefaultNla::new(kind, value)
}

fn word(kind: u16, value: u32) -> DefaultNla {
    nla(kind, &value.to_be_bytes())
}

fn nla(kind: u16, value: &[u8]) -> DefaultNla {
    DefaultNla::new(kind, value.to_vec())
}

fn nested(kind: u16, parts: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; parts.buffer_len()];
    parts.emit(&mut value);
    DefaultNla::new(kind | netlink_packet_core::NLA_F_NESTED, value)
}
