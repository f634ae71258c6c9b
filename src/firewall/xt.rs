//! The xt matches and targets as their info blobs stand in an nft rule. Pure.
//!
//! Layouts from `include/uapi/linux/netfilter/xt_*.h`; iptables asks for the newest revision.

use std::borrow::Cow;

use super::ask::{self, Side, asks};
use super::rule::{Counting, Threshold};
use super::value::{Field, Operand};
use super::{Outcome, Step, Test};

const UDP: u8 = 17;

/// `recent --set`, `--update`
pub(super) const RECENT: Step = Step::Note(Cow::Borrowed("recent"));

/// A match by its name and info blob, in a table of IPv4 or IPv6.
pub(super) fn matches(name: &str, info: &[u8], ipv4: bool) -> Vec<Step> {
    let found = match name {
        "comment" => Some(Vec::new()),
        "connlimit" => connlimit(info, ipv4).map(|counting| vec![Step::Count(counting)]),
        "tcp" => tcp(info),
        "udp" => Some(vec![asks(ask::protocol(UDP, true))]),
        "multiport" => multiport(info),
        // struct xt_state_info { statemask }
        "state" => word(info, 0).map(|bits| vec![asks(ask::states(bits, true))]),
        "conntrack" => conntrack(info, ipv4),
        "addrtype" => addrtype(info),
        "mark" => mark(info, Field::Mark),
        "connmark" => mark(info, Field::CtMark),
        "iprange" => iprange(info, ipv4),
        "recent" => recent(info),
        // struct xt_pkttype_info { pkttype, invert }: this host's packets are PACKET_HOST.
        "pkttype" => word(info, 0).zip(word(info, 4)).map(|(kind, invert)| {
            if (kind == 0) == (invert == 0) { Vec::new() } else { vec![asks(Test::Never)] }
        }),
        "limit" | "hashlimit" | "quota" | "statistic" => {
            Some(vec![asks(Test::Rate(name.to_owned()))])
        }
        _ => None,
    };
    found.unwrap_or_else(|| vec![asks(Test::Unclear(name.to_owned()))])
}

/// A target by its name and info blob.
pub(super) fn target(name: &str, info: &[u8], ipv4: bool) -> Vec<Step> {
    const XT_CT_NOTRACK: u16 = 1;
    const ZONE_OF_ANSWERS: u16 = 1 << 3;
    const ZONE_BY_MARK: u16 = 1 << 4;
    const IPT_TCP_RESET: u32 = 7;
    const IP6T_TCP_RESET: u32 = 6;
    // struct ipt_reject_info { with }
    let reset = if ipv4 { IPT_TCP_RESET } else { IP6T_TCP_RESET };
    if name == "REJECT" && word(info, 0) == Some(reset) {
        return vec![Step::Verdict(Outcome::Reset)];
    }
    // struct xt_ct_target_info { flags, zone, ... }
    let (flags, zone) = (half(info, 0).unwrap_or(0), half(info, 2).unwrap_or(0));
    if name == "CT" && (zone != 0 || flags & ZONE_BY_MARK != 0) && flags & ZONE_OF_ANSWERS == 0 {
        return vec![Step::SetZone(Some(zone).filter(|_| flags & ZONE_BY_MARK == 0))];
    }
    let is_notrack = name == "CT" && flags & XT_CT_NOTRACK != 0;
    let leads = (name == "DNAT").then(|| leads(info)).flatten();
    let end = named_target(if is_notrack { "NOTRACK" } else { name });
    end.into_iter().chain(leads.map(Step::Leads)).collect()
}

/// Where DNAT leads to. `struct nf_nat_ipv4_multi_range_compat { rangesize, flags, min_ip, max_ip, min, max }` of
/// revision 0, else `struct nf_nat_range2 { flags, min_addr[16], max_addr[16], min_proto, max_proto, base_proto }`.
fn leads(info: &[u8]) -> Option<Option<u16>> {
    const NF_NAT_RANGE_PROTO_SPECIFIED: u32 = 1 << 1;
    let (flags, from) = if info.len() < 40 { (word(info, 4)?, 16) } else { (word(info, 0)?, 36) };
    if flags & NF_NAT_RANGE_PROTO_SPECIFIED == 0 {
        return Some(None);
    }
    let port = |at: usize| info.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
    let (from, to) = (port(from)?, port(from + 2)?);
    (from == to).then_some(Some(from))
}

/// Whether a target gives connections a policy of timeouts by its name (`CT --timeout`).
pub(super) fn names_policy(name: &str, info: &[u8]) -> bool {
    // struct xt_ct_target_info_v1 { flags, zone, ct_events, exp_events, helper[16], timeout[32], ct };
    // without the timeout, as in revision 0, it is too short.
    name == "CT" && info.get(28..60).is_some_and(|timeout| !timeout.starts_with(&[0]))
}

