//! The kernel's side of a conversation, played: requests taken apart, answers put together.
//!
//! Written from the uapi headers (`netlink.h`, `inet_diag.h`, `nfnetlink_conntrack.h`) and not from
//! ctkeep's own encoders and decoders: a mistake there is not made here a second time. Numbers
//! stand for themselves for the same reason.

// Each test crate uses the part it needs, and a test that meets the unexpected ends by a panic.
#![allow(dead_code, unreachable_pub)]
#![allow(clippy::indexing_slicing, clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod crate_reader;
pub mod hex;
pub mod host;

use std::net::IpAddr;
use std::time::Duration;

use ctkeep::conntrack::{Entry, Status, Tcp, TcpState, Zone};
use ctkeep::flow::{Endpoint, FourTuple};
use ctkeep::netlink::script::{Reply, Script};
use ctkeep::sockdiag::{Cookie, Socket, State};

pub const NLM_F_REQUEST: u16 = 0x1;
pub const NLM_F_MULTI: u16 = 0x2;
pub const NLM_F_ACK: u16 = 0x4;
pub const NLM_F_DUMP_INTR: u16 = 0x10;
pub const NLM_F_CAPPED: u16 = 0x100;
pub const NLM_F_ACK_TLVS: u16 = 0x200;
pub const NLM_F_DUMP: u16 = 0x300;
pub const NLM_F_EXCL: u16 = 0x200;
pub const NLM_F_CREATE: u16 = 0x400;

pub const NLMSG_NOOP: u16 = 1;
pub const NLMSG_ERROR: u16 = 2;
pub const NLMSG_DONE: u16 = 3;
pub const NLMSG_OVERRUN: u16 = 4;

pub const TCPDIAG_GETSOCK: u16 = 18;
pub const SOCK_DIAG_BY_FAMILY: u16 = 20;
pub const CT_NEW: u16 = 0x100;
pub const CT_GET: u16 = 0x101;
pub const CT_DELETE: u16 = 0x102;
pub const CT_GET_STATS: u16 = 0x105;

pub const EPERM: i32 = 1;
pub const ENOENT: i32 = 2;
pub const EOPNOTSUPP: i32 = 95;
pub const EEXIST: i32 = 17;
pub const EINVAL: i32 = 22;
pub const ENOMEM: i32 = 12;
pub const ENOBUFS: i32 = 105;

/// A function from the bytes of one send to what arrives because of it.
pub type Kernel = Box<dyn FnMut(&[u8]) -> Vec<Reply>>;

/// The transport that plays it.
pub type Played = Script<Kernel>;

/// A transport on which `kernel` answers each send.
pub fn script(kernel: impl FnMut(&[u8]) -> Vec<Reply> + 'static) -> Played {
    Script::new(Box::new(kernel))
}

/// A kernel that behaves: `answer` gives the messages that answer a request, or the errno that
/// refuses it; the end of the dump or the acknowledgement that is asked for is added, and every message comes in a
/// datagram of its own.
pub fn obliging(mut answer: impl FnMut(&Request) -> Result<Vec<Vec<u8>>, i32> + 'static) -> Played {
    script(move |datagram| {
        let mut replies = Vec::new();
        for request in requests(datagram) {
            let (messages, end) = match answer(&request) {
                Ok(messages) if request.is_dump() => (messages, Some(done(request.seq, 0))),
                Ok(messages) if request.flags & NLM_F_ACK == 0 => (messages, None),
                Ok(messages) => (messages, Some(ack(request.seq))),
                Err(errno) => (Vec::new(), Some(refusal(request.seq, errno))),
            };
            replies.extend(messages.into_iter().chain(end).map(Reply::Datagram));
        }
        replies
    })
}

/// One message to the kernel.
#[derive(Clone, Debug)]
pub struct Request {
    pub kind: u16,
    pub flags: u16,
    pub seq: u32,
    pub body: Vec<u8>,
}

