//! Netlink attributes: those of answers looked up by number, borrowed, never trusted; those of
//! requests built.

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLA_HEADER_SIZE, NlasIterator};

/// An attribute of these bytes.
pub fn nla(kind: u16, value: &[u8]) -> DefaultNla {
    DefaultNla::new(kind, value.to_vec())
}

/// A number in network byte order.
pub fn word(kind: u16, value: u32) -> DefaultNla {
    nla(kind, &value.to_be_bytes())
}

/// A text with its NUL.
pub fn text(kind: u16, text: &str) -> DefaultNla {
    let mut value = text.as_bytes().to_vec();
    value.push(0);
    DefaultNla::new(kind, value)
}

/// A nest of attributes.
pub fn nested(kind: u16, parts: &[DefaultNla]) -> DefaultNla {
    DefaultNla::new(kind | NLA_F_NESTED, emitted(parts))
}

/// The bytes of these attributes, one behind the other.
pub fn emitted(parts: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; parts.buffer_len()];
    parts.emit(&mut bytes);
    bytes
}

/// A nest of attributes.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(
    /// The bytes of the nest.
    pub &'a [u8],
);

impl<'a> Attributes<'a> {
    /// Number and value of each; ends at the first that is cut short.
    pub fn iter(self) -> impl Iterator<Item = (u16, &'a [u8])> {
        NlasIterator::new(self.0).map_while(Result::ok).map(|attribute| {
            let (kind, end) = (attribute.kind(), usize::from(attribute.length()));
            let bytes: &'a [u8] = attribute.into_inner();
            (kind, bytes.get(NLA_HEADER_SIZE..end).unwrap_or_default())
        })
    }

    /// The first with this number.
    pub fn value(self, kind: u16) -> Option<&'a [u8]> {
        self.iter().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The first with this number, as a nest.
    pub fn nest(self, kind: u16) -> Option<Attributes<'a>> {
        self.value(kind).map(Attributes)
    }

    /// A number in network byte order.
    pub fn number(self, kind: u16) -> Option<u32> {
        self.value(kind)?.try_into().ok().map(u32::from_be_bytes)
    }

    /// A number in this host's byte order, as rtnetlink has them.
    pub fn native(self, kind: u16) -> Option<u32> {
        self.value(kind)?.try_into().ok().map(u32::from_ne_bytes)
    }

    /// A number of 8 bytes in network byte order.
    pub fn long(self, kind: u16) -> Option<u64> {
        self.value(kind)?.try_into().ok().map(u64::from_be_bytes)
    }

    /// A text with its NUL.
    pub fn text(self, kind: u16) -> Option<String> {
        let bytes = self.value(kind)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(bytes.get(..end)?).into_owned())
    }
}