/// A target by its name alone; `None` for one that lets the packet go on as it is.
pub(super) fn named_target(name: &str) -> Option<Step> {
    let outcome = match name {
        "ACCEPT" | "DNAT" | "SNAT" | "REDIRECT" | "MASQUERADE" | "NETMAP" | "TPROXY" => {
            Outcome::Accept
        }
        "DROP" | "TARPIT" | "STEAL" => Outcome::Drop,
        "REJECT" => Outcome::Reject,
        "RETURN" => Outcome::Return,
        "SYNPROXY" => Outcome::Synproxy,
        "QUEUE" | "NFQUEUE" => Outcome::Queue,
        "NOTRACK" => return Some(Step::Notrack),
        "MARK" => return Some(Step::SetMark(None)),
        "CONNMARK" => return Some(Step::SetCtMark(None)),
        // The second byte of IPv4, the first two of IPv6: a rule behind may look at it.
        "DSCP" | "TOS" => return Some(Step::Write(Operand::plain(Field::Ip(0), 2))),
        "LOG" | "NFLOG" | "ULOG" => return Some(Step::Log),
        "SET" => return Some(Step::Note("set".into())),
        _ => return None,
    };
    Some(Step::Verdict(outcome))
}

/// `struct xt_connlimit_info { mask[16], limit, flags }`
fn connlimit(info: &[u8], ipv4: bool) -> Option<Counting> {
    const XT_CONNLIMIT_INVERT: u32 = 1;
    const XT_CONNLIMIT_DADDR: u32 = 2;
    let mask = info.get(..if ipv4 { 4 } else { 16 })?;
    let prefix = u8::try_from(mask.iter().map(|byte| byte.count_ones()).sum::<u32>()).ok()?;
    let flags = word(info, 20)?;
    let side = if flags & XT_CONNLIMIT_DADDR == 0 { Side::Source } else { Side::Destination };
    let limit = Threshold { count: word(info, 16)?, over: flags & XT_CONNLIMIT_INVERT == 0 };
    Some(Counting { limit, by: ask::counted_by(side, prefix, ipv4) })
}

/// `struct xt_tcp { spts[2], dpts[2], option, flg_mask, flg_cmp, invflags }`
fn tcp(info: &[u8]) -> Option<Vec<Step>> {
    const XT_TCP_INV_SRCPT: u8 = 0x01;
    const XT_TCP_INV_DSTPT: u8 = 0x02;
    const XT_TCP_INV_FLAGS: u8 = 0x04;
    const TCP: u8 = 6;
    let &[option, mask, compared, inverse] = info.get(8..12)? else { return None };
    let (source, destination) =
        ((half(info, 0)?, half(info, 2)?), (half(info, 4)?, half(info, 6)?));
    let mut all = vec![asks(ask::protocol(TCP, true))];
    for (side, range, inverted) in [
        (Side::Source, source, XT_TCP_INV_SRCPT),
        (Side::Destination, destination, XT_TCP_INV_DSTPT),
    ] {
        if range != (0, u16::MAX) || inverse & inverted != 0 {
            all.push(asks(ask::ports(side.port(), &[range], inverse & inverted == 0)));
        }
    }
    if mask != 0 {
        all.push(asks(ask::flags(mask, compared, inverse & XT_TCP_INV_FLAGS == 0)));
    }
    if option != 0 {
        all.push(asks(Test::Unclear("tcp option".to_owned())));
    }
    Some(all)
}

/// `struct xt_multiport_v1 { flags, count, ports[15], pflags[15], invert }`
fn multiport(info: &[u8]) -> Option<Vec<Step>> {
    const XT_MULTIPORT_SOURCE: u8 = 0;
    const XT_MULTIPORT_DESTINATION: u8 = 1;
    let &[side, count] = info.get(..2)? else { return None };
    let invert = *info.get(47)? != 0;
    let value = match side {
        XT_MULTIPORT_SOURCE => Side::Source.port(),
        XT_MULTIPORT_DESTINATION => Side::Destination.port(),
        _ => return None,
    };
    let mut ranges = Vec::new();
    let mut index = 0;
    while index < usize::from(count) {
        let from = half(info, 2 + 2 * index)?;
        let is_range = *info.get(32 + index)? != 0;
        index += usize::from(is_range);
        ranges.push((from, half(info, 2 + 2 * index)?));
        index += 1;
    }
    Some(vec![asks(ask::ports(value, &ranges, !invert))])
}

