//! A conntrack entry as netlink-packet-netfilter reads it, to be held against ctkeep's reading.

use std::time::Duration;

use ctkeep::conntrack::Entry;
use ctkeep::flow::{Endpoint, FourTuple};
use netlink_packet_core::ParseableParametrized;
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Protocol,
    Tuple,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner};

/// What both decoders know of an entry.
#[derive(Debug, Default, PartialEq)]
pub struct Common {
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
pub fn read_by_the_crate(kind: u16, payload: &[u8]) -> Result<Option<Common>, String> {
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
