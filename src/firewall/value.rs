//! Bytes of a packet of which some bits may not be known, and where rules take them from. Pure.

use serde::{Deserialize, Serialize};

use super::packet::Packet;

/// Whether a packet meets what a rule asks.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// It does not.
    #[default]
    No,
    /// Some packets of the connection's source do: a rate.
    Sometimes,
    /// It cannot be told from outside.
    Unknown,
    /// It does.
    Yes,
}

impl Answer {
    /// Both of them hold.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Unknown, _) | (_, Self::Unknown) => Self::Unknown,
            (Self::Sometimes, _) | (_, Self::Sometimes) => Self::Sometimes,
            _ => Self::Yes,
        }
    }

    /// The opposite, if `is`.
    #[must_use]
    pub fn not_if(self, is: bool) -> Self {
        match self {
            Self::Yes if is => Self::No,
            Self::No if is => Self::Yes,
            same => same,
        }
    }
}

impl From<bool> for Answer {
    fn from(is: bool) -> Self {
        if is { Self::Yes } else { Self::No }
    }
}

/// Up to 16 bytes, read as one number in network byte order; bits that are not known are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    value: u128,
    known: u128,
    /// In bytes.
    length: u32,
}

fn ones(length: u32) -> u128 {
    match length.min(16) {
        16 => u128::MAX,
        bytes => (1 << (8 * bytes)) - 1,
    }
}

impl Bits {
    /// A number of `length` bytes of which these bits are known.
    pub fn partly(value: u128, known: u128, length: u32) -> Self {
        let known = known & ones(length);
        Self { value: value & known, known, length: length.min(16) }
    }

    /// All bits are known.
    pub fn number(value: u128, length: u32) -> Self {
        Self::partly(value, u128::MAX, length)
    }

    /// None of them is.
    pub fn unknown(length: u32) -> Self {
        Self::partly(0, 0, length)
    }

    /// These bytes, at most 16 of them.
    pub fn of(bytes: &[u8]) -> Self {
        let bytes = bytes.get(..16).unwrap_or(bytes);
        let value = bytes.iter().fold(0, |all, byte| all << 8 | u128::from(*byte));
        Self::number(value, u32::try_from(bytes.len()).unwrap_or(16))
    }

    /// Whether nothing is left open.
    pub fn is_known(self) -> bool {
        self.known == ones(self.length)
    }

    /// The number, where all of it is known.
    pub fn value(self) -> Option<u128> {
        self.is_known().then_some(self.value)
    }

    /// Bytes.
    pub fn length(self) -> u32 {
        self.length
    }

    /// The first `length` bytes; what lies beyond is not known.
    #[must_use]
    pub fn first(self, length: u32) -> Self {
        let length = length.min(16);
        if length <= self.length {
            let shift = 8 * (self.length - length);
            // A shift by the whole width is no shift in Rust.
            let cut = |bits: u128| bits.checked_shr(shift).unwrap_or(0);
            return Self::partly(cut(self.value), cut(self.known), length);
        }
        let shift = 8 * (length - self.length);
        let grown = |bits: u128| bits.checked_shl(shift).unwrap_or(0);
        Self::partly(grown(self.value), grown(self.known), length)
    }

    /// `(bits & mask) ^ xor`
    #[must_use]
    pub fn masked(self, mask: u128, xor: u128) -> Self {
        let known = self.known | !mask;
        Self::partly((self.value & mask) ^ xor, known, self.length)
    }

    /// In the other byte order.
    #[must_use]
    pub fn swapped(self) -> Self {
        let turn = |bits: u128| bits.swap_bytes().checked_shr(8 * (16 - self.length)).unwrap_or(0);
        Self { value: turn(self.value), known: turn(self.known), length: self.length }
    }

    /// The bytes, where all are known.
    pub fn bytes(self) -> Option<Vec<u8>> {
        let bytes = self.value()?.to_be_bytes();
        bytes.get(16 - usize::try_from(self.length).ok()?..).map(<[u8]>::to_vec)
    }

    /// Whether it is this number of the same length.
    pub fn equals(self, other: u128) -> Answer {
        match (self.value ^ other) & self.known {
            0 if self.is_known() => Answer::Yes,
            0 => Answer::Unknown,
            _ => Answer::No,
        }
    }

