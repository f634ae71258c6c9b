//! ctkeep's entry decoder against that of netlink-packet-netfilter: two readers, one meaning.
//!
//! On what a kernel has sent, and on entries that are built with that crate's own types.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod played;

use std::net::IpAddr;
use std::time::Duration;

use ctkeep::conntrack::{Entry, TcpState, decode};
use ctkeep::flow::{Endpoint, FourTuple};
use ctkeep::netlink::frames;
use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, ParseableParametrized};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol,
    Status, TCPFlags, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use proptest::prelude::*;
use proptest::sample::select;

/// What both decoders know of an entry.
#[derive(Debug, Default, PartialEq)]
struct Common {
    orig: Option<FourTuple>,
    reply: Option<FourTuple>,
    status: Option<u32>,
    timeout: Option<Duration>,
    mark: Option<u32>,
    state: Option<u8>,
    wscale: [u8; 2],
    flags: [u8; 2],
}

impl From<Entry> for Common {
    fn from(entry: Entry) -> Self {
        Self {
            orig: Some(entry.orig),
            reply: Some(entry.reply),
            status: entry.status.map(|status| status.0),
            timeout: entry.timeout,
            mark: entry.mark,
            state: entry.tcp.map(|tcp| tcp.state as u8),
            wscale: entry.tcp.map_or([0, 0], |tcp| tcp.wscale),
            flags: entry.tcp.map_or([0, 0], |tcp| tcp.flags),
        }
    }
}

/// As the other crate reads it; `None` where an entry is not TCP.
///
/// # Errors
/// The crate refuses it, or there is no entry in what it has read.
fn read_by_the_crate(kind: u16, payload: &[u8]) -> Result<Option<Common>, String> {
    let message = NetfilterMessage::parse_with_param(payload, kind).map_err(|e| e.to_string())?;
    let NetfilterMessageInner::Conntrack(message) = message.inner else {
        panic!("subsystem of {kind:#x}")
    };
    let (ConntrackMessage::New(attributes) | ConntrackMessage::Delete(attributes)) = message else {
        panic!("message type {kind:#x}")
    };
    let mut common = Common::default();
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => {
                let Some(tuple) = four_tuple(&parts)? else { return Ok(None) };
                common.orig = Some(tuple);
            }
            ConntrackAttribute::CtaTupleReply(parts) => {
                let Some(tuple) = four_tuple(&parts)? else { return Ok(None) };
                common.reply = Some(tuple);
            }
            ConntrackAttribute::CtaStatus(status) => common.status = Some(status.bits()),
            ConntrackAttribute::CtaTimeout(seconds) => {
                common.timeout = Some(Duration::from_secs(seconds.into()));
            }
            ConntrackAttribute::CtaMark(mark) => common.mark = Some(mark),
            ConntrackAttribute::CtaProtoInfo(infos) => {
                // Of an attribute that comes twice, which only damage brings about, the last counts.
                common = Common { state: None, wscale: [0; 2], flags: [0; 2], ..common };
                let tcp = infos.iter().find_map(|info| match info {
                    ProtoInfo::TCP(parts) => Some(parts),
                    _ => None,
                });
                tcp.into_iter().flatten().for_each(|part| common.read_tcp(part));
            }
            _ => {}
        }
    }
    Ok(Some(common))
}

impl Common {
    fn read_tcp(&mut self, part: &ProtoInfoTCP) {
        match part {
            ProtoInfoTCP::State(state) => self.state = Some(*state),
            ProtoInfoTCP::OriginalWindowScale(scale) => self.wscale[0] = *scale,
            ProtoInfoTCP::ReplyWindowScale(scale) => self.wscale[1] = *scale,
            ProtoInfoTCP::OriginalFlags(flags) => self.flags[0] = flags.flags,
            ProtoInfoTCP::ReplyFlags(flags) => self.flags[1] = flags.flags,
            _ => {}
        }
    }
}

