//! Reads chains, rules and the sets that they look into by nf_tables netlink.

use std::collections::HashMap;

use netlink_packet_core::{DefaultNla, Emitable};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use super::expression::{self, Element};
use super::{Base, Chain, Family, Hook, Rule};
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Connection, KernelSocket, Request, Transport};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETSET: u16 = 10;
const NFT_MSG_GETSETELEM: u16 = 13;

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;

const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_EXPR: u16 = 17;
const NFTA_SET_EXPRESSIONS: u16 = 18;

const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;

const NFGENMSG: usize = 4;

/// What a set says of itself.
struct Declared {
    key_length: u32,
    /// Expressions that every element has (`ct count over 9` in a set's declaration).
    stateful: Vec<u8>,
}

/// A table's sets, of which a rule names one.
pub(super) struct Sets<'c, T> {
    connection: &'c mut Connection<T>,
    family: u8,
    table: String,
    declared: &'c HashMap<(u8, String, String), Declared>,
}

impl<T: Transport> Sets<'_, T> {
    /// The elements of a set.
    pub(super) fn elements(&mut self, set: &str) -> Result<Vec<Element>> {
        let attributes = [
            DefaultNla::new(NFTA_SET_ELEM_LIST_TABLE, c_string(&self.table)),
            DefaultNla::new(NFTA_SET_ELEM_LIST_SET, c_string(set)),
        ];
        let request = get("dump of an nft set", NFT_MSG_GETSETELEM, self.family, &attributes);
        self.connection.dump(&request, |all: &mut Vec<Element>, frame| {
            let message = Attributes(frame.payload.get(NFGENMSG..).unwrap_or_default());
            let elements = message.nest(NFTA_SET_ELEM_LIST_ELEMENTS).map(Attributes::iter);
            all.extend(elements.into_iter().flatten().map(|(_, value)| Element::decode(value)));
            Ok(())
        })
    }

    /// The list of expressions in the declaration of a set.
    pub(super) fn stateful(&self, set: &str) -> Option<&[u8]> {
        self.declared(set).map(|declared| declared.stateful.as_slice())
    }

    /// Bytes of a set's key.
    pub(super) fn key(&self, set: &str) -> u32 {
        self.declared(set).map_or(0, |declared| declared.key_length)
    }

    fn declared(&self, set: &str) -> Option<&Declared> {
        self.declared.get(&(self.family, self.table.clone(), set.to_owned()))
    }
}

/// The chains of the network namespace that the calling thread is in.
pub(super) fn read() -> Result<Vec<Chain>> {
    let op = Op::new("open nftables netlink");
    chains(&mut Connection::new(KernelSocket::open(op, NETLINK_NETFILTER)?))
}

/// The chains that a kernel tells of, with their rules.
///
/// # Errors
/// The kernel refused, or a message was lost or malformed.
pub fn chains<T: Transport>(connection: &mut Connection<T>) -> Result<Vec<Chain>> {
    let found = connection.dump(
        &get("dump of nft chains", NFT_MSG_GETCHAIN, 0, &[]),
        |all: &mut Vec<Chain>, frame| {
            all.extend(chain(frame.payload));
            Ok(())
        },
    );
    let mut chains = match found {
        // A kernel without nf_tables has no such rules.
        Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP)) => {
            return Ok(Vec::new());
        }
        other => other?,
    };
    let declared = declared_sets(connection)?;
    let rules = connection.dump(
        &get("dump of nft rules", NFT_MSG_GETRULE, 0, &[]),
        |all: &mut Vec<Vec<u8>>, frame| {
            all.push(frame.payload.to_vec());
            Ok(())
        },
    )?;
    for message in &rules {
        let family = message.first().copied().unwrap_or_default();
        let attributes = Attributes(message.get(NFGENMSG..).unwrap_or_default());
        let (Some(table), Some(name), Some(expressions)) = (
            attributes.text(NFTA_RULE_TABLE),
            attributes.text(NFTA_RULE_CHAIN),
            attributes.nest(NFTA_RULE_EXPRESSIONS),
        ) else {
            continue;
        };
        let owner = chains.iter_mut().find(|chain| {
            chain.family == Family::from_kernel(family)
                && chain.table == table
                && chain.name == name
        });
        let Some(owner) = owner else { continue };
        let mut sets = Sets { connection: &mut *connection, family, table, declared: &declared };
        let position = owner.rules.last().map_or(1, |rule| rule.position + 1);
        let rules = expression::rules(owner.family, expressions, &mut sets)?;
        owner.rules.extend(rules.into_iter().map(|rule| Rule { position, ..rule }));
    }
    Ok(chains)
}

fn chain(message: &[u8]) -> Option<Chain> {
    let attributes = Attributes(message.get(NFGENMSG..)?);
    let base = attributes.nest(NFTA_CHAIN_HOOK).and_then(|hook| {
        Some(Base {
            hook: Hook::from_kernel(hook.number(NFTA_HOOK_HOOKNUM)?)?,
            priority: hook.number(NFTA_HOOK_PRIORITY)?.cast_signed(),
        })
    });
    Some(Chain {
        family: Family::from_kernel(*message.first()?),
        table: attributes.text(NFTA_CHAIN_TABLE)?,
        name: attributes.text(NFTA_CHAIN_NAME)?,
        base,
        rules: Vec::new(),
    })
}

fn declared_sets<T: Transport>(
    connection: &mut Connection<T>,
) -> Result<HashMap<(u8, String, String), Declared>> {
    let request = get("dump of nft sets", NFT_MSG_GETSET, 0, &[]);
    connection.dump(&request, |all: &mut HashMap<_, _>, frame| {
        let set = Attributes(frame.payload.get(NFGENMSG..).unwrap_or_default());
        let one = || set.value(NFTA_SET_EXPR).map(expression::listed);
        let list = set.value(NFTA_SET_EXPRESSIONS).map(<[u8]>::to_vec);
        if let (Some(family), Some(table), Some(name)) =
            (frame.payload.first(), set.text(NFTA_SET_TABLE), set.text(NFTA_SET_NAME))
        {
            let declared = Declared {
                key_length: set.number(NFTA_SET_KEY_LEN).unwrap_or(0),
                stateful: list.or_else(one).unwrap_or_default(),
            };
            all.insert((*family, table, name), declared);
        }
        Ok(())
    })
}

fn get(verb: &'static str, message: u16, family: u8, attributes: &[DefaultNla]) -> Request {
    let mut body = vec![family, 0, 0, 0];
    let mut rest = vec![0; attributes.buffer_len()];
    attributes.emit(&mut rest);
    body.extend(rest);
    let kind = NFNL_SUBSYS_NFTABLES << 8 | message;
    Request { op: Op::new(verb), kind, flags: 0, body, joined: false }
}

fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}
