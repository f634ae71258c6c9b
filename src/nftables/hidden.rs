//! FINs and RSTs that conntrack takes for ACKs, and TCP gets as they came.
//!
//! Before conntrack the packet becomes an ACK whose urgent pointer says what it was; right behind
//! conntrack it becomes what it was. So no such packet closes an entry, and yet it is tracked: rules
//! that accept what is established, and translations, apply to it as to any other of its
//! connection. `notrack` would lose both.
//!
//! Only two fields change, the flags' byte and the urgent pointer, and the pointer by as much as the
//! flags the other way: the checksum stays right as it is. Linux 7.3 does not let nf_tables write
//! the byte before the flags, with the data offset and the reserved bits; and the kernel can mend the
//! checksum only for whole words.
//!
//! Flag combinations that conntrack itself calls invalid (`tcp_valid_flags` in
//! nf_conntrack_proto_tcp.c) stay as they are: they change no entry, and rules may drop them.

use super::{Expr, Hook};

/// A hook and a priority at which packets are turned into what they were.
pub(crate) const BACK: (Hook, i32) = (Hook::Prerouting, -199);

/// Offset of the flags in a TCP header.
const FLAGS: u32 = 13;
/// Offset of the urgent pointer.
const POINTER: u32 = 18;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;
/// What conntrack goes by, and the urgent flag.
const READ: u8 = SYN | FIN | RST | ACK | URG;

/// Urgent data further ahead than the field can say, or none.
const FAR: u16 = u16::MAX;

/// Who hides a packet. Each has flags of its own, so that neither turns back, or clears, what the
/// other has hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The reply filter, by the packet's tuple: as an ACK.
    Tuple,
    /// The shield, by the packet itself: as an ACK with urgent data.
    Shield,
}

impl By {
    /// The flags of what is hidden.
    fn flags(self) -> u8 {
        match self {
            Self::Tuple => ACK,
            Self::Shield => ACK | URG,
        }
    }
}

/// What closes a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closing {
    /// A FIN; without an ACK it is invalid.
    Fin,
    /// An RST with an ACK.
    RstAck,
    /// An RST without.
    Rst,
}

impl Closing {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Fin, Self::RstAck, Self::Rst];

    fn flags(self) -> u8 {
        match self {
            Self::Fin => FIN | ACK,
            Self::RstAck => RST | ACK,
            Self::Rst => RST,
        }
    }

    /// The urgent pointer with which the changed flags have the sum of the old ones and none.
    fn pointer(self, by: By) -> u16 {
        let (old, new) = (u16::from(self.flags()), u16::from(by.flags()));
        // A sum of ones' complements: what is less than nothing counts down from the highest.
        if old > new { old - new } else { u16::MAX - (new - old) }
    }

    /// Turns it into an ACK, where `found` goes on with the packet.
    pub(crate) fn hide(self, by: By, found: &[Expr]) -> Vec<Expr> {
        let change = self.change(by, self.pointer(by));
        [&is(self.flags())[..], found, &point(0), &change, &[Expr::Accept]].concat()
    }

    /// Turns it into what it was.
    pub(crate) fn show(self, by: By, found: &[Expr]) -> Vec<Expr> {
        [&self.hidden(by)[..], found, &self.change(by, 0), &[Expr::Accept]].concat()
    }

    /// Takes the urgent pointer away with which a packet came in that would be taken for this one.
    /// One with the flag for it stays urgent.
    pub(crate) fn unmask(self, by: By, found: &[Expr]) -> Vec<Expr> {
        [&self.hidden(by)[..], found, &point(FAR), &[Expr::Accept]].concat()
    }

    /// Goes on with what is hidden so, or looks like it.
    fn hidden(self, by: By) -> Vec<Expr> {
        let pointer = Expr::Equals(self.pointer(by).to_be_bytes().to_vec());
        [&[Expr::transport(POINTER, 2), pointer][..], &is(by.flags())].concat()
    }

    /// From what is hidden to what it was, and back.
    fn change(self, by: By, pointer: u16) -> [Expr; 5] {
        let [load, flip, store] = turn_over(self.flags() ^ by.flags());
        let [value, point] = point_alone(pointer);
        [load, flip, store, value, point]
    }
}

/// Writes what hiding writes, and goes on where this kernel has let it: a write that is refused ends the
/// rule without a word. Of a packet that goes no further.
pub(crate) fn tried() -> Vec<Expr> {
    [&turn_over(URG)[..], &point_alone(URG.into())].concat()
}

/// Takes urgent data away from a FIN that is to be hidden: the field is used for something else.
pub(crate) fn without_urgent_data(found: &[Expr]) -> Vec<Expr> {
    // The pointer makes up for the flag, and goes with the checksum.
    [&is(FIN | ACK | URG)[..], found, &point(0), &tried(), &point(0)].concat()
}

/// Packets with nothing to hide, and no pointer that would have them taken for hidden ones, leave.
pub(crate) fn ordinary() -> Vec<Expr> {
    [Expr::transport_bits(FLAGS, FIN | RST, 0), never_hidden()].concat()
}

/// Packets that are not hidden leave.
pub(crate) fn never_hidden() -> Vec<Expr> {
    vec![Expr::transport(POINTER, 2), Expr::Equals(vec![0; 2]), Expr::Accept]
}

fn is(flags: u8) -> Vec<Expr> {
    Expr::transport_bits(FLAGS, READ, flags)
}

/// Turns flags over, which are as the rule says. With the byte behind them: nft 1.1 knows the flags by
/// their one, and lists words that `nft -f` refuses.
fn turn_over(flags: u8) -> [Expr; 3] {
    [
        Expr::transport(FLAGS, 2),
        Expr::Flip(vec![flags, 0]),
        Expr::StoreTcpAlone { offset: FLAGS, length: 2 },
    ]
}

/// Sets the urgent pointer, and mends the checksum.
fn point(to: u16) -> [Expr; 2] {
    let value = Expr::Constant(to.to_be_bytes().to_vec());
    [value, Expr::StoreTcp { offset: POINTER, length: 2 }]
}

/// Sets the urgent pointer, which makes up for what the flags have become.
fn point_alone(to: u16) -> [Expr; 2] {
    let value = Expr::Constant(to.to_be_bytes().to_vec());
    [value, Expr::StoreTcpAlone { offset: POINTER, length: 2 }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_pointer_have_the_sum_that_they_had() {
        for by in [By::Tuple, By::Shield] {
            for closing in Closing::ALL {
                let pointer = closing.pointer(by);
                let sum = u32::from(by.flags()) + u32::from(pointer);
                let folded = (sum >> 16) + (sum & 0xffff);
                assert_eq!(folded, u32::from(closing.flags()), "{by:?} {closing:?}");
                assert!(pointer != 0 && pointer != FAR, "{by:?} {closing:?}");
            }
        }
    }

    #[test]
    fn no_hidden_packet_is_taken_for_another() {
        let mut all: Vec<_> = [By::Tuple, By::Shield]
            .into_iter()
            .flat_map(|by| Closing::ALL.map(|closing| (by.flags(), closing.pointer(by))))
            .collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 6);
    }
}
