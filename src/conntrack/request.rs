//! The typed requests to ctnetlink. What must not be asked cannot be written: every delete and
//! update carries a tuple (a delete without one would flush the table).
//!
//! Attributes are written as `DefaultNla`: the typed ones of netlink-packet-netfilter 0.4 drop the
//! nested flag of what they do not know, and the kernel refuses `CTA_FILTER` without it.

use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};

use super::entry::{Entry, EntryKey, SeqAdj, Status, SynProxy, TcpState, Zone};
use super::uapi::*;
use crate::error::Op;
use crate::flow::{AF_INET, Endpoint, FourTuple};
use crate::netlink::attribute::{emitted, nested, nla};
use crate::netlink::{Request, nfgenmsg};

/// Flags of both directions of what we insert, or hold as ESTABLISHED where it is. Liberal: the windows
/// are not known to a new entry, and without the flag the rest of the stream would be INVALID; so would
/// be answers to a hidden FIN, and a hidden RST without ACK, whose acknowledgement number is any. And a
/// flag that the kernel gives to no direction, nor looks at there: it marks our entries
/// ([`Entry::is_ours`]; seen to last on 6.18, guarded by tests/live/release.rs).
const OURS: u8 = IP_CT_TCP_FLAG_BE_LIBERAL | IP_CT_TCP_SIMULTANEOUS_OPEN;

/// One change to the table.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// Set the time until the entry expires; nothing else.
    Extend {
        /// Which entry.
        key: EntryKey,
        /// From now; the kernel takes whole seconds, so it is rounded up.
        timeout: Duration,
    },
    /// Set TCP state, status and timeout of an entry in place. One that is made ESTABLISHED is ours from
    /// then on ([`Entry::is_ours`]): a packet can lengthen it to days, and the daemon that holds
    /// it, or the next one, must know to give it back.
    Update {
        /// Which entry.
        key: EntryKey,
        /// New state.
        state: TcpState,
        /// Bits to set, where any are to be; the kernel never clears one.
        status: Option<Status>,
        /// As in [`Change::Extend`].
        timeout: Duration,
    },
    /// Create an entry; fails with `EEXIST` where one of its tuples is in the table.
    Insert(Insert),
    /// The same without the mark of ours ([`Entry::is_ours`]): of a connection that this host opened,
    /// which nobody takes for one of the scope.
    PutBack(Insert),
    /// Delete `old` and create an entry, back to back in one send.
    Replace {
        /// The entry to delete; where it is gone already only the insert happens.
        old: EntryKey,
        /// Its identity, so that a younger entry of the same tuple is left alone.
        id: Option<u32>,
        /// The entry to create.
        new: Insert,
    },
    /// Delete an entry.
    Delete {
        /// Which entry.
        key: EntryKey,
        /// As in [`Change::Replace`].
        id: Option<u32>,
    },
}

/// An entry to create.
#[derive(Clone, Copy, Debug)]
pub struct Insert {
    /// Tuples, zone, mark, labels, helper, sequence adjustment and window scale come from here.
    pub like: Entry,
    /// State to create it in.
    pub state: TcpState,
    /// Must contain `IPS_CONFIRMED`, else the kernel answers `EBUSY`.
    pub status: Status,
    /// As in [`Change::Extend`].
    pub timeout: Duration,
}

impl Change {
    /// The connection that it concerns, by its original tuple.
    pub fn flow(&self) -> FourTuple {
        match self {
            Self::Extend { key, .. } | Self::Update { key, .. } | Self::Delete { key, .. } => {
                key.orig
            }
            Self::Insert(new) | Self::PutBack(new) | Self::Replace { new, .. } => new.like.orig,
        }
    }