impl Request {
    pub fn is_dump(&self) -> bool {
        self.flags & NLM_F_DUMP == NLM_F_DUMP
    }
}

/// The requests of one send.
pub fn requests(datagram: &[u8]) -> Vec<Request> {
    let mut rest = datagram;
    let mut requests = Vec::new();
    while !rest.is_empty() {
        let length = u32_at(rest, 0) as usize;
        requests.push(Request {
            kind: u16_at(rest, 4),
            flags: u16_at(rest, 6),
            seq: u32_at(rest, 8),
            body: rest[16..length].to_vec(),
        });
        rest = &rest[length.next_multiple_of(4)..];
    }
    requests
}

/// The messages of a datagram, each with its header.
pub fn messages(datagram: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = datagram;
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let length = u32_at(rest, 0) as usize;
        messages.push(rest[..length].to_vec());
        rest = &rest[length.next_multiple_of(4)..];
    }
    messages
}

/// A message with its header, padded as in a datagram of several.
pub fn message(kind: u16, flags: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
    message_from(0, kind, flags, seq, payload)
}

/// The same with the port of the request that caused it.
pub fn message_from(port: u32, kind: u16, flags: u16, seq: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(seq.to_ne_bytes());
    bytes.extend(port.to_ne_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A message with another sequence number.
pub fn with_seq(mut message: Vec<u8>, seq: u32) -> Vec<u8> {
    message[8..12].copy_from_slice(&seq.to_ne_bytes());
    message
}

pub fn ack(seq: u32) -> Vec<u8> {
    refusal(seq, 0)
}

/// An error as `NETLINK_CAP_ACK` has it: only the header of the request comes back.
pub fn refusal(seq: u32, errno: i32) -> Vec<u8> {
    message(NLMSG_ERROR, NLM_F_CAPPED, seq, &error_payload(errno, 16))
}

/// The same with the kernel's sentence behind it.
pub fn refusal_because(seq: u32, errno: i32, sentence: &str) -> Vec<u8> {
    let mut payload = error_payload(errno, 16);
    payload.extend(sentence_attribute(sentence));
    message(NLMSG_ERROR, NLM_F_CAPPED | NLM_F_ACK_TLVS, seq, &payload)
}

/// As without `NETLINK_CAP_ACK`: the whole request of `length` bytes comes back before the
/// sentence.
pub fn uncapped_refusal_because(seq: u32, errno: i32, length: u32, sentence: &str) -> Vec<u8> {
    let mut payload = error_payload(errno, length);
    payload.resize(4 + length.next_multiple_of(4) as usize, 0xee);
    payload.extend(sentence_attribute(sentence));
    message(NLMSG_ERROR, NLM_F_ACK_TLVS, seq, &payload)
}

/// `struct nlmsgerr` with the header of a request that was `length` bytes long.
fn error_payload(errno: i32, length: u32) -> Vec<u8> {
    let mut payload = (-errno).to_ne_bytes().to_vec();
    payload.extend(length.to_ne_bytes());
    payload.extend([0xee; 12]);
    payload
}

/// The end of a dump.
pub fn done(seq: u32, errno: i32) -> Vec<u8> {
    message(NLMSG_DONE, NLM_F_MULTI, seq, &(-errno).to_ne_bytes())
}

/// The same with the kernel's sentence, which here follows the error number directly
/// (`netlink_dump_done()` in `af_netlink.c`).
pub fn done_because(seq: u32, errno: i32, sentence: &str) -> Vec<u8> {
    let mut payload = (-errno).to_ne_bytes().to_vec();
    payload.extend(sentence_attribute(sentence));
    message(NLMSG_DONE, NLM_F_MULTI | NLM_F_ACK_TLVS, seq, &payload)
}

/// `NLMSGERR_ATTR_MSG`, a C string.
fn sentence_attribute(sentence: &str) -> Vec<u8> {
    attribute(1, format!("{sentence}\0").as_bytes())
}

/// A netlink attribute, padded.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute that holds attributes.
pub fn nest(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 0x8000, &parts.concat())
}

/// The attributes in `bytes`, without the flag bits of their types.
pub fn attributes(bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut rest = bytes;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let length = u16_at(rest, 0) as usize;
        found.push((u16_at(rest, 2) & 0x3fff, &rest[4..length]));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The value of the attribute that is found by descending through `path`.
pub fn descend<'a>(bytes: &'a [u8], path: &[u16]) -> Option<&'a [u8]> {
    path.iter().try_fold(bytes, |bytes, kind| {
        attributes(bytes).into_iter().find(|(found, _)| found == kind).map(|(_, value)| value)
    })
}

