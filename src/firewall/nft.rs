//! Reads what the expressions of nft rules mean.
//!
//! `payload`, `meta` and `ct` load a value into registers, `bitwise` and `byteorder` change it,
//! `cmp`, `range` and `lookup` test it. An expression that is not known leaves its answer open.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use netlink_sys::protocols::NETLINK_NETFILTER;

use super::rule::{Adding, Counting, Threshold};
use super::set::{Element, Set};
use super::value::{Bits, Change, Field, Operand};
use super::{Base, Chain, Family, Hook, Outcome, Rule, Step, Test, xt};
use crate::error::{Op, Result};
use crate::netlink::{Attributes, Conversation, KernelSocket, Transport};
use crate::nftables::dump::{self, RawChain, RawObject, RawSet, listed};
use crate::nftables::uapi::*;

/// Elements of a set that are kept: 1 000 000 take some 200 MB.
const ELEMENTS: usize = 262_144;

/// The chains of the network namespace that the calling thread is in.
pub(super) fn read() -> Result<Vec<Chain>> {
    let op = Op::new("open nftables netlink");
    chains(&mut Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?))
}

/// The chains that a kernel reports, with their rules.
///
/// # Errors
/// The kernel refused, or a message was lost or malformed.
pub fn chains<T: Transport>(conversation: &mut Conversation<T>) -> Result<Vec<Chain>> {
    let Some(tables) = dump::tables(conversation)? else { return Ok(Vec::new()) };
    let mut chains: Vec<Chain> = dump::chains(conversation)?.into_iter().map(chain).collect();
    for table in &tables {
        let family = Family::from_kernel(table.family);
        let of_table = |chain: &&mut Chain| chain.family == family && chain.table == table.name;
        for chain in chains.iter_mut().filter(of_table) {
            chain.is_dormant = table.flags & NFT_TABLE_F_DORMANT != 0;
            chain.is_ours = table.is_ours;
        }
    }
    let mut places = HashMap::new();
    for (at, chain) in chains.iter().enumerate() {
        places.insert((chain.family, chain.table.clone(), chain.name.clone()), at);
    }
    let declared = dump::sets(conversation)?;
    let objects = dump::objects(conversation)?;
    let rules = dump::rules(conversation)?;
    let mut read: HashMap<(u8, String, String), Arc<Set>> = HashMap::new();
    for rule in rules {
        let family = Family::from_kernel(rule.family);
        let place = places.get(&(family, rule.table.clone(), rule.chain));
        let Some(owner) = place.and_then(|at| chains.get_mut(*at)) else { continue };
        let mut machine = Machine {
            registers: BTreeMap::new(),
            steps: Vec::new(),
            known: Known {
                conversation: &mut *conversation,
                family: rule.family,
                table: &rule.table,
                declared: &declared,
                objects: &objects,
                read: &mut read,
            },
        };
        for (kind, expression) in Attributes(&rule.expressions).iter() {
            if kind == NFTA_LIST_ELEM {
                machine.step(Attributes(expression))?;
            }
        }
        let steps = machine.steps;
        owner.rules.push(Rule { position: owner.rules.len() + 1, handle: rule.handle, steps });
    }
    Ok(chains)
}

fn chain(raw: RawChain) -> Chain {
    let family = Family::from_kernel(raw.family);
    let base = raw.hook.and_then(|(hook, priority)| {
        // `enum nf_dev_hooks`: the first of them is ingress.
        let hook = match family {
            Family::Netdev if hook == 0 => Hook::Ingress,
            Family::Netdev => return None,
            _ => Hook::from_kernel(hook)?,
        };
        let (drops, is_nat) = (raw.policy == NF_DROP, raw.kind == "nat");
        Some(Base { hook, priority, drops, is_nat, devices: raw.devices })
    });
    Chain::new(family, &raw.table, &raw.name, base)
}

