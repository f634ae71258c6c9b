//! Lists what nf_tables holds: tables, chains, rules, sets, objects and elements, as the kernel
//! reports them. What they mean is not read here.

use std::time::Duration;

use netlink_packet_core::DefaultNla;
use nix::errno::Errno;

use super::COMMENT;
use super::table::comment;
use super::uapi::*;
use crate::error::{Op, Result};
use crate::netlink::attribute::{emitted, nested, nla, text};
use crate::netlink::{Attributes, Conversation, NFGENMSG_LEN, Request, Transport};

/// A table.
#[derive(Clone, Debug)]
pub(crate) struct RawTable {
    pub family: u8,
    pub name: String,
    /// `NFT_TABLE_F_*`
    pub flags: u32,
    /// A running ctkeep has made it.
    pub is_ours: bool,
}

/// A chain, and the hook of a base chain.
#[derive(Clone, Debug)]
pub(crate) struct RawChain {
    pub family: u8,
    pub table: String,
    pub name: String,
    /// Number of the hook and priority.
    pub hook: Option<(u32, i32)>,
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// `NF_DROP` or `NF_ACCEPT`.
    pub policy: u32,
    /// Of an ingress hook.
    pub devices: Vec<String>,
}

/// A rule.
#[derive(Clone, Debug)]
pub(crate) struct RawRule {
    pub family: u8,
    pub table: String,
    pub chain: String,
    pub handle: Option<u64>,
    /// The list of its expressions.
    pub expressions: Vec<u8>,
}

/// What a set says of itself.
#[derive(Clone, Debug)]
pub(crate) struct RawSet {
    pub family: u8,
    pub table: String,
    pub name: String,
    pub handle: u64,
    /// `NFT_SET_*`
    pub flags: u32,
    pub key_length: u32,
    pub size: Option<u32>,
    /// The list of expressions that every element has (`ct count over 9` in its declaration).
    pub expressions: Vec<u8>,
}

/// A named object.
#[derive(Clone, Debug)]
pub(crate) struct RawObject {
    pub family: u8,
    pub table: String,
    pub name: String,
    /// `NFT_OBJECT_*`
    pub kind: u32,
    /// The nest of its attributes.
    pub data: Vec<u8>,
}

/// All tables; `None` where the kernel has no nf_tables.
pub(crate) fn tables<T: Transport>(
    conversation: &mut Conversation<T>,
) -> Result<Option<Vec<RawTable>>> {
    let table = |family, attributes: Attributes<'_>| {
        let name = attributes.text(NFTA_TABLE_NAME)?;
        let flags = attributes.number(NFTA_TABLE_FLAGS).unwrap_or(0);
        let is_ours = attributes.value(NFTA_TABLE_USERDATA) == Some(&comment(COMMENT));
        Some(RawTable { family, name, flags, is_ours })
    };
    match list(conversation, "dump of nft tables", NFT_MSG_GETTABLE, table) {
        Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP)) => Ok(None),
        found => found.map(Some),
    }
}

/// All chains.
pub(crate) fn chains<T: Transport>(conversation: &mut Conversation<T>) -> Result<Vec<RawChain>> {
    list(conversation, "dump of nft chains", NFT_MSG_GETCHAIN, chain)
}

/// All rules, in the order of their chains.
pub(crate) fn rules<T: Transport>(conversation: &mut Conversation<T>) -> Result<Vec<RawRule>> {
    let rule = |family, attributes: Attributes<'_>| {
        Some(RawRule {
            family,
            table: attributes.text(NFTA_RULE_TABLE)?,
            chain: attributes.text(NFTA_RULE_CHAIN)?,
            handle: attributes.long(NFTA_RULE_HANDLE),
            expressions: attributes.value(NFTA_RULE_EXPRESSIONS)?.to_vec(),
        })
    };
    list(conversation, "dump of nft rules", NFT_MSG_GETRULE, rule)
}

/// All sets and maps.
pub(crate) fn sets<T: Transport>(conversation: &mut Conversation<T>) -> Result<Vec<RawSet>> {
    list(conversation, "dump of nft sets", NFT_MSG_GETSET, set)
}

/// All named objects, or those of one kind (`NFT_OBJECT_*`).
pub(crate) fn objects<T: Transport>(
    conversation: &mut Conversation<T>,
    kind: Option<u32>,
) -> Result<Vec<RawObject>> {
    let object = |family, attributes: Attributes<'_>| {
        Some(RawObject {
            family,
            table: attributes.text(NFTA_OBJ_TABLE)?,
            name: attributes.text(NFTA_OBJ_NAME)?,
            kind: attributes.number(NFTA_OBJ_TYPE)?,
            data: attributes.value(NFTA_OBJ_DATA).unwrap_or_default().to_vec(),
        })
    };
    let wanted = kind.map(|kind| nla(NFTA_OBJ_TYPE, &kind.to_be_bytes()));
    listed_by(conversation, "dump of nft objects", NFT_MSG_GETOBJ, wanted.as_slice(), object)
}

