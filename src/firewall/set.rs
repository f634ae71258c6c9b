//! Sets and maps of rules, and what is in them. Pure.

use std::collections::HashMap;

use super::packet::{Interface, Packet};
use super::rule::{Outcome, Threshold};
use super::value::{Answer, Bits, Field, Operand};

/// So many elements are compared one by one with a value that is not known in full.
const COMPARED: usize = 4096;

/// A set or map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// Its name; empty for one that a rule carries itself.
    pub name: String,
    /// The kernel's number of it.
    pub handle: u64,
    /// Most elements, where it has a limit.
    pub size: Option<u32>,
    /// Why its elements are not known.
    pub unread: Option<String>,
    /// Its elements.
    elements: Vec<Element>,
    index: Index,
    otherwise: Option<usize>,
}

/// One element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Element {
    /// The value, or the first of some: each field padded to 4 bytes where there are several.
    pub key: Vec<u8>,
    /// The last of some.
    pub end: Option<Vec<u8>>,
    /// What a verdict map does with it.
    pub verdict: Option<Outcome>,
    /// Connections are counted for this element alone.
    pub limit: Option<Threshold>,
    /// It has a rate or a quota of its own: some packets are no match.
    pub is_sometimes: bool,
    /// The object that an object map names.
    pub object: Option<String>,
}

impl Element {
    /// What all packets that it stands for have in common, where there are several: it keeps one list for them.
    pub(super) fn of_several(&self) -> Option<Vec<u8>> {
        let is_one = !self.key.is_empty() && self.end.as_ref().is_none_or(|end| *end == self.key);
        (!is_one).then(|| [&self.key[..], self.end.as_deref().unwrap_or_default()].concat())
    }

    /// The prefix length of the network that it stands for, where it is one.
    pub(super) fn prefix(&self) -> Option<u8> {
        let (first, last) = (Bits::of(&self.key), Bits::of(self.end.as_ref()?));
        let differs = first.value()? ^ last.value()?;
        let is_network = (differs & differs.wrapping_add(1)) == 0 && first.value()? & differs == 0;
        let bits = u32::try_from(self.key.len()).ok()? * 8;
        u8::try_from(bits.checked_sub(differs.count_ones())?).ok().filter(|_| is_network)
    }
}

/// How elements are found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Index {
    /// None is there.
    #[default]
    Empty,
    /// Whole keys.
    Exact(HashMap<Vec<u8>, usize>),
    /// First and last, in order.
    Ranges(Vec<(u128, u128, usize)>),
    /// Field by field.
    Fields,
}

/// What a look-up found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'s> {
    /// Whether there is one.
    pub answer: Answer,
    /// Which, where that is known.
    pub element: Option<&'s Element>,
}

impl Set {
    /// One of these elements; `otherwise` stands for all that is not named.
    pub fn new(name: &str, elements: Vec<Element>, otherwise: Option<Element>) -> Self {
        let index = Index::of(&elements);
        let mut all = elements;
        let at = otherwise.map(|element| {
            all.push(element);
            all.len() - 1
        });
        Self { name: name.to_owned(), elements: all, index, otherwise: at, ..Self::default() }
    }

    /// With the kernel's number of it.
    #[must_use]
    pub fn numbered(self, handle: u64) -> Self {
        Self { handle, ..self }
    }

    /// With room for so many.
    #[must_use]
    pub fn with_room(self, size: Option<u32>) -> Self {
        Self { size, ..self }
    }

    /// Its elements are not known, for this reason.
    #[must_use]
    pub fn or_unread(self, why: Option<String>) -> Self {
        Self { unread: why, ..self }
    }

    /// Its elements, that for all others last.
    pub fn elements(&self) -> &[Element] {
        &self.elements
    }

    /// Whether some element has a limit of its own.
    pub(super) fn has_limits(&self) -> bool {
        self.elements.iter().any(|element| element.limit.is_some())
    }

    /// The elements that have a key.
    pub fn keyed(&self) -> &[Element] {
        let end = self.otherwise.unwrap_or(self.elements.len());
        self.elements.get(..end).unwrap_or_default()
    }

    /// What stands for all values that are not named.
    pub fn otherwise(&self) -> Option<&Element> {
        self.elements.get(self.otherwise?)
    }

    /// Whether nothing more can be added.
    pub fn is_full(&self) -> bool {
        let most = self.size.and_then(|size| usize::try_from(size).ok());
        most.is_some_and(|most| self.elements.len() >= most)
    }

