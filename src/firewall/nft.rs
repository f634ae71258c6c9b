//! Runs over the expressions of one nft rule as the kernel would, and keeps what they ask for.
//!
//! A small symbolic machine: `payload`, `meta` and `ct` load a field into a register, `bitwise`
//! masks it, `cmp`, `range` and `lookup` test it. What it does not know only narrows the rule.

use std::collections::HashMap;

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::{Base, Chain, Family, Hook, Key, Limit, Match, Outcome, Ports, Rule, xt};
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Connection, KernelSocket, Transport};
use crate::nftables::dump::{self, RawSet, listed};
use crate::nftables::uapi::*;

/// So many different verdicts of one verdict map are followed.
const VERDICTS: usize = 256;
/// `LOOPBACK_IFINDEX`: the same in every namespace.
const LOOPBACK_IFINDEX: u32 = 1;

/// The chains of the network namespace that the calling thread is in.
pub(super) fn read() -> Result<Vec<Chain>> {
    let op = Op::new("open nftables netlink");
    chains(&mut Connection::new(KernelSocket::open(op, NETLINK_NETFILTER)?))
}

/// The chains that a kernel reports, with their rules.
///
/// # Errors
/// The kernel refused, or a message was lost or malformed.
pub fn chains<T: Transport>(connection: &mut Connection<T>) -> Result<Vec<Chain>> {
    let Some(raw) = dump::chains(connection)? else { return Ok(Vec::new()) };
    let mut chains: Vec<Chain> = raw
        .into_iter()
        .map(|chain| Chain {
            family: Family::from_kernel(chain.family),
            table: chain.table,
            name: chain.name,
            base: chain.hook.and_then(|(hook, priority)| {
                Some(Base { hook: Hook::from_kernel(hook)?, priority })
            }),
            rules: Vec::new(),
        })
        .collect();
    let declared = dump::sets(connection)?;
    for rule in dump::rules(connection)? {
        let owner = chains.iter_mut().find(|chain| {
            chain.family == Family::from_kernel(rule.family)
                && chain.table == rule.table
                && chain.name == rule.chain
        });
        let Some(owner) = owner else { continue };
        let mut sets = Sets {
            connection: &mut *connection,
            family: rule.family,
            table: &rule.table,
            declared: &declared,
        };
        let position = owner.rules.last().map_or(1, |rule| rule.position + 1);
        let rules = rules(owner.family, Attributes(&rule.expressions), &mut sets)?;
        owner.rules.extend(rules.into_iter().map(|rule| Rule { position, ..rule }));
    }
    Ok(chains)
}

/// A table's sets, of which a rule names one.
struct Sets<'c, T> {
    connection: &'c mut Connection<T>,
    family: u8,
    table: &'c str,
    declared: &'c [RawSet],
}

impl<T: Transport> Sets<'_, T> {
    fn elements(&mut self, set: &str) -> Result<Vec<Element>> {
        let raw = dump::elements(self.connection, self.family, self.table, set)?;
        Ok(raw.iter().map(|element| Element::decode(element)).collect())
    }

    fn declared(&self, set: &str) -> Option<&RawSet> {
        self.declared.iter().find(|known| {
            known.family == self.family && known.table == self.table && known.name == set
        })
    }
}

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Protocol,
    NetworkProtocol,
    EtherType,
    InterfaceName,
    InterfaceIndex,
    Port,
    TcpFlags,
    State,
    /// Source address, so many bytes from its start; IPv4 or not.
    Source(bool, u32),
    Destination(bool, u32),
    Unknown,
}

#[derive(Clone, Debug)]
struct Register {
    field: Field,
    mask: Option<Vec<u8>>,
}

/// How a value is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Test {
    Equal,
    Not,
    AtMost,
    AtLeast,
}

/// An element of a set or map.
#[derive(Clone, Debug)]
struct Element {
    key: Vec<u8>,
    ends: bool,
    verdict: Option<Outcome>,
}

