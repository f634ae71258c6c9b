//! Packets that can fool conntrack, logged by an nftables table of our own (`nflog_table`):
//! every RST of a guarded connection, and every FIN but its first.
//!
//! Ordinary traffic pays a few header look-ups; RSTs that may well be ordinary are handed over in
//! batches. Conntrack's own events would cost every connection of the host (docs/performance.md),
//! and are silent about a packet that is dropped behind conntrack: they are sent when a packet has
//! come through.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use netlink_packet_core::{DecodeError, DefaultNla, NlasIterator, parse_u32_be};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use super::headers::tcp_flow;
pub use super::nflog_table::CLOSING;
use super::nflog_table::{
    self, ANSWERED, CLOSING_WORD, FULL, HELD4, HELD6, HOLDERS4, HOLDERS6, HURRY, Kernel, OPENED,
    OPENS, PORTS, QUEUE, SPOOFED, TRANSLATED, TRANSLATED_WAITED, WAITED, Watched,
};
use super::{Drained, Memory, Suspect, tracking};
use crate::error::{Cause, Error, Op, Result};
use crate::flow::{Connection, FourTuple};
use crate::netlink::attribute::{emitted, nla, word};
use crate::netlink::{Conversation, KernelSocket, NFGENMSG_LEN, Request, drain, nfgenmsg};
use crate::nftables::{Table, TableSpec, key};

/// `NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET` and `| NFULNL_MSG_CONFIG`.
const NFULNL_MSG_PACKET: u16 = 4 << 8;
const NFULNL_MSG_CONFIG: u16 = 4 << 8 | 1;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_NLBUFSIZ: u16 = 3;
const NFULA_CFG_TIMEOUT: u16 = 4;
const NFULA_CFG_QTHRESH: u16 = 5;
const NFULA_CFG_FLAGS: u16 = 6;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULNL_CFG_F_SEQ: u16 = 1;
const NFULA_TIMESTAMP: u16 = 3;
const NFULA_IFINDEX_INDEV: u16 = 4;
const NFULA_PAYLOAD: u16 = 9;
const NFULA_PREFIX: u16 = 10;
const NFULA_SEQ: u16 = 12;

/// The headers of every packet that Linux takes in one piece: eight options in a header of each kind
/// are 2 KiB (`net.ipv6.max_dst_opts_number`), and a packet without options is logged as short as
/// it is.
pub(super) const SNAPLEN: u32 = 4096;
/// A batch fits into it: a logged packet takes some 200 bytes.
const BATCH_BYTES: u32 = 16 << 10;
/// How long RSTs wait for others, in hundredths of a second: as short as can be.
const BATCH_TIME: u32 = 1;
/// Groups that are tried: more than instances that share a namespace with containers of theirs.
const GROUPS: usize = 64;
/// Asked for; some 20 000 packets queue in 8 MiB.
const LOG_BUFFER: usize = 8 << 20;

/// The table, and the socket that its packets arrive at.
#[derive(Debug)]
pub struct Watch {
    table: Table,
    socket: KernelSocket,
    datagram: Vec<u8>,
    next: Option<u32>,
    group: u16,
    ports: HashSet<u16>,
    memory: Memory,
    /// Ports some SYNs to which are logged.
    opened: HashSet<u16>,
    held: HashSet<Connection>,
    /// Whose they are.
    holders: HashSet<IpAddr>,
    /// The chain is there: its `ct` expressions would switch conntrack on in a namespace that lives
    /// without.
    is_watching: bool,
}

