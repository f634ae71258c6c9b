//! Reads ctnetlink messages into [`Entry`] values without allocating.
//!
//! Own code where `netlink-packet-netfilter` has a decoder, for the reason measured in
//! docs/adr/0002-own-conntrack-decoder.md; a test holds the two against each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, NLA_ALIGNTO, NLA_HEADER_SIZE, NLA_TYPE_MASK, parse_u8, parse_u16_be, parse_u32_be,
};

use super::Counters;
use super::entry::{Entry, HelperName, SeqAdj, Status, SynProxy, Tcp, TcpState, Zone};
use super::uapi::*;
use crate::flow::{Endpoint, FourTuple};

/// Length of `struct nfgenmsg`.
const NFGENMSG_LEN: usize = 4;

type Decoded<T> = Result<T, DecodeError>;

/// The entry in the payload of a ctnetlink message; `None` where it is not TCP.
///
/// # Errors
/// An attribute cut short or of the wrong size, an unknown TCP state, a missing tuple.
pub fn entry(payload: &[u8]) -> Decoded<Option<Entry>> {
    let body = payload.get(NFGENMSG_LEN..).ok_or_else(|| missing("nfgenmsg header"))?;
    let mut orig = None;
    let mut reply = None;
    let mut zone = Zone::default();
    let mut status = None;
    let mut timeout = None;
    let mut tcp = None;
    let mut mark = None;
    let mut id = None;
    let mut labels = None;
    let mut helper = None;
    let mut seq_adj = [None; 2];
    let mut synproxy = None;

    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        match kind {
            // The first packet's tuple.
            CTA_TUPLE_ORIG => {
                let Some(tuple) = tuple(value)? else { return Ok(None) };
                zone.orig = tuple.zone.unwrap_or(zone.orig);
                orig = Some(tuple.flow);
            }
            // The tuple that an answer has; differs from the inverse of the first under NAT.
            CTA_TUPLE_REPLY => {
                let Some(tuple) = tuple(value)? else { return Ok(None) };
                zone.reply = tuple.zone.unwrap_or(zone.reply);
                reply = Some(tuple.flow);
            }
            CTA_STATUS => status = Some(Status(parse_u32_be(value)?)),
            CTA_PROTOINFO => tcp = protoinfo(value)?,
            CTA_HELP => helper = help(value)?,
            // Whole seconds, rounded down by the kernel.
            CTA_TIMEOUT => timeout = Some(Duration::from_secs(parse_u32_be(value)?.into())),
            CTA_MARK => mark = Some(parse_u32_be(value)?),
            CTA_ID => id = Some(parse_u32_be(value)?),
            // Sent only for a zone that counts in both directions; else it stands in a tuple.
            CTA_ZONE => zone = Zone::both(parse_u16_be(value)?),
            // Old kernels send only as many bytes as they need, 6.18 always all sixteen.
            CTA_LABELS => {
                let mut all = [0; NF_CT_LABELS_MAX_SIZE];
                all.get_mut(..value.len())
                    .ok_or_else(|| missing("label size"))?
                    .copy_from_slice(value);
                labels = Some(all);
            }
            CTA_SEQ_ADJ_ORIG => seq_adj[0] = Some(sequence_adjustment(value)?),
            CTA_SEQ_ADJ_REPLY => seq_adj[1] = Some(sequence_adjustment(value)?),
            // All zero on every entry that came in by ctnetlink: no proxy is in front of it.
            CTA_SYNPROXY => {
                synproxy = Some(syn_proxy(value)?).filter(|state| *state != SynProxy::default());
            }
            _ => {}
        }
    }
    Ok(Some(Entry {
        orig: orig.ok_or_else(|| missing("CTA_TUPLE_ORIG"))?,
        reply: reply.ok_or_else(|| missing("CTA_TUPLE_REPLY"))?,
        zone,
        status,
        timeout,
        tcp,
        mark,
        id,
        labels,
        helper,
        seq_adj: match seq_adj {
            [None, None] => None,
            [orig, reply] => Some([orig.unwrap_or_default(), reply.unwrap_or_default()]),
        },
        synproxy,
    }))
}

