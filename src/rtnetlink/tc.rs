//! Traffic control of our own device by rtnetlink: an `ingress` qdisc, and one filter for each target.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::body;
use crate::error::{Op, Result};
use crate::netlink::attribute::{emitted, nested, nla, text};
use crate::netlink::{Conversation, KernelSocket, Request};

const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TCA_INGRESS_REDIR: u32 = 3;
const TC_ACT_STOLEN: u32 = 4;
const TC_U32_TERMINAL: u8 = 1;
const TC_H_INGRESS: u32 = 0xffff_fff1;
const TC_H_CLSACT_INGRESS: u32 = 0xffff_fff2;
/// What the kernel calls the `ingress` qdisc itself.
const INGRESS: u32 = 0xffff_0000;

/// Four bytes of a packet that choose it, counted from the start of the IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selector {
    /// `ETH_P_IP` or `ETH_P_IPV6`.
    pub protocol: u16,
    /// Where.
    pub offset: i32,
    /// What they are, masked.
    pub value: u32,
    /// Which of their bits count.
    pub mask: u32,
}

/// Speaks rtnetlink about queueing disciplines and filters.
#[derive(Debug)]
pub struct TrafficControl {
    conversation: Conversation<KernelSocket>,
}

impl TrafficControl {
    /// Speaks of the namespace of the calling thread.
    ///
    /// # Errors
    /// No socket is to be had.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open traffic control netlink"), NETLINK_ROUTE)?;
        Ok(Self { conversation: Conversation::new(socket) })
    }

    /// `tc qdisc add dev DEVICE ingress`
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn add_ingress(&mut self, device: u32) -> Result<()> {
        let head = Head { device, handle: INGRESS, parent: TC_H_INGRESS, info: 0 };
        self.send("add ingress qdisc", RTM_NEWQDISC, head, &[text(TCA_KIND, "ingress")])
    }

    /// `tc filter add dev DEVICE ingress protocol PROTOCOL u32 match u32 VALUE MASK at OFFSET
    /// action mirred ingress redirect ifindex TARGET`
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn redirect(&mut self, device: u32, selector: Selector, target: u32) -> Result<()> {
        let Selector { protocol, offset, value, mask } = selector;
        // struct tc_u32_sel { u8 flags, offshift, nkeys, be16 offmask, u16 off, s16 offoff, hoff, be32 hmask }
        let mut selector = vec![TC_U32_TERMINAL, 0, 1, 0];
        selector.extend([0; 12]);
        // struct tc_u32_key { be32 mask, val, int off, offmask }
        for word in [mask.to_be(), value.to_be(), offset.cast_unsigned(), 0] {
            selector.extend(word.to_ne_bytes());
        }
        // struct tc_mirred { u32 index, capab, int action, refcnt, bindcnt, eaction, u32 ifindex }
        let mirred = [0, 0, TC_ACT_STOLEN, 0, 0, TCA_INGRESS_REDIR, target];
        let mirred: Vec<u8> = mirred.into_iter().flat_map(u32::to_ne_bytes).collect();
        let action = [
            text(TCA_ACT_KIND, "mirred"),
            nested(TCA_ACT_OPTIONS, &[nla(TCA_MIRRED_PARMS, &mirred)]),
        ];
        // Of a list of actions the first.
        let actions = emitted(&[nla(1, &emitted(&action))]);
        let options = emitted(&[nla(TCA_U32_SEL, &selector), nla(TCA_U32_ACT, &actions)]);
        // A priority has filters of one protocol only.
        let info = u32::from(protocol) << 16 | u32::from(protocol.to_be());
        let head = Head { device, handle: 0, parent: TC_H_CLSACT_INGRESS, info };
        let attributes = [text(TCA_KIND, "u32"), nla(TCA_OPTIONS, &options)];
        self.send("add redirect filter", RTM_NEWTFILTER, head, &attributes)
    }

    fn send(
        &mut self,
        verb: &'static str,
        kind: u16,
        head: Head,
        attributes: &[DefaultNla],
    ) -> Result<()> {
        let Head { device, handle, parent, info } = head;
        let body = body([0, device, handle, parent, info], attributes);
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.conversation.execute(&Request { op: Op::new(verb), kind, flags, body, joined: false })
    }
}

/// `struct tcmsg`.
struct Head {
    device: u32,
    handle: u32,
    parent: u32,
    info: u32,
}