    /// Whether it lies between these, both included.
    pub fn is_within(self, from: u128, to: u128) -> Answer {
        if from > to {
            return Answer::No;
        }
        let (least, most) = (self.value, self.value | !self.known & ones(self.length));
        if least > to || most < from {
            Answer::No
        } else if least >= from && most <= to {
            Answer::Yes
        } else {
            Answer::Unknown
        }
    }
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Field {
    /// The header of IPv4 or IPv6, from this offset.
    Ip(u32),
    /// The header of TCP, from this offset.
    Tcp(u32),
    /// `meta l4proto`
    L4Proto,
    /// `meta nfproto`
    NfProto,
    /// `meta protocol`
    EtherType,
    /// `iifname`
    InterfaceName,
    /// `iif`
    InterfaceIndex,
    /// `oifname`
    OutName,
    /// `oif`
    OutIndex,
    /// `meta mark`
    Mark,
    /// `ct mark`
    CtMark,
    /// `ct state`, in the machine's byte order
    CtState,
    /// The state bits of xt's conntrack match, in network byte order here.
    XtState,
    /// `ct direction`
    CtDirection,
    /// `ct original saddr` (or of the answer)
    CtSource(bool),
    /// `ct original daddr`
    CtDestination(bool),
    /// `ct original proto-src`
    CtSourcePort(bool),
    /// `ct original proto-dst`
    CtDestinationPort(bool),
    /// `fib daddr type`
    DestinationType,
    /// `fib saddr type`
    SourceType,
    /// A constant.
    Constant(u128),
    /// Nothing that can be told from outside.
    Unknown,
}

impl Field {
    /// Whether it is read from the packet's entry: without one no test of it passes.
    pub fn is_of_entry(self) -> bool {
        matches!(
            self,
            Self::CtMark
                | Self::CtDirection
                | Self::CtSource(_)
                | Self::CtDestination(_)
                | Self::CtSourcePort(_)
                | Self::CtDestinationPort(_)
        )
    }
}

/// One change to a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Change {
    /// `(bits & mask) ^ xor`
    Mask(u128, u128),
    /// The other byte order.
    Swap,
    /// Something else: nothing is known afterwards.
    Lost,
}

/// A value that a rule looks at.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Operand {
    /// Where it comes from.
    pub field: Field,
    /// Bytes.
    pub length: u32,
    /// Its changes, in order.
    pub changes: Vec<Change>,
}

impl Operand {
    /// A field as it is.
    pub fn plain(field: Field, length: u32) -> Self {
        Self { field, length, changes: Vec::new() }
    }

    /// With some bits kept.
    #[must_use]
    pub fn masked(mut self, mask: u128) -> Self {
        self.changes.push(Change::Mask(mask, 0));
        self
    }

    /// What it is for this packet.
    pub fn of(&self, packet: &Packet<'_>) -> Bits {
        let loaded = packet.field(self.field, self.length);
        self.changes.iter().fold(loaded, |bits, change| match change {
            Change::Mask(mask, xor) => bits.masked(*mask, *xor),
            Change::Swap => bits.swapped(),
            Change::Lost => Bits::unknown(bits.length),
        })
    }

    /// The mask, where it is all that is done to it.
    pub fn mask(&self) -> Option<u128> {
        match self.changes.as_slice() {
            [] => Some(ones(self.length)),
            [Change::Mask(mask, 0)] => Some(*mask & ones(self.length)),
            _ => None,
        }
    }

    /// Whether it is taken as it is.
    pub fn is_plain(&self) -> bool {
        self.changes.is_empty()
    }

    /// Prefix length of the mask, where it is one.
    pub fn prefix(&self) -> Option<u8> {
        let mask = self.mask()?;
        let bits = mask.count_ones();
        let top = ones(self.length) & !ones(self.length).checked_shr(bits).unwrap_or(0);
        (mask == top).then(|| u8::try_from(bits).ok()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_leave_open_only_what_hangs_on_them() {
        let half = Bits::partly(0x1200, 0xff00, 2);
        assert_eq!(half.equals(0x1234), Answer::Unknown);
        assert_eq!(half.equals(0x1334), Answer::No);
        assert_eq!(half.masked(0xff00, 0).equals(0x1200), Answer::Yes);
        assert_eq!(half.is_within(0x1200, 0x12ff), Answer::Yes);
        assert_eq!(half.is_within(0x1300, 0xffff), Answer::No);
        assert_eq!(half.is_within(0x1280, 0xffff), Answer::Unknown);
        assert_eq!(half.first(1).equals(0x12), Answer::Yes);
        assert_eq!(half.swapped().first(1).equals(0x12), Answer::Unknown);
        assert_eq!(Bits::of(&[1, 2]).swapped().bytes(), Some(vec![2, 1]));
        assert_eq!(Bits::of(&[7; 16]).first(0).equals(0), Answer::Yes);
    }

    #[test]
    fn a_mask_is_a_prefix_only_if_its_ones_lead() {
        let of = |mask| Operand::plain(Field::Ip(12), 4).masked(mask).prefix();
        assert_eq!((of(0xffff_ff00), of(0xff00_ff00), of(0)), (Some(24), None, Some(0)));
        assert_eq!(Operand::plain(Field::Ip(8), 16).prefix(), Some(128));
    }
}
