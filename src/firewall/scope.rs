//! Which opening packets a rule, or a path of rules, is for: what can be said of it in words. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::set::{Element, Set};
use super::value::{Answer, Bits, Field, Operand};
use super::{Ports, Test};

/// `ct state` bits, the same in nft and in xt's conntrack and state matches.
pub const STATE_ESTABLISHED: u32 = 1 << 1;
/// See [`STATE_ESTABLISHED`].
pub const STATE_NEW: u32 = 1 << 3;

/// `XT_CONNTRACK_STATE_SNAT`, `_DNAT`
const XT_TRANSLATED: u32 = 1 << 6 | 1 << 7;

const TCP: u128 = 6;
const SYN: u128 = 0x02;
const NFPROTO_IPV4: u128 = 2;
const ETH_P_IP: u128 = 0x0800;
/// `LOOPBACK_IFINDEX`: the same in every namespace.
const LOOPBACK_IFINDEX: u32 = 1;
/// `RTN_LOCAL`
const RTN_LOCAL: u32 = 2;
/// So many elements of a set are named one by one.
const NAMED: usize = 4;

/// Which packets a rule, or a path of rules, is for. Empty: for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// IPv4 only (`true`) or IPv6 only (`false`).
    pub ipv4: Option<bool>,
    /// Destination ports, as the rule sees them.
    pub ports: Ports,
    /// Destination ports as the client asked for them.
    pub asked: Ports,
    /// Names of incoming interfaces; empty: any.
    pub interfaces: Vec<String>,
    /// `ct state`: one of these bits.
    pub states: Option<u32>,
    /// Or, whatever its state, of a connection that is translated (`--ctstate DNAT`).
    pub or_translated: bool,
    /// Packets with SYN only (`--syn`, `tcp flags syn`).
    pub syn: bool,
    /// All packets without SYN and no others (`! --syn`).
    pub without_syn: bool,
    /// Source networks: inside, or (`false`) outside of it; all must hold.
    pub sources: Vec<(IpNet, bool)>,
    /// Destination networks likewise.
    pub destinations: Vec<(IpNet, bool)>,
    /// What else it is asked, in words.
    pub others: Vec<String>,
    /// A rate or a quota: only some of those packets.
    pub is_rated: bool,
    /// No SYN of TCP.
    pub never: bool,
}

impl Match {
    /// What a test asks.
    pub fn of(test: &Test) -> Self {
        match test {
            Test::Within { value, from, to, is } => within(value, *from, *to, *is),
            Test::In { values, set, is } => inside(values, set, *is),
            Test::Rate(what) => Self { is_rated: true, ..other(what.clone()) },
            Test::Unclear(what) => other(what.clone()),
            Test::Never => Self { never: true, ..Self::default() },
        }
    }

    /// What one element of a set asks, which is looked up by these values.
    pub fn of_element(values: &[Operand], element: &Element) -> Self {
        let mut at = 0;
        let mut all = Self { is_rated: element.is_sometimes, ..Self::default() };
        for value in values {
            let length = usize::try_from(value.length).unwrap_or(16);
            let part = |key: &[u8]| key.get(at..at + length).map(Bits::of);
            let from = part(&element.key);
            let to = element.end.as_deref().map_or(from, part);
            match from.zip(to) {
                Some((from, to)) => all = all.and(&within(value, from, to, true)),
                None => all.others.push(words(value)),
            }
            at += length.next_multiple_of(4);
        }
        all
    }

