//! Timeouts that rules give the entries of some connections in place of the kernel's (`ct timeout`).

use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::conntrack::TcpState;
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Conversation, KernelSocket};
use crate::nftables::dump;
use crate::nftables::uapi::*;

const IPPROTO_TCP: u8 = 6;

/// The policies of nf_tables for TCP: seconds, by what `enum ctattr_timeout_tcp` calls them.
#[derive(Clone, Debug, Default)]
pub struct Policies(Vec<Vec<(u16, u32)>>);

impl Policies {
    /// Reads those of the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn read() -> Result<Self> {
        let op = Op::new("open nftables netlink");
        let conversation = &mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?);
        let mut objects = dump::objects(conversation, Some(NFT_OBJECT_CT_TIMEOUT))?;
        // A kernel may not choose by the kind.
        objects.retain(|object| object.kind == NFT_OBJECT_CT_TIMEOUT);
        Ok(Self(objects.iter().filter_map(policy).collect()))
    }

    /// The shortest that an entry in one of these states is given by any policy, or where data is not
    /// acknowledged or comes again and again; `None` without a policy.
    pub fn shortest(&self, states: &[TcpState]) -> Option<Duration> {
        let kinds = states.iter().map(|state| u16::from(*state as u8));
        let kinds: Vec<_> = kinds.chain([CTA_TIMEOUT_TCP_RETRANS, CTA_TIMEOUT_TCP_UNACK]).collect();
        let wanted = self.0.iter().flatten().filter(|(kind, _)| kinds.contains(kind));
        wanted.map(|(_, seconds)| Duration::from_secs((*seconds).into())).min()
    }
}

/// `None` where it is not for TCP.
fn policy(object: &dump::RawObject) -> Option<Vec<(u16, u32)>> {
    let data = Attributes(&object.data);
    let is_tcp = data.value(NFTA_CT_TIMEOUT_L4PROTO) == Some(&[IPPROTO_TCP]);
    let timeouts = data.nest(NFTA_CT_TIMEOUT_DATA).filter(|_| is_tcp)?;
    let seconds = |value: &[u8]| value.try_into().ok().map(u32::from_be_bytes);
    Some(timeouts.iter().filter_map(|(kind, value)| Some((kind, seconds(value)?))).collect())
}
