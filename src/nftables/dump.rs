//! Lists what nf_tables holds: tables, chains, rules, sets, objects and elements, as the kernel
//! reports them. What they mean is not read here.

use netlink_packet_core::DefaultNla;
use nix::errno::Errno;

use super::uapi::*;
use crate::error::{Op, Result};
use crate::netlink::attribute::{emitted, text};
use crate::netlink::{Attributes, Connection, Request, Transport};

/// A chain, and the hook of a base chain.
#[derive(Clone, Debug)]
pub(crate) struct RawChain {
    pub family: u8,
    pub table: String,
    pub name: String,
    /// Number of the hook and priority.
    pub hook: Option<(u32, i32)>,
}

/// A rule.
#[derive(Clone, Debug)]
pub(crate) struct RawRule {
    pub family: u8,
    pub table: String,
    pub chain: String,
    /// The list of its expressions.
    pub expressions: Vec<u8>,
}

/// What a set says of itself.
#[derive(Clone, Debug)]
pub(crate) struct RawSet {
    pub family: u8,
    pub table: String,
    pub name: String,
    pub key_length: u32,
    /// The list of expressions that every element has (`ct count over 9` in its declaration).
    pub expressions: Vec<u8>,
}

/// All chains; `None` where the kernel has no nf_tables.
pub(crate) fn chains<T: Transport>(
    connection: &mut Connection<T>,
) -> Result<Option<Vec<RawChain>>> {
    match list(connection, "dump of nft chains", NFT_MSG_GETCHAIN, chain) {
        Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP)) => Ok(None),
        found => found.map(Some),
    }
}

/// All rules, in the order of their chains.
pub(crate) fn rules<T: Transport>(connection: &mut Connection<T>) -> Result<Vec<RawRule>> {
    list(connection, "dump of nft rules", NFT_MSG_GETRULE, rule)
}

/// All sets and maps.
pub(crate) fn sets<T: Transport>(connection: &mut Connection<T>) -> Result<Vec<RawSet>> {
    list(connection, "dump of nft sets", NFT_MSG_GETSET, set)
}

/// The elements of a set, each a nest.
pub(crate) fn elements<T: Transport>(
    connection: &mut Connection<T>,
    family: u8,
    table: &str,
    set: &str,
) -> Result<Vec<Vec<u8>>> {
    let attributes = [text(NFTA_SET_ELEM_LIST_TABLE, table), text(NFTA_SET_ELEM_LIST_SET, set)];
    let request = get("dump of an nft set", NFT_MSG_GETSETELEM, family, &attributes);
    connection.dump(&request, |all: &mut Vec<Vec<u8>>, frame| {
        let message = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        let elements = message.nest(NFTA_SET_ELEM_LIST_ELEMENTS).map(Attributes::iter);
        all.extend(elements.into_iter().flatten().map(|(_, value)| value.to_vec()));
        Ok(())
    })
}

fn list<T: Transport, V>(
    connection: &mut Connection<T>,
    verb: &'static str,
    message: u16,
    decode: fn(u8, Attributes<'_>) -> Option<V>,
) -> Result<Vec<V>> {
    connection.dump(&get(verb, message, 0, &[]), |all: &mut Vec<V>, frame| {
        let attributes = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        all.extend(frame.payload.first().and_then(|family| decode(*family, attributes)));
        Ok(())
    })
}

fn chain(family: u8, attributes: Attributes<'_>) -> Option<RawChain> {
    let hook = attributes.nest(NFTA_CHAIN_HOOK).and_then(|hook| {
        Some((hook.number(NFTA_HOOK_HOOKNUM)?, hook.number(NFTA_HOOK_PRIORITY)?.cast_signed()))
    });
    Some(RawChain {
        family,
        table: attributes.text(NFTA_CHAIN_TABLE)?,
        name: attributes.text(NFTA_CHAIN_NAME)?,
        hook,
    })
}

fn rule(family: u8, attributes: Attributes<'_>) -> Option<RawRule> {
    Some(RawRule {
        family,
        table: attributes.text(NFTA_RULE_TABLE)?,
        chain: attributes.text(NFTA_RULE_CHAIN)?,
        expressions: attributes.value(NFTA_RULE_EXPRESSIONS)?.to_vec(),
    })
}

fn set(family: u8, attributes: Attributes<'_>) -> Option<RawSet> {
    let one = || attributes.value(NFTA_SET_EXPR).map(listed);
    let several = attributes.value(NFTA_SET_EXPRESSIONS).map(<[u8]>::to_vec);
    Some(RawSet {
        family,
        table: attributes.text(NFTA_SET_TABLE)?,
        name: attributes.text(NFTA_SET_NAME)?,
        key_length: attributes.number(NFTA_SET_KEY_LEN).unwrap_or(0),
        expressions: several.or_else(one).unwrap_or_default(),
    })
}

/// One expression as a list of one.
pub(crate) fn listed(expression: &[u8]) -> Vec<u8> {
    emitted(&[DefaultNla::new(NFTA_LIST_ELEM, expression.to_vec())])
}

fn get(verb: &'static str, message: u16, family: u8, attributes: &[DefaultNla]) -> Request {
    let mut body = vec![family, 0, 0, 0];
    body.extend(emitted(attributes));
    let kind = NFNL_SUBSYS_NFTABLES << 8 | message;
    Request { op: Op::new(verb), kind, flags: 0, body, joined: false }
}
