//! Timeouts that rules give the entries of some connections in place of the kernel's (`ct timeout`).

use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::conntrack::TcpState;
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Conversation, KernelSocket, Transport};
use crate::nftables::dump;
use crate::nftables::uapi::*;

const IPPROTO_TCP: u8 = 6;

/// The shortest that a TCP entry in one of these states is given by any policy of nf_tables, or where data is
/// not acknowledged or comes again and again; `None` without a policy.
///
/// # Errors
/// The kernel refused.
pub fn shortest(states: &[TcpState]) -> Result<Option<Duration>> {
    let op = Op::new("open nftables netlink");
    shortest_of(&mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?), states)
}

fn shortest_of<T: Transport>(
    conversation: &mut Conversation<T>,
    states: &[TcpState],
) -> Result<Option<Duration>> {
    let mut policies = dump::objects(conversation, Some(NFT_OBJECT_CT_TIMEOUT))?;
    // A kernel may not choose by the kind.
    policies.retain(|object| object.kind == NFT_OBJECT_CT_TIMEOUT);
    let kinds = states.iter().map(|state| u16::from(*state as u8));
    let kinds: Vec<_> = kinds.chain([CTA_TIMEOUT_TCP_RETRANS, CTA_TIMEOUT_TCP_UNACK]).collect();
    let of_policy = |object: &dump::RawObject| {
        let data = Attributes(&object.data);
        let is_tcp = data.value(NFTA_CT_TIMEOUT_L4PROTO) == Some(&[IPPROTO_TCP]);
        let timeouts = data.nest(NFTA_CT_TIMEOUT_DATA).filter(|_| is_tcp)?;
        kinds.iter().filter_map(|kind| timeouts.number(*kind)).min()
    };
    let shortest = policies.iter().filter_map(of_policy).min();
    Ok(shortest.map(|seconds| Duration::from_secs(seconds.into())))
}
