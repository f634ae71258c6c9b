//! Reads ctnetlink messages into [`Entry`] values without allocating.
//!
//! Own code where `netlink-packet-netfilter` has a decoder, for the reason measured in
//! docs/adr/0002-own-conntrack-decoder.md; a test holds the two against each other.

use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{DecodeError, NLA_ALIGNTO, NLA_F_NESTED, NLA_HEADER_SIZE, NLA_TYPE_MASK};

use super::Counters;
use super::entry::{Entry, HelperName, SeqAdj, Status, SynProxy, Tcp, TcpState, Zone};
use super::uapi::*;
use crate::flow::{Endpoint, FourTuple};
use crate::netlink::NFGENMSG_LEN;

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

    let mut attributes = Attributes(body);
    for (kind, value) in attributes.by_ref() {
        match kind {
            // The first packet's tuple.
            CTA_TUPLE_ORIG => {
                let is_tcp = tuple(value, &mut orig, &mut zone.orig)?;
                if !is_tcp {
                    return Ok(None);
                }
            }
            // The tuple that an answer has; differs from the inverse of the first under NAT.
            CTA_TUPLE_REPLY => {
                let is_tcp = tuple(value, &mut reply, &mut zone.reply)?;
                if !is_tcp {
                    return Ok(None);
                }
            }
            CTA_STATUS => status = Some(Status(number(value)?)),
            CTA_PROTOINFO => tcp = protoinfo(value)?,
            CTA_HELP => helper = help(value)?,
            // Whole seconds, rounded down by the kernel.
            CTA_TIMEOUT => timeout = Some(Duration::from_secs(number(value)?.into())),
            CTA_MARK => mark = Some(number(value)?),
            CTA_ID => id = Some(number(value)?),
            // Sent only for a zone that counts in both directions; else it stands in a tuple.
            CTA_ZONE => zone = Zone::both(short(value)?),
            // Old kernels send only as many bytes as they need, 6.18 always all sixteen.
            CTA_LABELS => {
                let mut all = [0; NF_CT_LABELS_MAX_SIZE];
                all.get_mut(..value.len())
                    .ok_or_else(|| missing("label size"))?
                    .copy_from_slice(value);
                // Our own says nothing of the host's.
                labels = (all != CLOSING_LABEL).then_some(all);
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
    attributes.end()?;
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

/// Table size as `IPCTNL_MSG_CT_GET_STATS` reports it: entries, and the maximum (since 5.17).
///
/// # Errors
/// An attribute cut short, or no count.
pub fn stats(payload: &[u8]) -> Decoded<(u32, Option<u32>)> {
    let body = payload.get(NFGENMSG_LEN..).ok_or_else(|| missing("nfgenmsg header"))?;
    let (mut entries, mut maximum) = (None, None);
    let mut attributes = Attributes(body);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_STATS_GLOBAL_ENTRIES => entries = Some(number(value)?),
            CTA_STATS_GLOBAL_MAX_ENTRIES => maximum = Some(number(value)?),
            _ => {}
        }
    }
    attributes.end()?;
    Ok((entries.ok_or_else(|| missing("CTA_STATS_GLOBAL_ENTRIES"))?, maximum))
}

/// The counters of one CPU, added to `sum`.
///
/// # Errors
/// An attribute cut short.
pub(super) fn counters(payload: &[u8], sum: &mut Counters) -> Decoded<()> {
    let body = payload.get(NFGENMSG_LEN..).ok_or_else(|| missing("nfgenmsg header"))?;
    let mut attributes = Attributes(body);
    for (kind, value) in attributes.by_ref() {
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
        *counter += u64::from(number(value)?);
    }
    attributes.end()?;
    Ok(())
}

/// Decodes a tuple and its zone into the caller's slots: to return them by value costs a measurable
/// copy. `false` where it is not TCP.
#[inline]
fn tuple(nested: &[u8], flow: &mut Option<FourTuple>, zone: &mut u16) -> Decoded<bool> {
    if let Some(usual) = fast_tuple(nested) {
        *flow = Some(usual);
        return Ok(true);
    }
    any_tuple(nested, flow, zone)
}

/// Fast path for TCP over IPv4 without a zone, attributes in the kernel's own order; any other is
/// walked. It compares word by word: to collect the headers first costs more.
#[inline]
fn fast_tuple(nested: &[u8]) -> Option<FourTuple> {
    let (&[ip, s, src, d, dst, proto, n, number, sp, src_port, dp, dst_port], []) =
        nested.as_chunks::<4>()
    else {
        return None;
    };
    let is_usual = ip == header(CTA_TUPLE_IP | NLA_F_NESTED, 20)
        && s == header(CTA_IP_V4_SRC, 8)
        && d == header(CTA_IP_V4_DST, 8)
        && proto == header(CTA_TUPLE_PROTO | NLA_F_NESTED, 28)
        && n == header(CTA_PROTO_NUM, 5)
        && number[0] == IPPROTO_TCP
        && sp == header(CTA_PROTO_SRC_PORT, 6)
        && dp == header(CTA_PROTO_DST_PORT, 6);
    let end = |addr: [u8; 4], [p0, p1, ..]: [u8; 4]| {
        Endpoint::new(addr.into(), u16::from_be_bytes([p0, p1]))
    };
    is_usual.then(|| FourTuple::new(end(src, src_port), end(dst, dst_port)))
}

fn any_tuple(nested: &[u8], flow: &mut Option<FourTuple>, zone: &mut u16) -> Decoded<bool> {
    let mut addrs = None;
    let mut ports = None;
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_TUPLE_IP => addrs = Some(addresses(value)?),
            CTA_TUPLE_PROTO => {
                let Some(pair) = tcp_ports(value)? else { return Ok(false) };
                ports = Some(pair);
            }
            CTA_TUPLE_ZONE => *zone = short(value)?,
            _ => {}
        }
    }
    attributes.end()?;
    let [src, dst] = addrs.ok_or_else(|| missing("CTA_TUPLE_IP"))?;
    let [src_port, dst_port] = ports.ok_or_else(|| missing("CTA_TUPLE_PROTO"))?;
    let both = FourTuple::new(Endpoint::new(src, src_port), Endpoint::new(dst, dst_port));
    if both.src.addr().is_ipv4() != both.dst.addr().is_ipv4() {
        return Err(missing("addresses of one family"));
    }
    *flow = Some(both);
    Ok(true)
}

