//! What a limit counts together: by source, by destination, or all. Pure.

use std::fmt;

use crate::firewall::matches::words::words;
use crate::firewall::set::Element;
use crate::firewall::value::{Field, Operand};

/// What a limit counts together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// Connections of a source network of this prefix length (for either family its own).
    Source(u8),
    /// The same, for each destination port on its own.
    SourceAndPort(u8),
    /// Connections to a destination network.
    Destination(u8),
    /// All that reach the rule.
    All,
    /// Something else, in words.
    Other(String),
}

impl fmt::Display for Key {
    /// In words: `from each /32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(prefix) => write!(f, "from each /{prefix}"),
            Self::SourceAndPort(prefix) => write!(f, "from each /{prefix} for each port"),
            Self::Destination(prefix) => write!(f, "to each /{prefix}"),
            Self::All => f.write_str("in all"),
            Self::Other(what) => write!(f, "for each {what}"),
        }
    }
}

/// The key of what a rule counts by.
pub(super) fn key(by: &[Operand]) -> Key {
    let address = |value: &Operand| {
        let of_source = match (value.field, value.length) {
            (Field::Ip(12), 4) | (Field::Ip(8), 16) | (Field::CtSource(true), _) => true,
            (Field::Ip(16), 4) | (Field::Ip(24), 16) => false,
            _ => return None,
        };
        Some((of_source, value.prefix()?))
    };
    let is_port =
        |value: &Operand| value.field == Field::Tcp(2) && value.length == 2 && value.is_plain();
    let named = || Key::Other(by.iter().map(words).collect::<Vec<_>>().join(" and "));
    match by {
        [] => Key::All,
        [one] => match address(one) {
            Some((_, 0)) => Key::All,
            Some((true, prefix)) => Key::Source(prefix),
            Some((false, prefix)) => Key::Destination(prefix),
            None => named(),
        },
        [one, port] if is_port(port) => match address(one) {
            Some((true, prefix)) => Key::SourceAndPort(prefix),
            _ => named(),
        },
        _ => named(),
    }
}

/// The key of the limit that an element keeps by itself, looked up by these values.
pub(super) fn key_of(values: &[Operand], element: &Element) -> Key {
    if element.key.is_empty() {
        return Key::All;
    }
    match (element.of_several(), key(values), element.prefix()) {
        (None, key, _) => key,
        (_, Key::Source(_), Some(prefix)) => Key::Source(prefix),
        (_, Key::Destination(_), Some(prefix)) => Key::Destination(prefix),
        _ => Key::Other("element of a set".to_owned()),
    }
}
