//! The packet that is played: the SYN of a connection, as far as it is known. Pure.

use std::net::IpAddr;

use super::value::{Bits, Field};
use crate::flow::Endpoint;

const TCP: u8 = 6;
const SYN: u8 = 0x02;
const NFPROTO_IPV4: u128 = 2;
const NFPROTO_IPV6: u128 = 10;
const ETH_P_IP: u128 = 0x0800;
const ETH_P_IPV6: u128 = 0x86dd;
/// `enum ip_conntrack_info` as `ct state` bits, and `NF_CT_STATE_UNTRACKED_BIT`.
const INVALID: u32 = 1;
const RELATED: u32 = 1 << 2;
const NEW: u32 = 1 << 3;
const UNTRACKED: u32 = 1 << 6;
/// `XT_CONNTRACK_STATE_SNAT`, `_DNAT`, `_UNTRACKED`.
const XT_SNAT: u32 = 1 << 6;
const XT_DNAT: u32 = 1 << 7;
const XT_UNTRACKED: u32 = 1 << 8;
/// `RTN_LOCAL`
const RTN_LOCAL: u32 = 2;
/// `RTN_UNICAST`
const RTN_UNICAST: u32 = 1;

/// By which device a connection comes in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Interface {
    /// By this one, named as rules name it, with its number.
    Known(String, u32),
    /// By another than the loopback device.
    NotLoopback,
    /// Any may be.
    #[default]
    Unknown,
}

impl Interface {
    /// The loopback device, which is the first of every namespace.
    pub fn loopback() -> Self {
        Self::Known("lo".to_owned(), 1)
    }
}

/// The connection whose SYN is played.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Syn {
    /// Who opens it.
    pub source: IpAddr,
    /// From which port, where that is known.
    pub source_port: Option<u16>,
    /// The address and port that the client asked for; `None` where rules may have translated them and
    /// nothing shows from what.
    pub asked: Option<Endpoint>,
    /// The address and port that it gets to: another one after destination NAT.
    pub destination: Endpoint,
    /// The device that it comes in by.
    pub interface: Interface,
    /// The device that it leaves by, where it is forwarded.
    pub leaves: Interface,
    /// Its socket is in another namespace or host: it is forwarded.
    pub is_forwarded: bool,
    /// A helper has expected it (FTP's data): conntrack calls it RELATED, not NEW.
    pub is_expected: bool,
    /// Conntrack has taken the connection up, whatever rules do with its SYN: a list keeps what it was put into.
    pub is_taken_up: bool,
}

impl Syn {
    /// From a source, any port of it, to an endpoint of this host, without NAT.
    pub fn new(source: IpAddr, destination: Endpoint) -> Self {
        let is_local = source.is_loopback() || source == destination.addr();
        Self {
            source,
            source_port: None,
            asked: Some(destination),
            destination,
            interface: if is_local { Interface::loopback() } else { Interface::NotLoopback },
            leaves: Interface::Unknown,
            is_forwarded: false,
            is_expected: false,
            is_taken_up: false,
        }
    }
}

/// The SYN somewhere on its way.
#[derive(Clone, Debug)]
pub struct Packet<'s> {
    syn: &'s Syn,
    /// Destination NAT is behind it.
    pub is_translated: bool,
    /// Conntrack has seen it.
    pub is_seen: bool,
    /// Conntrack keeps an entry of it; `None` where that cannot be told.
    pub is_tracked: Option<bool>,
    /// The zone that its entry is in; `None` where that cannot be told.
    pub zone: Option<u16>,
    /// Its mark.
    pub mark: Bits,
    /// The mark of its entry.
    pub ct_mark: Bits,
    /// Bytes of its headers that rules have made others, by where they begin.
    pub written: Vec<(Field, u32)>,
}

impl<'s> Packet<'s> {
    /// As it comes from the wire.
    pub fn new(syn: &'s Syn) -> Self {
        Self {
            syn,
            is_translated: false,
            is_seen: false,
            is_tracked: Some(true),
            zone: Some(0),
            mark: Bits::unknown(4),
            ct_mark: Bits::number(0, 4),
            written: Vec::new(),
        }
    }

    /// The state in which conntrack sees it.
    fn first(&self) -> u32 {
        if self.syn.is_expected { RELATED } else { NEW }
    }