fn addresses(nested: &[u8]) -> Decoded<[IpAddr; 2]> {
    let (mut src, mut dst) = (None, None);
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_IP_V4_SRC => src = Some(IpAddr::from(exact::<4>(value)?)),
            CTA_IP_V4_DST => dst = Some(IpAddr::from(exact::<4>(value)?)),
            CTA_IP_V6_SRC => src = Some(IpAddr::from(exact::<16>(value)?)),
            CTA_IP_V6_DST => dst = Some(IpAddr::from(exact::<16>(value)?)),
            _ => {}
        }
    }
    attributes.end()?;
    Ok([src.ok_or_else(|| missing("source address"))?, dst.ok_or_else(|| missing("destination"))?])
}

/// Source and destination port; `None` where the protocol is not TCP.
fn tcp_ports(nested: &[u8]) -> Decoded<Option<[u16; 2]>> {
    let (mut protocol, mut src, mut dst) = (None, None, None);
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_PROTO_NUM => protocol = Some(byte(value)?),
            CTA_PROTO_SRC_PORT => src = Some(short(value)?),
            CTA_PROTO_DST_PORT => dst = Some(short(value)?),
            _ => {}
        }
    }
    attributes.end()?;
    if protocol.ok_or_else(|| missing("CTA_PROTO_NUM"))? != IPPROTO_TCP {
        return Ok(None);
    }
    Ok(Some([
        src.ok_or_else(|| missing("CTA_PROTO_SRC_PORT"))?,
        dst.ok_or_else(|| missing("CTA_PROTO_DST_PORT"))?,
    ]))
}

#[inline]
fn protoinfo(nested: &[u8]) -> Decoded<Option<Tcp>> {
    match usual_protoinfo(nested) {
        None => any_protoinfo(nested),
        usual => Ok(usual),
    }
}

/// The state of TCP as [`fast_tuple`] reads a tuple.
#[inline]
fn usual_protoinfo(nested: &[u8]) -> Option<Tcp> {
    let (&[nest, s, state, w0, wscale0, w1, wscale1, f0, flags0, f1, flags1], []) =
        nested.as_chunks::<4>()
    else {
        return None;
    };
    let is_usual = nest == header(CTA_PROTOINFO_TCP | NLA_F_NESTED, 44)
        && s == header(CTA_PROTOINFO_TCP_STATE, 5)
        && w0 == header(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, 5)
        && w1 == header(CTA_PROTOINFO_TCP_WSCALE_REPLY, 5)
        && f0 == header(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, 6)
        && f1 == header(CTA_PROTOINFO_TCP_FLAGS_REPLY, 6);
    if !is_usual {
        return None;
    }
    Some(Tcp {
        state: TcpState::from_kernel(state[0])?,
        wscale: [wscale0[0], wscale1[0]],
        flags: [flags0[0], flags1[0]],
    })
}