impl Element {
    fn decode(nested: &[u8]) -> Self {
        let element = Attributes(nested);
        let key = element.nest(NFTA_SET_ELEM_KEY).and_then(|key| key.value(NFTA_DATA_VALUE));
        let flags = element.number(NFTA_SET_ELEM_FLAGS).unwrap_or(0);
        let verdict = element
            .nest(NFTA_SET_ELEM_DATA)
            .and_then(|data| data.nest(NFTA_DATA_VERDICT))
            .and_then(verdict);
        Self {
            key: key.unwrap_or_default().to_vec(),
            ends: flags & NFT_SET_ELEM_INTERVAL_END != 0,
            verdict,
        }
    }
}

/// The expressions of one rule; a verdict map makes several rules of it.
fn rules<T: Transport>(
    family: Family,
    list: Attributes<'_>,
    sets: &mut Sets<'_, T>,
) -> Result<Vec<Rule>> {
    let mut machine = Machine::new(family, sets);
    for (kind, expression) in list.iter() {
        if kind == NFTA_LIST_ELEM {
            machine.step(Attributes(expression))?;
        }
    }
    let mut rules = machine.mapped;
    // A map that had no key for the packet lets it go on.
    if rules.is_empty() || machine.rule.outcome != Outcome::Continue || machine.rule.limit.is_some()
    {
        rules.push(machine.rule);
    }
    Ok(rules)
}

struct Machine<'s, 'c, T> {
    registers: HashMap<u32, Register>,
    rule: Rule,
    mapped: Vec<Rule>,
    sets: &'s mut Sets<'c, T>,
}

impl<'s, 'c, T: Transport> Machine<'s, 'c, T> {
    fn new(family: Family, sets: &'s mut Sets<'c, T>) -> Self {
        let mut rule = Rule::default();
        rule.matches.ipv4 = match family {
            Family::Ip => Some(true),
            Family::Ip6 => Some(false),
            _ => None,
        };
        Self { registers: HashMap::new(), rule, mapped: Vec::new(), sets }
    }

    fn step(&mut self, expression: Attributes<'_>) -> Result<()> {
        let name = expression.text(NFTA_EXPR_NAME).unwrap_or_default();
        let data = expression.nest(NFTA_EXPR_DATA).unwrap_or(Attributes(&[]));
        match name.as_str() {
            "payload" => self.load(data, NFTA_PAYLOAD_DREG, payload(data)),
            "meta" => self.load(data, NFTA_META_DREG, meta(data)),
            "ct" => self.load(data, NFTA_CT_DREG, ct(data)),
            "bitwise" => self.bitwise(data),
            "cmp" => self.cmp(data),
            "range" => self.range(data),
            "lookup" => return self.lookup(data),
            "immediate" => self.immediate(data),
            "connlimit" => self.rule.limit = Some(connlimit(data, Key::All, false)),
            "dynset" => self.dynset(data),
            "match" => self.xt_match(data),
            "target" => self.xt_target(data),
            "reject" => self.rule.outcome = Outcome::Reject,
            "notrack" => self.rule.outcome = Outcome::Notrack,
            "synproxy" => self.rule.outcome = Outcome::Synproxy,
            "nat" | "masq" | "redir" | "tproxy" | "queue" => self.rule.outcome = Outcome::Accept,
            "counter" | "log" | "dup" | "fwd" | "objref" | "last" | "quota" => {}
            // A rate, a socket look-up, a route: true for some packets.
            _ => {
                self.load(data, NFTA_META_DREG, Field::Unknown);
                self.rule.matches.narrowed |= matches!(name.as_str(), "limit" | "inner" | "exthdr");
            }
        }
        Ok(())
    }

    /// `destination` is the attribute number of the register; without one something is *set*.
    fn load(&mut self, data: Attributes<'_>, destination: u16, field: Field) {
        if let Some(register) = data.number(destination) {
            self.registers.insert(slot(register), Register { field, mask: None });
        }
    }

    fn register(&self, data: Attributes<'_>, source: u16) -> Register {
        let number = data.number(source).map(slot).unwrap_or_default();
        let unknown = Register { field: Field::Unknown, mask: None };
        self.registers.get(&number).cloned().unwrap_or(unknown)
    }