    /// The connection that it opens.
    pub fn syn(&self) -> &'s Syn {
        self.syn
    }

    fn destination(&self) -> Option<Endpoint> {
        if self.is_translated { Some(self.syn.destination) } else { self.syn.asked }
    }

    /// Some bytes of it, or of what the kernel knows of it.
    pub fn field(&self, field: Field, length: u32) -> Bits {
        if self.is_written(field, length) {
            return Bits::unknown(length);
        }
        let is_ipv4 = self.syn.source.is_ipv4();
        let by_family = |ipv4, ipv6| Bits::number(if is_ipv4 { ipv4 } else { ipv6 }, length);
        // Where one direction mirrors the other.
        let plain = self.syn.asked == Some(self.syn.destination);
        match field {
            Field::Ip(offset) => self.network(offset, length),
            Field::Tcp(offset) => self.transport(offset, length),
            Field::L4Proto => Bits::number(TCP.into(), length),
            Field::NfProto => by_family(NFPROTO_IPV4, NFPROTO_IPV6),
            Field::EtherType => by_family(ETH_P_IP, ETH_P_IPV6),
            Field::InterfaceName => name_of(&self.syn.interface, length),
            Field::InterfaceIndex => index_of(&self.syn.interface, length),
            Field::OutName => name_of(&self.syn.leaves, length),
            Field::OutIndex => index_of(&self.syn.leaves, length),
            Field::Mark => self.mark,
            Field::CtMark => self.ct_mark,
            Field::CtState => {
                let (value, known) = self.states(INVALID, self.first(), UNTRACKED, 0);
                Bits::partly(number(value), number(known), 4)
            }
            Field::XtState => {
                let translated = if plain { 0 } else { XT_DNAT };
                let dnat = if self.is_translated { translated } else { 0 };
                let (value, known) = self.states(INVALID, self.first(), XT_UNTRACKED, dnat);
                let unsure = if self.syn.asked.is_none() { XT_DNAT } else { 0 };
                Bits::partly((value & !XT_SNAT).into(), (known & !unsure).into(), 4)
            }
            Field::CtDirection => Bits::number(0, length),
            Field::CtSource(true) => address(self.syn.source, length),
            Field::CtDestination(true) => {
                self.syn.asked.map_or(Bits::unknown(length), |it| address(it.addr(), length))
            }
            Field::CtSourcePort(true) => self.source_port(length),
            Field::CtDestinationPort(true) => {
                self.syn.asked.map_or(Bits::unknown(length), |it| port(it.port(), length))
            }
            Field::CtSource(false) if plain => address(self.syn.destination.addr(), length),
            Field::CtSourcePort(false) if plain => port(self.syn.destination.port(), length),
            Field::DestinationType if !self.syn.is_forwarded => native(RTN_LOCAL).first(length),
            Field::SourceType if self.syn.interface != Interface::loopback() => {
                native(RTN_UNICAST).first(length)
            }
            Field::Constant(value) => Bits::number(value, length),
            _ => Bits::unknown(length),
        }
    }

    /// Whether a rule has written to these bytes, or to what they come from.
    fn is_written(&self, field: Field, length: u32) -> bool {
        let meets = |from: u32, size: u32, at: u32| {
            from < at.saturating_add(length) && at < from.saturating_add(size)
        };
        self.written.iter().any(|(written, size)| match (*written, field) {
            (Field::Ip(from), Field::Ip(at)) | (Field::Tcp(from), Field::Tcp(at)) => {
                meets(from, *size, at)
            }
            // No more than its class of service: conntrack has looked at none of that.
            (Field::Ip(from), _) if from.saturating_add(*size) <= 2 => false,
            (_, Field::DestinationType | Field::SourceType) => true,
            (_, other) => other.is_of_entry() && other != Field::CtMark,
        })
    }

    /// State bits and which of them are known.
    fn states(&self, invalid: u32, new: u32, untracked: u32, more: u32) -> (u32, u32) {
        match (self.is_tracked, self.is_seen) {
            (Some(true), false) => (invalid, u32::MAX),
            (Some(true), true) => (new | more, u32::MAX),
            (Some(false), _) => (untracked, u32::MAX),
            (None, _) => (0, !(invalid | new | untracked | more)),
        }
    }

    fn source_port(&self, length: u32) -> Bits {
        match self.syn.source_port {
            Some(number) => port(number, length),
            None => Bits::unknown(length),
        }
    }

    fn network(&self, offset: u32, length: u32) -> Bits {
        let (mut value, mut known) = ([0_u8; 40], [0_u8; 40]);
        let size = match (self.syn.source, self.syn.destination.addr()) {
            (IpAddr::V4(from), IpAddr::V4(_)) => {
                set(&mut value, &mut known, 0, &[0x45]);
                // Neither a fragment nor the first of some; whether it may become some is open.
                set(&mut value, &mut known, 6, &[0, 0]);
                set(&mut known, &mut [0; 40], 6, &[0xbf, 0xff]);
                set(&mut value, &mut known, 9, &[TCP]);
                set(&mut value, &mut known, 12, &from.octets());
                if let Some(IpAddr::V4(to)) = self.destination().map(|it| it.addr()) {
                    set(&mut value, &mut known, 16, &to.octets());
                }
                20
            }
            (from, _) => {
                set(&mut value, &mut known, 0, &[0x60]);
                set(&mut known, &mut [0; 40], 0, &[0xf0]);
                set(&mut value, &mut known, 6, &[TCP]);
                set(&mut value, &mut known, 8, &octets(from));
                if let Some(to) = self.destination() {
                    set(&mut value, &mut known, 24, &octets(to.addr()));
                }
                40
            }
        };
        part(&value, &known, size, offset, length)
    }

    fn transport(&self, offset: u32, length: u32) -> Bits {
        let (mut value, mut known) = ([0_u8; 40], [0_u8; 40]);
        if let Some(port) = self.syn.source_port {
            set(&mut value, &mut known, 0, &port.to_be_bytes());
        }
        if let Some(to) = self.destination() {
            set(&mut value, &mut known, 2, &to.port().to_be_bytes());
        }
        set(&mut value, &mut known, 13, &[SYN]);
        part(&value, &known, 20, offset, length)
    }
}

