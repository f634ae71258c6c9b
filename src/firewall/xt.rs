//! The xt matches and targets that bear on limits, as their info blobs stand in an nft rule.
//!
//! Layouts from `include/uapi/linux/netfilter/xt_*.h`; iptables asks for the newest revision.

use super::{Key, Limit, Match, Outcome, Ports};

/// What a match asks for.
pub(super) enum Found {
    /// Certain packets.
    Match(Match),
    /// A number of connections.
    Limit(Limit),
}

/// A match by its name and info blob, in a table of IPv4 or IPv6.
pub(super) fn matches(name: &str, info: &[u8], ipv4: bool) -> Found {
    let found = match name {
        "connlimit" => return connlimit(info, ipv4).map_or_else(narrowed, Found::Limit),
        "comment" => Some(Match::default()),
        "tcp" => tcp(info),
        "multiport" => multiport(info),
        // struct xt_state_info { statemask }
        "state" => word(info, 0).map(states),
        "conntrack" => conntrack(info),
        _ => None,
    };
    found.map_or_else(narrowed, Found::Match)
}

/// A target by its name and info blob.
pub(super) fn target(name: &str, info: &[u8]) -> Outcome {
    const XT_CT_NOTRACK: u16 = 1;
    match name {
        "REJECT" => Outcome::Reject,
        "NOTRACK" => Outcome::Notrack,
        // struct xt_ct_target_info { flags, ... }
        "CT" if half(info, 0).unwrap_or(0) & XT_CT_NOTRACK != 0 => Outcome::Notrack,
        "SYNPROXY" => Outcome::Synproxy,
        "TARPIT" => Outcome::Drop,
        "DNAT" | "REDIRECT" | "MASQUERADE" | "SNAT" | "TPROXY" | "NFQUEUE" => Outcome::Accept,
        _ => Outcome::Continue,
    }
}

/// `struct xt_connlimit_info { mask[16], limit, flags }`
fn connlimit(info: &[u8], ipv4: bool) -> Option<Limit> {
    const XT_CONNLIMIT_INVERT: u32 = 1;
    const XT_CONNLIMIT_DADDR: u32 = 2;
    let mask = info.get(..if ipv4 { 4 } else { 16 })?;
    let prefix = u8::try_from(mask.iter().map(|byte| byte.count_ones()).sum::<u32>()).ok()?;
    let flags = word(info, 20)?;
    let key = if flags & XT_CONNLIMIT_DADDR == 0 { Key::Source } else { Key::Destination };
    Some(Limit {
        count: word(info, 16)?,
        over: flags & XT_CONNLIMIT_INVERT == 0,
        key: key(prefix),
        dynamic: false,
    })
}

/// `struct xt_tcp { spts[2], dpts[2], option, flg_mask, flg_cmp, invflags }`
fn tcp(info: &[u8]) -> Option<Match> {
    const XT_TCP_INV_DSTPT: u8 = 0x02;
    const XT_TCP_INV_FLAGS: u8 = 0x04;
    const SYN: u8 = 2;
    let &[option, flag_mask, flag_cmp, inverse] = info.get(8..12)? else { return None };
    let ports = Ports::of([(half(info, 4)?, half(info, 6)?)]);
    let any_source = (half(info, 0)?, half(info, 2)?) == (0, u16::MAX);
    let syn = flag_mask & flag_cmp & SYN != 0 && inverse & XT_TCP_INV_FLAGS == 0;
    Some(Match {
        protocol: Some(6),
        ports: if inverse & XT_TCP_INV_DSTPT == 0 { ports } else { ports.not() },
        syn,
        narrowed: !any_source || option != 0 || flag_mask != 0 && !syn,
        ..Match::default()
    })
}

/// `struct xt_multiport_v1 { flags, count, ports[15], pflags[15], invert }`
fn multiport(info: &[u8]) -> Option<Match> {
    const XT_MULTIPORT_DESTINATION: u8 = 1;
    let &[side, count] = info.get(..2)? else { return None };
    let invert = *info.get(47)? != 0;
    if side != XT_MULTIPORT_DESTINATION {
        return None;
    }
    let mut ranges = Vec::new();
    let mut index = 0;
    while index < usize::from(count) {
        let from = half(info, 2 + 2 * index)?;
        let is_range = *info.get(32 + index)? != 0;
        index += usize::from(is_range);
        ranges.push((from, half(info, 2 + 2 * index)?));
        index += 1;
    }
    let ports = Ports::of(ranges);
    Some(Match { ports: if invert { ports.not() } else { ports }, ..Match::default() })
}

/// `struct xt_conntrack_mtinfo3`: match_flags at 146, invert_flags at 148, state_mask at 150.
fn conntrack(info: &[u8]) -> Option<Match> {
    const XT_CONNTRACK_STATE: u16 = 1;
    // Set by `-m state`, which iptables turns into this match.
    const XT_CONNTRACK_STATE_ALIAS: u16 = 1 << 13;
    let (asked, inverse, mask) = (half(info, 146)?, half(info, 148)?, half(info, 150)?);
    if asked & XT_CONNTRACK_STATE == 0 {
        return None;
    }
    let mask = u32::from(mask);
    let mut found = states(if inverse & XT_CONNTRACK_STATE == 0 { mask } else { !mask });
    found.narrowed = asked & !XT_CONNTRACK_STATE_ALIAS != XT_CONNTRACK_STATE;
    Some(found)
}

fn states(bits: u32) -> Match {
    Match { states: Some(bits), ..Match::default() }
}

fn narrowed() -> Found {
    Found::Match(Match { narrowed: true, ..Match::default() })
}

fn half(info: &[u8], at: usize) -> Option<u16> {
    info.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn word(info: &[u8], at: usize) -> Option<u32> {
    info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}