/// Sets and objects of a rule's table.
struct Known<'c, T> {
    conversation: &'c mut Conversation<T>,
    family: u8,
    table: &'c str,
    declared: &'c [RawSet],
    objects: &'c [RawObject],
    read: &'c mut HashMap<(u8, String, String), Arc<Set>>,
}

impl<T: Transport> Known<'_, T> {
    fn declared(&self, set: &str) -> Option<&RawSet> {
        self.declared.iter().find(|known| {
            known.family == self.family && known.table == self.table && known.name == set
        })
    }

    fn object(&self, kind: Option<u32>, name: &str) -> Option<&RawObject> {
        self.objects.iter().find(|known| {
            known.family == self.family
                && known.table == self.table
                && known.name == name
                && kind.is_none_or(|kind| kind == known.kind)
        })
    }

    fn set(&mut self, name: &str) -> Result<Arc<Set>> {
        let key = (self.family, self.table.to_owned(), name.to_owned());
        if let Some(set) = self.read.get(&key) {
            return Ok(Arc::clone(set));
        }
        let raw = dump::elements(self.conversation, self.family, self.table, name)?;
        let set = self.build(name, &raw);
        let set = Arc::new(set);
        self.read.insert(key, Arc::clone(&set));
        Ok(set)
    }

    fn build(&self, name: &str, raw: &[Vec<u8>]) -> Set {
        let declared = self.declared(name);
        // `__set0` and `__map0` are sets that rules carry themselves.
        let shown = if name.starts_with("__") { "" } else { name };
        let mut all: Vec<Piece> = raw.iter().take(ELEMENTS).map(|e| piece(e)).collect();
        let otherwise = all.iter().position(|piece| piece.is_catchall);
        let otherwise = otherwise.map(|at| all.swap_remove(at).element);
        let flags = declared.map_or(0, |set| set.flags);
        let is_interval = flags & NFT_SET_INTERVAL != 0 && flags & NFT_SET_CONCAT == 0;
        let elements =
            if is_interval { intervals(all) } else { all.into_iter().map(|p| p.element).collect() };
        let unread = (raw.len() > ELEMENTS)
            .then(|| format!("set {name} has {} elements: not read", raw.len()));
        Set::new(shown, elements, otherwise)
            .numbered(declared.map_or(0, |set| set.handle))
            .with_room(declared.and_then(|set| set.size).filter(|_| flags & NFT_SET_EVAL != 0))
            .or_unread(unread)
    }
}

/// An element as it is listed: of an interval, its start or its end.
struct Piece {
    element: Element,
    is_end: bool,
    is_catchall: bool,
}