    /// Looks a packet's value up.
    pub fn find(&self, pieces: &[Operand], packet: &Packet<'_>) -> Found<'_> {
        if self.unread.is_some() {
            return Found { answer: Answer::Unknown, element: None };
        }
        let values: Vec<Bits> = pieces.iter().map(|piece| piece.of(packet)).collect();
        let otherwise = || match self.otherwise() {
            Some(element) => Found { answer: sure(element), element: Some(element) },
            None => Found { answer: Answer::No, element: None },
        };
        if let Some(found) = self.exactly(&values) {
            return match found.and_then(|at| self.elements.get(at)) {
                Some(element) => Found { answer: sure(element), element: Some(element) },
                None => otherwise(),
            };
        }
        let not_loopback = pieces.len() == 1 && is_not_loopback(pieces, packet);
        let keyed = self.keyed();
        let may = keyed.len() > COMPARED
            || keyed.iter().any(|element| {
                !(not_loopback && element.end.is_none() && is_lo(pieces, &element.key))
                    && element.holds(&values) != Answer::No
            });
        // One that holds whatever the rest is.
        let holds = keyed.iter().take(COMPARED).find(|e| e.holds(&values) == Answer::Yes);
        match (holds, may) {
            (Some(element), _) => Found { answer: sure(element), element: Some(element) },
            (None, true) => Found { answer: Answer::Unknown, element: None },
            (None, false) => otherwise(),
        }
    }

    /// By the whole key; outer `None` where it is not known or the index has no such way.
    fn exactly(&self, values: &[Bits]) -> Option<Option<usize>> {
        match &self.index {
            Index::Empty => Some(None),
            Index::Exact(all) => Some(all.get(&key(values)?).copied()),
            Index::Ranges(all) => {
                let [value] = values else { return None };
                let value = value.value()?;
                let at = all.partition_point(|(from, _, _)| *from <= value).checked_sub(1);
                let range = at.and_then(|at| all.get(at));
                Some(range.filter(|(_, to, _)| value <= *to).map(|(_, _, at)| *at))
            }
            Index::Fields => None,
        }
    }
}

impl Index {
    fn of(elements: &[Element]) -> Self {
        if elements.is_empty() {
            return Self::Empty;
        }
        if elements.iter().all(|element| element.end.is_none()) {
            let keys = elements.iter().enumerate().map(|(at, e)| (e.key.clone(), at));
            return Self::Exact(keys.collect());
        }
        if elements.iter().any(|element| element.key.len() > 16) {
            return Self::Fields;
        }
        let range = |(at, element): (usize, &Element)| {
            let last = element.end.as_ref().unwrap_or(&element.key);
            Some((Bits::of(&element.key).value()?, Bits::of(last).value()?, at))
        };
        let mut ranges: Vec<_> = elements.iter().enumerate().filter_map(range).collect();
        ranges.sort_unstable();
        Self::Ranges(ranges)
    }
}

impl Element {
    /// Whether these values, field by field, lie in it.
    fn holds(&self, values: &[Bits]) -> Answer {
        let mut at = 0;
        let mut all = Answer::Yes;
        for value in values {
            let length = usize::try_from(value.length()).unwrap_or(16);
            let part = |key: &[u8]| key.get(at..at + length).map(Bits::of).and_then(Bits::value);
            let (Some(from), to) = (part(&self.key), self.end.as_deref().map(part)) else {
                return Answer::Unknown;
            };
            let to = to.flatten().unwrap_or(from);
            all = all.and(value.is_within(from, to));
            at += length.next_multiple_of(4);
        }
        all
    }
}

fn sure(element: &Element) -> Answer {
    if element.is_sometimes { Answer::Sometimes } else { Answer::Yes }
}

/// The whole key of a packet, where all of it is known: fields of several padded to 4 bytes.
pub(super) fn key(values: &[Bits]) -> Option<Vec<u8>> {
    if let [one] = values {
        return one.bytes();
    }
    let mut key = Vec::new();
    for value in values {
        key.extend(value.bytes()?);
        key.resize(key.len().next_multiple_of(4), 0);
    }
    Some(key)
}

/// Whether the one thing known of the value is that it is not the loopback device.
pub(super) fn is_not_loopback(pieces: &[Operand], packet: &Packet<'_>) -> bool {
    let of_interface = |piece: &Operand| {
        piece.is_plain() && matches!(piece.field, Field::InterfaceName | Field::InterfaceIndex)
    };
    packet.syn().interface == Interface::NotLoopback && pieces.iter().all(of_interface)
}

/// Whether a value names the loopback device.
pub(super) fn is_lo(pieces: &[Operand], key: &[u8]) -> bool {
    match pieces.first().map(|piece| piece.field) {
        Some(Field::InterfaceName) => key.starts_with(b"lo\0"),
        Some(Field::InterfaceIndex) => key == 1_u32.to_ne_bytes(),
        _ => false,
    }
}