    /// Packets that pass both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let both = |a: Option<u32>, b: Option<u32>| match (a, b) {
            (Some(a), Some(b)) => Some(a & b),
            (one, another) => one.or(another),
        };
        let join = |a: &[(IpNet, bool)], b: &[(IpNet, bool)]| {
            let mut all = a.to_vec();
            all.extend(b.iter().filter(|net| !a.contains(net)));
            all
        };
        let mut others = self.others.clone();
        others.extend(other.others.iter().filter(|what| !self.others.contains(what)).cloned());
        let interfaces = common(&self.interfaces, &other.interfaces);
        let ports = self.ports.and(&other.ports);
        let asked = self.asked.and(&other.asked);
        let (states, or_translated) = match (self.or_translated, other.or_translated) {
            (true, false) if other.states.is_none() => (self.states, true),
            (false, true) if self.states.is_none() => (other.states, true),
            // Of those in the one's states some may be translated.
            (true, false) | (false, true) => {
                others.push("translated".to_owned());
                (if self.or_translated { other.states } else { self.states }, false)
            }
            (is, _) => (both(self.states, other.states), is),
        };
        let sources = join(&self.sources, &other.sources);
        let destinations = join(&self.destinations, &other.destinations);
        let families = matches!((self.ipv4, other.ipv4), (Some(a), Some(b)) if a != b);
        let never = self.never
            || other.never
            || families
            || self.syn && other.without_syn
            || self.without_syn && other.syn
            || ports.is_empty()
            || asked.is_empty()
            || states == Some(0) && !or_translated
            || interfaces.is_none()
            || is_empty(&sources)
            || is_empty(&destinations);
        Self {
            ipv4: self.ipv4.or(other.ipv4),
            ports,
            asked,
            interfaces: interfaces.unwrap_or_default(),
            states,
            or_translated,
            syn: self.syn || other.syn,
            without_syn: self.without_syn || other.without_syn,
            sources,
            destinations,
            others,
            is_rated: self.is_rated || other.is_rated,
            never,
        }
    }

    /// Whether something else narrows it further.
    pub fn is_narrowed(&self) -> bool {
        !self.others.is_empty() || self.or_translated
    }

    /// Whether it is for nothing but packets that come in by the loopback device.
    pub fn is_loopback(&self) -> bool {
        !self.interfaces.is_empty() && self.interfaces.iter().all(|name| name == "lo")
    }

    /// Whether packets of established connections pass it, and opening ones do not.
    pub fn is_established(&self) -> bool {
        self.without_syn
            || self
                .states
                .is_some_and(|bits| bits & STATE_ESTABLISHED != 0 && bits & STATE_NEW == 0)
    }

    /// Whether packets of open connections pass it: a stale RST is one.
    pub fn is_for_all(&self) -> bool {
        !self.syn && self.states.is_none_or(|bits| bits & STATE_ESTABLISHED != 0)
    }

    /// Whether a packet that opens a tracked connection may pass it.
    pub fn may_open(&self) -> bool {
        !self.without_syn
            && (self.or_translated || self.states.is_none_or(|bits| bits & STATE_NEW != 0))
    }

    /// Whether no client, destination and interface is left out.
    pub fn is_for_everybody(&self) -> bool {
        !self.is_narrowed()
            && !self.never
            && self.interfaces.is_empty()
            && self.sources.is_empty()
            && self.destinations.is_empty()
    }

    /// Ports as clients know them.
    pub fn shown_ports(&self) -> &Ports {
        if self.asked.is_all() { &self.ports } else { &self.asked }
    }
}

impl fmt::Display for Match {
    /// ` to port 80 of 192.0.2.1/32, from 203.0.113.0/24, by eth0, if mark`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shown_ports() {
            ports if ports.is_all() => f.write_str(" to any port")?,
            ports => write!(f, " to port {ports}")?,
        }
        let list = |f: &mut fmt::Formatter<'_>, nets: &[(IpNet, bool)], inside: &str| {
            nets.iter().try_for_each(|(net, is)| {
                write!(f, "{}{net}", if *is { inside } else { ", not of " })
            })
        };
        list(f, &self.destinations, " of ")?;
        let outside = |(net, is): &(IpNet, bool)| (*net, *is);
        for (net, is) in self.sources.iter().map(outside) {
            write!(f, "{}{net}", if is { ", from " } else { ", not from " })?;
        }
        if !self.interfaces.is_empty() {
            write!(f, ", by {}", self.interfaces.join(" or "))?;
        }
        if !self.others.is_empty() {
            write!(f, ", if {}", self.others.join(" and "))?;
        }
        if self.or_translated {
            f.write_str(", if translated")?;
        }
        Ok(())
    }
}

fn other(what: String) -> Match {
    Match { others: vec![what], ..Match::default() }
}