/// Table size as `IPCTNL_MSG_CT_GET_STATS` tells it: entries, and the maximum (since 5.17).
///
/// # Errors
/// An attribute cut short, or no count.
pub fn stats(payload: &[u8]) -> Decoded<(u32, Option<u32>)> {
    let body = payload.get(NFGENMSG_LEN..).ok_or_else(|| missing("nfgenmsg header"))?;
    let (mut entries, mut maximum) = (None, None);
    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        match kind {
            CTA_STATS_GLOBAL_ENTRIES => entries = Some(parse_u32_be(value)?),
            CTA_STATS_GLOBAL_MAX_ENTRIES => maximum = Some(parse_u32_be(value)?),
            _ => {}
        }
    }
    Ok((entries.ok_or_else(|| missing("CTA_STATS_GLOBAL_ENTRIES"))?, maximum))
}

/// The counters of one CPU, added to `sum`.
///
/// # Errors
/// An attribute cut short.
pub(super) fn counters(payload: &[u8], sum: &mut Counters) -> Decoded<()> {
    let body = payload.get(NFGENMSG_LEN..).ok_or_else(|| missing("nfgenmsg header"))?;
    for attribute in attributes(body) {
        let (kind, value) = attribute?;
        let counter = match kind {
            CTA_STATS_INVALID => &mut sum.invalid,
            CTA_STATS_INSERT_FAILED => &mut sum.insert_failed,
            // A new connection was refused: the table was full and nothing could be evicted.
            CTA_STATS_DROP => &mut sum.drop,
            // An unassured entry was evicted for a new one.
            CTA_STATS_EARLY_DROP => &mut sum.early_drop,
            CTA_STATS_CHAIN_TOOLONG => &mut sum.chain_toolong,
            _ => continue,
        };
        *counter += u64::from(parse_u32_be(value)?);
    }
    Ok(())
}

struct Tuple {
    flow: FourTuple,
    zone: Option<u16>,
}

/// A tuple; `None` where it is not of TCP.
fn tuple(nested: &[u8]) -> Decoded<Option<Tuple>> {
    let mut addrs = None;
    let mut ports = None;
    let mut zone = None;
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        match kind {
            CTA_TUPLE_IP => addrs = Some(addresses(value)?),
            CTA_TUPLE_PROTO => {
                let Some(pair) = tcp_ports(value)? else { return Ok(None) };
                ports = Some(pair);
            }
            CTA_TUPLE_ZONE => zone = Some(parse_u16_be(value)?),
            _ => {}
        }
    }
    let [src, dst] = addrs.ok_or_else(|| missing("CTA_TUPLE_IP"))?;
    let [src_port, dst_port] = ports.ok_or_else(|| missing("CTA_TUPLE_PROTO"))?;
    let flow = FourTuple::new(Endpoint::new(src, src_port), Endpoint::new(dst, dst_port));
    if flow.src.addr().is_ipv4() != flow.dst.addr().is_ipv4() {
        return Err(missing("addresses of one family"));
    }
    Ok(Some(Tuple { flow, zone }))
}

fn addresses(nested: &[u8]) -> Decoded<[IpAddr; 2]> {
    let (mut src, mut dst) = (None, None);
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        match kind {
            CTA_IP_V4_SRC => src = Some(ipv4(value)?),
            CTA_IP_V4_DST => dst = Some(ipv4(value)?),
            CTA_IP_V6_SRC => src = Some(ipv6(value)?),
            CTA_IP_V6_DST => dst = Some(ipv6(value)?),
            _ => {}
        }
    }
    Ok([src.ok_or_else(|| missing("source address"))?, dst.ok_or_else(|| missing("destination"))?])
}

/// Source and destination port; `None` where the protocol is not TCP.
fn tcp_ports(nested: &[u8]) -> Decoded<Option<[u16; 2]>> {
    let (mut protocol, mut src, mut dst) = (None, None, None);
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        match kind {
            CTA_PROTO_NUM => protocol = Some(parse_u8(value)?),
            CTA_PROTO_SRC_PORT => src = Some(parse_u16_be(value)?),
            CTA_PROTO_DST_PORT => dst = Some(parse_u16_be(value)?),
            _ => {}
        }
    }
    if protocol.ok_or_else(|| missing("CTA_PROTO_NUM"))? != IPPROTO_TCP {
        return Ok(None);
    }
    Ok(Some([
        src.ok_or_else(|| missing("CTA_PROTO_SRC_PORT"))?,
        dst.ok_or_else(|| missing("CTA_PROTO_DST_PORT"))?,
    ]))
}

fn protoinfo(nested: &[u8]) -> Decoded<Option<Tcp>> {
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        if kind == CTA_PROTOINFO_TCP {
            return tcp_info(value).map(Some);
        }
    }
    Ok(None)
}

