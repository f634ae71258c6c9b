//! The sets and objects that rules name, and what their elements are and do.

use std::collections::HashMap;
use std::sync::Arc;

use super::expression::{connlimit, verdict};
use crate::error::Result;
use crate::firewall::rule::Threshold;
use crate::firewall::set::{Element, Set};
use crate::firewall::value::Bits;
use crate::netlink::{Attributes, Conversation, Transport};
use crate::nftables::dump::{self, RawObject, RawSet, listed};
use crate::nftables::uapi::*;

/// Elements of a set that are kept: 1 000 000 take some 200 MB.
const ELEMENTS: usize = 262_144;

/// Sets and objects of a rule's table.
pub(super) struct Known<'c, T> {
    pub(super) conversation: &'c mut Conversation<T>,
    pub(super) family: u8,
    pub(super) table: &'c str,
    pub(super) declared: &'c [RawSet],
    pub(super) objects: &'c [RawObject],
    pub(super) read: &'c mut HashMap<(u8, String, String), Arc<Set>>,
}

impl<T: Transport> Known<'_, T> {
    pub(super) fn declared(&self, set: &str) -> Option<&RawSet> {
        self.declared.iter().find(|known| {
            known.family == self.family && known.table == self.table && known.name == set
        })
    }

    pub(super) fn object(&self, kind: Option<u32>, name: &str) -> Option<&RawObject> {
        self.objects.iter().find(|known| {
            known.family == self.family
                && known.table == self.table
                && known.name == name
                && kind.is_none_or(|kind| kind == known.kind)
        })
    }

    pub(super) fn set(&mut self, name: &str) -> Result<Arc<Set>> {
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
pub(super) struct Expressions {
    pub(super) limit: Option<Threshold>,
    pub(super) is_sometimes: bool,
}

impl Expressions {
    pub(super) fn of(list: &[u8]) -> Self {
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