fn name_of(interface: &Interface, length: u32) -> Bits {
    match interface {
        Interface::Known(name, _) => padded(name).first(length),
        _ => Bits::unknown(length),
    }
}

fn index_of(interface: &Interface, length: u32) -> Bits {
    match interface {
        Interface::Known(_, index) => native(*index),
        _ => Bits::unknown(length),
    }
}

fn octets(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}

fn address(addr: IpAddr, length: u32) -> Bits {
    match (addr, length) {
        (IpAddr::V4(addr), 4) => Bits::of(&addr.octets()),
        (IpAddr::V6(addr), 16) => Bits::of(&addr.octets()),
        _ => Bits::unknown(length),
    }
}

fn port(number: u16, length: u32) -> Bits {
    Bits::number(number.into(), length)
}

fn set(value: &mut [u8; 40], known: &mut [u8; 40], at: usize, bytes: &[u8]) {
    for (index, byte) in (at..).zip(bytes) {
        if let (Some(slot), Some(known)) = (value.get_mut(index), known.get_mut(index)) {
            (*slot, *known) = (*byte, 0xff);
        }
    }
}

fn part(value: &[u8; 40], known: &[u8; 40], size: u32, offset: u32, length: u32) -> Bits {
    let end = offset.saturating_add(length);
    let cut = |bytes: &[u8; 40]| {
        let range = usize::try_from(offset).ok()?..usize::try_from(end).ok()?;
        Some(bytes.get(range)?.iter().fold(0_u128, |all, byte| all << 8 | u128::from(*byte)))
    };
    match (cut(value), cut(known)) {
        (Some(value), Some(known)) if end <= size && length <= 16 => {
            Bits::partly(value, known, length)
        }
        _ => Bits::unknown(length),
    }
}

/// A name as registers hold it: 16 bytes, the rest zeros.
pub(super) fn padded(name: &str) -> Bits {
    let mut bytes = [0; 16];
    for (slot, byte) in bytes.iter_mut().zip(name.bytes().take(15)) {
        *slot = byte;
    }
    Bits::of(&bytes)
}

/// A number of 4 bytes in the machine's order.
pub(super) fn native(number: u32) -> Bits {
    Bits::of(&number.to_ne_bytes())
}

fn number(native: u32) -> u128 {
    u32::from_be_bytes(native.to_ne_bytes()).into()
}

/// A packet of which nothing is asked but constants.
pub(super) fn nothing() -> Packet<'static> {
    static SYN: std::sync::LazyLock<Syn> = std::sync::LazyLock::new(|| {
        let addr = IpAddr::from([0, 0, 0, 0]);
        Syn::new(addr, Endpoint::new(addr, 0))
    });
    Packet::new(&SYN)
}