    fn bitwise(&mut self, data: Attributes<'_>) {
        let mut register = self.register(data, NFTA_BITWISE_SREG);
        let mask = data.nest(NFTA_BITWISE_MASK).and_then(|mask| mask.value(NFTA_DATA_VALUE));
        match (mask, data.number(NFTA_BITWISE_OP).unwrap_or(NFT_BITWISE_BOOL)) {
            (Some(mask), NFT_BITWISE_BOOL) if register.mask.is_none() => {
                register.mask = Some(mask.to_vec());
            }
            _ => register.field = Field::Unknown,
        }
        if let Some(destination) = data.number(NFTA_BITWISE_DREG) {
            self.registers.insert(slot(destination), register);
        }
    }

    fn cmp(&mut self, data: Attributes<'_>) {
        let register = self.register(data, NFTA_CMP_SREG);
        let value = data.nest(NFTA_CMP_DATA).and_then(|value| value.value(NFTA_DATA_VALUE));
        let test = match data.number(NFTA_CMP_OP) {
            Some(NFT_CMP_EQ) => Test::Equal,
            Some(NFT_CMP_NEQ) => Test::Not,
            Some(NFT_CMP_LTE) => Test::AtMost,
            Some(NFT_CMP_GTE) => Test::AtLeast,
            _ => return self.rule.matches.narrowed = true,
        };
        let found = condition(&register, test, value.unwrap_or_default());
        self.rule.matches = self.rule.matches.and(&found);
    }

    fn range(&mut self, data: Attributes<'_>) {
        let end = |kind| data.nest(kind).and_then(|v| v.value(NFTA_DATA_VALUE)).and_then(port);
        let (Field::Port, Some(from), Some(to)) = (
            self.register(data, NFTA_RANGE_SREG).field,
            end(NFTA_RANGE_FROM_DATA),
            end(NFTA_RANGE_TO_DATA),
        ) else {
            self.rule.matches.narrowed = true;
            return;
        };
        let ports = Ports::of([(from, to)]);
        let ports =
            if data.number(NFTA_RANGE_OP) == Some(NFT_RANGE_NEQ) { ports.not() } else { ports };
        self.rule.matches.ports = self.rule.matches.ports.and(&ports);
    }

    fn lookup(&mut self, data: Attributes<'_>) -> Result<()> {
        let register = self.register(data, NFTA_LOOKUP_SREG);
        let to_verdict = data.number(NFTA_LOOKUP_DREG) == Some(NFT_REG_VERDICT);
        let known = matches!(
            register.field,
            Field::Port
                | Field::State
                | Field::InterfaceName
                | Field::InterfaceIndex
                | Field::Protocol
        ) && register.mask.is_none();
        if let Some(destination) =
            data.number(NFTA_LOOKUP_DREG).filter(|number| *number != NFT_REG_VERDICT)
        {
            let unknown = Register { field: Field::Unknown, mask: None };
            self.registers.insert(slot(destination), unknown);
        }
        if !known && !to_verdict {
            self.rule.matches.narrowed = true;
            return Ok(());
        }
        let elements = match data.text(NFTA_LOOKUP_SET) {
            Some(set) => self.sets.elements(&set)?,
            None => Vec::new(),
        };
        if to_verdict {
            self.map(&register, &elements);
            return Ok(());
        }
        let inverse = data.number(NFTA_LOOKUP_FLAGS).unwrap_or(0) & NFT_LOOKUP_F_INV != 0;
        let found = members(&register, &elements, inverse);
        self.rule.matches = self.rule.matches.and(&found);
        Ok(())
    }

    fn map(&mut self, register: &Register, elements: &[Element]) {
        let mut keyed = elements.to_vec();
        keyed.sort_by(|a, b| a.key.cmp(&b.key));
        for (index, element) in keyed.iter().enumerate() {
            let Some(outcome) = element.verdict.clone().filter(|_| !element.ends) else { continue };
            let end = keyed.get(index + 1).filter(|next| next.ends).cloned();
            let pair: Vec<Element> = std::iter::once(element.clone()).chain(end).collect();
            let matches = self.rule.matches.and(&members(register, &pair, false));
            let rule = Rule { position: 0, matches, outcome, limit: self.rule.limit };
            if self.mapped.len() < VERDICTS && !self.mapped.contains(&rule) {
                self.mapped.push(rule);
            }
        }
    }