fn piece(nested: &[u8]) -> Piece {
    let attributes = Attributes(nested);
    let value =
        |kind| attributes.nest(kind).and_then(|key: Attributes<'_>| key.value(NFTA_DATA_VALUE));
    let flags = attributes.number(NFTA_SET_ELEM_FLAGS).unwrap_or(0);
    let verdict = attributes
        .nest(NFTA_SET_ELEM_DATA)
        .and_then(|data| data.nest(NFTA_DATA_VERDICT))
        .and_then(verdict);
    let one = || attributes.value(NFTA_SET_ELEM_EXPR).map(listed);
    let several = attributes.value(NFTA_SET_ELEM_EXPRESSIONS).map(<[u8]>::to_vec);
    let expressions = Expressions::of(&several.or_else(one).unwrap_or_default());
    let element = Element {
        key: value(NFTA_SET_ELEM_KEY).unwrap_or_default().to_vec(),
        end: value(NFTA_SET_ELEM_KEY_END).map(<[u8]>::to_vec),
        verdict,
        limit: expressions.limit,
        is_sometimes: expressions.is_sometimes,
        object: attributes.text(NFTA_SET_ELEM_OBJREF),
    };
    Piece {
        element,
        is_end: flags & NFT_SET_ELEM_INTERVAL_END != 0,
        is_catchall: flags & NFT_SET_ELEM_CATCHALL != 0,
    }
}

/// Starts and (excluded) ends, in any order, as ranges.
fn intervals(mut all: Vec<Piece>) -> Vec<Element> {
    // Where one ends and the next begins the end comes first.
    all.sort_by(|a, b| (&a.element.key, !a.is_end).cmp(&(&b.element.key, !b.is_end)));
    let mut ranges: Vec<Element> = Vec::new();
    let mut open = false;
    for piece in all {
        if piece.is_end {
            if let Some(range) = ranges.last_mut().filter(|_| open) {
                range.end = before(&piece.element.key);
            }
            open = false;
        } else {
            // Without an end it goes on to the greatest value.
            let end = vec![0xff; piece.element.key.len()];
            ranges.push(Element { end: Some(end), ..piece.element });
            open = true;
        }
    }
    ranges
}

/// The number before this one.
fn before(key: &[u8]) -> Option<Vec<u8>> {
    let bits = Bits::of(key);
    Bits::number(bits.value()?.checked_sub(1)?, bits.length()).bytes()
}

/// What the expressions of an element, or of a set's declaration, do.
#[derive(Default)]
struct Expressions {
    limit: Option<Threshold>,
    is_sometimes: bool,
}

impl Expressions {
    fn of(list: &[u8]) -> Self {
        let mut all = Self::default();
        for (_, value) in Attributes(list).iter() {
            let expression = Attributes(value);
            let data = expression.nest(NFTA_EXPR_DATA).unwrap_or(Attributes(&[]));
            match expression.text(NFTA_EXPR_NAME).as_deref() {
                Some("connlimit") => all.limit = Some(connlimit(data)),
                Some("counter" | "last") | None => {}
                Some(_) => all.is_sometimes = true,
            }
        }
        all
    }
}

struct Machine<'c, T> {
    /// By their first 4-byte slot.
    registers: BTreeMap<u32, Operand>,
    steps: Vec<Step>,
    known: Known<'c, T>,
}