fn tcp_info(nested: &[u8]) -> Decoded<Tcp> {
    let mut state = None;
    let mut wscale = [0; 2];
    let mut flags = [0; 2];
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        match kind {
            CTA_PROTOINFO_TCP_STATE => {
                let number = parse_u8(value)?;
                state = Some(TcpState::from_kernel(number).ok_or_else(|| {
                    DecodeError::from(format!("unknown TCP state {number} of conntrack"))
                })?);
            }
            CTA_PROTOINFO_TCP_WSCALE_ORIGINAL => wscale[0] = parse_u8(value)?,
            CTA_PROTOINFO_TCP_WSCALE_REPLY => wscale[1] = parse_u8(value)?,
            // struct nf_ct_tcp_flags { flags, mask }: the mask means nothing in an answer.
            CTA_PROTOINFO_TCP_FLAGS_ORIGINAL => flags[0] = first(value)?,
            CTA_PROTOINFO_TCP_FLAGS_REPLY => flags[1] = first(value)?,
            _ => {}
        }
    }
    Ok(Tcp { state: state.ok_or_else(|| missing("CTA_PROTOINFO_TCP_STATE"))?, wscale, flags })
}

fn help(nested: &[u8]) -> Decoded<Option<HelperName>> {
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        if kind == CTA_HELP_NAME {
            return match HelperName::from_kernel(value) {
                Some(name) => Ok(Some(name)),
                None => Err(missing("helper name of at most 15 bytes")),
            };
        }
    }
    Ok(None)
}

fn sequence_adjustment(nested: &[u8]) -> Decoded<SeqAdj> {
    let mut adjustment = SeqAdj::default();
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        match kind {
            CTA_SEQADJ_CORRECTION_POS => adjustment.correction_pos = parse_u32_be(value)?,
            CTA_SEQADJ_OFFSET_BEFORE => adjustment.offset_before = parse_u32_be(value)?,
            CTA_SEQADJ_OFFSET_AFTER => adjustment.offset_after = parse_u32_be(value)?,
            _ => {}
        }
    }
    Ok(adjustment)
}

fn syn_proxy(nested: &[u8]) -> Decoded<SynProxy> {
    let mut state = SynProxy::default();
    for attribute in attributes(nested) {
        let (kind, value) = attribute?;
        match kind {
            CTA_SYNPROXY_ISN => state.isn = parse_u32_be(value)?,
            CTA_SYNPROXY_ITS => state.its = parse_u32_be(value)?,
            CTA_SYNPROXY_TSOFF => state.tsoff = parse_u32_be(value)?,
            _ => {}
        }
    }
    Ok(state)
}

/// The attributes of a message or of a nest: type without flags, and value.
///
/// Every entry of a dump has some thirty: this walk is most of what reading a table costs.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = Decoded<(u16, &[u8])>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some((kind, value, length)) = first_attribute(rest) else {
            rest = &[];
            return Some(Err(missing("attribute as long as it says")));
        };
        // The padding of the last one may be left out.
        rest = rest.get(length.next_multiple_of(NLA_ALIGNTO)..).unwrap_or_default();
        Some(Ok((kind, value)))
    })
}

/// Type, value, and length with header of the attribute that `bytes` begin with.
fn first_attribute(bytes: &[u8]) -> Option<(u16, &[u8], usize)> {
    let [l0, l1, t0, t1] = *bytes.first_chunk::<NLA_HEADER_SIZE>()?;
    let length = usize::from(u16::from_ne_bytes([l0, l1]));
    let kind = u16::from_ne_bytes([t0, t1]) & NLA_TYPE_MASK;
    Some((kind, bytes.get(NLA_HEADER_SIZE..length)?, length))
}

fn ipv4(value: &[u8]) -> Decoded<IpAddr> {
    <[u8; 4]>::try_from(value)
        .map(|bytes| Ipv4Addr::from(bytes).into())
        .map_err(|_| missing("IPv4 address of 4 bytes"))
}

fn ipv6(value: &[u8]) -> Decoded<IpAddr> {
    <[u8; 16]>::try_from(value)
        .map(|bytes| Ipv6Addr::from(bytes).into())
        .map_err(|_| missing("IPv6 address of 16 bytes"))
}

fn first(value: &[u8]) -> Decoded<u8> {
    value.first().copied().ok_or_else(|| missing("TCP flags"))
}

#[cold]
fn missing(what: &str) -> DecodeError {
    DecodeError::from(format!("no {what}"))
}
