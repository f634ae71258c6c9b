//! Conntrack events: what the kernel did to which entry, as it happens.
//!
//! Events make a repair fast; they prove nothing. They can be lost, and entries made while no program
//! listened never send any (`nf_conntrack_events=2`).

use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::NLM_F_CREATE;
use netlink_sys::protocols::NETLINK_NETFILTER;
use socket2::SockFilter;

use crate::conntrack::uapi::*;
use crate::conntrack::{Entry, TcpState, decode};
use crate::error::{Op, Result};
use crate::netlink::{Drained, KernelSocket, Transport, drain};

/// Asked for; 13 000 events queue in 8 MiB, the default buffer holds 166.
const EVENT_BUFFER: usize = 8 << 20;

/// What happened to an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Its state, status, mark, ... changed.
    Update,
    /// It is gone.
    Destroy,
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The entry after it.
    pub entry: Entry,
    /// Netlink port of the request that caused it; 0 for packets and timeouts.
    pub port: u32,
}

/// Receives the events of one network namespace.
#[derive(Debug)]
pub struct Listener<T = KernelSocket> {
    transport: T,
    datagram: Vec<u8>,
}

impl Listener<KernelSocket> {
    /// Listens to UPDATE and DESTROY in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` is missing, or the kernel has no ctnetlink.
    pub fn open() -> Result<Self> {
        let op = Op::new("open conntrack events");
        let mut socket = KernelSocket::open(op, NETLINK_NETFILTER)?;
        socket.grow_receive_buffer(EVENT_BUFFER).map_err(|error| op.io(error))?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        // Before the first event can come. Without it every event of the host would wake us.
        socket.attach_filter(&filter()).map_err(|error| op.io(error))?;
        for group in [NFNLGRP_CONNTRACK_UPDATE, NFNLGRP_CONNTRACK_DESTROY] {
            socket.join(group).map_err(|error| op.io(error))?;
        }
        Ok(Self::new(socket))
    }

    /// Receive buffer in bytes, as granted.
    pub fn receive_buffer(&self) -> usize {
        self.transport.receive_buffer()
    }
}

/// Classic BPF that the kernel runs before an event is queued. Updates of closing TCP entries pass, and
/// so do destroys, except from TIME_WAIT and CLOSE: their update was delivered. Anything that cannot be
/// parsed passes.
fn filter() -> Vec<SockFilter> {
    use To::{Drop, Go, Pass};

    const MESSAGE_TYPE: u32 = 4;
    const ATTRIBUTES: u32 = 20;
    const ATTRIBUTE_HEADER: u32 = 4;
    // linux/filter.h: finds attribute X behind offset A, or inside the one at A; 0 for none.
    const SKF_AD_NLATTR: u32 = 0xffff_f000 + 12;
    const SKF_AD_NLATTR_NEST: u32 = 0xffff_f000 + 16;

    let load = |k| (0x00, k, Go(0), Go(0)); // BPF_LD | BPF_IMM
    let load_x = |k: u16| (0x01, u32::from(k), Go(0), Go(0)); // BPF_LDX | BPF_IMM
    let load_half = |k| (0x28, k, Go(0), Go(0)); // BPF_LD | BPF_H | BPF_ABS
    let load_word = |k| (0x20, k, Go(0), Go(0)); // BPF_LD | BPF_W | BPF_ABS
    let load_byte_at_x = |k| (0x50, k, Go(0), Go(0)); // BPF_LD | BPF_B | BPF_IND
    let to_x = (0x07, 0, Go(0), Go(0)); // BPF_MISC | BPF_TAX
    let store = (0x02, 0, Go(0), Go(0)); // BPF_ST
    let recall = (0x60, 0, Go(0), Go(0)); // BPF_LD | BPF_MEM
    let equal = |k, yes, no| (0x15, k, yes, no); // BPF_JMP | BPF_JEQ | BPF_K
    let at_least = |k, yes, no| (0x35, k, yes, no); // BPF_JMP | BPF_JGE | BPF_K

    // Loads are big-endian, and the message type is in the byte order of the machine.
    let kind = |kind: u16| u32::from(u16::from_be_bytes(kind.to_ne_bytes()));
    let value = |path: [u16; 3]| {
        let mut code = vec![load(ATTRIBUTES)];
        for (depth, attribute) in path.into_iter().enumerate() {
            let find = if depth == 0 { SKF_AD_NLATTR } else { SKF_AD_NLATTR_NEST };
            code.extend([load_x(attribute), load_word(find), equal(0, Pass, Go(0))]);
        }
        code.extend([to_x, load_byte_at_x(ATTRIBUTE_HEADER)]);
        code
    };
    let [last_ack, time_wait, close] =
        [TcpState::LastAck, TcpState::TimeWait, TcpState::Close].map(|state| state as u32);
    let destroy = kind(IPCTNL_MSG_CT_DELETE);
    let program = [
        vec![
            load_half(MESSAGE_TYPE),
            store,
            equal(destroy, Go(1), Go(0)),
            equal(kind(IPCTNL_MSG_CT_NEW), Go(0), Pass),
        ],
        value([CTA_TUPLE_ORIG, CTA_TUPLE_PROTO, CTA_PROTO_NUM]),
        vec![equal(IPPROTO_TCP.into(), Go(0), Drop)],
        value([CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE]),
        vec![
            equal(time_wait, Go(4), Go(0)),
            equal(close, Go(3), Go(0)),
            at_least(last_ack, Pass, Go(0)),
            recall,
            equal(destroy, Pass, Drop),
            recall,
            equal(destroy, Drop, Pass),
        ],
    ]
    .concat();
    // The two ends stand behind the program: first that of passing, then that of dropping.
    let length = program.len();
    let jump = |at: usize, to: To| {
        let distance = match to {
            Go(further) => further,
            Pass => length - at - 1,
            Drop => length - at,
        };
        u8::try_from(distance).unwrap_or(u8::MAX)
    };
    let ends = [u32::MAX, 0].map(|taken| SockFilter::new(0x06, 0, 0, taken)); // BPF_RET | BPF_K
    let code = program
        .iter()
        .enumerate()
        .map(|(at, &(code, k, yes, no))| SockFilter::new(code, jump(at, yes), jump(at, no), k));
    code.chain(ends).collect()
}

/// Where a step of [`filter`] goes on.
#[derive(Clone, Copy)]
enum To {
    /// Past so many steps.
    Go(usize),
    /// The event is queued.
    Pass,
    /// The event is not queued.
    Drop,
}

impl AsFd for Listener<KernelSocket> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.as_fd()
    }
}

impl<T: Transport> Listener<T> {
    /// Listens on any non-blocking transport.
    pub fn new(transport: T) -> Self {
        Self { transport, datagram: Vec::new() }
    }

    /// Hands every queued TCP event to `take`, until none is left or `limit` datagrams were read.
    ///
    /// # Errors
    /// The socket is broken. Lost and unreadable events are not errors but in [`Drained`].
    pub fn drain(&mut self, limit: usize, mut take: impl FnMut(Event)) -> Result<Drained> {
        let op = Op::new("receive conntrack events");
        drain(&mut self.transport, &mut self.datagram, limit, op, |frame| {
            let kind = match frame.kind {
                IPCTNL_MSG_CT_NEW if frame.flags & NLM_F_CREATE == 0 => EventKind::Update,
                IPCTNL_MSG_CT_DELETE => EventKind::Destroy,
                _ => return Ok(()),
            };
            if let Some(entry) = decode::entry(frame.payload)? {
                take(Event { kind, entry, port: frame.port });
            }
            Ok(())
        })
    }
}
