//! Devices, routes and traffic control by rtnetlink.

pub mod bridge;
pub mod changes;
pub mod link;
pub mod neighbour;
pub mod nsid;
pub mod route;
pub mod tc;

use std::net::IpAddr;

use netlink_packet_core::DefaultNla;

use crate::error::{Op, Result};
use crate::flow::{AF_INET, AF_INET6};
use crate::netlink::attribute::{Attributes, emitted, nla};

/// A message's head, a C struct of so many words, and its attributes.
fn body<const WORDS: usize>(head: [u32; WORDS], attributes: &[DefaultNla]) -> Vec<u8> {
    let mut body: Vec<u8> = head.into_iter().flat_map(u32::to_ne_bytes).collect();
    body.append(&mut emitted(attributes));
    body
}

/// The same, taken apart.
fn split<const WORDS: usize>(op: Op, payload: &[u8]) -> Result<([u32; WORDS], Attributes<'_>)> {
    let mut head = [0; WORDS];
    let (words, _) = payload.as_chunks();
    if words.len() < WORDS {
        return Err(op.malformed("cut short"));
    }
    for (word, bytes) in head.iter_mut().zip(words) {
        *word = u32::from_ne_bytes(*bytes);
    }
    Ok((head, Attributes(payload.get(WORDS * size_of::<u32>()..).unwrap_or_default())))
}

/// `AF_INET` or `AF_INET6`, and the address as an attribute.
fn address(kind: u16, addr: IpAddr) -> (u8, DefaultNla) {
    match addr {
        IpAddr::V4(addr) => (AF_INET, nla(kind, &addr.octets())),
        IpAddr::V6(addr) => (AF_INET6, nla(kind, &addr.octets())),
    }
}