    /// Appends its one or two messages.
    pub(super) fn write(&self, out: &mut Vec<Request>) {
        match *self {
            Self::Extend { key, timeout } => {
                let mut attributes = key_attributes(key);
                attributes.push(timeout_attribute(timeout));
                out.push(request("conntrack extend", key.orig, IPCTNL_MSG_CT_NEW, 0, &attributes));
            }
            Self::Update { key, state, status, timeout } => {
                let mut attributes = key_attributes(key);
                attributes.extend(status.map(status_attribute));
                attributes.push(timeout_attribute(timeout));
                let mut info = vec![nla(CTA_PROTOINFO_TCP_STATE, &[state as u8])];
                if state == TcpState::Close {
                    let reusable = [IP_CT_TCP_FLAG_CLOSE_INIT; 2];
                    info.push(nla(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &reusable));
                }
                if state == TcpState::Established && status.is_some() {
                    // struct nf_ct_tcp_flags { flags, mask }
                    info.push(nla(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &[OURS; 2]));
                    info.push(nla(CTA_PROTOINFO_TCP_FLAGS_REPLY, &[OURS; 2]));
                }
                attributes.push(protoinfo(&info));
                out.push(request("conntrack update", key.orig, IPCTNL_MSG_CT_NEW, 0, &attributes));
            }
            Self::Insert(insert) => out.push(insert.request(OURS)),
            Self::PutBack(insert) => out.push(insert.request(IP_CT_TCP_FLAG_BE_LIBERAL)),
            Self::Replace { old, id, new } => {
                out.push(Request { joined: true, ..delete(old, id) });
                out.push(new.request(OURS));
            }
            Self::Delete { key, id } => out.push(delete(key, id)),
        }
    }
}

impl Insert {
    /// With these flags in both directions.
    fn request(&self, flags: u8) -> Request {
        let like = &self.like;
        let mut attributes = vec![
            tuple(CTA_TUPLE_ORIG, like.orig, like.zone),
            // The plain inverse also under NAT: from it and CTA_NAT_* the kernel makes the
            // translated tuple. A translated one here is accepted, and breaks the stream.
            tuple(CTA_TUPLE_REPLY, like.orig.inverse(), like.zone),
            status_attribute(self.status),
            timeout_attribute(self.timeout),
            self.tcp(flags),
        ];
        attributes.extend(two_way_zone(like.zone));
        attributes.extend(translation(like));
        attributes.extend(like.mark.map(|mark| nla(CTA_MARK, &mark.to_be_bytes())));
        attributes.extend(like.labels.map(|labels| nla(CTA_LABELS, &labels)));
        attributes.extend(
            like.helper.map(|name| nested(CTA_HELP, &[nla(CTA_HELP_NAME, name.as_c_bytes())])),
        );
        if let Some([orig, reply]) = like.seq_adj {
            attributes.push(sequence_adjustment(CTA_SEQ_ADJ_ORIG, orig));
            attributes.push(sequence_adjustment(CTA_SEQ_ADJ_REPLY, reply));
        }
        attributes.extend(like.synproxy.map(syn_proxy));
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        request("conntrack insert", like.orig, IPCTNL_MSG_CT_NEW, flags, &attributes)
    }

    fn tcp(&self, always: u8) -> DefaultNla {
        const KEPT: u8 = IP_CT_TCP_FLAG_WINDOW_SCALE;
        let (flags, mask) = match self.like.tcp {
            Some(tcp) => (tcp.flags.map(|flags| flags & KEPT), KEPT),
            None => ([0; 2], 0),
        };
        // struct nf_ct_tcp_flags { flags, mask }
        let [mut orig, reply] = flags.map(|flags| [flags, mask].map(|byte| byte | always));
        // Conntrack learns who closed first from a FIN that this entry may never see. Without the
        // flag it ignores a SYN that uses the tuple again after the end, and connlimit, which
        // cannot count an ignored one, drops it (seen on 6.18; guarded by
        // `a_port_that_is_used_again_is_a_new_connection`).
        orig = orig.map(|byte| byte | IP_CT_TCP_FLAG_CLOSE_INIT);
        let mut info = vec![
            nla(CTA_PROTOINFO_TCP_STATE, &[self.state as u8]),
            nla(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &orig),
            nla(CTA_PROTOINFO_TCP_FLAGS_REPLY, &reply),
        ];
        if let Some(tcp) = self.like.tcp {
            info.push(nla(CTA_PROTOINFO_TCP_WSCALE_ORIGINAL, &[tcp.wscale[0]]));
            info.push(nla(CTA_PROTOINFO_TCP_WSCALE_REPLY, &[tcp.wscale[1]]));
        }
        protoinfo(&info)
    }
}

/// The entry that has `flow` as one of its tuples, in either direction.
pub(super) fn get(flow: FourTuple, zone: Zone) -> Request {
    let attributes = key_attributes(EntryKey { zone, orig: flow });
    request("conntrack get", flow, IPCTNL_MSG_CT_GET, 0, &attributes)
}