/// `struct xt_conntrack_mtinfo3`: eight addresses and masks of 16 bytes, l4proto at 136, four ports,
/// match_flags at 146, invert_flags at 148, state_mask at 150, status_mask at 152, four last ports.
fn conntrack(info: &[u8], ipv4: bool) -> Option<Vec<Step>> {
    const STATE: u16 = 1;
    const PROTO: u16 = 1 << 1;
    const ORIGSRC: u16 = 1 << 2;
    const ORIGDST: u16 = 1 << 3;
    const ORIGSRC_PORT: u16 = 1 << 8;
    const ORIGDST_PORT: u16 = 1 << 9;
    const DIRECTION: u16 = 1 << 12;
    // Set by `-m state`, which iptables turns into this match.
    const STATE_ALIAS: u16 = 1 << 13;
    let (mut asked, inverse) = (half(info, 146)? & !STATE_ALIAS, half(info, 148)?);
    let mut all = Vec::new();
    let mut ask = |flag: u16, test: Option<Test>| {
        if asked & flag != 0
            && let Some(test) = test
        {
            all.push(asks(test.not_if(inverse & flag != 0)));
            asked &= !flag;
        }
    };
    ask(STATE, half(info, 150).map(|bits| ask::states(bits.into(), true)));
    let protocol = half(info, 136).and_then(|number| u8::try_from(number).ok());
    ask(PROTO, protocol.map(|number| ask::protocol(number, true)));
    for (flag, at, field) in
        [(ORIGSRC, 0, Field::CtSource(true)), (ORIGDST, 32, Field::CtDestination(true))]
    {
        ask(flag, address(info, at, field, ipv4));
    }
    for (flag, from, to, field) in [
        (ORIGSRC_PORT, 138, 154, Field::CtSourcePort(true)),
        (ORIGDST_PORT, 140, 156, Field::CtDestinationPort(true)),
    ] {
        let value = super::value::Operand::plain(field, 2);
        let range = half(info, from).zip(half(info, to));
        ask(flag, range.map(|(from, to)| ask::ports(value, &[(from, to.max(from))], true)));
    }
    // A SYN opens its connection.
    let original = super::value::Operand::plain(Field::CtDirection, 1);
    ask(DIRECTION, Some(Test::equals(original, super::value::Bits::number(0, 1))));
    if asked != 0 {
        all.push(asks(Test::Unclear("conntrack".to_owned())));
    }
    Some(all)
}

/// An address at `at`, its mask behind it.
fn address(info: &[u8], at: usize, field: Field, ipv4: bool) -> Option<Test> {
    use super::value::{Bits, Operand};
    let length = if ipv4 { 4 } else { 16 };
    let (with, mask) = (info.get(at..at + length)?, info.get(at + 16..at + 16 + length)?);
    let mask = Bits::of(mask).value()?;
    let value = Operand::plain(field, u32::try_from(length).ok()?).masked(mask);
    Some(Test::equals(value, Bits::of(with).masked(mask, 0)))
}

/// `struct xt_addrtype_info_v1 { source, dest, flags }`
fn addrtype(info: &[u8]) -> Option<Vec<Step>> {
    const INVERT_SOURCE: u32 = 1;
    const INVERT_DEST: u32 = 2;
    const LIMIT_IFACE: u32 = 4 | 8;
    let (source, destination, flags) = (half(info, 0)?, half(info, 2)?, word(info, 4)?);
    if flags & LIMIT_IFACE != 0 {
        return None;
    }
    let sides = [
        (Side::Source, source, flags & INVERT_SOURCE == 0),
        (Side::Destination, destination, flags & INVERT_DEST == 0),
    ];
    let asked = sides.into_iter().filter(|(_, kinds, _)| *kinds != 0);
    Some(asked.map(|(side, kinds, is)| asks(ask::address_types(side, kinds.into(), is))).collect())
}

/// `struct xt_mark_mtinfo1 { mark, mask, invert }`
fn mark(info: &[u8], field: Field) -> Option<Vec<Step>> {
    let is = *info.get(8)? == 0;
    Some(vec![asks(ask::mark(field, word(info, 0)?, word(info, 4)?, is))])
}

/// `struct xt_iprange_mtinfo { src_min, src_max, dst_min, dst_max, flags }`
fn iprange(info: &[u8], ipv4: bool) -> Option<Vec<Step>> {
    let flags = *info.get(64)?;
    let length = if ipv4 { 4 } else { 16 };
    let mut all = Vec::new();
    for (side, at, asked, inverted) in [(Side::Source, 0, 1, 16), (Side::Destination, 32, 2, 32)] {
        if flags & asked != 0 {
            let (from, to) = (info.get(at..at + length)?, info.get(at + 16..at + 16 + length)?);
            all.push(asks(ask::addresses(side, from, to, flags & inverted == 0)));
        }
    }
    Some(all)
}

/// `struct xt_recent_mtinfo { seconds, hit_count, check_set, invert, ... }`: setting always matches.
fn recent(info: &[u8]) -> Option<Vec<Step>> {
    const XT_RECENT_SET: u8 = 2;
    const XT_RECENT_UPDATE: u8 = 4;
    let &[check, invert] = info.get(8..10)? else { return None };
    if check & XT_RECENT_SET != 0 && invert == 0 {
        return Some(vec![RECENT]);
    }
    let unclear = asks(Test::Unclear("recent".to_owned()));
    (check & XT_RECENT_UPDATE != 0).then(|| vec![RECENT, unclear])
}

fn half(info: &[u8], at: usize) -> Option<u16> {
    info.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn word(info: &[u8], at: usize) -> Option<u32> {
    info.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_named_by_ct_of_the_later_revisions_alone() {
        let mut info = vec![0; 72];
        assert!(!names_policy("CT", &info));
        info[12] = b'h';
        assert!(!names_policy("CT", &info), "that is a helper");
        info[28] = b's';
        assert!(names_policy("CT", &info));
        assert!(!names_policy("TEE", &info));
        assert!(!names_policy("CT", &info[..40]), "revision 0 has the kernel's pointer there");
    }
}