    fn immediate(&mut self, data: Attributes<'_>) {
        if data.number(NFTA_IMMEDIATE_DREG) == Some(NFT_REG_VERDICT) {
            let verdict = data
                .nest(NFTA_IMMEDIATE_DATA)
                .and_then(|value| value.nest(NFTA_DATA_VERDICT))
                .and_then(verdict);
            self.rule.outcome = verdict.unwrap_or_default();
        } else {
            self.load(data, NFTA_IMMEDIATE_DREG, Field::Unknown);
        }
    }

    fn dynset(&mut self, data: Attributes<'_>) {
        let set = data.text(NFTA_DYNSET_SET_NAME).unwrap_or_default();
        let declared = self.sets.declared(&set);
        let several = data.value(NFTA_DYNSET_EXPRESSIONS).map(<[u8]>::to_vec);
        let list = several
            .or_else(|| data.value(NFTA_DYNSET_EXPR).map(listed))
            .or_else(|| declared.map(|set| set.expressions.clone()))
            .unwrap_or_default();
        let length = declared.map_or(0, |set| set.key_length);
        let counting = Attributes(&list)
            .iter()
            .map(|(_, value)| Attributes(value))
            .find(|expression| expression.text(NFTA_EXPR_NAME).as_deref() == Some("connlimit"));
        if let Some(data_of) = counting.and_then(|expression| expression.nest(NFTA_EXPR_DATA)) {
            let key =
                self.key(data.number(NFTA_DYNSET_SREG_KEY).map(slot).unwrap_or_default(), length);
            self.rule.limit = Some(connlimit(data_of, key, true));
        }
    }

    /// What a set key of `length` bytes from register slot `first` on says.
    fn key(&self, first: u32, length: u32) -> Key {
        let Some(Register { field: Field::Source(_, bytes), mask }) = self.registers.get(&first)
        else {
            return match self.registers.get(&first) {
                Some(Register { field: Field::Destination(_, bytes), mask }) => {
                    Key::Destination(prefix(mask.as_deref(), *bytes))
                }
                _ => Key::Other,
            };
        };
        let source = prefix(mask.as_deref(), *bytes);
        let next = self.registers.get(&(first + bytes.div_ceil(4))).map(|register| register.field);
        match length {
            length if length <= bytes.next_multiple_of(4) => Key::Source(source),
            _ if next == Some(Field::Port) => Key::SourceAndPort(source),
            _ => Key::Other,
        }
    }

    fn xt_match(&mut self, data: Attributes<'_>) {
        let name = data.text(NFTA_MATCH_NAME).unwrap_or_default();
        let ipv4 = self.rule.matches.ipv4 != Some(false);
        match xt::matches(&name, data.value(NFTA_MATCH_INFO).unwrap_or_default(), ipv4) {
            xt::Found::Match(found) => self.rule.matches = self.rule.matches.and(&found),
            xt::Found::Limit(limit) => self.rule.limit = Some(limit),
        }
    }

    fn xt_target(&mut self, data: Attributes<'_>) {
        let name = data.text(NFTA_TARGET_NAME).unwrap_or_default();
        self.rule.outcome = xt::target(&name, data.value(NFTA_TARGET_INFO).unwrap_or_default());
    }
}

fn connlimit(data: Attributes<'_>, key: Key, dynamic: bool) -> Limit {
    let over = data.number(NFTA_CONNLIMIT_FLAGS).unwrap_or(0) & NFT_CONNLIMIT_F_INV != 0;
    Limit { count: data.number(NFTA_CONNLIMIT_COUNT).unwrap_or(0), over, key, dynamic }
}

fn payload(data: Attributes<'_>) -> Field {
    let (Some(base), Some(offset), Some(length)) = (
        data.number(NFTA_PAYLOAD_BASE),
        data.number(NFTA_PAYLOAD_OFFSET),
        data.number(NFTA_PAYLOAD_LEN),
    ) else {
        return Field::Unknown;
    };
    match (base, offset, length) {
        (NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2) => Field::Port,
        (NFT_PAYLOAD_TRANSPORT_HEADER, 13, 1) => Field::TcpFlags,
        (NFT_PAYLOAD_NETWORK_HEADER, 9, 1) | (NFT_PAYLOAD_NETWORK_HEADER, 6, 1) => Field::Protocol,
        (NFT_PAYLOAD_NETWORK_HEADER, 12, 1..=4) => Field::Source(true, length),
        (NFT_PAYLOAD_NETWORK_HEADER, 16, 1..=4) => Field::Destination(true, length),
        (NFT_PAYLOAD_NETWORK_HEADER, 8, 1..=16) => Field::Source(false, length),
        (NFT_PAYLOAD_NETWORK_HEADER, 24, 1..=16) => Field::Destination(false, length),
        _ => Field::Unknown,
    }
}

