//! The few expressions that our rules are made of. Each works on the first register, but for
//! [`Expr::Load`], which builds keys of several fields.

use netlink_packet_core::DefaultNla;

use super::uapi::*;
use crate::netlink::attribute::{nested, nla, text, word};

/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u32 = 16;

/// One step of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// Load the address family of the packet (1 byte). `meta nfproto`
    NfProto,
    /// Load the layer 4 protocol number (1 byte). `meta l4proto`
    L4Proto,
    /// Load the packet's mark (4 bytes of the machine's order). `meta mark`
    Mark,
    /// Make what was loaded the packet's mark. `meta mark set`
    SetMark,
    /// Load the number of the device it came in by (4 bytes of the machine's order). `meta iif`
    InputDevice,
    /// Load what conntrack says of the packet (4 bytes of the machine's order): bits of
    /// `enum ip_conntrack_info`. A rule with a `ct` expression switches conntrack on. `ct state`
    CtState,
    /// Load the status bits of the packet's entry (4 bytes of the machine's order); go on only if
    /// there is an entry. `ct status`
    CtStatus,
    /// Load 0 for a packet of the direction that opened the connection, else 1 (1 byte); go on
    /// only if there is an entry. `ct direction`
    CtDirection,
    /// Load the labels of the packet's entry (16 bytes), which are 0 where it has no room for any; go on
    /// only if there is an entry. `ct label`
    CtLabels,
    /// Give the entry the labels that were loaded besides those it has. Entries that are made while no rule
    /// does so have no room for any, and stay as they are. `ct label set`
    AddCtLabels,
    /// Load these bytes.
    Constant(Vec<u8>),
    /// Load the port that answers come from: the server's own, whatever the packet's was
    /// translated from (2 bytes); go on only if there is an entry. `ct reply proto-src`
    CtReplySource,
    /// Load the number of the device that the packet came in by (4 bytes of the machine's order) if
    /// this host would send there what is for the packet's source, else 0, as for addresses of its
    /// own. `fib saddr . iif oif`
    SourceRoute,
    /// Load bytes of a header into the 4-byte register `register` (0 is the first) and on.
    /// `@nh,offset,length` or `@th,offset,length` (in bytes here)
    Load {
        /// Which header.
        header: Header,
        /// Bytes from its start.
        offset: u32,
        /// How many.
        length: u32,
        /// Where to.
        register: u32,
    },
    /// Keep only these bits of what was loaded.
    Mask(Vec<u8>),
    /// Turn these bits of what was loaded over.
    Flip(Vec<u8>),
    /// Write what was loaded into the TCP header, at an even offset, and mend the checksum.
    /// `@th,offset,length set`
    StoreTcp {
        /// Bytes from its start.
        offset: u32,
        /// How many.
        length: u32,
    },
    /// Write what was loaded into the TCP header, and leave the checksum: what else the rule writes makes
    /// up for it. `nft` has no words for that, and mends the checksum.
    StoreTcpAlone {
        /// Bytes from its start.
        offset: u32,
        /// How many.
        length: u32,
    },
    /// Go on only if what was loaded equals this.
    Equals(Vec<u8>),
    /// Go on only if what was loaded differs from this.
    Differs(Vec<u8>),
    /// Go on only if what was loaded is an element of this set.
    In(&'static str),
    /// Go on only if what was loaded is no element of this set.
    NotIn(&'static str),
    /// Add what was loaded to this set; where it is full, do not go on.
    Add(&'static str),
    /// The same, and give what is there its whole time again.
    Update(&'static str),
    /// Send the packet's first bytes to this NFLOG group.
    Log {
        /// The group.
        group: u16,
        /// How many bytes.
        snaplen: u32,
        /// A word that goes with it.
        prefix: Option<&'static str>,
        /// Sent when so many wait, or when the group's own number or time is up.
        threshold: u16,
    },
    /// Go on only so often.
    Limit {
        /// Packets in a second.
        rate: u64,
        /// At once, after a rest.
        burst: u32,
    },
    /// Count the packet's connection; go on only if there are more than this. `ct count over N`
    CountOver(u32),
    /// Have the packet's further way reported, if what was loaded is not 0. `meta nftrace set`
    Trace,
    /// This chain is done with the packet.
    Accept,
    /// Drop the packet.
    Drop,
    /// Go through a regular chain of the table, and then on with the next rule.
    Jump(&'static str),
    /// Go through a regular chain of the table, and no further.
    Goto(&'static str),
}

/// A header of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// IPv4 or IPv6.
    Network,
    /// TCP, ICMP, ...
    Transport,
}

impl Expr {
    /// Load bytes of the transport header into the first register.
    pub fn transport(offset: u32, length: u32) -> Self {
        Self::Load { header: Header::Transport, offset, length, register: 0 }
    }

    /// Go on only if these bits of a byte of the transport header have this value.
    ///
    /// nft from 1.1 on lists a test of bits as one of the field that begins with the lowest of them and has
    /// as many. The value of bits that are not neighbours does not fit into that, and `nft -f` refuses the
    /// whole file. So each group of neighbours has its test; 0 fits into any.
    pub fn transport_bits(offset: u32, mask: u8, value: u8) -> Vec<Self> {
        let groups = if value == 0 { vec![mask] } else { neighbours(mask) };
        let test = |group: u8| {
            let (mask, value) = (vec![group], vec![value & group]);
            [Self::transport(offset, 1), Self::Mask(mask), Self::Equals(value)]
        };
        groups.into_iter().flat_map(test).collect()
    }

    /// As a list element of a rule.
    pub(super) fn element(&self) -> DefaultNla {
        let (name, data) = match self {
            Self::NfProto => ("meta", meta(NFT_META_NFPROTO)),
            Self::L4Proto => ("meta", meta(NFT_META_L4PROTO)),
            Self::Mark => ("meta", meta(NFT_META_MARK)),
            Self::SetMark => ("meta", set_meta(NFT_META_MARK)),
            Self::Trace => ("meta", set_meta(NFT_META_NFTRACE)),
            Self::InputDevice => ("meta", meta(NFT_META_IIF)),
            Self::CtState => ("ct", ct(NFT_CT_STATE)),
            Self::CtStatus => ("ct", ct(NFT_CT_STATUS)),
            Self::CtDirection => ("ct", ct(NFT_CT_DIRECTION)),
            Self::CtLabels => ("ct", ct(NFT_CT_LABELS)),
            Self::AddCtLabels => {
                ("ct", vec![word(NFTA_CT_KEY, NFT_CT_LABELS), word(NFTA_CT_SREG, NFT_REG32_00)])
            }
            Self::Constant(bytes) => (
                "immediate",
                vec![word(NFTA_IMMEDIATE_DREG, NFT_REG32_00), value(NFTA_IMMEDIATE_DATA, bytes)],
            ),
            Self::CtReplySource => {
                let mut data = ct(NFT_CT_PROTO_SRC);
                data.push(nla(NFTA_CT_DIRECTION, &[IP_CT_DIR_REPLY]));
                ("ct", data)
            }
            Self::SourceRoute => (
                "fib",
                vec![
                    word(NFTA_FIB_DREG, NFT_REG32_00),
                    word(NFTA_FIB_RESULT, NFT_FIB_RESULT_OIF),
                    word(NFTA_FIB_FLAGS, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF),
                ],
            ),
            Self::Load { header, offset, length, register } => {
                let base = match header {
                    Header::Network => NFT_PAYLOAD_NETWORK_HEADER,
                    Header::Transport => NFT_PAYLOAD_TRANSPORT_HEADER,
                };
                let data = vec![
                    word(NFTA_PAYLOAD_DREG, NFT_REG32_00 + register),
                    word(NFTA_PAYLOAD_BASE, base),
                    word(NFTA_PAYLOAD_OFFSET, *offset),
                    word(NFTA_PAYLOAD_LEN, *length),
                ];
                ("payload", data)
            }
            Self::Mask(mask) => ("bitwise", bitwise(mask, &vec![0; mask.len()])),
            Self::Flip(flip) => ("bitwise", bitwise(&vec![u8::MAX; flip.len()], flip)),
            Self::StoreTcp { offset, length } => {
                let mut data = store(*offset, *length);
                data.push(word(NFTA_PAYLOAD_CSUM_TYPE, NFT_PAYLOAD_CSUM_INET));
                data.push(word(NFTA_PAYLOAD_CSUM_OFFSET, TCP_CHECKSUM));
                ("payload", data)
            }
            Self::StoreTcpAlone { offset, length } => ("payload", store(*offset, *length)),
            Self::Equals(bytes) => ("cmp", compare(NFT_CMP_EQ, bytes)),
            Self::Differs(bytes) => ("cmp", compare(NFT_CMP_NEQ, bytes)),
            Self::In(set) => ("lookup", lookup(set, 0)),
            Self::NotIn(set) => ("lookup", lookup(set, NFT_LOOKUP_F_INV)),
            Self::Add(set) => ("dynset", dynset(set, NFT_DYNSET_OP_ADD)),
            Self::Update(set) => ("dynset", dynset(set, NFT_DYNSET_OP_UPDATE)),
            Self::Log { group, snaplen, prefix, threshold } => {
                let mut data = vec![
                    nla(NFTA_LOG_GROUP, &group.to_be_bytes()),
                    word(NFTA_LOG_SNAPLEN, *snaplen),
                    nla(NFTA_LOG_QTHRESHOLD, &threshold.to_be_bytes()),
                ];
                data.extend(prefix.map(|prefix| text(NFTA_LOG_PREFIX, prefix)));
                ("log", data)
            }
            Self::Limit { rate, burst } => (
                "limit",
                vec![
                    nla(NFTA_LIMIT_RATE, &rate.to_be_bytes()),
                    nla(NFTA_LIMIT_UNIT, &1_u64.to_be_bytes()),
                    word(NFTA_LIMIT_BURST, *burst),
                ],
            ),
            Self::CountOver(count) => (
                "connlimit",
                vec![
                    word(NFTA_CONNLIMIT_COUNT, *count),
                    word(NFTA_CONNLIMIT_FLAGS, NFT_CONNLIMIT_F_INV),
                ],
            ),
            Self::Accept => ("immediate", verdict(NF_ACCEPT, None)),
            Self::Drop => ("immediate", verdict(NF_DROP, None)),
            Self::Jump(chain) => ("immediate", verdict(NFT_JUMP.cast_unsigned(), Some(chain))),
            Self::Goto(chain) => ("immediate", verdict(NFT_GOTO.cast_unsigned(), Some(chain))),
        };
        nested(NFTA_LIST_ELEM, &[text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, &data)])
    }
}

/// The groups of bits that are set side by side, the lowest first.
fn neighbours(mut bits: u8) -> Vec<u8> {
    let mut groups = Vec::new();
    while bits != 0 {
        let lowest = bits & bits.wrapping_neg();
        let group = bits & !bits.wrapping_add(lowest);
        groups.push(group);
        bits &= !group;
    }
    groups
}

fn bitwise(mask: &[u8], xor: &[u8]) -> Vec<DefaultNla> {
    vec![
        word(NFTA_BITWISE_SREG, NFT_REG32_00),
        word(NFTA_BITWISE_DREG, NFT_REG32_00),
        word(NFTA_BITWISE_LEN, u32::try_from(mask.len()).unwrap_or(0)),
        value(NFTA_BITWISE_MASK, mask),
        value(NFTA_BITWISE_XOR, xor),
    ]
}

fn meta(key: u32) -> Vec<DefaultNla> {
    vec![word(NFTA_META_KEY, key), word(NFTA_META_DREG, NFT_REG32_00)]
}

fn ct(key: u32) -> Vec<DefaultNla> {
    vec![word(NFTA_CT_KEY, key), word(NFTA_CT_DREG, NFT_REG32_00)]
}

fn set_meta(key: u32) -> Vec<DefaultNla> {
    vec![word(NFTA_META_KEY, key), word(NFTA_META_SREG, NFT_REG32_00)]
}

/// Into the transport header, without its checksum.
fn store(offset: u32, length: u32) -> Vec<DefaultNla> {
    vec![
        word(NFTA_PAYLOAD_SREG, NFT_REG32_00),
        word(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_TRANSPORT_HEADER),
        word(NFTA_PAYLOAD_OFFSET, offset),
        word(NFTA_PAYLOAD_LEN, length),
    ]
}

fn lookup(set: &str, flags: u32) -> Vec<DefaultNla> {
    vec![
        text(NFTA_LOOKUP_SET, set),
        word(NFTA_LOOKUP_SREG, NFT_REG32_00),
        word(NFTA_LOOKUP_FLAGS, flags),
    ]
}

fn dynset(set: &str, change: u32) -> Vec<DefaultNla> {
    vec![
        text(NFTA_DYNSET_SET_NAME, set),
        word(NFTA_DYNSET_OP, change),
        word(NFTA_DYNSET_SREG_KEY, NFT_REG32_00),
    ]
}

fn compare(how: u32, bytes: &[u8]) -> Vec<DefaultNla> {
    vec![word(NFTA_CMP_SREG, NFT_REG32_00), word(NFTA_CMP_OP, how), value(NFTA_CMP_DATA, bytes)]
}

fn verdict(code: u32, chain: Option<&str>) -> Vec<DefaultNla> {
    let mut parts = vec![word(NFTA_VERDICT_CODE, code)];
    parts.extend(chain.map(|chain| text(NFTA_VERDICT_CHAIN, chain)));
    let verdict = nested(NFTA_DATA_VERDICT, &parts);
    vec![word(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT), nested(NFTA_IMMEDIATE_DATA, &[verdict])]
}

fn value(kind: u16, bytes: &[u8]) -> DefaultNla {
    nested(kind, &[nla(NFTA_DATA_VALUE, bytes)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_that_are_no_neighbours_are_tested_one_group_after_the_other() {
        assert_eq!(neighbours(0x37), [0x07, 0x30]);
        assert_eq!(neighbours(0x80), [0x80]);
        assert_eq!(neighbours(u8::MAX), [u8::MAX]);
        let syn = Expr::transport_bits(13, 0x17, 0x02);
        let byte = || Expr::transport(13, 1);
        let is = |mask: u8, value: u8| [byte(), Expr::Mask(vec![mask]), Expr::Equals(vec![value])];
        assert_eq!(syn, [is(0x07, 0x02), is(0x10, 0)].concat());
        assert_eq!(Expr::transport_bits(13, 0x05, 0), is(0x05, 0));
    }
}
