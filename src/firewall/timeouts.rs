//! Timeouts that rules give the entries of some connections in place of the kernel's: `ct timeout` of nft, and
//! policies that `iptables -j CT --timeout` names.

use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::conntrack::TcpState;
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Conversation, KernelSocket, NFGENMSG_LEN, Request, Transport};
use crate::nftables::dump;
use crate::nftables::uapi::*;

const IPPROTO_TCP: u8 = 6;

/// `linux/netfilter/nfnetlink_cttimeout.h`
const NFNL_SUBSYS_CTNETLINK_TIMEOUT: u16 = 8;
const IPCTNL_MSG_TIMEOUT_GET: u16 = 1;
const CTA_TIMEOUT_L4PROTO: u16 = 3;
const CTA_TIMEOUT_DATA: u16 = 4;

/// Policies for TCP: seconds, by what `enum ctattr_timeout_tcp` calls them.
#[derive(Clone, Debug, Default)]
pub struct Policies(Vec<Vec<(u16, u32)>>);

impl Policies {
    /// Those of nf_tables in the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn of_nft() -> Result<Self> {
        let op = Op::new("open nftables netlink");
        let conversation = &mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?);
        let mut objects = dump::objects(conversation, Some(NFT_OBJECT_CT_TIMEOUT))?;
        // A kernel may not choose by the kind.
        objects.retain(|object| object.kind == NFT_OBJECT_CT_TIMEOUT);
        let numbers = [NFTA_CT_TIMEOUT_L4PROTO, NFTA_CT_TIMEOUT_DATA];
        let found = objects.iter().filter_map(|object| policy(Attributes(&object.data), numbers));
        Ok(Self(found.collect()))
    }

    /// Those of nfnetlink_cttimeout there. Only to be asked for where a rule names one, which keeps the module
    /// loaded: the kernel loads it for the question, too.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn named() -> Result<Self> {
        let op = Op::new("open conntrack timeout netlink");
        Self::named_of(&mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?))
    }

    fn named_of<T: Transport>(conversation: &mut Conversation<T>) -> Result<Self> {
        let op = Op::new("dump of conntrack timeout policies");
        let kind = NFNL_SUBSYS_CTNETLINK_TIMEOUT << 8 | IPCTNL_MSG_TIMEOUT_GET;
        let body = vec![0; NFGENMSG_LEN];
        let request = Request { op, kind, flags: 0, body, joined: false };
        let numbers = [CTA_TIMEOUT_L4PROTO, CTA_TIMEOUT_DATA];
        let found = conversation.dump(&request, |all: &mut Vec<_>, frame| {
            let attributes = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
            all.extend(policy(attributes, numbers));
            Ok(())
        })?;
        Ok(Self(found))
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

/// By the numbers of its protocol and of its timeouts; `None` where it is not for TCP.
fn policy(attributes: Attributes<'_>, [protocol, data]: [u16; 2]) -> Option<Vec<(u16, u32)>> {
    let is_tcp = attributes.value(protocol) == Some(&[IPPROTO_TCP]);
    let timeouts = attributes.nest(data).filter(|_| is_tcp)?;
    let seconds = |value: &[u8]| value.try_into().ok().map(u32::from_be_bytes);
    Some(timeouts.iter().filter_map(|(kind, value)| Some((kind, seconds(value)?))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute::{emitted, nested, nla, text, word};
    use crate::netlink::script::{Reply, Script};

    #[test]
    fn policies_with_names_are_read_where_they_are_for_tcp() {
        const NLMSG_DONE: u16 = 3;
        let message = |kind: u16, seq: &[u8], payload: &[u8]| {
            let length = u32::try_from(16 + payload.len()).unwrap();
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend([kind.to_ne_bytes(), [2, 0]].concat());
            bytes.extend([seq, &[0; 4], payload].concat());
            bytes
        };
        let policy = |protocol: u8, seconds: [u32; 2]| {
            let [established, unacknowledged] = seconds;
            let timeouts = [word(3, established), word(11, unacknowledged), word(12, 1)];
            let policy = [
                text(1, "short"),
                nla(2, &[0, 2]),
                nla(3, &[protocol]),
                word(5, 1),
                nested(4, &timeouts),
            ];
            [vec![0; 4], emitted(&policy)].concat()
        };
        let kernel = |request: &[u8]| {
            assert_eq!(request[4..6], (8_u16 << 8 | 1).to_ne_bytes(), "a list of policies");
            let seq = &request[8..12];
            let mut answer = message(8 << 8, seq, &policy(6, [20, 300]));
            answer.extend(message(8 << 8, seq, &policy(17, [1, 1])));
            answer.extend(message(8 << 8, seq, &policy(6, [40, 10])));
            answer.extend(message(NLMSG_DONE, seq, &[0; 4]));
            vec![Reply::Datagram(answer)]
        };
        let found = Policies::named_of(&mut Conversation::new(Script::new(kernel))).unwrap();
        let shortest = |state| found.shortest(&[state]).map(|it| it.as_secs());
        assert_eq!(shortest(TcpState::Established), Some(10), "where data is not acknowledged");
        assert_eq!(found.0.len(), 2);
        assert!(found.0.iter().all(|policy| policy.len() == 3));
    }
}
