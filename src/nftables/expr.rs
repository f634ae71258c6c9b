//! The few expressions that our rules are made of. Each works on register 1.

use netlink_packet_core::DefaultNla;

use super::uapi::*;
use super::{nested, nla, text, word};

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// Load the layer 4 protocol number (1 byte). `meta l4proto`
    L4Proto,
    /// Load bytes of the transport header. `@th,offset,length` (in bytes here)
    Transport {
        /// Bytes from the start of the header.
        offset: u32,
        /// How many, at most 4.
        length: u32,
    },
    /// Keep only these bits of what was loaded.
    Mask(Vec<u8>),
    /// Go on only if what was loaded equals this.
    Equals(Vec<u8>),
    /// Go on only if what was loaded differs from this.
    Differs(Vec<u8>),
    /// Drop the packet.
    Drop,
}

impl Expr {
    /// As a list element of a rule.
    pub(super) fn element(&self) -> DefaultNla {
        let (name, data) = match self {
            Self::L4Proto => (
                "meta",
                vec![word(NFTA_META_KEY, NFT_META_L4PROTO), word(NFTA_META_DREG, NFT_REG_1)],
            ),
            Self::Transport { offset, length } => (
                "payload",
                vec![
                    word(NFTA_PAYLOAD_DREG, NFT_REG_1),
                    word(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_TRANSPORT_HEADER),
                    word(NFTA_PAYLOAD_OFFSET, *offset),
                    word(NFTA_PAYLOAD_LEN, *length),
                ],
            ),
            Self::Mask(mask) => (
                "bitwise",
                vec![
                    word(NFTA_BITWISE_SREG, NFT_REG_1),
                    word(NFTA_BITWISE_DREG, NFT_REG_1),
                    word(NFTA_BITWISE_LEN, u32::try_from(mask.len()).unwrap_or(0)),
                    value(NFTA_BITWISE_MASK, mask),
                    value(NFTA_BITWISE_XOR, &vec![0; mask.len()]),
                ],
            ),
            Self::Equals(bytes) => ("cmp", compare(NFT_CMP_EQ, bytes)),
            Self::Differs(bytes) => ("cmp", compare(NFT_CMP_NEQ, bytes)),
            Self::Drop => {
                let verdict = nested(NFTA_DATA_VERDICT, &[word(NFTA_VERDICT_CODE, NF_DROP)]);
                let data = vec![
                    word(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT),
                    nested(NFTA_IMMEDIATE_DATA, &[verdict]),
                ];
                ("immediate", data)
            }
        };
        nested(NFTA_LIST_ELEM, &[text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, &data)])
    }
}

fn compare(how: u32, bytes: &[u8]) -> Vec<DefaultNla> {
    vec![word(NFTA_CMP_SREG, NFT_REG_1), word(NFTA_CMP_OP, how), value(NFTA_CMP_DATA, bytes)]
}

fn value(kind: u16, bytes: &[u8]) -> DefaultNla {
    nested(kind, &[nla(NFTA_DATA_VALUE, bytes)])
}
