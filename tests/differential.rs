//! ctkeep's entry decoder against that of netlink-packet-netfilter: two readers, one meaning.
//!
//! On what a kernel has sent, and on entries that are built with that crate's own types.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod played;

use std::net::IpAddr;

use ctkeep::conntrack::{TcpState, decode};
use ctkeep::netlink::frames;
use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol,
    Status, TCPFlags, Tuple,
};
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterProtoFamily};
use played::crate_reader::{Common, read_by_the_crate};
use proptest::prelude::*;
use proptest::sample::select;

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
