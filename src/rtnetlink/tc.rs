//! Traffic control of our own device by rtnetlink: an `ingress` qdisc, and one filter for each target.

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcHeader, TcMessage,
    TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request};

const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
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
        let header = TcHeader {
            handle: TcHandle { major: u16::MAX, minor: 0 },
            parent: TcHandle::INGRESS,
            ..header(device)
        };
        let message = TcMessage::from_parts(header, vec![TcAttribute::Kind("ingress".to_owned())]);
        self.send("add ingress qdisc", RTM_NEWQDISC, &message)
    }

    /// `tc filter add dev DEVICE ingress protocol PROTOCOL u32 match u32 VALUE MASK at OFFSET
    /// action mirred ingress redirect ifindex TARGET`
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn redirect(&mut self, device: u32, selector: Selector, target: u32) -> Result<()> {
        let Selector { protocol, offset, value, mask } = selector;
        let mut key = TcU32Key::default();
        key.mask = mask;
        key.val = value;
        key.off = offset;
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = 1;
        selector.keys = vec![key];

        let mut mirror = TcMirror::default();
        mirror.generic = TcActionGeneric::default();
        mirror.generic.action = TcActionType::Stolen;
        mirror.eaction = TcMirrorActionType::IngressRedir;
        mirror.ifindex = target;
        let mut action = TcAction::default();
        action.attributes = vec![
            TcActionAttribute::Kind("mirred".to_owned()),
            TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
                mirror,
            ))]),
        ];
        let header = TcHeader {
            parent: TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS },
            // A priority has filters of one protocol only.
            info: u32::from(protocol) << 16 | u32::from(protocol.to_be()),
            ..header(device)
        };
        let options = vec![
            TcOption::U32(TcFilterU32Option::Selector(selector)),
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
        ];
        let attributes =
            vec![TcAttribute::Kind(TcFilterU32::KIND.to_owned()), TcAttribute::Options(options)];
        self.send("add redirect filter", RTM_NEWTFILTER, &TcMessage::from_parts(header, attributes))
    }

    fn send(&mut self, verb: &'static str, kind: u16, message: &TcMessage) -> Result<()> {
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        self.conversation.execute(&Request { op: Op::new(verb), kind, flags, body, joined: false })
    }
}

fn header(device: u32) -> TcHeader {
    TcHeader { index: i32::try_from(device).unwrap_or(0), ..TcHeader::default() }
}