fn any_protoinfo(nested: &[u8]) -> Decoded<Option<Tcp>> {
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        if kind == CTA_PROTOINFO_TCP {
            return tcp_info(value).map(Some);
        }
    }
    attributes.end()?;
    Ok(None)
}

fn tcp_info(nested: &[u8]) -> Decoded<Tcp> {
    let mut state = None;
    let mut wscale = [0; 2];
    let mut flags = [0; 2];
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_PROTOINFO_TCP_STATE => {
                let number = byte(value)?;
                state = Some(TcpState::from_kernel(number).ok_or_else(|| {
                    DecodeError::from(format!("unknown TCP state {number} of conntrack"))
                })?);
            }
            CTA_PROTOINFO_TCP_WSCALE_ORIGINAL => wscale[0] = byte(value)?,
            CTA_PROTOINFO_TCP_WSCALE_REPLY => wscale[1] = byte(value)?,
            // struct nf_ct_tcp_flags { flags, mask }: the mask means nothing in an answer.
            CTA_PROTOINFO_TCP_FLAGS_ORIGINAL => flags[0] = first(value)?,
            CTA_PROTOINFO_TCP_FLAGS_REPLY => flags[1] = first(value)?,
            _ => {}
        }
    }
    attributes.end()?;
    Ok(Tcp { state: state.ok_or_else(|| missing("CTA_PROTOINFO_TCP_STATE"))?, wscale, flags })
}

fn help(nested: &[u8]) -> Decoded<Option<HelperName>> {
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        if kind == CTA_HELP_NAME {
            return match HelperName::from_kernel(value) {
                Some(name) => Ok(Some(name)),
                None => Err(missing("helper name of at most 15 bytes")),
            };
        }
    }
    attributes.end()?;
    Ok(None)
}

fn sequence_adjustment(nested: &[u8]) -> Decoded<SeqAdj> {
    let mut adjustment = SeqAdj::default();
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_SEQADJ_CORRECTION_POS => adjustment.correction_pos = number(value)?,
            CTA_SEQADJ_OFFSET_BEFORE => adjustment.offset_before = number(value)?,
            CTA_SEQADJ_OFFSET_AFTER => adjustment.offset_after = number(value)?,
            _ => {}
        }
    }
    attributes.end()?;
    Ok(adjustment)
}

fn syn_proxy(nested: &[u8]) -> Decoded<SynProxy> {
    let mut state = SynProxy::default();
    let mut attributes = Attributes(nested);
    for (kind, value) in attributes.by_ref() {
        match kind {
            CTA_SYNPROXY_ISN => state.isn = number(value)?,
            CTA_SYNPROXY_ITS => state.its = number(value)?,
            CTA_SYNPROXY_TSOFF => state.tsoff = number(value)?,
            _ => {}
        }
    }
    attributes.end()?;
    Ok(state)
}

/// The attributes of a message or of a nest: type without flags, and value.
/// [`Attributes::end`] shows whether the walk came to the end.
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (length, rest) = self.0.split_first_chunk()?;
        let length = usize::from(u16::from_ne_bytes(*length));
        let kind = u16::from_ne_bytes(*rest.first_chunk()?) & NLA_TYPE_MASK;
        let value = self.0.get(NLA_HEADER_SIZE..length)?;
        // The padding of the last one may be left out.
        self.0 = self.0.get(length.next_multiple_of(NLA_ALIGNTO)..).unwrap_or_default();
        Some((kind, value))
    }
}

impl Attributes<'_> {
    /// # Errors
    /// The walk has stopped at an attribute that is cut short.
    fn end(self) -> Decoded<()> {
        if self.0.is_empty() { Ok(()) } else { Err(missing("attribute as long as it says")) }
    }
}

/// The four bytes that an attribute of this type and length begins with.
const fn header(kind: u16, length: u16) -> [u8; NLA_HEADER_SIZE] {
    let ([l0, l1], [k0, k1]) = (length.to_ne_bytes(), kind.to_ne_bytes());
    [l0, l1, k0, k1]
}