/// Interfaces that both lists have; empty lists have all, `None` is none.
fn common(one: &[String], other: &[String]) -> Option<Vec<String>> {
    if one.is_empty() || other.is_empty() {
        return Some([one, other].concat());
    }
    let begins = |name: &str, pattern: &str| {
        pattern.strip_suffix('*').is_some_and(|start| name.trim_end_matches('*').starts_with(start))
    };
    let both = |a: &String, b: &String| match () {
        () if a == b || begins(a, b) => Some(a.clone()),
        () if begins(b, a) => Some(b.clone()),
        () => None,
    };
    let all: Vec<String> =
        one.iter().flat_map(|a| other.iter().filter_map(move |b| both(a, b))).collect();
    (!all.is_empty()).then_some(all)
}

/// Whether no address can meet all of these.
fn is_empty(nets: &[(IpNet, bool)]) -> bool {
    nets.iter().any(|(net, is)| {
        nets.iter().any(|(other, also)| match (is, also) {
            (true, true) => !net.contains(other) && !other.contains(net),
            (true, false) => other.contains(net),
            _ => false,
        })
    })
}

/// A test of a value between two, or outside of them.
fn within(value: &Operand, from: Bits, to: Bits, is: bool) -> Match {
    let answer = |known: u128, length: u32| {
        let bits =
            Operand { field: Field::Constant(known), length, changes: value.changes.clone() };
        let packet = super::packet::nothing();
        let (Some(low), Some(high)) = (from.value(), to.value()) else { return Answer::Unknown };
        bits.of(&packet).first(from.length()).is_within(low, high).not_if(!is)
    };
    let fixed = |known: u128, length: u32| Match {
        never: answer(known, length) == Answer::No,
        ..Match::default()
    };
    match (value.field, value.length) {
        (Field::L4Proto, length) => fixed(TCP, length),
        (Field::CtDirection, length) => fixed(0, length),
        (Field::Constant(known), length) => fixed(known, length),
        (Field::DestinationType, length) => {
            let local = Bits::of(&RTN_LOCAL.to_ne_bytes()).value().unwrap_or(0);
            // A forwarded packet has another.
            let never = answer(local, length) == Answer::No;
            if never { other("fib daddr type".to_owned()) } else { Match::default() }
        }
        (Field::NfProto | Field::EtherType, _) if value.is_plain() && from == to => {
            let ipv4 = [Some(NFPROTO_IPV4), Some(ETH_P_IP)].contains(&from.value());
            Match { ipv4: Some(ipv4 == is), ..Match::default() }
        }
        (Field::Tcp(2), 2) | (Field::CtDestinationPort(true), 2) if value.is_plain() => {
            let end = |bits: Bits| bits.value().and_then(|port| u16::try_from(port).ok());
            let Some((from, to)) = end(from).zip(end(to)) else { return other(words(value)) };
            let ports = Ports::of([(from, to)]);
            let ports = if is { ports } else { ports.not() };
            match value.field {
                Field::Tcp(_) => Match { ports, ..Match::default() },
                _ => Match { asked: ports, ..Match::default() },
            }
        }
        (Field::Tcp(13), 1) => {
            let without_syn = |wanted| {
                let mut flags = (0..=u8::MAX.into()).filter(|flags: &u128| flags & SYN == 0);
                flags.all(|flags| answer(flags, 1) == wanted)
            };
            let never = answer(SYN, 1) == Answer::No;
            let is_rest = never && without_syn(Answer::Yes);
            Match {
                syn: without_syn(Answer::No),
                without_syn: is_rest,
                never: never && !is_rest,
                ..Match::default()
            }
        }
        (Field::CtState | Field::XtState, _) => states(value, from, to, is),
        (Field::InterfaceName | Field::InterfaceIndex, _) if value.is_plain() && from == to => {
            let name = interface(value.field, from);
            match is {
                true => Match { interfaces: vec![name], ..Match::default() },
                false => other(format!("not by {name}")),
            }
        }
        (Field::Ip(_), _) if from == to => match network(value, from) {
            Some((net, true)) => Match { sources: vec![(net, is)], ..Match::default() },
            Some((net, false)) => Match { destinations: vec![(net, is)], ..Match::default() },
            None => header(value, from, is),
        },
        (Field::Ip(_), _) if value.is_plain() => match (network_of(value, from, to), is) {
            (Some((net, true)), _) => Match { sources: vec![(net, is)], ..Match::default() },
            (Some((net, false)), _) => Match { destinations: vec![(net, is)], ..Match::default() },
            _ => header(value, from, is),
        },
        (Field::Ip(_), _) => header(value, from, is),
        _ => other(described(value, from, to, is)),
    }
}

