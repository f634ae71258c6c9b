//! Kernel names and numbers of ctnetlink, exactly as in
//! `include/uapi/linux/netfilter/nfnetlink_conntrack.h`, `nf_conntrack_tcp.h` and
//! `nf_conntrack_common.h`.
#![allow(missing_docs)]

/// `NFNL_SUBSYS_CTNETLINK << 8`.
pub const NFNL_SUBSYS_CTNETLINK: u16 = 1 << 8;

pub const IPCTNL_MSG_CT_NEW: u16 = NFNL_SUBSYS_CTNETLINK;
pub const IPCTNL_MSG_CT_GET: u16 = NFNL_SUBSYS_CTNETLINK | 1;
pub const IPCTNL_MSG_CT_DELETE: u16 = NFNL_SUBSYS_CTNETLINK | 2;
pub const IPCTNL_MSG_CT_GET_STATS_CPU: u16 = NFNL_SUBSYS_CTNETLINK | 4;
pub const IPCTNL_MSG_CT_GET_STATS: u16 = NFNL_SUBSYS_CTNETLINK | 5;

pub const NFNLGRP_CONNTRACK_UPDATE: u32 = 2;
pub const NFNLGRP_CONNTRACK_DESTROY: u32 = 3;

pub const CTA_TUPLE_ORIG: u16 = 1;
pub const CTA_TUPLE_REPLY: u16 = 2;
pub const CTA_STATUS: u16 = 3;
pub const CTA_PROTOINFO: u16 = 4;
pub const CTA_HELP: u16 = 5;
pub const CTA_NAT_SRC: u16 = 6;
pub const CTA_TIMEOUT: u16 = 7;
pub const CTA_MARK: u16 = 8;
pub const CTA_ID: u16 = 12;
pub const CTA_NAT_DST: u16 = 13;
pub const CTA_SEQ_ADJ_ORIG: u16 = 15;
pub const CTA_SEQ_ADJ_REPLY: u16 = 16;
pub const CTA_ZONE: u16 = 18;
pub const CTA_LABELS: u16 = 22;
pub const CTA_SYNPROXY: u16 = 24;
pub const CTA_FILTER: u16 = 25;

pub const CTA_TUPLE_IP: u16 = 1;
pub const CTA_TUPLE_PROTO: u16 = 2;
pub const CTA_TUPLE_ZONE: u16 = 3;

pub const CTA_IP_V4_SRC: u16 = 1;
pub const CTA_IP_V4_DST: u16 = 2;
pub const CTA_IP_V6_SRC: u16 = 3;
pub const CTA_IP_V6_DST: u16 = 4;

pub const CTA_PROTO_NUM: u16 = 1;
pub const CTA_PROTO_SRC_PORT: u16 = 2;
pub const CTA_PROTO_DST_PORT: u16 = 3;

pub const CTA_PROTOINFO_TCP: u16 = 1;
pub const CTA_PROTOINFO_TCP_STATE: u16 = 1;
pub const CTA_PROTOINFO_TCP_WSCALE_ORIGINAL: u16 = 2;
pub const CTA_PROTOINFO_TCP_WSCALE_REPLY: u16 = 3;
pub const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
pub const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;

pub const CTA_HELP_NAME: u16 = 1;

pub const CTA_NAT_V4_MINIP: u16 = 1;
pub const CTA_NAT_V4_MAXIP: u16 = 2;
pub const CTA_NAT_PROTO: u16 = 3;
pub const CTA_NAT_V6_MINIP: u16 = 4;
pub const CTA_NAT_V6_MAXIP: u16 = 5;
pub const CTA_PROTONAT_PORT_MIN: u16 = 1;
pub const CTA_PROTONAT_PORT_MAX: u16 = 2;

pub const CTA_SEQADJ_CORRECTION_POS: u16 = 1;
pub const CTA_SEQADJ_OFFSET_BEFORE: u16 = 2;
pub const CTA_SEQADJ_OFFSET_AFTER: u16 = 3;

pub const CTA_SYNPROXY_ISN: u16 = 1;
pub const CTA_SYNPROXY_ITS: u16 = 2;
pub const CTA_SYNPROXY_TSOFF: u16 = 3;

pub const CTA_FILTER_ORIG_FLAGS: u16 = 1;
pub const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Bits of the two above (`CTA_FILTER_FLAG()` in `net/netfilter/nf_internals.h`, since 5.8; an
/// older kernel ignores the filter and sends everything).
pub const CTA_FILTER_F_CTA_PROTO_NUM: u32 = 1 << 3;
pub const CTA_FILTER_F_CTA_PROTO_SRC_PORT: u32 = 1 << 4;
pub const CTA_FILTER_F_CTA_PROTO_DST_PORT: u32 = 1 << 5;

pub const CTA_STATS_INVALID: u16 = 4;
pub const CTA_STATS_INSERT_FAILED: u16 = 9;
pub const CTA_STATS_DROP: u16 = 10;
pub const CTA_STATS_EARLY_DROP: u16 = 11;
pub const CTA_STATS_CHAIN_TOOLONG: u16 = 15;

pub const CTA_STATS_GLOBAL_ENTRIES: u16 = 1;
pub const CTA_STATS_GLOBAL_MAX_ENTRIES: u16 = 2;

pub const IPPROTO_TCP: u8 = 6;

pub const IPS_EXPECTED: u32 = 1;
pub const IPS_SEEN_REPLY: u32 = 1 << 1;
pub const IPS_ASSURED: u32 = 1 << 2;
pub const IPS_CONFIRMED: u32 = 1 << 3;

pub const IP_CT_TCP_FLAG_WINDOW_SCALE: u8 = 0x01;
pub const IP_CT_TCP_FLAG_SACK_PERM: u8 = 0x02;
pub const IP_CT_TCP_FLAG_CLOSE_INIT: u8 = 0x04;
pub const IP_CT_TCP_FLAG_BE_LIBERAL: u8 = 0x08;
/// Of the last packet alone, to the kernel: among the flags of a direction only a request sets it.
pub const IP_CT_TCP_SIMULTANEOUS_OPEN: u8 = 0x80;

/// Longest helper name with its NUL (`NF_CT_HELPER_NAME_LEN`).
pub const NF_CT_HELPER_NAME_LEN: usize = 16;
/// Bytes of connlabels (`NF_CT_LABELS_MAX_SIZE`).
pub const NF_CT_LABELS_MAX_SIZE: usize = 16;
/// Ours, which the watch gives an entry at its first FIN: the last of 128 (on little-endian machines), since those who
/// name theirs (`connlabel.conf`) begin with the first. As they lie in memory.
pub const CLOSING_LABEL: [u8; NF_CT_LABELS_MAX_SIZE] =
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80];