/// Size of the table.
pub(super) fn stats() -> Request {
    message(Op::new("conntrack stats"), IPCTNL_MSG_CT_GET_STATS, 0, 0, &[])
}

/// The counters of every CPU.
pub(super) fn counters() -> Request {
    message(Op::new("dump of conntrack counters"), IPCTNL_MSG_CT_GET_STATS_CPU, 0, 0, &[])
}

/// What a dump lets through, in the kernel where it can filter (since 5.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Every TCP entry. `conntrack -L -p tcp`.
    Tcp,
    /// TCP entries whose answers come from this port, so whose server's socket has it after any
    /// translation. `conntrack -L -p tcp --reply-port-src PORT`.
    AnsweredFrom(u16),
    /// TCP entries whose first packet came from this port: reversed ones of a server.
    /// `conntrack -L -p tcp --orig-port-src PORT`.
    BegunFrom(u16),
    /// TCP entries whose first packet was sent to this port, before any translation.
    /// `conntrack -L -p tcp --orig-port-dst PORT`.
    AskedOf(u16),
}

/// A filtered dump of one family's entries; the kernel refuses a tuple filter without a family
/// (`EOPNOTSUPP`, seen on 6.18).
pub(super) fn dump(family: u8, filter: Filter) -> Request {
    let (kind, port) = match filter {
        Filter::Tcp => (CTA_TUPLE_ORIG, None),
        Filter::AnsweredFrom(port) => (CTA_TUPLE_REPLY, Some(port)),
        Filter::BegunFrom(port) | Filter::AskedOf(port) => (CTA_TUPLE_ORIG, Some(port)),
    };
    let (attribute, bit) = match filter {
        Filter::AskedOf(_) => (CTA_PROTO_DST_PORT, CTA_FILTER_F_CTA_PROTO_DST_PORT),
        _ => (CTA_PROTO_SRC_PORT, CTA_FILTER_F_CTA_PROTO_SRC_PORT),
    };
    let mut proto = vec![nla(CTA_PROTO_NUM, &[IPPROTO_TCP])];
    let mut bits = CTA_FILTER_F_CTA_PROTO_NUM;
    if let Some(port) = port {
        proto.push(nla(attribute, &port.to_be_bytes()));
        bits |= bit;
    }
    let word = if kind == CTA_TUPLE_REPLY { CTA_FILTER_REPLY_FLAGS } else { CTA_FILTER_ORIG_FLAGS };
    let attributes = [
        nested(kind, &[nested(CTA_TUPLE_PROTO, &proto)]),
        // In host byte order, unlike everything else here.
        nested(CTA_FILTER, &[nla(word, &bits.to_ne_bytes())]),
    ];
    message(Op::new("dump of conntrack entries"), IPCTNL_MSG_CT_GET, 0, family, &attributes)
}

fn delete(key: EntryKey, id: Option<u32>) -> Request {
    let mut attributes = key_attributes(key);
    attributes.extend(id.map(|id| nla(CTA_ID, &id.to_be_bytes())));
    request("conntrack delete", key.orig, IPCTNL_MSG_CT_DELETE, 0, &attributes)
}

/// What finds an entry. The kernel looks in both directions, whichever attribute the tuple is
/// in; the attribute says in which direction a one-way zone counts.
fn key_attributes(key: EntryKey) -> Vec<DefaultNla> {
    let one_way_reply = key.zone.orig == 0 && key.zone.reply != 0;
    let kind = if one_way_reply { CTA_TUPLE_REPLY } else { CTA_TUPLE_ORIG };
    let mut attributes = vec![tuple(kind, key.orig, key.zone)];
    attributes.extend(two_way_zone(key.zone));
    attributes
}

fn two_way_zone(zone: Zone) -> Option<DefaultNla> {
    (zone.id() != 0 && zone.orig == zone.reply).then(|| nla(CTA_ZONE, &zone.id().to_be_bytes()))
}