/// Other parts of the network header.
fn header(value: &Operand, from: Bits, is: bool) -> Match {
    match (value.field, value.length) {
        // The protocol, of IPv4 and IPv6.
        (Field::Ip(9 | 6), 1) if value.is_plain() => {
            Match { never: (from.value() == Some(TCP)) != is, ..Match::default() }
        }
        _ => other(words(value)),
    }
}

/// The states of a conntrack test: `value & mask` is 0 or is not, or a whole value.
fn states(value: &Operand, from: Bits, to: Bits, is: bool) -> Match {
    let native = |bits: u128| {
        let bits = u32::try_from(bits).unwrap_or(0);
        if value.field == Field::CtState { u32::from_ne_bytes(bits.to_be_bytes()) } else { bits }
    };
    let (Some(low), Some(mask)) = (from.value().filter(|_| from == to), value.mask()) else {
        return other(words(value));
    };
    let (low, mask) = (native(low), native(mask));
    // xt's states have two that say nothing of what the packet is: how its connection is translated.
    let translated = if value.field == Field::XtState { mask & XT_TRANSLATED } else { 0 };
    if !value.is_plain() && low == 0 && translated != 0 {
        let mask = mask & !translated;
        return match is {
            true => Match { states: Some(!mask), ..other("not translated".to_owned()) },
            false => Match { states: Some(mask), or_translated: true, ..Match::default() },
        };
    }
    let bits = match (value.is_plain(), low, is) {
        (true, low, true) => low,
        (true, low, false) => !low,
        (false, 0, false) => mask,
        (false, 0, true) => !mask,
        _ => return other(words(value)),
    };
    Match { states: Some(bits), ..Match::default() }
}

/// A test of values in a set, or not in it.
fn inside(values: &[Operand], set: &Set, is: bool) -> Match {
    let named = || {
        let what: Vec<_> = values.iter().map(words).collect();
        let set = if set.name.is_empty() { "a set".to_owned() } else { format!("@{}", set.name) };
        other(format!("{} {} {set}", what.join(" . "), if is { "in" } else { "not in" }))
    };
    if set.unread.is_some() || set.otherwise().is_some() {
        return named();
    }
    // Elements that no opening TCP packet meets say nothing.
    let each: Vec<Match> = set.keyed().iter().map(|e| Match::of_element(values, e)).collect();
    let mut each = each.into_iter().filter(|element| !element.never).peekable();
    if each.peek().is_none() {
        return Match { never: is, ..Match::default() };
    }
    let one_by_one: Vec<Match> = each.collect();
    let only = |wanted: fn(&Match) -> Match| one_by_one.iter().all(|m| *m == wanted(m));
    if only(|m| Match { ports: m.ports.clone(), ..Match::default() }) {
        let ports = one_by_one.iter().fold(Ports::of([]), |all, m| all.or(&m.ports));
        return Match { ports: if is { ports } else { ports.not() }, ..Match::default() };
    }
    if only(|m| Match { states: m.states, ..Match::default() }) {
        let bits = one_by_one.iter().filter_map(|m| m.states).fold(0, |a, b| a | b);
        return Match { states: Some(if is { bits } else { !bits }), ..Match::default() };
    }
    if is && only(|m| Match { interfaces: m.interfaces.clone(), ..Match::default() }) {
        let interfaces = one_by_one.iter().flat_map(|m| m.interfaces.clone()).collect();
        return Match { interfaces, ..Match::default() };
    }
    match one_by_one.as_slice() {
        [one] if is => one.clone(),
        few if !is
            && few.len() <= NAMED
            && only(|m| Match { sources: m.sources.clone(), ..Match::default() }) =>
        {
            let sources = few.iter().flat_map(|m| &m.sources).map(|(net, _)| (*net, false));
            Match { sources: sources.collect(), ..Match::default() }
        }
        _ => named(),
    }
}

