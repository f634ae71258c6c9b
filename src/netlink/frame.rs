//! Cuts a datagram into netlink messages and reads their control payloads.

use netlink_packet_core::{
    DecodeError, NLM_F_ACK_TLVS, NLM_F_CAPPED, NetlinkBuffer, NlasIterator, parse_i32, parse_u32,
};
use nix::errno::Errno;

use crate::error::Cause;

/// `NLMSGERR_ATTR_MSG`: the kernel's sentence in an extended acknowledgement.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Length of `struct nlmsghdr`.
pub(super) const NLMSG_HDRLEN: usize = 16;

/// One netlink message, borrowed from the datagram that it came in.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub seq: u32,
    /// `nlmsg_pid`: whose request caused it; 0 for the kernel's own doing.
    pub port: u32,
    /// Everything after the header.
    pub payload: &'a [u8],
}

/// The messages of one datagram.
///
/// # Errors
/// An item is an error where a header is cut short or lies about its length; nothing follows it.
pub fn frames(datagram: &[u8]) -> impl Iterator<Item = Result<Frame<'_>, DecodeError>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let buffer = match NetlinkBuffer::new_checked(rest) {
            Ok(buffer) => buffer,
            Err(error) => {
                rest = &[];
                return Some(Err(error));
            }
        };
        let length = usize::try_from(buffer.length()).unwrap_or(usize::MAX);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok(Frame {
            kind: buffer.message_type(),
            flags: buffer.flags(),
            seq: buffer.sequence_number(),
            port: buffer.port_number(),
            payload: buffer.payload(),
        }))
    })
}

impl Frame<'_> {
    /// Reads `struct nlmsgerr`: `None` is a plain acknowledgement.
    ///
    /// # Errors
    /// A payload too short to hold the error number.
    pub(super) fn acknowledgement(&self) -> Result<Option<Cause>, DecodeError> {
        self.status(self.copied_request())
    }

    /// The error number that begins the payload; `copied` is how many bytes stand between it
    /// and the kernel's attributes.
    fn status(&self, copied: Option<usize>) -> Result<Option<Cause>, DecodeError> {
        let code = self.payload.get(..4).ok_or_else(|| too_short(self.payload.len()))?;
        match parse_i32(code)? {
            0 => Ok(None),
            code => Ok(Some(Cause::Kernel {
                errno: Errno::from_raw(code.saturating_neg()),
                word: copied.and_then(|copied| self.extended_word(copied)),
            })),
        }
    }

    /// Reads the status that ends a dump (`NLMSG_DONE`).
    ///
    /// # Errors
    /// A payload too short to hold it.
    pub(super) fn done_status(&self) -> Result<Option<Cause>, DecodeError> {
        match self.payload {
            [] => Ok(None),
            // No copy of the request here (`netlink_dump_done()` in `af_netlink.c`).
            _ => self.status(Some(0)),
        }
    }

    /// Length of the request that an error carries a copy of: its header, or all of it.
    fn copied_request(&self) -> Option<usize> {
        if self.flags & NLM_F_CAPPED != 0 {
            return Some(NLMSG_HDRLEN);
        }
        let length = parse_u32(self.payload.get(4..8)?).ok()?;
        usize::try_from(length).ok()?.checked_next_multiple_of(4)
    }

    /// The kernel's sentence behind the error number and `copied` bytes, if it sent one.
    fn extended_word(&self, copied: usize) -> Option<String> {
        if self.flags & NLM_F_ACK_TLVS == 0 {
            return None;
        }
        let attributes = self.payload.get(4usize.checked_add(copied)?..)?;
        NlasIterator::new(attributes).map_while(Result::ok).find_map(|attribute| {
            (attribute.kind() == NLMSGERR_ATTR_MSG).then(|| {
                String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned()
            })
        })
    }
}

fn too_short(length: usize) -> DecodeError {
    DecodeError::from(format!("{length} bytes where an error number should be"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn a_header_that_lies_about_its_length_ends_the_datagram_with_an_error() {
        for length in [0, 15, 21, u32::MAX] {
            let bytes = message(length, &[0; 4]);
            let items: Vec<_> = frames(&bytes).collect();
            assert_eq!(items.len(), 1, "length {length}");
            assert!(items[0].is_err(), "length {length}");
        }
    }

    #[test]
    fn messages_are_cut_at_aligned_ends() {
        let mut bytes = message(18, &[7, 7, 0, 0]);
        bytes.extend(message(20, &[0; 4]));
        let items: Vec<_> = frames(&bytes).map(Result::unwrap).collect();
        assert_eq!(items.len(), 2);
        assert_eq!(items[0].payload, [7, 7]);
        assert!(items[1].acknowledgement().unwrap().is_none());
    }

    #[test]
    fn an_error_number_cut_short_is_malformed() {
        let bytes = message(18, &[0xfe, 0xff, 0, 0]);
        let frame = frames(&bytes).next().unwrap().unwrap();
        assert!(frame.acknowledgement().is_err());
    }
}
