//! A TCP entry of the conntrack table, flat and without allocations.

use std::fmt;
use std::time::Duration;

use super::uapi::{
    IP_CT_TCP_FLAG_BE_LIBERAL, IP_CT_TCP_FLAG_SACK_PERM, IP_CT_TCP_FLAG_WINDOW_SCALE,
    IP_CT_TCP_SIMULTANEOUS_OPEN, IPS_ASSURED, IPS_CONFIRMED, IPS_EXPECTED, IPS_SEEN_REPLY,
    NF_CT_HELPER_NAME_LEN, NF_CT_LABELS_MAX_SIZE,
};
use crate::flow::FourTuple;

/// A conntrack entry of a TCP connection. `Option` where the kernel may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As the first packet had it, before address translation.
    pub orig: FourTuple,
    /// As answers have it, so after address translation and turned round.
    pub reply: FourTuple,
    /// Zone of each direction.
    pub zone: Zone,
    /// `IPS_*` bits; absent from some events.
    pub status: Option<Status>,
    /// Time until the entry expires without packets; absent from some DESTROY events.
    pub timeout: Option<Duration>,
    /// TCP state machine.
    pub tcp: Option<Tcp>,
    /// Connection mark; events carry it only where it is not 0 or has changed.
    pub mark: Option<u32>,
    /// The kernel's identity of the entry.
    pub id: Option<u32>,
    /// Connection labels, but for [`CLOSING_LABEL`](super::CLOSING_LABEL) by itself.
    pub labels: Option<[u8; NF_CT_LABELS_MAX_SIZE]>,
    /// Application helper.
    pub helper: Option<HelperName>,
    /// Sequence adjustment of both directions (helpers, SYNPROXY).
    pub seq_adj: Option<[SeqAdj; 2]>,
    /// What SYNPROXY must remember.
    pub synproxy: Option<SynProxy>,
}

/// What finds one entry: any of its tuples, in its zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryKey {
    /// Zone of each direction.
    pub zone: Zone,
    /// The original tuple.
    pub orig: FourTuple,
}

impl Entry {
    /// An entry of which only the connection is known: from client to server, no translation.
    pub fn plain(client_to_server: FourTuple, zone: Zone) -> Self {
        Self {
            orig: client_to_server,
            reply: client_to_server.inverse(),
            zone,
            status: None,
            timeout: None,
            tcp: None,
            mark: None,
            id: None,
            labels: None,
            helper: None,
            seq_adj: None,
            synproxy: None,
        }
    }

    /// What finds this entry.
    pub fn key(&self) -> EntryKey {
        EntryKey { zone: self.zone, orig: self.orig }
    }

    /// The TCP state, where the kernel reports it.
    pub fn state(&self) -> Option<TcpState> {
        self.tcp.map(|tcp| tcp.state)
    }

    /// Whether addresses or ports are translated.
    pub fn is_translated(&self) -> bool {
        self.orig != self.reply.inverse()
    }

    /// Whether [`Entry::plain`] of its original tuple says all that there is to say.
    pub fn is_plain(&self) -> bool {
        !self.is_translated()
            && self.zone == Zone::default()
            && self.mark.unwrap_or(0) == 0
            && self.labels.is_none()
            && self.helper.is_none()
            && self.seq_adj.is_none()
            && self.synproxy.is_none()
    }

    /// Whether conntrack learned of the connection from a packet in its middle
    /// (`nf_conntrack_tcp_loose`), not from a handshake.
    ///
    /// `tcp_new()` in `nf_conntrack_proto_tcp.c` gives both directions the two flags, and knows no
    /// window scale. The flow table makes entries of a handshake liberal, too
    /// (`nft_flow_offload_eval()`): of them those without window scaling pass for picked up.
    pub fn is_picked_up(&self) -> bool {
        let picked_up = IP_CT_TCP_FLAG_BE_LIBERAL | IP_CT_TCP_FLAG_SACK_PERM;
        self.has_flags(picked_up) && !self.has_flags(IP_CT_TCP_FLAG_WINDOW_SCALE) && !self.is_ours()
    }

    /// Whether this program inserted the entry, in this life or another.
    pub fn is_ours(&self) -> bool {
        self.has_flags(IP_CT_TCP_SIMULTANEOUS_OPEN)
    }

    fn has_flags(&self, wanted: u8) -> bool {
        self.tcp.is_some_and(|tcp| tcp.flags.iter().all(|flags| flags & wanted == wanted))
    }
}

/// Conntrack zone of each direction; 0 is the default zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Zone {
    /// Zone of the original direction.
    pub orig: u16,
    /// Zone of the reply direction.
    pub reply: u16,
}

impl Zone {
    /// The same zone in both directions.
    pub fn both(id: u16) -> Self {
        Self { orig: id, reply: id }
    }

    /// The one number that the kernel keeps; the direction says where it counts.
    pub fn id(self) -> u16 {
        if self.orig == 0 { self.reply } else { self.orig }
    }
}

