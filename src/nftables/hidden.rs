//! FINs and RSTs that conntrack takes for ACKs, and TCP gets as they came.
//!
//! Before conntrack the packet becomes an ACK whose reserved bits (RFC 9293, 3.1) say what it was;
//! right behind conntrack it becomes what it was. So no such packet closes an entry, and yet it is
//! tracked: rules that accept what is established, and translations, apply to it as to any other of
//! its connection. `notrack` would lose both.
//!
//! Flag combinations that conntrack itself calls invalid (`tcp_valid_flags` in
//! nf_conntrack_proto_tcp.c) stay as they are: they change no entry, and rules may drop them.

use super::{Expr, Hook};

/// A hook and a priority at which packets are turned into what they were.
pub(crate) const BACK: (Hook, i32) = (Hook::Prerouting, -199);

/// Offset of the two bytes with data offset, reserved bits and flags.
const WORD: u32 = 12;

const FIN: u16 = 0x0001;
const SYN: u16 = 0x0002;
const RST: u16 = 0x0004;
const ACK: u16 = 0x0010;
const URG: u16 = 0x0020;
/// Not the fourth of them: AccECN uses it (RFC 9768).
const RESERVED: u16 = 0x0e00;

/// Who hides a packet. Each has bits of its own, so that neither turns back, or clears, what the
/// other has hidden.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The reply filter, by the packet's tuple: one bit.
    Tuple,
    /// The shield, by the packet itself: the two others.
    Shield,
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

    fn bits(self, by: By) -> u16 {
        let bit = match self {
            Self::Fin => 0x0200,
            Self::RstAck => 0x0400,
            Self::Rst => 0x0800,
        };
        if by == By::Tuple { bit } else { RESERVED ^ bit }
    }

    fn flag(self) -> u16 {
        if self == Self::Fin { FIN } else { RST }
    }

    /// The ACK that it lacks, and gets for a while.
    fn lent(self) -> u16 {
        if self == Self::Rst { ACK } else { 0 }
    }

    /// Turns it into an ACK, where `found` goes on with the packet.
    pub(crate) fn hide(self, by: By, found: &[Expr]) -> Vec<Expr> {
        let urgent = if self == Self::Fin { 0 } else { URG };
        let mask = SYN | FIN | RST | ACK | urgent;
        let value = self.flag() | ACK ^ self.lent();
        // The flag is there, and is turned over: nft 1.1 lists a rule that clears it by the mask as one that `nft -f` refuses.
        let change = change(!RESERVED, self.bits(by) | self.flag() | self.lent());
        [&is(mask, value)[..], found, &change, &[Expr::Accept]].concat()
    }

    /// Turns it into what it was.
    pub(crate) fn show(self, by: By, found: &[Expr]) -> Vec<Expr> {
        let change = change(!(RESERVED | self.lent()), self.flag());
        [&is(RESERVED, self.bits(by))[..], found, &change, &[Expr::Accept]].concat()
    }

    /// Takes the reserved bits away with which a packet came in that would be taken for this one.
    pub(crate) fn unmask(self, by: By, found: &[Expr]) -> Vec<Expr> {
        let bits = is(RESERVED, self.bits(by));
        [&bits[..], found, &change(!RESERVED, 0), &[Expr::Accept]].concat()
    }
}

/// Packets with nothing to hide, and no bits that would have them taken for hidden ones, leave.
pub(crate) fn ordinary() -> Vec<Expr> {
    [&is(FIN | RST | RESERVED, 0)[..], &[Expr::Accept]].concat()
}

/// Packets that are not hidden leave.
pub(crate) fn never_hidden() -> Vec<Expr> {
    [&is(RESERVED, 0)[..], &[Expr::Accept]].concat()
}

/// Takes the reserved bits away with which a packet came in, where `found` goes on with it: it
/// would be taken for a hidden one.
pub(crate) fn without_reserved_bits(found: &[Expr]) -> Vec<Expr> {
    let differs = [word(), Expr::Mask(bytes(RESERVED)), Expr::Differs(bytes(0))];
    [&differs[..], found, &change(!RESERVED, 0), &[Expr::Accept]].concat()
}

fn word() -> Expr {
    Expr::transport(WORD, 2)
}

fn bytes(word: u16) -> Vec<u8> {
    word.to_be_bytes().to_vec()
}

fn is(mask: u16, value: u16) -> Vec<Expr> {
    Expr::transport_bits(WORD, 2, mask, value)
}

fn change(keep: u16, flip: u16) -> [Expr; 3] {
    let changed = Expr::Change { keep: bytes(keep), flip: bytes(flip) };
    [word(), changed, Expr::StoreTcp { offset: WORD, length: 2 }]
}