/// A network that a masked address is compared with, and whether it is the source's.
fn network(value: &Operand, with: Bits) -> Option<(IpNet, bool)> {
    let Field::Ip(offset) = value.field else { return None };
    let (is_source, ipv4) = match (offset, value.length) {
        (12, 1..=4) => (true, true),
        (16, 1..=4) => (false, true),
        (8, 2..=16) => (true, false),
        (24, 1..=16) => (false, false),
        _ => return None,
    };
    let prefix = value.prefix()?;
    let bytes = with.bytes()?;
    let addr: IpAddr = if ipv4 {
        let mut octets = [0; 4];
        octets.get_mut(..bytes.len())?.copy_from_slice(&bytes);
        Ipv4Addr::from(octets).into()
    } else {
        let mut octets = [0; 16];
        octets.get_mut(..bytes.len())?.copy_from_slice(&bytes);
        Ipv6Addr::from(octets).into()
    };
    Some((IpNet::new(addr, prefix).ok()?.trunc(), is_source))
}

/// The network that a range of whole addresses is, as sets keep them, and whether it is the source's.
fn network_of(value: &Operand, from: Bits, to: Bits) -> Option<(IpNet, bool)> {
    let (first, is_source) = network(value, from)?;
    let (last, _) = network(value, to)?;
    let width = first.max_prefix_len();
    let is_whole = |net: &IpNet| net.prefix_len() == width;
    if !is_whole(&first) || !is_whole(&last) {
        return None;
    }
    let nets = (0..width).filter_map(|bits| IpNet::new(first.addr(), bits).ok());
    let mut exact =
        nets.filter(|net| net.network() == first.addr() && net.broadcast() == last.addr());
    Some((exact.next()?, is_source))
}

/// The name of an interface; one without its NUL is the beginning of names.
fn interface(field: Field, value: Bits) -> String {
    let bytes = value.bytes().unwrap_or_default();
    if field == Field::InterfaceIndex {
        return match <[u8; 4]>::try_from(bytes.as_slice()).map(u32::from_ne_bytes) {
            Ok(LOOPBACK_IFINDEX) => "lo".to_owned(),
            Ok(index) => format!("interface {index}"),
            Err(_) => "interface".to_owned(),
        };
    }
    match bytes.iter().position(|byte| *byte == 0) {
        Some(end) => String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned(),
        None => format!("{}*", String::from_utf8_lossy(&bytes)),
    }
}

fn described(value: &Operand, from: Bits, to: Bits, is: bool) -> String {
    let sign = if is { "" } else { "not " };
    match (value.field, from.value(), to.value()) {
        (Field::Tcp(0) | Field::CtSourcePort(true), Some(from), Some(to)) if from == to => {
            format!("{} {sign}{from}", words(value))
        }
        (Field::Tcp(0) | Field::CtSourcePort(true), Some(from), Some(to)) => {
            format!("{} {sign}{from}-{to}", words(value))
        }
        (Field::Mark | Field::CtMark, ..) => {
            let bytes = from.bytes().unwrap_or_default();
            let mark = <[u8; 4]>::try_from(bytes.as_slice()).map_or(0, u32::from_ne_bytes);
            format!("{} {sign}0x{mark:x}", words(value))
        }
        _ => words(value),
    }
}

/// A value by the name that rules give it.
pub(super) fn words(value: &Operand) -> String {
    match (value.field, value.length) {
        (Field::Ip(12), 1..=4) | (Field::Ip(8), 2..=16) => "source address",
        (Field::Ip(16), 1..=4) | (Field::Ip(24), 1..=16) => "destination address",
        (Field::CtSource(true), _) => "source address",
        (Field::CtDestination(true), _) => "asked address",
        (Field::Tcp(0) | Field::CtSourcePort(true), 2) => "source port",
        (Field::Tcp(2), 2) => "port",
        (Field::CtDestinationPort(true), 2) => "asked port",
        (Field::L4Proto, _) => "protocol",
        (Field::InterfaceName | Field::InterfaceIndex, _) => "interface",
        (Field::Mark, _) => "mark",
        (Field::CtMark, _) => "ct mark",
        (Field::CtState | Field::XtState, _) => "ct state",
        (Field::DestinationType, _) => "fib daddr type",
        (Field::SourceType, _) => "fib saddr type",
        (Field::Ip(_), _) => "ip header",
        (Field::Tcp(_), _) => "tcp header",
        _ => "another value",
    }
    .to_owned()
}