fn four_tuple(parts: &[Tuple]) -> Result<Option<FourTuple>, String> {
    let (mut src, mut dst, mut ports) = (None, None, [None; 2]);
    let mut protocol = None;
    for part in parts {
        match part {
            Tuple::Ip(addrs) => {
                for addr in addrs {
                    match addr {
                        IPTuple::SourceAddress(addr) => src = Some(*addr),
                        IPTuple::DestinationAddress(addr) => dst = Some(*addr),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(number) => protocol = Some(*number),
                        ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                        ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if protocol.ok_or("no protocol")? != Protocol::Tcp {
        return Ok(None);
    }
    let src = Endpoint::new(src.ok_or("no source")?, ports[0].ok_or("no source port")?);
    let dst = Endpoint::new(dst.ok_or("no destination")?, ports[1].ok_or("no destination port")?);
    Ok(Some(FourTuple::new(src, dst)))
}

#[test]
fn both_read_the_same_in_what_a_kernel_has_sent() {
    let mut compared = 0;
    for name in played::hex::names("entries").iter().chain(&played::hex::names("events")) {
        for datagram in played::hex::read(name) {
            for frame in frames(&datagram) {
                let frame = frame.unwrap();
                if ![played::CT_NEW, played::CT_DELETE].contains(&frame.kind) {
                    continue;
                }
                let ours = decode::entry(frame.payload).unwrap().map(Common::from);
                let theirs = read_by_the_crate(frame.kind, frame.payload).unwrap();
                assert_eq!(ours, theirs, "{name}");
                compared += 1;
            }
        }
    }
    // The kernel names at least: plain, IPv6, redirected, three zones, mark, labels, UDP, events.
    assert!(compared >= 12, "only {compared} entries among the golden files");
}

fn any_endpoint(is_ipv4: bool) -> impl Strategy<Value = (IpAddr, u16)> {
    let addr = if is_ipv4 {
        any::<[u8; 4]>().prop_map(IpAddr::from).boxed()
    } else {
        // Conntrack never has an IPv4 address in the clothes of an IPv6 one.
        any::<[u8; 16]>()
            .prop_map(IpAddr::from)
            .prop_filter("canonical", |addr| addr.to_canonical() == *addr)
            .boxed()
    };
    (addr, any::<u16>())
}

/// A tuple with its parts in any order, and parts that nobody knows among them.
fn any_tuple(is_ipv4: bool) -> impl Strategy<Value = Vec<Tuple>> {
    let protocols = prop_oneof![9 => Just(Protocol::Tcp), 1 => Just(Protocol::Udp)];
    (any_endpoint(is_ipv4), any_endpoint(is_ipv4), protocols, any_unknown(200))
        .prop_flat_map(|((src, src_port), (dst, dst_port), protocol, unknown)| {
            let addrs = vec![IPTuple::SourceAddress(src), IPTuple::DestinationAddress(dst)];
            let ports = vec![
                ProtoTuple::Protocol(protocol),
                ProtoTuple::SourcePort(src_port),
                ProtoTuple::DestinationPort(dst_port),
            ];
            (Just(addrs).prop_shuffle(), Just(ports).prop_shuffle(), Just(unknown))
        })
        .prop_flat_map(|(addrs, ports, unknown)| {
            let mut parts = vec![Tuple::Ip(addrs), Tuple::Proto(ports)];
            parts.extend(unknown.map(Tuple::Other));
            Just(parts).prop_shuffle()
        })
}

/// An attribute of a kernel newer than both readers.
fn any_unknown(first: u16) -> impl Strategy<Value = Option<DefaultNla>> {
    let kinds = (first..first + 50, any::<bool>())
        .prop_map(|(kind, is_nested)| if is_nested { kind | NLA_F_NESTED } else { kind });
    let values = proptest::collection::vec(any::<u8>(), 0..20);
    proptest::option::of((kinds, values).prop_map(|(kind, value)| DefaultNla::new(kind, value)))
}

fn any_flags() -> impl Strategy<Value = TCPFlags> {
    any::<[u8; 2]>().prop_map(|pair| TCPFlags::parse(&pair).unwrap())
}

fn any_tcp() -> impl Strategy<Value = ProtoInfo> {
    let states: Vec<u8> = TcpState::ALL.iter().map(|state| *state as u8).collect();
    (select(states), any::<Option<[u8; 2]>>(), proptest::option::of((any_flags(), any_flags())))
        .prop_flat_map(|(state, scales, flags)| {
            let mut parts = vec![ProtoInfoTCP::State(state)];
            if let Some([orig, reply]) = scales {
                parts.push(ProtoInfoTCP::OriginalWindowScale(orig));
                parts.push(ProtoInfoTCP::ReplyWindowScale(reply));
            }
            if let Some((orig, reply)) = flags {
                parts.push(ProtoInfoTCP::OriginalFlags(orig));
                parts.push(ProtoInfoTCP::ReplyFlags(reply));
            }
            Just(parts).prop_shuffle().prop_map(ProtoInfo::TCP)
        })
}

/// A message with the attributes in any order.
fn any_message() -> impl Strategy<Value = (u16, Vec<u8>)> {
    any::<bool>()
        .prop_flat_map(|is_ipv4| {
            (
                Just(is_ipv4),
                any_tuple(is_ipv4),
                any_tuple(is_ipv4),
                any::<Option<u32>>(),
                any::<Option<u32>>(),
                any::<Option<u32>>(),
                proptest::option::of(any_tcp()),
                any_unknown(200),
                any::<bool>(),
            )
        })
        .prop_flat_map(|(is_ipv4, orig, reply, status, timeout, mark, tcp, unknown, is_end)| {
            let mut attributes = vec![
                ConntrackAttribute::CtaTupleOrig(orig),
                ConntrackAttribute::CtaTupleReply(reply),
            ];
            attributes
                .extend(status.map(Status::from_bits_retain).map(ConntrackAttribute::CtaStatus));
            attributes.extend(timeout.map(ConntrackAttribute::CtaTimeout));
            attributes.extend(mark.map(ConntrackAttribute::CtaMark));
            attributes.extend(tcp.map(|tcp| ConntrackAttribute::CtaProtoInfo(vec![tcp])));
            attributes.extend(unknown.map(ConntrackAttribute::Other));
            (Just(is_ipv4), Just(attributes).prop_shuffle(), Just(is_end))
        })
        .prop_map(|(is_ipv4, attributes, is_end)| {
            let family =
                if is_ipv4 { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
            let (kind, message) = if is_end {
                (played::CT_DELETE, ConntrackMessage::Delete(attributes))
            } else {
                (played::CT_NEW, ConntrackMessage::New(attributes))
            };
            let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
            let mut payload = vec![0; Emitable::buffer_len(&message)];
            message.emit(&mut payload);
            (kind, payload)
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn both_read_the_same_in_what_the_crate_has_written((kind, payload) in any_message()) {
        let ours = decode::entry(&payload).unwrap().map(Common::from);
        prop_assert_eq!(ours, read_by_the_crate(kind, &payload).unwrap());
    }

    /// The two may differ in what they refuse.
    #[test]
    fn what_both_accept_they_read_alike_however_damaged(
        (kind, payload) in any_message(),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4),
        cut in any::<Option<usize>>(),
    ) {
        let mut payload = payload;
        for (at, value) in damage {
            let at = at % payload.len();
            payload[at] = value;
        }
        if let Some(length) = cut {
            payload.truncate(length % payload.len());
        }
        if let (Ok(ours), Ok(theirs)) =
            (decode::entry(&payload), read_by_the_crate(kind, &payload))
        {
            prop_assert_eq!(ours.map(Common::from), theirs);
        }
        let _ = decode::stats(&payload);
    }
}
