//! Sets that others use too: made where they are missing, never taken away, and filled with elements
//! that go by themselves.

use std::time::Duration;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE};

use super::Field;
use super::dump;
use super::table::{edges, message_of};
use super::uapi::*;
use crate::error::{Cause, Op, Result};
use crate::netlink::attribute::{nested, nla, text, word};
use crate::netlink::{Conversation, Request, Transport};

/// A set to be made: with timeouts, small at first, growing.
#[derive(Clone, Copy, Debug)]
pub struct SharedSet {
    /// Name in `nft list ruleset`.
    pub name: &'static str,
    /// What an element is.
    pub key: Field,
    /// Whether an element is a network (`flags interval`).
    pub of_networks: bool,
}

/// What matters of a set that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of a key: 4 for IPv4 addresses, 16 for IPv6.
    pub key_length: u32,
    /// It takes networks.
    pub of_networks: bool,
    /// Its elements can go by themselves.
    pub has_timeouts: bool,
}

/// An element.
#[derive(Clone, Debug)]
pub struct Element {
    /// Its key, or the first of a network.
    pub first: Vec<u8>,
    /// Behind the last of the network; `None` where there is no further one.
    pub behind: Option<Vec<u8>>,
    /// It goes after this time, in a set that has timeouts.
    pub time: Option<Duration>,
}

/// Makes a table of the `inet` family and sets in it, where they are missing.
///
/// # Errors
/// nf_tables is missing, or a set of one of these names is of another kind.
pub fn make<T: Transport>(
    conversation: &mut Conversation<T>,
    table: &str,
    sets: &[SharedSet],
) -> Result<()> {
    let op = Op::new("make nftables sets");
    let named = text(NFTA_TABLE_NAME, table);
    let flagged = [named, word(NFTA_TABLE_FLAGS, 0)];
    let mut messages = vec![message_of(op, NFPROTO_INET, NFT_MSG_NEWTABLE, NLM_F_CREATE, &flagged)];
    for (id, set) in (1..).zip(sets) {
        let interval = if set.of_networks { NFT_SET_INTERVAL } else { 0 };
        let attributes = [
            text(NFTA_SET_TABLE, table),
            text(NFTA_SET_NAME, set.name),
            word(NFTA_SET_ID, id),
            word(NFTA_SET_KEY_TYPE, set.key as u32),
            word(NFTA_SET_KEY_LEN, set.key.length()),
            word(NFTA_SET_FLAGS, NFT_SET_TIMEOUT | interval),
        ];
        messages.push(message_of(op, NFPROTO_INET, NFT_MSG_NEWSET, NLM_F_CREATE, &attributes));
    }
    transact(conversation, op, &messages)
}

/// Looks at a set.
///
/// # Errors
/// There is none, or a broken conversation.
pub fn shape<T: Transport>(
    conversation: &mut Conversation<T>,
    family: &str,
    table: &str,
    set: &str,
) -> Result<Shape> {
    let number = family_number(family);
    let sets = dump::sets(conversation)?;
    let is_it =
        |it: &&dump::RawSet| Some(it.family) == number && it.table == table && it.name == set;
    let found = sets.iter().find(is_it).ok_or_else(|| {
        let what = format!("no set '{set}' in table {family} {table}");
        Op::new("look for nftables set").failed(Cause::Unavailable(what))
    })?;
    Ok(Shape {
        key_length: found.key_length,
        of_networks: found.flags & NFT_SET_INTERVAL != 0,
        has_timeouts: found.flags & NFT_SET_TIMEOUT != 0,
    })
}

/// Puts an element into the set of this family, table and name; one that is there already is put
/// anew, so that its time begins again.
///
/// # Errors
/// The set is gone, full, or has something that overlaps.
pub fn put<T: Transport>(
    conversation: &mut Conversation<T>,
    shape: Shape,
    place: [&str; 3],
    element: &Element,
) -> Result<()> {
    let op = Op::new("put into nftables set");
    let add = request(op, NFT_MSG_NEWSETELEM, shape, place, element);
    let remove = request(op, NFT_MSG_DELSETELEM, shape, place, element);
    // A removal of what is not there fails, and with it all that is sent with it.
    match transact(conversation, op, &[remove, add.clone()]) {
        Err(error) if error.is_absent() => transact(conversation, op, &[add]),
        result => result,
    }
}

/// Takes an element out of the set of this family, table and name, where it is there.
///
/// # Errors
/// A broken conversation.
pub fn take<T: Transport>(
    conversation: &mut Conversation<T>,
    shape: Shape,
    place: [&str; 3],
    element: &Element,
) -> Result<()> {
    let op = Op::new("take out of nftables set");
    match transact(conversation, op, &[request(op, NFT_MSG_DELSETELEM, shape, place, element)]) {
        Err(error) if error.is_absent() => Ok(()),
        result => result,
    }
}

fn request(op: Op, kind: u16, shape: Shape, place: [&str; 3], element: &Element) -> Request {
    let [family, table, set] = place;
    let key = |key: &[u8]| nested(NFTA_SET_ELEM_KEY, &[nla(NFTA_DATA_VALUE, key)]);
    let mut first = vec![key(&element.first)];
    if let Some(time) = element.time.filter(|_| shape.has_timeouts && kind == NFT_MSG_NEWSETELEM) {
        let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        first.push(nla(NFTA_SET_ELEM_TIMEOUT, &milliseconds.to_be_bytes()));
    }
    let mut elements: Vec<DefaultNla> = vec![nested(NFTA_LIST_ELEM, &first)];
    if let Some(behind) = element.behind.as_ref().filter(|_| shape.of_networks) {
        let end = [key(behind), word(NFTA_SET_ELEM_FLAGS, NFT_SET_ELEM_INTERVAL_END)];
        elements.push(nested(NFTA_LIST_ELEM, &end));
    }
    let attributes = [
        text(NFTA_SET_ELEM_LIST_TABLE, table),
        text(NFTA_SET_ELEM_LIST_SET, set),
        nested(NFTA_SET_ELEM_LIST_ELEMENTS, &elements),
    ];
    let flags = if kind == NFT_MSG_NEWSETELEM { NLM_F_CREATE } else { 0 };
    message_of(op, family_number(family).unwrap_or_default(), kind, flags, &attributes)
}

/// The families that have tables for packets of IP.
fn family_number(name: &str) -> Option<u8> {
    match name {
        "inet" => Some(NFPROTO_INET),
        "ip" => Some(NFPROTO_IPV4),
        "ip6" => Some(NFPROTO_IPV6),
        "netdev" => Some(NFPROTO_NETDEV),
        _ => None,
    }
}

fn transact<T: Transport>(
    conversation: &mut Conversation<T>,
    op: Op,
    messages: &[Request],
) -> Result<()> {
    let (begin, end) = edges(op);
    conversation.transaction(&begin, messages, &end)
}