impl Watch {
    /// Watches these ports of servers in or behind the network namespace of the calling thread, by
    /// `group` or one of those behind it, where another program has that.
    ///
    /// Of `memory` the number is [`CLOSING`] as a rule. The caller names those that stay half-closed
    /// ([`Watch::set_held`]) in time.
    ///
    /// # Errors
    /// The kernel has no nf_tables or nfnetlink_log, all groups are taken, or `CAP_NET_ADMIN` is
    /// missing.
    pub fn open(name: &str, group: u16, ports: &HashSet<u16>, memory: Memory) -> Result<Self> {
        let op = Op::new("open packet log");
        let mut connection = Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?);
        let group = bind(&mut connection, op, group)?;
        let settings = [
            nla(NFULA_CFG_MODE, &copy_packets()),
            word(NFULA_CFG_QTHRESH, QUEUE.into()),
            word(NFULA_CFG_NLBUFSIZ, BATCH_BYTES),
            word(NFULA_CFG_TIMEOUT, BATCH_TIME),
            nla(NFULA_CFG_FLAGS, &NFULNL_CFG_F_SEQ.to_be_bytes()),
        ];
        connection.execute(&config(op, group, &settings))?;
        let mut socket = connection.into_transport();
        socket.grow_receive_buffer(LOG_BUFFER).map_err(|error| op.io(error))?;
        socket.set_non_blocking().map_err(|error| op.io(error))?;
        // After the group: a log statement without a listener would go nowhere.
        let table = Table::create(name, &TableSpec::default())?;
        let mut this = Self {
            table,
            socket,
            datagram: Vec::new(),
            next: None,
            group,
            ports: ports.clone(),
            memory,
            opened: HashSet::new(),
            held: HashSet::new(),
            holders: HashSet::new(),
            is_watching: false,
        };
        this.watch()?;
        Ok(this)
    }

    /// Puts the chain in place as soon as conntrack has been seen to track anything.
    fn watch(&mut self) -> Result<()> {
        if self.is_watching || !tracking::is_on() {
            return Ok(());
        }
        let Self { group, memory, .. } = *self;
        // Kernels of others may be built without nft_fib, or without labels.
        let kernels = [(true, true), (false, true), (true, false), (false, false)];
        let mut built = Ok(());
        for (knows_own, has_labels) in kernels {
            let kernel = Kernel { knows_own, has_labels };
            let watched = Watched { group, ports: &self.ports, memory, kernel };
            built = self.table.rebuild(&nflog_table::layout(watched));
            let lacks =
                |error: &Error| matches!(error.errno(), Some(Errno::ENOENT | Errno::EOPNOTSUPP));
            if built.as_ref().err().is_some_and(lacks) {
                continue;
            }
            if built.is_ok() && !knows_own {
                tracing::info!("no nft_fib: answers that are not this host's are not told");
            }
            if built.is_ok() && !has_labels {
                tracing::info!("no labels of entries: first FINs are remembered by their tuples");
            }
            break;
        }
        built?;
        self.is_watching = true;
        Ok(())
    }

    /// Receive buffer in bytes, as granted.
    pub fn receive_buffer(&self) -> usize {
        self.socket.receive_buffer()
    }

    /// Watches exactly these local ports from now on.
    ///
    /// # Errors
    /// The table is gone.
    pub fn set_ports(&mut self, ports: &HashSet<u16>) -> Result<()> {
        if !self.is_watching {
            self.ports.clone_from(ports);
            return self.watch();
        }
        let key = |port: &u16| nflog_table::port_key(*port);
        let new: Vec<_> = ports.difference(&self.ports).map(key).collect();
        let old: Vec<_> = self.ports.difference(ports).map(key).collect();
        self.table.add(PORTS, &new)?;
        self.table.remove(PORTS, &old)?;
        self.ports.clone_from(ports);
        Ok(())
    }

    /// Logs some SYNs to exactly these ports.
    ///
    /// # Errors
    /// The table is gone.
    pub fn set_opened(&mut self, ports: &HashSet<u16>) -> Result<()> {
        if !self.is_watching || *ports == self.opened {
            return Ok(());
        }
        let key = |port: &u16| nflog_table::port_key(*port);
        let new: Vec<_> = ports.difference(&self.opened).map(key).collect();
        let old: Vec<_> = self.opened.difference(ports).map(key).collect();
        self.table.add(OPENED, &new)?;
        self.table.remove(OPENED, &old)?;
        self.opened.clone_from(ports);
        Ok(())
    }

    /// Logs every FIN and RST of exactly these half-closed connections:
    /// an entry that is put back knows nothing of a FIN before it; and some SYNs of their peers.
    ///
    /// # Errors
    /// The set is full, or the table is gone.
    pub fn set_held(&mut self, connections: HashSet<Connection>) -> Result<()> {
        if !self.is_watching {
            return Ok(());
        }
        for (set, ipv4) in [(HELD4, true), (HELD6, false)] {
            let keys = |all: &mut dyn Iterator<Item = &Connection>| -> Vec<Vec<u8>> {
                let received = all.map(|it| it.received());
                received.filter(|flow| flow.is_ipv4() == ipv4).map(key::of).collect()
            };
            let new = keys(&mut connections.difference(&self.held));
            let old = keys(&mut self.held.difference(&connections));
            self.table.add(set, &new)?;
            self.table.remove(set, &old)?;
        }
        let holders: HashSet<_> = connections.iter().map(|it| it.remote.addr()).collect();
        for (set, ipv4) in [(HOLDERS4, true), (HOLDERS6, false)] {
            let keys = |all: &mut dyn Iterator<Item = &IpAddr>| -> Vec<Vec<u8>> {
                all.filter(|addr| addr.is_ipv4() == ipv4).map(|addr| address_key(*addr)).collect()
            };
            let new = keys(&mut holders.difference(&self.holders));
            let old = keys(&mut self.holders.difference(&holders));
            self.table.add(set, &new)?;
            self.table.remove(set, &old)?;
        }
        (self.held, self.holders) = (connections, holders);
        Ok(())
    }

    /// Hands the connection of every queued packet to `take`, until none is left or `limit`
    /// datagrams were read.
    ///
    /// # Errors
    /// The socket is broken. Lost and unreadable packets are not errors but in [`Drained`].
    pub fn drain(&mut self, limit: usize, mut take: impl FnMut(Suspect)) -> Result<Drained> {
        let (mut drained, mut is_gap) = (Drained::default(), false);
        let next = &mut self.next;
        let op = Op::new("receive logged packets");
        let lost = drain(&mut self.socket, &mut self.datagram, limit, op, |frame| {
            if frame.kind != NFULNL_MSG_PACKET {
                return Ok(());
            }
            let packet = packet(frame.payload)
                .ok_or_else(|| DecodeError::from("no packet in the log message"))?;
            let Packet { flow, interface, seq, at, prefix } = packet;
            is_gap |= seq.is_some() && next.is_some() && seq != *next;
            *next = seq.map(|seq| seq.wrapping_add(1));
            let suspect = |flow| {
                let is_translated = matches!(prefix, Prefix::Translated | Prefix::TranslatedWaited);
                let has_waited =
                    matches!(prefix, Prefix::Waited | Prefix::TranslatedWaited | Prefix::Answered);
                let is_spoofed = prefix == Prefix::Spoofed;
                // Its way is that of the server's own packets, and the device is not the socket's.
                let is_answered = prefix == Prefix::Answered;
                let (connection, interface) = if is_spoofed || is_answered {
                    (Connection::of_sender(flow), 0)
                } else {
                    (Connection::of_receiver(flow), interface)
                };
                Suspect {
                    connection,
                    interface,
                    is_translated,
                    is_spoofed,
                    is_answered,
                    has_waited,
                    destroyed: None,
                    at,
                }
            };
            match prefix {
                Prefix::Hurry => return Ok(()),
                Prefix::Opens => {
                    drained.opening.extend(flow.map(|flow| flow.src.addr()));
                    return Ok(());
                }
                Prefix::Closing => {
                    drained.closing.extend(flow.map(suspect));
                    return Ok(());
                }
                _ => {}
            }
            drained.logged += 1;
            drained.full |= prefix == Prefix::Full;
            if let Some(flow) = flow {
                take(suspect(flow));
            } else {
                // Any client can send one; it says nothing of other packets.
                drained.unreadable += 1;
            }
            Ok(())
        })?;
        drained.add(lost);
        drained.overrun |= is_gap;
        Ok(drained)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Takes the first group from `first` on that is free, and returns it. The kernel refuses one
/// that another socket has with EPERM, as it refuses all to a process without `CAP_NET_ADMIN`.
fn bind(connection: &mut Conversation<KernelSocket>, op: Op, first: u16) -> Result<u16> {
    let mut refused = None;
    for group in (first..=u16::MAX).take(GROUPS) {
        match connection.execute(&config(op, group, &[nla(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND])]))
        {
            Ok(()) => return Ok(group),
            Err(error) if error.is_missing_privilege() => refused = refused.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| op.failed(Cause::Unavailable("no group".to_owned()))))
}