/// The elements of a set, each a nest.
pub(crate) fn elements<T: Transport>(
    conversation: &mut Conversation<T>,
    family: u8,
    table: &str,
    set: &str,
) -> Result<Vec<Vec<u8>>> {
    let attributes = [text(NFTA_SET_ELEM_LIST_TABLE, table), text(NFTA_SET_ELEM_LIST_SET, set)];
    let request = get("dump of an nft set", NFT_MSG_GETSETELEM, family, &attributes);
    conversation.dump(&request, |all: &mut Vec<Vec<u8>>, frame| {
        let message = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        let elements = message.nest(NFTA_SET_ELEM_LIST_ELEMENTS).map(Attributes::iter);
        all.extend(elements.into_iter().flatten().map(|(_, value)| value.to_vec()));
        Ok(())
    })
}

/// The time that an element of a set has left; `None` where it is not in it, zero where it stays.
pub(crate) fn time_left<T: Transport>(
    conversation: &mut Conversation<T>,
    table: &str,
    set: &str,
    key: &[u8],
) -> Result<Option<Duration>> {
    let key = nested(NFTA_SET_ELEM_KEY, &[nla(NFTA_DATA_VALUE, key)]);
    let attributes = [
        text(NFTA_SET_ELEM_LIST_TABLE, table),
        text(NFTA_SET_ELEM_LIST_SET, set),
        nested(NFTA_SET_ELEM_LIST_ELEMENTS, &[nested(NFTA_LIST_ELEM, &[key])]),
    ];
    let request = get("look into nftables set", NFT_MSG_GETSETELEM, NFPROTO_INET, &attributes);
    let found = conversation.find(&[request], "element", |_, _, frame| {
        let message = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        let elements = message.nest(NFTA_SET_ELEM_LIST_ELEMENTS);
        let element = elements.and_then(|all| all.iter().next());
        let left = element.and_then(|(_, it)| Attributes(it).long(NFTA_SET_ELEM_EXPIRATION));
        Ok(Some(Duration::from_millis(left.unwrap_or(0))))
    })?;
    Ok(found.into_iter().next().flatten())
}

fn list<T: Transport, V>(
    conversation: &mut Conversation<T>,
    verb: &'static str,
    message: u16,
    decode: impl Fn(u8, Attributes<'_>) -> Option<V>,
) -> Result<Vec<V>> {
    listed_by(conversation, verb, message, &[], decode)
}

fn listed_by<T: Transport, V>(
    conversation: &mut Conversation<T>,
    verb: &'static str,
    message: u16,
    wanted: &[DefaultNla],
    decode: impl Fn(u8, Attributes<'_>) -> Option<V>,
) -> Result<Vec<V>> {
    conversation.dump(&get(verb, message, 0, wanted), |all: &mut Vec<V>, frame| {
        let attributes = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        all.extend(frame.payload.first().and_then(|family| decode(*family, attributes)));
        Ok(())
    })
}

fn chain(family: u8, attributes: Attributes<'_>) -> Option<RawChain> {
    let hook = attributes.nest(NFTA_CHAIN_HOOK);
    let place = hook.and_then(|hook| {
        Some((hook.number(NFTA_HOOK_HOOKNUM)?, hook.number(NFTA_HOOK_PRIORITY)?.cast_signed()))
    });
    let one = hook.and_then(|hook| hook.text(NFTA_HOOK_DEV));
    let several = hook.and_then(|hook| hook.nest(NFTA_HOOK_DEVS)).map(|devices| {
        let names = devices.iter().filter(|(kind, _)| *kind == NFTA_DEVICE_NAME);
        names.map(|(_, name)| c_text(name)).collect::<Vec<_>>()
    });
    Some(RawChain {
        family,
        table: attributes.text(NFTA_CHAIN_TABLE)?,
        name: attributes.text(NFTA_CHAIN_NAME)?,
        hook: place,
        kind: attributes.text(NFTA_CHAIN_TYPE).unwrap_or_default(),
        policy: attributes.number(NFTA_CHAIN_POLICY).unwrap_or(NF_ACCEPT),
        devices: several.unwrap_or_else(|| one.into_iter().collect()),
    })
}

fn set(family: u8, attributes: Attributes<'_>) -> Option<RawSet> {
    let one = || attributes.value(NFTA_SET_EXPR).map(listed);
    let several = attributes.value(NFTA_SET_EXPRESSIONS).map(<[u8]>::to_vec);
    Some(RawSet {
        family,
        table: attributes.text(NFTA_SET_TABLE)?,
        name: attributes.text(NFTA_SET_NAME)?,
        handle: attributes.long(NFTA_SET_HANDLE).unwrap_or(0),
        flags: attributes.number(NFTA_SET_FLAGS).unwrap_or(0),
        key_length: attributes.number(NFTA_SET_KEY_LEN).unwrap_or(0),
        size: attributes.nest(NFTA_SET_DESC).and_then(|desc| desc.number(NFTA_SET_DESC_SIZE)),
        expressions: several.or_else(one).unwrap_or_default(),
    })
}

fn c_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
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