fn meta(data: Attributes<'_>) -> Field {
    match data.number(NFTA_META_KEY) {
        Some(NFT_META_PROTOCOL) => Field::EtherType,
        Some(NFT_META_IIF) => Field::InterfaceIndex,
        Some(NFT_META_IIFNAME) => Field::InterfaceName,
        Some(NFT_META_NFPROTO) => Field::NetworkProtocol,
        Some(NFT_META_L4PROTO) => Field::Protocol,
        _ => Field::Unknown,
    }
}

fn ct(data: Attributes<'_>) -> Field {
    if data.number(NFTA_CT_KEY) == Some(NFT_CT_STATE) { Field::State } else { Field::Unknown }
}

/// What a test of a register asks of a packet.
fn condition(register: &Register, test: Test, value: &[u8]) -> Match {
    let narrowed = Match { narrowed: true, ..Match::default() };
    let masked = register.mask.as_deref();
    match (register.field, masked, test) {
        (Field::Protocol, None, Test::Equal) => {
            Match { protocol: value.first().copied(), ..Match::default() }
        }
        (Field::NetworkProtocol, None, Test::Equal) => {
            Match { ipv4: value.first().map(|number| *number == 2), ..Match::default() }
        }
        (Field::EtherType, None, Test::Equal) => {
            Match { ipv4: Some(value == [0x08, 0x00]), ..Match::default() }
        }
        (Field::Port, None, _) => {
            let Some(port) = port(value) else { return narrowed };
            let ports = match test {
                Test::Equal => Ports::of([(port, port)]),
                Test::Not => Ports::of([(port, port)]).not(),
                Test::AtMost => Ports::of([(0, port)]),
                Test::AtLeast => Ports::of([(port, u16::MAX)]),
            };
            Match { ports, ..Match::default() }
        }
        (Field::State, None, Test::Equal) => states(number(value)),
        (Field::State, None, Test::Not) => states(!number(value)),
        (Field::State, Some(mask), Test::Not) if number(value) == 0 => states(number(mask)),
        (Field::State, Some(mask), Test::Equal) if number(value) == 0 => states(!number(mask)),
        (Field::TcpFlags, mask, _) => {
            const SYN: u8 = 2;
            let bits = value.first().copied().unwrap_or(0);
            let mask = mask.and_then(|mask| mask.first()).copied().unwrap_or(0xff);
            let opens = match test {
                Test::Equal => bits & mask & SYN != 0,
                Test::Not => bits == 0 && mask & SYN != 0,
                _ => false,
            };
            Match { syn: opens, narrowed: !opens, ..Match::default() }
        }
        (Field::InterfaceName, None, Test::Equal) => interface(&name(value)),
        (Field::InterfaceIndex, None, Test::Equal) => interface(&indexed(value)),
        (Field::Source(ipv4, length), _, Test::Equal | Test::Not) => {
            let bits = prefix(masked, length);
            match network(ipv4, value, bits) {
                Some(net) => {
                    Match { sources: vec![(net, test == Test::Equal)], ..Match::default() }
                }
                None => narrowed,
            }
        }
        _ => narrowed,
    }
}

/// What being in a set asks of a packet.
fn members(register: &Register, elements: &[Element], inverse: bool) -> Match {
    let turned = |all: Match| match (register.field, inverse) {
        (_, false) => all,
        (Field::Port, true) => Match { ports: all.ports.not(), ..all },
        (Field::State, true) => Match { states: all.states.map(|bits| !bits), ..all },
        _ => Match { narrowed: true, ..Match::default() },
    };
    turned(match register.field {
        Field::Port => Match { ports: ranges(elements), ..Match::default() },
        Field::State => {
            states(elements.iter().map(|element| number(&element.key)).fold(0, |a, b| a | b))
        }
        Field::InterfaceName => Match {
            interfaces: elements.iter().map(|element| name(&element.key)).collect(),
            ..Match::default()
        },
        Field::InterfaceIndex => Match {
            interfaces: elements.iter().map(|element| indexed(&element.key)).collect(),
            ..Match::default()
        },
        Field::Protocol => {
            const TCP: u8 = 6;
            let has_tcp = elements.iter().any(|element| element.key.first() == Some(&TCP));
            let protocol = elements.first().and_then(|element| element.key.first()).copied();
            Match { protocol: if has_tcp { Some(TCP) } else { protocol }, ..Match::default() }
        }
        _ => Match { narrowed: true, ..Match::default() },
    })
}