/// `struct inet_diag_msg`.
pub fn socket_payload(socket: &Socket) -> Vec<u8> {
    let family = if socket.local.addr().is_ipv4() { 2 } else { 10 };
    let mut bytes = vec![family, socket.state as u8, 0, 0];
    bytes.extend(socket.local.port().to_be_bytes());
    bytes.extend(socket.remote.port().to_be_bytes());
    bytes.extend(sixteen(socket.local.addr()));
    bytes.extend(sixteen(socket.remote.addr()));
    bytes.extend(socket.interface.to_ne_bytes());
    bytes.extend(socket.cookie.0.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    for word in [socket.recv_queue, socket.send_queue, socket.uid, socket.inode] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// The same for a socket of a dual-stack listener: its IPv4 addresses are v4-mapped.
pub fn mapped_socket_payload(socket: &Socket) -> Vec<u8> {
    let mut bytes = socket_payload(socket);
    bytes[0] = 10;
    for (at, endpoint) in [(8, socket.local), (24, socket.remote)] {
        let IpAddr::V4(addr) = endpoint.addr() else { panic!("an IPv4 socket") };
        bytes[at..at + 16].copy_from_slice(&addr.to_ipv6_mapped().octets());
    }
    bytes
}

fn sixteen(addr: IpAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    match addr {
        IpAddr::V4(addr) => bytes[..4].copy_from_slice(&addr.octets()),
        IpAddr::V6(addr) => bytes.copy_from_slice(&addr.octets()),
    }
    bytes
}

/// An answer to a look-up.
pub fn socket_message(seq: u32, socket: &Socket) -> Vec<u8> {
    message(SOCK_DIAG_BY_FAMILY, 0, seq, &socket_payload(socket))
}

/// A part of a dump.
pub fn listed_socket(seq: u32, socket: &Socket) -> Vec<u8> {
    message(TCPDIAG_GETSOCK, 0, seq, &socket_payload(socket))
}

/// The states that a dump asks for (`struct inet_diag_req`).
pub fn dumped_states(request: &Request) -> u32 {
    assert_eq!((request.kind, request.body.len()), (TCPDIAG_GETSOCK, 60));
    u32_at(&request.body, 52)
}

/// `struct nfgenmsg` and the attributes of an entry, in the kernel's order. Without a helper, of
/// which only the kernel can make one.
pub fn entry_payload(entry: &Entry) -> Vec<u8> {
    let mut bytes = vec![entry.orig.family(), 0, 0, 0];
    bytes.extend(tuple(1, entry.orig, one_way(entry.zone, entry.zone.orig)));
    bytes.extend(tuple(2, entry.reply, one_way(entry.zone, entry.zone.reply)));
    if entry.zone.orig != 0 && entry.zone.orig == entry.zone.reply {
        bytes.extend(attribute(18, &entry.zone.orig.to_be_bytes()));
    }
    bytes.extend(entry.status.iter().flat_map(|status| word(3, status.0)));
    bytes.extend(entry.timeout.iter().flat_map(|timeout| word(7, timeout.as_secs() as u32)));
    if let Some(tcp) = entry.tcp {
        let parts = [
            attribute(1, &[tcp.state as u8]),
            attribute(2, &[tcp.wscale[0]]),
            attribute(3, &[tcp.wscale[1]]),
            attribute(4, &[tcp.flags[0], 0]),
            attribute(5, &[tcp.flags[1], 0]),
        ];
        bytes.extend(nest(4, &[nest(1, &parts)]));
    }
    bytes.extend(entry.mark.iter().flat_map(|mark| word(8, *mark)));
    bytes.extend(entry.id.iter().flat_map(|id| word(12, *id)));
    bytes.extend(entry.labels.iter().flat_map(|labels| attribute(22, labels)));
    for (kind, adjustment) in [15, 16].into_iter().zip(entry.seq_adj.into_iter().flatten()) {
        bytes.extend(nest(
            kind,
            &[
                word(1, adjustment.correction_pos),
                word(2, adjustment.offset_before),
                word(3, adjustment.offset_after),
            ],
        ));
    }
    if let Some(state) = entry.synproxy {
        bytes.extend(nest(24, &[word(1, state.isn), word(2, state.its), word(3, state.tsoff)]));
    }
    bytes
}

fn one_way(zone: Zone, of_direction: u16) -> u16 {
    if zone.orig == zone.reply { 0 } else { of_direction }
}

fn word(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn tuple(kind: u16, flow: FourTuple, zone: u16) -> Vec<u8> {
    let octets = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let first = if flow.is_ipv4() { 1 } else { 3 };
    let mut parts = vec![
        nest(
            1,
            &[
                attribute(first, &octets(flow.src.addr())),
                attribute(first + 1, &octets(flow.dst.addr())),
            ],
        ),
        nest(
            2,
            &[
                attribute(1, &[6]),
                attribute(2, &flow.src.port().to_be_bytes()),
                attribute(3, &flow.dst.port().to_be_bytes()),
            ],
        ),
    ];
    if zone != 0 {
        parts.push(attribute(3, &zone.to_be_bytes()));
    }
    nest(kind, &parts)
}

/// An answer to a question or a part of a dump.
pub fn entry_message(seq: u32, entry: &Entry) -> Vec<u8> {
    message(CT_NEW, 0, seq, &entry_payload(entry))
}

pub fn endpoint(text: &str) -> Endpoint {
    text.parse().unwrap()
}

pub fn flow(src: &str, dst: &str) -> FourTuple {
    FourTuple::new(endpoint(src), endpoint(dst))
}

/// A server's socket.
pub fn socket(local: &str, remote: &str, state: State, cookie: u64) -> Socket {
    Socket {
        local: endpoint(local),
        remote: endpoint(remote),
        state,
        inode: 4711,
        uid: 33,
        cookie: Cookie(cookie),
        interface: 0,
        recv_queue: 1,
        send_queue: 0,
    }
}

/// The entry of a connection that a peer opened, seen from the server (`flow`).
pub fn entry(flow: FourTuple, state: TcpState, seconds: u64) -> Entry {
    Entry {
        status: Some(Status::ASSURED),
        timeout: Some(Duration::from_secs(seconds)),
        tcp: Some(Tcp { state, wscale: [7, 7], flags: [0x03, 0x03] }),
        id: Some(0x1234_5678),
        ..Entry::plain(flow.inverse(), Zone::default())
    }
}

/// The entry that loose pick-up makes of a packet of the server.
pub fn reversed_entry(flow: FourTuple, state: TcpState, seconds: u64) -> Entry {
    Entry {
        tcp: Some(Tcp { state, wscale: [0, 0], flags: [0x0a, 0x0a] }),
        ..entry(flow.inverse(), state, seconds)
    }
}

/// The entry of a connection that this host opened.
pub fn outgoing_entry(flow: FourTuple, state: TcpState, seconds: u64) -> Entry {
    entry(flow.inverse(), state, seconds)
}

pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}
