//! What single expressions say, whatever the registers have.

use crate::firewall::rule::{Counting, Threshold};
use crate::firewall::value::{Field, Operand};
use crate::firewall::{Outcome, Step, Test};
use crate::netlink::Attributes;
use crate::nftables::dump::RawObject;
use crate::nftables::uapi::*;

/// Expressions that load a value and ask nothing, each with the attribute of its register.
pub(super) const LOADS: [(&str, u16); 8] = [
    ("exthdr", NFTA_EXTHDR_DREG),
    ("hash", NFTA_HASH_DREG),
    ("numgen", NFTA_NG_DREG),
    ("osf", NFTA_OSF_DREG),
    ("rt", NFTA_RT_DREG),
    ("socket", NFTA_SOCKET_DREG),
    ("tunnel", NFTA_TUNNEL_DREG),
    ("xfrm", NFTA_XFRM_DREG),
];

/// What a rule does that uses an object: counters and helpers do nothing to the packet's way.
pub(super) fn used(object: &RawObject) -> Option<Step> {
    let data = Attributes(&object.data);
    match object.kind {
        NFT_OBJECT_LIMIT => Some(Step::Test(Test::Rate(format!("limit name {}", object.name)))),
        NFT_OBJECT_QUOTA => Some(Step::Test(Test::Rate(format!("quota name {}", object.name)))),
        NFT_OBJECT_CONNLIMIT => {
            Some(Step::Count(Counting { limit: connlimit(data), by: Vec::new() }))
        }
        NFT_OBJECT_SYNPROXY => Some(Step::Verdict(Outcome::Synproxy)),
        _ => None,
    }
}

pub(super) fn unknown(length: u32) -> Operand {
    Operand::plain(Field::Unknown, length)
}

pub(super) fn connlimit(data: Attributes<'_>) -> Threshold {
    let over = data.number(NFTA_CONNLIMIT_FLAGS).unwrap_or(0) & NFT_CONNLIMIT_F_INV != 0;
    Threshold { count: data.number(NFTA_CONNLIMIT_COUNT).unwrap_or(0), over }
}

pub(super) fn payload(data: Attributes<'_>) -> Operand {
    let length = data.number(NFTA_PAYLOAD_LEN).unwrap_or(4).min(16);
    let offset = data.number(NFTA_PAYLOAD_OFFSET).unwrap_or(u32::MAX);
    match data.number(NFTA_PAYLOAD_BASE) {
        Some(NFT_PAYLOAD_NETWORK_HEADER) => Operand::plain(Field::Ip(offset), length),
        Some(NFT_PAYLOAD_TRANSPORT_HEADER) => Operand::plain(Field::Tcp(offset), length),
        _ => unknown(length),
    }
}

pub(super) fn fib(data: Attributes<'_>) -> Operand {
    match (data.number(NFTA_FIB_RESULT), data.number(NFTA_FIB_FLAGS)) {
        (Some(NFT_FIB_RESULT_ADDRTYPE), Some(NFTA_FIB_F_DADDR)) => {
            Operand::plain(Field::DestinationType, 4)
        }
        (Some(NFT_FIB_RESULT_ADDRTYPE), Some(NFTA_FIB_F_SADDR)) => {
            Operand::plain(Field::SourceType, 4)
        }
        (Some(NFT_FIB_RESULT_OIFNAME), _) => unknown(16),
        _ => unknown(4),
    }
}

pub(super) fn verdict(data: Attributes<'_>) -> Option<Outcome> {
    let chain = || data.text(NFTA_VERDICT_CHAIN).unwrap_or_default();
    Some(match data.number(NFTA_VERDICT_CODE)?.cast_signed() {
        code if code == NF_DROP.cast_signed() => Outcome::Drop,
        code if code == NF_ACCEPT.cast_signed() => Outcome::Accept,
        // The upper half is the queue's number.
        code if code & 0xff == NF_QUEUE.cast_signed() && code > 0 => Outcome::Queue,
        NFT_JUMP => Outcome::Jump(chain()),
        NFT_GOTO => Outcome::Goto(chain()),
        NFT_RETURN => Outcome::Return,
        _ => Outcome::Continue,
    })
}

/// Registers 1 to 4 are 16 bytes, registers from 8 on are their 4-byte parts.
pub(super) fn slot(register: u32) -> u32 {
    if register < NFT_REG32_00 {
        register.saturating_sub(1).saturating_mul(4)
    } else {
        register - NFT_REG32_00
    }
}
