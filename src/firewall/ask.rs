//! The questions that xt matches ask, whether they come from a blob or from a saved text. Pure.

use std::sync::Arc;

use super::packet::{native, padded};
use super::set::{Element, Set};
use super::value::{Bits, Field, Operand};
use super::{Step, Test};

const TCP_SOURCE_PORT: u32 = 0;
const TCP_DESTINATION_PORT: u32 = 2;
const TCP_FLAGS: u32 = 13;

/// Source or destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Side {
    /// The address in the network header.
    pub(super) fn address(self, ipv4: bool) -> Operand {
        let (offset, length) = match (self, ipv4) {
            (Self::Source, true) => (12, 4),
            (Self::Destination, true) => (16, 4),
            (Self::Source, false) => (8, 16),
            (Self::Destination, false) => (24, 16),
        };
        Operand::plain(Field::Ip(offset), length)
    }

    /// The port in the transport header.
    pub(super) fn port(self) -> Operand {
        let offset = if self == Self::Source { TCP_SOURCE_PORT } else { TCP_DESTINATION_PORT };
        Operand::plain(Field::Tcp(offset), 2)
    }
}

/// A protocol.
pub(super) fn protocol(number: u8, is: bool) -> Test {
    let number = Bits::number(number.into(), 1);
    Test::equals(Operand::plain(Field::L4Proto, 1), number).not_if(!is)
}

/// One of some ports.
pub(super) fn ports(value: Operand, ranges: &[(u16, u16)], is: bool) -> Test {
    if let [(from, to)] = ranges {
        let end = |port: &u16| Bits::number((*port).into(), 2);
        return Test::Within { value, from: end(from), to: end(to), is };
    }
    let element = |(from, to): &(u16, u16)| Element {
        key: from.to_be_bytes().to_vec(),
        end: (from != to).then(|| to.to_be_bytes().to_vec()),
        ..Element::default()
    };
    let set = Set::new("", ranges.iter().map(element).collect(), None);
    Test::In { values: vec![value], set: Arc::new(set), is }
}

/// An address between two.
pub(super) fn addresses(side: Side, from: &[u8], to: &[u8], is: bool) -> Test {
    let value = side.address(from.len() == 4);
    Test::Within { value, from: Bits::of(from), to: Bits::of(to), is }
}

/// Some TCP flags, of those in a mask.
pub(super) fn flags(mask: u8, set: u8, is: bool) -> Test {
    let value = Operand::plain(Field::Tcp(TCP_FLAGS), 1).masked(mask.into());
    Test::equals(value, Bits::number(set.into(), 1)).not_if(!is)
}

/// The device, or all whose names begin so.
pub(super) fn interface(field: Field, name: &str, is: bool) -> Test {
    let value = Operand::plain(field, 16);
    let with = match name.strip_suffix('+') {
        Some(start) => Bits::of(start.as_bytes()),
        None => padded(name),
    };
    Test::equals(value, with).not_if(!is)
}

/// One of these state bits of xt's conntrack match.
pub(super) fn states(bits: u32, is: bool) -> Test {
    Test::any_of(Operand::plain(Field::XtState, 4), bits.into()).not_if(!is)
}

/// A mark under a mask.
pub(super) fn mark(field: Field, mark: u32, mask: u32, is: bool) -> Test {
    let number = |bits: u32| native(bits).value().unwrap_or(0);
    let value = Operand::plain(field, 4);
    let value = if mask == u32::MAX { value } else { value.masked(number(mask)) };
    Test::equals(value, native(mark & mask)).not_if(!is)
}

/// One of these kinds of address (bits by `RTN_*`).
pub(super) fn address_types(side: Side, kinds: u32, is: bool) -> Test {
    let field = if side == Side::Source { Field::SourceType } else { Field::DestinationType };
    let element = |kind: u32| Element { key: kind.to_ne_bytes().to_vec(), ..Element::default() };
    let elements = (0..32).filter(|kind| kinds >> kind & 1 != 0).map(element).collect();
    let set = Arc::new(Set::new("", elements, None));
    Test::In { values: vec![Operand::plain(field, 4)], set, is }
}

/// What a limit counts together: the addresses of a side under a mask.
pub(super) fn counted_by(side: Side, prefix: u8, ipv4: bool) -> Vec<Operand> {
    let value = side.address(ipv4);
    let bits = 8 * value.length;
    match u32::from(prefix) {
        // All of them, and that is meant: a rule without a key is another thing.
        0 => vec![value.masked(0)],
        prefix if prefix >= bits => vec![value],
        prefix => {
            let ones = u128::MAX << (bits - prefix);
            let mask = if bits == 128 { ones } else { ones & ((1 << bits) - 1) };
            vec![value.masked(mask)]
        }
    }
}

/// A step that asks.
pub(super) fn asks(test: Test) -> Step {
    Step::Test(test)
}
