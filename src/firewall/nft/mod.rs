//! Reads what the expressions of nft rules mean.
//!
//! `payload`, `meta` and `ct` load a value into registers, `bitwise` and `byteorder` change it,
//! `cmp`, `range` and `lookup` test it. An expression that is not known leaves its answer open.

mod expression;
mod machine;
mod sets;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use netlink_sys::protocols::NETLINK_NETFILTER;

use self::machine::Machine;
use self::sets::Known;
use super::set::Set;
use super::{Base, Chain, Family, Hook};
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Conversation, KernelSocket, Transport};
use crate::nftables::dump::{self, RawChain};
use crate::nftables::uapi::*;

/// The chains of the network namespace that the calling thread is in.
pub(super) fn read() -> Result<Vec<Chain>> {
    let op = Op::new("open nftables netlink");
    chains(&mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?))
}

/// The chains that a kernel reports, with their rules.
///
/// # Errors
/// The kernel refused, or a message was lost or malformed.
pub fn chains<T: Transport>(conversation: &mut Conversation<T>) -> Result<Vec<Chain>> {
    let Some(tables) = dump::tables(conversation)? else { return Ok(Vec::new()) };
    let mut chains: Vec<Chain> = dump::chains(conversation)?.into_iter().map(chain).collect();
    for table in &tables {
        let family = Family::from_kernel(table.family);
        let of_table = |chain: &&mut Chain| chain.family == family && chain.table == table.name;
        for chain in chains.iter_mut().filter(of_table) {
            chain.is_dormant = table.flags & NFT_TABLE_F_DORMANT != 0;
            chain.is_ours = table.is_ours;
        }
    }
    let mut places = HashMap::new();
    for (at, chain) in chains.iter().enumerate() {
        places.insert((chain.family, chain.table.clone(), chain.name.clone()), at);
    }
    let declared = dump::sets(conversation)?;
    let objects = dump::objects(conversation, None)?;
    let rules = dump::rules(conversation)?;
    let mut read: HashMap<(u8, String, String), Arc<Set>> = HashMap::new();
    for rule in rules {
        let family = Family::from_kernel(rule.family);
        let place = places.get(&(family, rule.table.clone(), rule.chain));
        let Some(owner) = place.and_then(|at| chains.get_mut(*at)) else { continue };
        let mut machine = Machine {
            registers: BTreeMap::new(),
            steps: Vec::new(),
            known: Known {
                conversation: &mut *conversation,
                family: rule.family,
                table: &rule.table,
                declared: &declared,
                objects: &objects,
                read: &mut read,
            },
        };
        for (kind, expression) in Attributes(&rule.expressions).iter() {
            if kind == NFTA_LIST_ELEM {
                machine.step(Attributes(expression))?;
            }
        }
        owner.push(rule.handle, machine.steps);
    }
    Ok(chains)
}

fn chain(raw: RawChain) -> Chain {
    let family = Family::from_kernel(raw.family);
    let base = raw.hook.and_then(|(hook, priority)| {
        // `enum nf_dev_hooks`: the first of them is ingress.
        let hook = match family {
            Family::Netdev if hook == 0 => Hook::Ingress,
            Family::Netdev => return None,
            _ => Hook::from_kernel(hook)?,
        };
        let (drops, is_nat) = (raw.policy == NF_DROP, raw.kind == "nat");
        Some(Base { hook, priority, drops, is_nat, devices: raw.devices })
    });
    Chain::new(family, &raw.table, &raw.name, base)
}
