//! What a test of a rule asks of an opening packet. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::Match;
use super::words::{described, words};
use crate::firewall::packet;
use crate::firewall::set::{Element, Set};
use crate::firewall::value::{Answer, Bits, Field, Operand};
use crate::firewall::{Ports, Test};

/// `XT_CONNTRACK_STATE_SNAT`, `_DNAT`
const XT_TRANSLATED: u32 = 1 << 6 | 1 << 7;

const TCP: u128 = 6;
const UDP: u128 = 17;
const SYN: u128 = 0x02;
const NFPROTO_IPV4: u128 = 2;
const ETH_P_IP: u128 = 0x0800;
/// `LOOPBACK_IFINDEX`: the same in every namespace.
const LOOPBACK_IFINDEX: u32 = 1;
/// `RTN_LOCAL`
const RTN_LOCAL: u32 = 2;
/// So many elements of a set are named one by one.
const NAMED: usize = 4;

impl Match {
    /// What a test asks.
    pub fn of(test: &Test) -> Self {
        match test {
            Test::Within { value, from, to, is } => within(value, *from, *to, *is),
            Test::In { values, set, is } => inside(values, set, *is),
            Test::Rate(what) => Self { is_rated: true, ..other(what.clone()) },
            // Which way round it asks is not read.
            Test::Unclear(what) if what == "set" => other("a set has or lacks it".to_owned()),
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
}

fn other(what: String) -> Match {
    Match { others: vec![what], ..Match::default() }
}

/// A test of a value between two, or outside of them.
fn within(value: &Operand, from: Bits, to: Bits, is: bool) -> Match {
    let answer = |known: u128, length: u32| {
        let bits =
            Operand { field: Field::Constant(known), length, changes: value.changes.clone() };
        let packet = packet::nothing();
        let (Some(low), Some(high)) = (from.value(), to.value()) else { return Answer::Unknown };
        bits.of(&packet).first(from.length()).is_within(low, high).not_if(!is)
    };
    let fixed = |known: u128, length: u32| Match {
        never: answer(known, length) == Answer::No,
        ..Match::default()
    };
    match (value.field, value.length) {
        (Field::L4Proto, length) => {
            Match { tcp: answer(UDP, length) == Answer::No, ..fixed(TCP, length) }
        }
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
        (Field::OutName | Field::OutIndex, _) if value.is_plain() && from == to => {
            let not = if is { "" } else { "not " };
            other(format!("{not}on to {}", interface(value.field, from)))
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
            let is_tcp = from.value() == Some(TCP);
            Match { never: is_tcp != is, tcp: is_tcp && is, ..Match::default() }
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
    // Elements that no opening TCP packet meets say nothing, but that there are other protocols.
    let each: Vec<Match> = set.keyed().iter().map(|e| Match::of_element(values, e)).collect();
    let tcp = is && each.iter().all(|element| element.tcp);
    let each = each.into_iter().filter(|element| !element.never);
    let one_by_one: Vec<Match> = each.map(|it| Match { tcp: false, ..it }).collect();
    if one_by_one.is_empty() {
        return Match { never: is, ..Match::default() };
    }
    Match { tcp, ..of_elements(&one_by_one, is, named) }
}

/// A test of what elements of a set ask one by one.
fn of_elements(one_by_one: &[Match], is: bool, named: impl FnOnce() -> Match) -> Match {
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
    match one_by_one {
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
    if matches!(field, Field::InterfaceIndex | Field::OutIndex) {
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