/// `struct nfulnl_msg_config_mode { be32 copy_range, u8 copy_mode, u8 }`: packets up to this length.
fn copy_packets() -> Vec<u8> {
    [&SNAPLEN.to_be_bytes()[..], &[NFULNL_COPY_PACKET, 0]].concat()
}

fn config(op: Op, group: u16, attributes: &[DefaultNla]) -> Request {
    let mut body = nfgenmsg(0, group).to_vec();
    body.append(&mut emitted(attributes));
    Request { op, kind: NFULNL_MSG_CONFIG, flags: 0, body, joined: false }
}

/// A logged packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// From its sender to its receiver; `None` where no TCP header could be read.
    pub flow: Option<FourTuple>,
    /// The device that it came in by, 0 for none.
    pub interface: u32,
    /// Its number among the packets of the group.
    pub seq: Option<u32>,
    /// When it came; kernels before 5.18 say it only where somebody else asks for it too.
    pub at: Option<SystemTime>,
    /// The word that the rule gave it.
    pub prefix: Prefix,
}

/// What a rule says of a packet that it logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefix {
    /// Nothing: the packet has its socket's own addresses and ports.
    #[default]
    Plain,
    /// Its destination or source is translated.
    Translated,
    /// An RST without a FIN before it.
    Waited,
    /// Such an RST, whose destination or source is translated.
    TranslatedWaited,
    /// The table has no room for others like it.
    Full,
    /// A SYN that only sends off the packets before it.
    Hurry,
    /// A first FIN: something begins to close.
    Closing,
    /// It came in, and says to be this host's own.
    Spoofed,
    /// An RST of the server.
    Answered,
    /// A SYN of a source that has half-closed connections.
    Opens,
}