impl<T: Transport> Machine<'_, T> {
    fn step(&mut self, expression: Attributes<'_>) -> Result<()> {
        let name = expression.text(NFTA_EXPR_NAME).unwrap_or_default();
        let data = expression.nest(NFTA_EXPR_DATA).unwrap_or(Attributes(&[]));
        match name.as_str() {
            "payload" => self.payload(data),
            "meta" => self.meta(data),
            "ct" => self.ct(data),
            "fib" => self.load(data.number(NFTA_FIB_DREG), fib(data)),
            "bitwise" => self.bitwise(data),
            "byteorder" => self.byteorder(data),
            "cmp" => self.cmp(data),
            "range" => self.range(data),
            "lookup" => self.lookup(data)?,
            "immediate" => self.immediate(data),
            "connlimit" => {
                self.steps.push(Step::Count(Counting { limit: connlimit(data), by: Vec::new() }));
            }
            "dynset" => self.dynset(data)?,
            "objref" => self.object(data)?,
            "match" => self.steps.extend(xt::matches(
                &data.text(NFTA_MATCH_NAME).unwrap_or_default(),
                data.value(NFTA_MATCH_INFO).unwrap_or_default(),
                self.known.family == NFPROTO_IPV4,
            )),
            "target" => self.steps.extend(xt::target(
                &data.text(NFTA_TARGET_NAME).unwrap_or_default(),
                data.value(NFTA_TARGET_INFO).unwrap_or_default(),
                self.known.family == NFPROTO_IPV4,
            )),
            "reject" => {
                let kind = data.number(NFTA_REJECT_TYPE);
                let is_reset = kind == Some(NFT_REJECT_TCP_RST);
                self.ends(if is_reset { Outcome::Reset } else { Outcome::Reject });
            }
            "notrack" => self.steps.push(Step::Notrack),
            "synproxy" => self.ends(Outcome::Synproxy),
            "queue" => self.ends(Outcome::Queue),
            "nat" | "masq" | "redir" => self.ends(Outcome::Accept),
            "limit" | "quota" => self.ask(Test::Rate(name)),
            "log" => self.steps.push(Step::Log),
            "counter" | "dup" | "last" | "tproxy" | "flow_offload" => {}
            _ => match LOADS.iter().find(|(known, _)| *known == name) {
                Some((_, register)) => self.load_anything(data.number(*register)),
                None => {
                    self.registers.clear();
                    // It looks into a tunnel, and loads what it finds there.
                    if name != "inner" {
                        self.ask(Test::Unclear(name));
                    }
                }
            },
        }
        Ok(())
    }

    fn ask(&mut self, test: Test) {
        self.steps.push(Step::Test(test));
    }

    fn ends(&mut self, outcome: Outcome) {
        self.steps.push(Step::Verdict(outcome));
    }

    fn load(&mut self, destination: Option<u32>, value: Operand) {
        let Some(first) = destination.map(slot) else { return };
        let end = first.saturating_add(value.length.div_ceil(4).max(1));
        // The register is overwritten, and a value that overlaps it is lost.
        self.registers
            .retain(|at, old| *at >= end || at.saturating_add(old.length.div_ceil(4)) <= first);
        self.registers.insert(first, value);
    }

    /// A value that cannot be told, of any length.
    fn load_anything(&mut self, destination: Option<u32>) {
        let Some(first) = destination.map(slot) else { return };
        self.registers.retain(|at, old| at.saturating_add(old.length.div_ceil(4)) <= first);
    }

    fn payload(&mut self, data: Attributes<'_>) {
        match data.number(NFTA_PAYLOAD_SREG) {
            Some(_) => self.steps.push(Step::Write(payload(data))),
            None => self.load(data.number(NFTA_PAYLOAD_DREG), payload(data)),
        }
    }

    /// The value in the registers from `register` on, `length` bytes.
    fn value(&self, register: Option<u32>, length: u32) -> Operand {
        let length = length.min(REGISTERS);
        match self.values(register, length).as_slice() {
            [one] => one.clone(),
            _ => unknown(length),
        }
    }

    /// The same, field by field.
    fn values(&self, register: Option<u32>, length: u32) -> Vec<Operand> {
        let mut at = register.map(slot).unwrap_or(u32::MAX / 2);
        let end = at.saturating_add(length.min(REGISTERS).div_ceil(4));
        let mut all = Vec::new();
        while at < end {
            let value = self.registers.get(&at).cloned().unwrap_or_else(|| unknown(4));
            at = at.saturating_add(value.length.div_ceil(4).max(1));
            all.push(value);
        }
        all
    }

    fn meta(&mut self, data: Attributes<'_>) {
        let key = data.number(NFTA_META_KEY);
        if data.number(NFTA_META_SREG).is_some() {
            if key == Some(NFT_META_MARK) {
                let value = self.value(data.number(NFTA_META_SREG), 4);
                self.steps.push(Step::SetMark(Some(value)));
            }
            return;
        }
        let value = match key {
            Some(NFT_META_PROTOCOL) => Operand::plain(Field::EtherType, 2),
            Some(NFT_META_MARK) => Operand::plain(Field::Mark, 4),
            Some(NFT_META_IIF) => Operand::plain(Field::InterfaceIndex, 4),
            Some(NFT_META_IIFNAME) => Operand::plain(Field::InterfaceName, 16),
            Some(NFT_META_OIFNAME) => unknown(16),
            Some(NFT_META_NFPROTO) => Operand::plain(Field::NfProto, 1),
            Some(NFT_META_L4PROTO) => Operand::plain(Field::L4Proto, 1),
            // PACKET_HOST: what is for this host, or routed by it.
            Some(NFT_META_PKTTYPE) => Operand::plain(Field::Constant(0), 1),
            _ => return self.load_anything(data.number(NFTA_META_DREG)),
        };
        self.load(data.number(NFTA_META_DREG), value);
    }

    fn ct(&mut self, data: Attributes<'_>) {
        let key = data.number(NFTA_CT_KEY);
        if let Some(source) = data.number(NFTA_CT_SREG) {
            if key == Some(NFT_CT_MARK) {
                let value = self.value(Some(source), 4);
                self.steps.push(Step::SetCtMark(Some(value)));
            }
            // Of the answers' direction it is none of a limit's business.
            let is_of_answers = data.value(NFTA_CT_DIRECTION).and_then(|d| d.first()) == Some(&1);
            if key == Some(NFT_CT_ZONE) && !is_of_answers {
                let value = self.value(Some(source), 2);
                // In the machine's order.
                let zone = match value.field {
                    Field::Constant(number) if value.is_plain() => {
                        u16::try_from(number).ok().map(|it| u16::from_ne_bytes(it.to_be_bytes()))
                    }
                    _ => None,
                };
                self.steps.push(Step::SetZone(zone));
            }
            return;
        }
        let original = data.value(NFTA_CT_DIRECTION).and_then(|d| d.first()) == Some(&0);
        let value = match key {
            Some(NFT_CT_STATE) => Operand::plain(Field::CtState, 4),
            Some(NFT_CT_MARK) => Operand::plain(Field::CtMark, 4),
            Some(NFT_CT_DIRECTION) => Operand::plain(Field::CtDirection, 1),
            Some(NFT_CT_L3PROTOCOL) => Operand::plain(Field::NfProto, 1),
            Some(NFT_CT_PROTOCOL) => Operand::plain(Field::L4Proto, 1),
            Some(NFT_CT_PROTO_SRC) => Operand::plain(Field::CtSourcePort(original), 2),
            Some(NFT_CT_PROTO_DST) => Operand::plain(Field::CtDestinationPort(original), 2),
            Some(NFT_CT_SRC_IP) => Operand::plain(Field::CtSource(original), 4),
            Some(NFT_CT_DST_IP) => Operand::plain(Field::CtDestination(original), 4),
            Some(NFT_CT_SRC_IP6) => Operand::plain(Field::CtSource(original), 16),
            Some(NFT_CT_DST_IP6) => Operand::plain(Field::CtDestination(original), 16),
            _ => return self.load_anything(data.number(NFTA_CT_DREG)),
        };
        self.load(data.number(NFTA_CT_DREG), value);
    }

    fn bitwise(&mut self, data: Attributes<'_>) {
        let length = data.number(NFTA_BITWISE_LEN).unwrap_or(4);
        let mut value = self.value(data.number(NFTA_BITWISE_SREG), length);
        let bits = |kind| {
            let bytes =
                data.nest(kind).and_then(|nest: Attributes<'_>| nest.value(NFTA_DATA_VALUE))?;
            Bits::of(bytes).value()
        };
        let change = match data.number(NFTA_BITWISE_OP).unwrap_or(NFT_BITWISE_BOOL) {
            NFT_BITWISE_BOOL if length <= 16 => bits(NFTA_BITWISE_MASK)
                .map(|mask| Change::Mask(mask, bits(NFTA_BITWISE_XOR).unwrap_or(0))),
            _ => None,
        };
        value.changes.push(change.unwrap_or(Change::Lost));
        self.load(data.number(NFTA_BITWISE_DREG), value);
    }

    fn byteorder(&mut self, data: Attributes<'_>) {
        let length = data.number(NFTA_BYTEORDER_LEN).unwrap_or(4);
        let mut value = self.value(data.number(NFTA_BYTEORDER_SREG), length);
        let size = data.number(NFTA_BYTEORDER_SIZE);
        let is_in_place = data.number(NFTA_BYTEORDER_SREG) == data.number(NFTA_BYTEORDER_DREG);
        // nft has it for protocols of one byte in ranges: the kernel turns whole words alone.
        if length == 1 && size != Some(1) && is_in_place {
            return;
        }
        let is_whole = size == Some(length);
        let change = match cfg!(target_endian = "little") {
            true if is_whole => Change::Swap,
            true => Change::Lost,
            false => Change::Mask(u128::MAX, 0),
        };
        value.changes.push(change);
        self.load(data.number(NFTA_BYTEORDER_DREG), value);
    }

    fn cmp(&mut self, data: Attributes<'_>) {
        let bytes = data.nest(NFTA_CMP_DATA).and_then(|value| value.value(NFTA_DATA_VALUE));
        let bytes = bytes.unwrap_or_default();
        let with = Bits::of(bytes);
        let value = self.value(data.number(NFTA_CMP_SREG), with.length());
        let Some(number) = with.value().filter(|_| bytes.len() <= 16) else {
            return self.ask(Test::Unclear("cmp".to_owned()));
        };
        let to = |number| Bits::number(number, with.length());
        let most = Bits::number(u128::MAX, with.length());
        let range = match data.number(NFTA_CMP_OP) {
            Some(NFT_CMP_EQ) => Some((with, with, true)),
            Some(NFT_CMP_NEQ) => Some((with, with, false)),
            Some(NFT_CMP_LTE) => Some((to(0), with, true)),
            Some(NFT_CMP_GTE) => Some((with, most, true)),
            Some(NFT_CMP_LT) => number.checked_sub(1).map(|last| (to(0), to(last), true)),
            Some(NFT_CMP_GT) => Some((to(0), with, false)),
            _ => return self.ask(Test::Unclear("cmp".to_owned())),
        };
        self.ask(match range {
            Some((from, to, is)) => Test::Within { value, from, to, is },
            None => Test::Never,
        });
    }

    fn range(&mut self, data: Attributes<'_>) {
        let end = |kind| {
            data.nest(kind).and_then(|v: Attributes<'_>| v.value(NFTA_DATA_VALUE)).map(Bits::of)
        };
        let (Some(from), Some(to)) = (end(NFTA_RANGE_FROM_DATA), end(NFTA_RANGE_TO_DATA)) else {
            return self.ask(Test::Unclear("range".to_owned()));
        };
        let value = self.value(data.number(NFTA_RANGE_SREG), from.length());
        let is = data.number(NFTA_RANGE_OP) != Some(NFT_RANGE_NEQ);
        self.ask(Test::Within { value, from, to, is });
    }

    fn lookup(&mut self, data: Attributes<'_>) -> Result<()> {
        let name = data.text(NFTA_LOOKUP_SET).unwrap_or_default();
        let set = self.known.set(&name)?;
        let length = self.known.declared(&name).map_or(4, |set| set.key_length);
        let values = self.values(data.number(NFTA_LOOKUP_SREG), length);
        match data.number(NFTA_LOOKUP_DREG) {
            Some(NFT_REG_VERDICT) => self.steps.push(Step::Map(values, set)),
            destination => {
                let is = data.number(NFTA_LOOKUP_FLAGS).unwrap_or(0) & NFT_LOOKUP_F_INV == 0;
                self.ask(Test::In { values, set, is });
                self.load(destination, unknown(16));
            }
        }
        Ok(())
    }

    fn immediate(&mut self, data: Attributes<'_>) {
        let nest = data.nest(NFTA_IMMEDIATE_DATA).unwrap_or(Attributes(&[]));
        if data.number(NFTA_IMMEDIATE_DREG) == Some(NFT_REG_VERDICT) {
            let verdict = nest.nest(NFTA_DATA_VERDICT).and_then(verdict);
            self.ends(verdict.unwrap_or_default());
            return;
        }
        let bits = Bits::of(nest.value(NFTA_DATA_VALUE).unwrap_or_default());
        let value = match bits.value() {
            Some(number) => Operand::plain(Field::Constant(number), bits.length()),
            None => unknown(bits.length()),
        };
        self.load(data.number(NFTA_IMMEDIATE_DREG), value);
    }

    fn dynset(&mut self, data: Attributes<'_>) -> Result<()> {
        let name = data.text(NFTA_DYNSET_SET_NAME).unwrap_or_default();
        let set = self.known.set(&name)?;
        let declared = self.known.declared(&name);
        let several = data.value(NFTA_DYNSET_EXPRESSIONS).map(<[u8]>::to_vec);
        let list = several
            .or_else(|| data.value(NFTA_DYNSET_EXPR).map(listed))
            .or_else(|| declared.map(|set| set.expressions.clone()))
            .unwrap_or_default();
        let length = declared.map_or(4, |set| set.key_length);
        if data.number(NFTA_DYNSET_OP) == Some(NFT_DYNSET_OP_DELETE) {
            self.steps.push(Step::Remove(set));
            return Ok(());
        }
        let Expressions { limit, is_sometimes } = Expressions::of(&list);
        let by = self.values(data.number(NFTA_DYNSET_SREG_KEY), length);
        self.steps.push(Step::Add(Adding { by, set, limit, is_sometimes }));
        if data.number(NFTA_DYNSET_FLAGS).unwrap_or(0) & NFT_DYNSET_F_INV != 0 {
            self.ask(Test::Unclear(format!("! add @{name}")));
        }
        Ok(())
    }

    /// A named object, or the one that a map names.
    fn object(&mut self, data: Attributes<'_>) -> Result<()> {
        if let Some(name) = data.text(NFTA_OBJREF_IMM_NAME) {
            let found = self.known.object(data.number(NFTA_OBJREF_IMM_TYPE), &name).cloned();
            self.steps.extend(found.and_then(|object| used(&object)));
            return Ok(());
        }
        let name = data.text(NFTA_OBJREF_SET_NAME).unwrap_or_default();
        let set = self.known.set(&name)?;
        let length = self.known.declared(&name).map_or(4, |set| set.key_length);
        let values = self.values(data.number(NFTA_OBJREF_SET_SREG), length);
        let named = set.elements().iter().filter_map(|element| element.object.as_deref());
        let found = named.filter_map(|name| self.known.object(None, name));
        let kinds: Vec<Step> = found.filter_map(used).collect();
        if kinds.contains(&Step::Verdict(Outcome::Synproxy)) {
            // All objects of one map are of one kind.
            let verdict = Some(Outcome::Synproxy);
            let elements = set.elements().iter();
            let all = elements.map(|e| Element { verdict: verdict.clone(), ..e.clone() }).collect();
            let map = Set::new(&set.name, all, None).numbered(set.handle);
            self.steps.push(Step::Map(values, Arc::new(map)));
        } else if kinds.is_empty() {
            self.ask(Test::In { values, set, is: true });
        } else {
            let counts = set.elements().iter().cloned().map(|element| {
                let object = element.object.as_deref();
                let step = object.and_then(|name| self.known.object(None, name)).and_then(used);
                match step {
                    Some(Step::Count(counting)) => {
                        Element { limit: Some(counting.limit), ..element }
                    }
                    Some(_) => Element { is_sometimes: true, ..element },
                    None => element,
                }
            });
            let all: Vec<_> = counts.collect();
            let set = Set::new(&set.name, all, None).numbered(set.handle);
            self.ask(Test::In { values, set: Arc::new(set), is: true });
        }
        Ok(())
    }
}

/// What a rule does that uses an object: counters and helpers do nothing to the packet's way.
fn used(object: &RawObject) -> Option<Step> {
    let data = Attributes(&object.data);
    match object.kind {
        NFT_OBJECT_LIMIT => Some(Step::Test(Test::Rate(format!("limit name {}", object.name)))),
        NFT_OBJECT_QUOTA => Some(Step::Test(Test::Rate(format!("quota name {}", object.name)))),
        NFT_OBJECT_CONNLIMIT => {
            Some(Step::Count(Counting { limit: connlimit(data), by: Vec::new() }))
        }
        NFT_OBJECT_SYNPROXY => Some(Step::Verdict(Outcome::Synproxy)),
        _ => None,
    }
}

/// Expressions that load a value and ask nothing, each with the attribute of its register.
const LOADS: [(&str, u16); 8] = [
    ("exthdr", NFTA_EXTHDR_DREG),
    ("hash", NFTA_HASH_DREG),
    ("numgen", NFTA_NG_DREG),
    ("osf", NFTA_OSF_DREG),
    ("rt", NFTA_RT_DREG),
    ("socket", NFTA_SOCKET_DREG),
    ("tunnel", NFTA_TUNNEL_DREG),
    ("xfrm", NFTA_XFRM_DREG),
];

fn unknown(length: u32) -> Operand {
    Operand::plain(Field::Unknown, length)
}

fn connlimit(data: Attributes<'_>) -> Threshold {
    let over = data.number(NFTA_CONNLIMIT_FLAGS).unwrap_or(0) & NFT_CONNLIMIT_F_INV != 0;
    Threshold { count: data.number(NFTA_CONNLIMIT_COUNT).unwrap_or(0), over }
}

fn payload(data: Attributes<'_>) -> Operand {
    let length = data.number(NFTA_PAYLOAD_LEN).unwrap_or(4).min(16);
    let offset = data.number(NFTA_PAYLOAD_OFFSET).unwrap_or(u32::MAX);
    match data.number(NFTA_PAYLOAD_BASE) {
        Some(NFT_PAYLOAD_NETWORK_HEADER) => Operand::plain(Field::Ip(offset), length),
        Some(NFT_PAYLOAD_TRANSPORT_HEADER) => Operand::plain(Field::Tcp(offset), length),
        _ => unknown(length),
    }
}

fn fib(data: Attributes<'_>) -> Operand {
    match (data.number(NFTA_FIB_RESULT), data.number(NFTA_FIB_FLAGS)) {
        (Some(NFT_FIB_RESULT_ADDRTYPE), Some(NFTA_FIB_F_DADDR)) => {
            Operand::plain(Field::DestinationType, 4)
        }
        (Some(NFT_FIB_RESULT_ADDRTYPE), Some(NFTA_FIB_F_SADDR)) => {
            Operand::plain(Field::SourceType, 4)
        }
        (Some(NFT_FIB_RESULT_OIFNAME), _) => unknown(16),
        _ => unknown(4),
    }
}

fn verdict(data: Attributes<'_>) -> Option<Outcome> {
    let chain = || data.text(NFTA_VERDICT_CHAIN).unwrap_or_default();
    Some(match data.number(NFTA_VERDICT_CODE)?.cast_signed() {
        code if code == NF_DROP.cast_signed() => Outcome::Drop,
        code if code == NF_ACCEPT.cast_signed() => Outcome::Accept,
        // The upper half is the queue's number.
        code if code & 0xff == NF_QUEUE.cast_signed() && code > 0 => Outcome::Queue,
        NFT_JUMP => Outcome::Jump(chain()),
        NFT_GOTO => Outcome::Goto(chain()),
        NFT_RETURN => Outcome::Return,
        _ => Outcome::Continue,
    })
}

/// All registers of values together, in bytes (`NFT_REG32_COUNT` less those of the verdict): no value
/// is longer, whatever length a message has.
const REGISTERS: u32 = 64;

/// Registers 1 to 4 are 16 bytes, registers from 8 on are their 4-byte parts.
fn slot(register: u32) -> u32 {
    if register < NFT_REG32_00 {
        register.saturating_sub(1).saturating_mul(4)
    } else {
        register - NFT_REG32_00
    }
}
