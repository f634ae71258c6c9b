//! Runs through the expressions of a rule and says what each is: a step, or a value in a register.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::expression::{LOADS, connlimit, fib, payload, slot, unknown, used, verdict};
use super::sets::{Expressions, Known};
use crate::error::Result;
use crate::firewall::rule::{Adding, Counting};
use crate::firewall::set::{Element, Set};
use crate::firewall::value::{Bits, Change, Field, Operand};
use crate::firewall::{Outcome, Step, Test, xt};
use crate::netlink::{Attributes, Transport};
use crate::nftables::dump::listed;
use crate::nftables::uapi::*;

/// All registers of values together, in bytes (`NFT_REG32_COUNT` less those of the verdict): no value
/// is longer, whatever length a message has.
const REGISTERS: u32 = 64;

pub(super) struct Machine<'c, T> {
    /// By their first 4-byte slot.
    pub(super) registers: BTreeMap<u32, Operand>,
    pub(super) steps: Vec<Step>,
    pub(super) known: Known<'c, T>,
}

impl<T: Transport> Machine<'_, T> {
    pub(super) fn step(&mut self, expression: Attributes<'_>) -> Result<()> {
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
            "nat" => self.nat(data),
            "masq" | "redir" => self.ends(Outcome::Accept),
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

    fn nat(&mut self, data: Attributes<'_>) {
        self.ends(Outcome::Accept);
        if data.number(NFTA_NAT_TYPE) != Some(NFT_NAT_DNAT) {
            return;
        }
        let (from, to) = (data.number(NFTA_NAT_REG_PROTO_MIN), data.number(NFTA_NAT_REG_PROTO_MAX));
        let port = match self.value(from, 2) {
            _ if from.is_none() => Some(None),
            Operand { field: Field::Constant(port), length: 2, changes }
                if changes.is_empty() && to.is_none_or(|to| Some(to) == from) =>
            {
                u16::try_from(port).ok().map(Some)
            }
            _ => None,
        };
        self.steps.extend(port.map(Step::Leads));
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
            Some(NFT_META_OIF) => Operand::plain(Field::OutIndex, 4),
            Some(NFT_META_OIFNAME) => Operand::plain(Field::OutName, 16),
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