fn address_key(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

impl Prefix {
    /// The kernel ends the word with a zero.
    fn read(value: &[u8]) -> Self {
        match value.split(|byte| *byte == 0).next().map(std::str::from_utf8) {
            Some(Ok(TRANSLATED)) => Self::Translated,
            Some(Ok(WAITED)) => Self::Waited,
            Some(Ok(TRANSLATED_WAITED)) => Self::TranslatedWaited,
            Some(Ok(FULL)) => Self::Full,
            Some(Ok(HURRY)) => Self::Hurry,
            Some(Ok(CLOSING_WORD)) => Self::Closing,
            Some(Ok(OPENS)) => Self::Opens,
            Some(Ok(SPOOFED)) => Self::Spoofed,
            Some(Ok(ANSWERED)) => Self::Answered,
            _ => Self::Plain,
        }
    }
}

/// The packet in the payload of a log message; `None` where there is none.
pub fn packet(payload: &[u8]) -> Option<Packet> {
    let mut bytes = None;
    let (mut seq, mut at) = (None, None);
    let mut interface = 0;
    let mut prefix = Prefix::Plain;
    for attribute in NlasIterator::new(payload.get(NFGENMSG_LEN..)?) {
        let attribute = attribute.ok()?;
        match attribute.kind() {
            NFULA_PAYLOAD => bytes = Some(tcp_flow(attribute.value())),
            NFULA_IFINDEX_INDEV => interface = parse_u32_be(attribute.value()).unwrap_or(0),
            NFULA_TIMESTAMP => at = timestamp(attribute.value()),
            NFULA_SEQ => seq = parse_u32_be(attribute.value()).ok(),
            NFULA_PREFIX => prefix = Prefix::read(attribute.value()),
            _ => {}
        }
    }
    Some(Packet { flow: bytes?, interface, seq, at, prefix })
}

/// `struct nfulnl_msg_packet_timestamp`: seconds and microseconds since the epoch.
fn timestamp(value: &[u8]) -> Option<SystemTime> {
    let (seconds, rest) = value.split_first_chunk()?;
    let (micros, _) = rest.split_first_chunk()?;
    UNIX_EPOCH
        .checked_add(Duration::from_secs(u64::from_be_bytes(*seconds)))?
        .checked_add(Duration::from_micros(u64::from_be_bytes(*micros)))
}