/// `IPS_*` bits (`enum ip_conntrack_status`).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// Confirmed, and nothing seen yet: the limiter adds such a connection at its next packet.
    pub const FRESH: Self = Self(IPS_CONFIRMED);
    /// A connection that has had traffic both ways.
    pub const ASSURED: Self = Self(IPS_SEEN_REPLY | IPS_ASSURED | IPS_CONFIRMED);

    /// This entry after traffic both ways. That a helper has expected it cannot be changed:
    /// `ctnetlink_change_status()` answers EBUSY where the bit differs.
    pub fn assured(self) -> Self {
        Self(Self::ASSURED.0 | self.0 & IPS_EXPECTED)
    }

    /// Whether early drop spares the entry.
    pub fn is_assured(self) -> bool {
        self.0 & IPS_ASSURED != 0
    }

    /// Whether a helper has expected the connection.
    pub fn is_expected(self) -> bool {
        self.0 & IPS_EXPECTED != 0
    }

    /// Whether a packet of the reply direction was seen.
    pub fn has_seen_reply(self) -> bool {
        self.0 & IPS_SEEN_REPLY != 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The TCP part of an entry. Pairs are `[original, reply]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// State of the connection as conntrack sees it.
    pub state: TcpState,
    /// Window scale of each side.
    pub wscale: [u8; 2],
    /// `IP_CT_TCP_FLAG_*` of each side; 0 where the kernel was silent (DESTROY events).
    pub flags: [u8; 2],
}

/// TCP states of conntrack (`enum tcp_conntrack`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum TcpState {
    /// Nothing seen.
    None = 0,
    /// SYN seen.
    SynSent = 1,
    /// SYN and its answer seen.
    SynRecv = 2,
    /// Handshake complete, or loose pick-up.
    Established = 3,
    /// One FIN seen.
    FinWait = 4,
    /// That FIN was acknowledged.
    CloseWait = 5,
    /// Both FINs seen.
    LastAck = 6,
    /// Both FINs acknowledged.
    TimeWait = 7,
    /// RST seen.
    Close = 8,
    /// SYNs from both sides (`TCP_CONNTRACK_LISTEN` in old kernels).
    SynSent2 = 9,
}

impl TcpState {
    /// All ten, in the order of the kernel's numbers.
    pub const ALL: [Self; 10] = [
        Self::None,
        Self::SynSent,
        Self::SynRecv,
        Self::Established,
        Self::FinWait,
        Self::CloseWait,
        Self::LastAck,
        Self::TimeWait,
        Self::Close,
        Self::SynSent2,
    ];

    /// The state with the kernel's number.
    pub fn from_kernel(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u8 == number)
    }

    /// In lower case with hyphens, as this program's tables and JSON write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::SynSent => "syn-sent",
            Self::SynRecv => "syn-recv",
            Self::Established => "established",
            Self::FinWait => "fin-wait",
            Self::CloseWait => "close-wait",
            Self::LastAck => "last-ack",
            Self::TimeWait => "time-wait",
            Self::Close => "close",
            Self::SynSent2 => "syn-sent2",
        }
    }

    /// The setting (`net.netfilter.*`) of the timeout that the kernel gives an entry in this state.
    pub fn timeout_setting(self) -> Option<String> {
        let name = match self {
            Self::None => return None,
            // The kernel has one for both.
            Self::SynSent2 => Self::SynSent.name(),
            state => state.name(),
        };
        Some(format!("nf_conntrack_tcp_timeout_{}", name.replace('-', "_")))
    }

    /// Whether connlimit and `ct count` count an entry in this state: all but CLOSE and
    /// TIME_WAIT (`already_closed()` in `nf_conncount.c`).
    pub fn is_counted(self) -> bool {
        !matches!(self, Self::Close | Self::TimeWait)
    }

    /// Whether conntrack believes that the handshake is under way.
    pub fn is_opening(self) -> bool {
        matches!(self, Self::None | Self::SynSent | Self::SynRecv | Self::SynSent2)
    }

    /// Whether conntrack believes that the connection is over or about to be.
    pub fn is_closing(self) -> bool {
        matches!(self, Self::LastAck | Self::TimeWait | Self::Close)
    }
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Name of an application helper (`ftp`), NUL padded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HelperName([u8; NF_CT_HELPER_NAME_LEN]);

impl HelperName {
    /// The name in a `CTA_HELP_NAME` attribute; `None` where it does not fit.
    pub(super) fn from_kernel(bytes: &[u8]) -> Option<Self> {
        let text = bytes.split(|byte| *byte == 0).next()?;
        let mut name = [0; NF_CT_HELPER_NAME_LEN];
        // The last byte stays NUL: the kernel takes the name as a C string.
        name.get_mut(..NF_CT_HELPER_NAME_LEN - 1)?.get_mut(..text.len())?.copy_from_slice(text);
        Some(Self(name))
    }

    /// The name with one NUL behind it.
    pub(super) fn as_c_bytes(&self) -> &[u8] {
        let length = self.0.iter().take_while(|byte| **byte != 0).count();
        self.0.get(..=length).unwrap_or(&self.0)
    }
}

impl fmt::Debug for HelperName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(self.as_c_bytes()).trim_end_matches('\0'))
    }
}

/// How far sequence numbers of one direction are shifted (`struct nf_ct_seqadj`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SeqAdj {
    /// Sequence number of the last change.
    pub correction_pos: u32,
    /// Shift before it.
    pub offset_before: u32,
    /// Shift after it.
    pub offset_after: u32,
}

/// State of the SYNPROXY target for a connection (`struct nf_conn_synproxy`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SynProxy {
    /// Initial sequence number.
    pub isn: u32,
    /// Initial timestamp.
    pub its: u32,
    /// Timestamp offset.
    pub tsoff: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_name_keeps_its_terminator() {
        assert_eq!(HelperName::from_kernel(b"ftp\0").unwrap().as_c_bytes(), b"ftp\0");
        assert_eq!(HelperName::from_kernel(b"ftp").unwrap().as_c_bytes(), b"ftp\0");
        assert!(HelperName::from_kernel(b"sixteen-bytes-xx").is_none());
    }

    #[test]
    fn every_state_reads_back_from_its_number() {
        for state in TcpState::ALL {
            assert_eq!(TcpState::from_kernel(state as u8), Some(state));
        }
        assert_eq!(TcpState::from_kernel(10), None);
    }
}