/// Points, or starts and (excluded) ends in any order.
fn ranges(elements: &[Element]) -> Ports {
    let mut keys: Vec<(u16, bool)> =
        elements.iter().filter_map(|element| Some((port(&element.key)?, element.ends))).collect();
    keys.sort_unstable();
    if !keys.iter().any(|(_, ends)| *ends) {
        return Ports::of(keys.into_iter().map(|(port, _)| (port, port)));
    }
    let mut open = None;
    let mut all = Vec::new();
    for (key, ends) in keys {
        match (open, ends) {
            (Some(start), true) => {
                all.extend(key.checked_sub(1).map(|end| (start, end)));
                open = None;
            }
            (_, false) => open = Some(key),
            (None, true) => {}
        }
    }
    all.extend(open.map(|start| (start, u16::MAX)));
    Ports::of(all)
}

fn verdict(data: Attributes<'_>) -> Option<Outcome> {
    let chain = || data.text(NFTA_VERDICT_CHAIN).unwrap_or_default();
    Some(match data.number(NFTA_VERDICT_CODE)?.cast_signed() {
        code if code == NF_DROP.cast_signed() => Outcome::Drop,
        // NF_QUEUE hands over to a program; nothing is known of what follows.
        code if [NF_ACCEPT, NF_QUEUE].contains(&code.cast_unsigned()) => Outcome::Accept,
        NFT_JUMP => Outcome::Jump(chain()),
        NFT_GOTO => Outcome::Goto(chain()),
        NFT_RETURN => Outcome::Return,
        _ => Outcome::Continue,
    })
}

/// Registers 1 to 4 are 16 bytes, registers from 8 on are their 4-byte parts.
fn slot(register: u32) -> u32 {
    if register < 8 { register.saturating_sub(1) * 4 } else { register - 8 }
}

fn states(bits: u32) -> Match {
    Match { states: Some(bits), ..Match::default() }
}

fn interface(name: &str) -> Match {
    Match { interfaces: vec![name.to_owned()], ..Match::default() }
}

/// An interface name; one without its NUL is the beginning of names.
fn name(value: &[u8]) -> String {
    match value.iter().position(|byte| *byte == 0) {
        Some(end) => String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned(),
        None => format!("{}*", String::from_utf8_lossy(value)),
    }
}

fn indexed(value: &[u8]) -> String {
    match number(value) {
        LOOPBACK_IFINDEX => "lo".to_owned(),
        index => format!("interface {index}"),
    }
}

fn port(value: &[u8]) -> Option<u16> {
    value.get(..2)?.try_into().ok().map(u16::from_be_bytes)
}

/// A number in the host's byte order, as `ct state` and interface indices are.
fn number(value: &[u8]) -> u32 {
    value.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// Prefix length of a masked address of which `length` bytes are loaded.
fn prefix(mask: Option<&[u8]>, length: u32) -> u8 {
    let ones = |mask: &[u8]| mask.iter().zip(0..length).map(|(byte, _)| byte.count_ones()).sum();
    u8::try_from(mask.map_or(length * 8, ones)).unwrap_or(u8::MAX)
}

fn network(ipv4: bool, value: &[u8], prefix: u8) -> Option<IpNet> {
    let mut bytes = [0; 16];
    bytes.get_mut(..value.len())?.copy_from_slice(value);
    let addr: std::net::IpAddr =
        if ipv4 { <[u8; 4]>::try_from(bytes.get(..4)?).ok()?.into() } else { bytes.into() };
    IpNet::new(addr, prefix).ok().map(|net| net.trunc())
}