fn number(value: &[u8]) -> Decoded<u32> {
    exact(value).map(u32::from_be_bytes)
}

fn short(value: &[u8]) -> Decoded<u16> {
    exact(value).map(u16::from_be_bytes)
}

fn byte(value: &[u8]) -> Decoded<u8> {
    exact(value).map(u8::from_be_bytes)
}

fn exact<const N: usize>(value: &[u8]) -> Decoded<[u8; N]> {
    value.try_into().map_err(|_| wrong_size(N, value.len()))
}

fn first(value: &[u8]) -> Decoded<u8> {
    value.first().copied().ok_or_else(|| missing("TCP flags"))
}

#[cold]
fn wrong_size(wanted: usize, found: usize) -> DecodeError {
    DecodeError::from(format!("attribute of {found} bytes where {wanted} are expected"))
}

#[cold]
fn missing(what: &str) -> DecodeError {
    DecodeError::from(format!("no {what}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A nest as the kernel builds it: headers and values in turn.
    fn words(words: &[[u8; 4]]) -> Vec<u8> {
        words.concat()
    }

    fn usual_tuple_nest() -> impl Strategy<Value = Vec<u8>> {
        any::<[[u8; 4]; 4]>().prop_map(|[src, dst, src_port, dst_port]| {
            words(&[
                header(CTA_TUPLE_IP | NLA_F_NESTED, 20),
                header(CTA_IP_V4_SRC, 8),
                src,
                header(CTA_IP_V4_DST, 8),
                dst,
                header(CTA_TUPLE_PROTO | NLA_F_NESTED, 28),
                header(CTA_PROTO_NUM, 5),
                [IPPROTO_TCP, 0, 0, 0],
                header(CTA_PROTO_SRC_PORT, 6),
                src_port,
                header(CTA_PROTO_DST_PORT, 6),
                dst_port,
            ])
        })
    }

    fn usual_protoinfo_nest() -> impl Strategy<Value = Vec<u8>> {
        (0..10_u8, any::<[[u8; 4]; 4]>()).prop_map(|(state, [w0, w1, f0, f1])| {
            words(&[
                header(CTA_PROTOINFO_TCP | NLA_F_NESTED, 44),
                header(CTA_PROTOINFO_TCP_STATE, 5),
                [state, 0, 0, 0],
                header(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, 5),
                w0,
                header(CTA_PROTOINFO_TCP_WSCALE_REPLY, 5),
                w1,
                header(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, 6),
                f0,
                header(CTA_PROTOINFO_TCP_FLAGS_REPLY, 6),
                f1,
            ])
        })
    }

    /// Bytes that are put over others, and a new length.
    fn damage() -> impl Strategy<Value = (Vec<(usize, u8)>, Option<usize>)> {
        let value = prop_oneof![any::<u8>(), 0..48_u8];
        (proptest::collection::vec((0..48_usize, value), 0..4), proptest::option::of(0..64_usize))
    }

    fn damaged(nest: &[u8], (bytes, length): (Vec<(usize, u8)>, Option<usize>)) -> Vec<u8> {
        let mut nest = nest.to_vec();
        for (at, value) in bytes {
            if let Some(byte) = nest.get_mut(at) {
                *byte = value;
            }
        }
        nest.resize(length.unwrap_or(nest.len()), 0);
        nest
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

        #[test]
        fn a_tuple_at_a_glance_is_what_the_walk_finds(nest in usual_tuple_nest(), damage in damage()) {
            prop_assert!(fast_tuple(&nest).is_some());
            let nest = damaged(&nest, damage);
            if let Some(glance) = fast_tuple(&nest) {
                let (mut walk, mut zone) = (None, 7);
                prop_assert!(any_tuple(&nest, &mut walk, &mut zone).unwrap());
                prop_assert_eq!((walk, zone), (Some(glance), 7));
            }
        }

        #[test]
        fn a_state_at_a_glance_is_what_the_walk_finds(
            nest in usual_protoinfo_nest(),
            damage in damage(),
        ) {
            prop_assert!(usual_protoinfo(&nest).is_some());
            let nest = damaged(&nest, damage);
            if let Some(glance) = usual_protoinfo(&nest) {
                prop_assert_eq!(any_protoinfo(&nest).unwrap(), Some(glance));
            }
        }
    }
}