fn tuple(kind: u16, flow: FourTuple, zone: Zone) -> DefaultNla {
    let [src, dst] = match flow.family() {
        AF_INET => [CTA_IP_V4_SRC, CTA_IP_V4_DST],
        _ => [CTA_IP_V6_SRC, CTA_IP_V6_DST],
    };
    let mut parts = vec![
        nested(CTA_TUPLE_IP, &[address(src, flow.src.addr()), address(dst, flow.dst.addr())]),
        nested(
            CTA_TUPLE_PROTO,
            &[
                nla(CTA_PROTO_NUM, &[IPPROTO_TCP]),
                nla(CTA_PROTO_SRC_PORT, &flow.src.port().to_be_bytes()),
                nla(CTA_PROTO_DST_PORT, &flow.dst.port().to_be_bytes()),
            ],
        ),
    ];
    let one_way = match kind {
        CTA_TUPLE_REPLY if zone.orig == 0 => zone.reply,
        CTA_TUPLE_ORIG if zone.reply == 0 => zone.orig,
        _ => 0,
    };
    if one_way != 0 {
        parts.push(nla(CTA_TUPLE_ZONE, &one_way.to_be_bytes()));
    }
    nested(kind, &parts)
}

fn status_attribute(status: Status) -> DefaultNla {
    nla(CTA_STATUS, &status.0.to_be_bytes())
}

fn timeout_attribute(timeout: Duration) -> DefaultNla {
    let seconds = timeout.as_secs() + u64::from(timeout.subsec_nanos() > 0);
    nla(CTA_TIMEOUT, &u32::try_from(seconds).unwrap_or(u32::MAX).to_be_bytes())
}

fn protoinfo(parts: &[DefaultNla]) -> DefaultNla {
    nested(CTA_PROTOINFO, &[nested(CTA_PROTOINFO_TCP, parts)])
}

/// A dump never carries `CTA_NAT_*`, so the translation is derived from the two tuples.
fn translation(like: &Entry) -> impl Iterator<Item = DefaultNla> {
    let after = like.reply.inverse();
    let dst = (like.orig.dst != after.dst).then(|| nat(CTA_NAT_DST, after.dst));
    let src = (like.orig.src != after.src).then(|| nat(CTA_NAT_SRC, after.src));
    dst.into_iter().chain(src)
}

fn nat(kind: u16, to: Endpoint) -> DefaultNla {
    let [min, max] = match to.addr() {
        IpAddr::V4(_) => [CTA_NAT_V4_MINIP, CTA_NAT_V4_MAXIP],
        IpAddr::V6(_) => [CTA_NAT_V6_MINIP, CTA_NAT_V6_MAXIP],
    };
    let port = to.port().to_be_bytes();
    let ports = [nla(CTA_PROTONAT_PORT_MIN, &port), nla(CTA_PROTONAT_PORT_MAX, &port)];
    let parts = [address(min, to.addr()), address(max, to.addr()), nested(CTA_NAT_PROTO, &ports)];
    nested(kind, &parts)
}

fn sequence_adjustment(kind: u16, adjustment: SeqAdj) -> DefaultNla {
    let parts = [
        nla(CTA_SEQADJ_CORRECTION_POS, &adjustment.correction_pos.to_be_bytes()),
        nla(CTA_SEQADJ_OFFSET_BEFORE, &adjustment.offset_before.to_be_bytes()),
        nla(CTA_SEQADJ_OFFSET_AFTER, &adjustment.offset_after.to_be_bytes()),
    ];
    nested(kind, &parts)
}

fn syn_proxy(state: SynProxy) -> DefaultNla {
    let parts = [
        nla(CTA_SYNPROXY_ISN, &state.isn.to_be_bytes()),
        nla(CTA_SYNPROXY_ITS, &state.its.to_be_bytes()),
        nla(CTA_SYNPROXY_TSOFF, &state.tsoff.to_be_bytes()),
    ];
    nested(CTA_SYNPROXY, &parts)
}

fn address(kind: u16, addr: IpAddr) -> DefaultNla {
    match addr {
        IpAddr::V4(addr) => nla(kind, &addr.octets()),
        IpAddr::V6(addr) => nla(kind, &addr.octets()),
    }
}

fn request(
    verb: &'static str,
    flow: FourTuple,
    kind: u16,
    flags: u16,
    attributes: &[DefaultNla],
) -> Request {
    message(Op::on(verb, flow), kind, flags, flow.family(), attributes)
}

fn message(op: Op, kind: u16, flags: u16, family: u8, attributes: &[DefaultNla]) -> Request {
    let mut body = nfgenmsg(family, 0).to_vec();
    body.append(&mut emitted(attributes));
    Request { op, kind, flags, body, joined: false }
}
