//! Replaces the addresses of a text one for one, so that rules and limits still fit. Pure.
//!
//! Two addresses that have their first bits in common have as many in common afterwards: each bit is
//! turned or left by a secret function of the bits before it, so networks stay networks, and what is
//! counted together stays together. What has a meaning by its number keeps it: loopback, private
//! networks, multicast, masks.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The first `length` bits of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    is_ipv4: bool,
    bits: u128,
    length: u32,
}

impl Block {
    fn of(addr: IpAddr, length: u32) -> Self {
        let (bits, width) = bits(addr);
        Self { is_ipv4: addr.is_ipv4(), bits: high(bits, width, length), length }
    }
}

/// Networks that keep their place, and what is in them: no host's address, or the host's own.
const KEPT: [(IpAddr, u32); 5] = [
    (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8),
    (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
    // Multicast, what is reserved, masks.
    (IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 3),
    (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 8),
    (IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
];
/// Networks that keep their place: private ones, those of a link, all that is global.
const PLACED: [(IpAddr, u32); 9] = [
    (IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)), 8),
    (IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
    (IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(172, 16, 0, 0)), 12),
    (IpAddr::V4(Ipv4Addr::new(192, 168, 0, 0)), 16),
    (IpAddr::V6(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0)), 3),
    (IpAddr::V6(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0)), 96),
    (IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), 7),
    (IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 64),
];
/// A range of addresses whose ends have fewer bits in common cannot be kept a range without showing
/// too much of them.
const RANGE: [u32; 2] = [8, 16];

/// What replaces addresses; of one key always the same.
#[derive(Debug)]
pub struct Anonymous<S> {
    key: S,
    kept: Vec<Block>,
    placed: Vec<Block>,
    known: HashMap<IpAddr, IpAddr>,
}

impl<S: BuildHasher> Anonymous<S> {
    /// Replaces every address of a text.
    pub fn text(key: S, text: &str) -> String {
        let block = |(addr, length): &(IpAddr, u32)| Block::of(*addr, *length);
        let mut this = Self {
            key,
            kept: KEPT.iter().map(block).collect(),
            placed: PLACED.iter().map(block).collect(),
            known: HashMap::new(),
        };
        let words: Vec<_> = words(text).collect();
        // A range stays one: below what its ends have in common nothing is turned.
        this.kept.extend(words.iter().zip(words.iter().skip(1)).filter_map(|(from, to)| {
            let is_range = text.get(from.end..to.start) == Some("-");
            is_range.then(|| range(from.what.addr()?, to.what.addr()?)).flatten()
        }));
        let mut out = String::with_capacity(text.len());
        let mut at = 0;
        for word in words {
            out.push_str(text.get(at..word.start).unwrap_or_default());
            let rest = text.get(word.end..).unwrap_or_default();
            match word.what {
                What::Address(addr) => out.push_str(&this.network(addr, rest).to_string()),
                What::Device(mac) => out.push_str(&this.device(mac)),
            }
            at = word.end;
        }
        out.push_str(text.get(at..).unwrap_or_default());
        out
    }

    /// An address with what stands behind it: of a network the first bits alone.
    fn network(&mut self, addr: IpAddr, rest: &str) -> IpAddr {
        let now = self.address(addr);
        let Some(length) = prefix(rest, addr) else { return now };
        let (value, width) = bits(addr);
        let host = width.saturating_sub(length);
        let low = |value: u128| 1u128.checked_shl(host).map_or(value, |end| value % end);
        if low(value) != 0 {
            return now;
        }
        let (value, _) = bits(now);
        from_bits(value - low(value), addr)
    }

    fn address(&mut self, addr: IpAddr) -> IpAddr {
        if let Some(known) = self.known.get(&addr) {
            return *known;
        }
        let now = match addr {
            IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
                Some(v4) => match self.address(v4.into()) {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
                    IpAddr::V6(_) => addr,
                },
                None => self.turned(addr),
            },
            IpAddr::V4(_) => self.turned(addr),
        };
        self.known.insert(addr, now);
        now
    }

    fn turned(&self, addr: IpAddr) -> IpAddr {
        let (value, width) = bits(addr);
        let mut out = 0;
        for length in 0..width {
            let before =
                Block { is_ipv4: addr.is_ipv4(), bits: high(value, width, length), length };
            let bit = high(value, width, length + 1) & 1;
            let turns = !self.is_fixed(before)
                && self.key.hash_one((before.is_ipv4, before.bits, length)) & 1 == 1;
            out = out << 1 | (bit ^ u128::from(turns));
        }
        from_bits(out, addr)
    }

    /// Whether the bit behind these stays as it is: on the way to a network that keeps its place, or
    /// inside one that keeps everything.
    fn is_fixed(&self, before: Block) -> bool {
        let leads_to = |block: &Block| {
            block.is_ipv4 == before.is_ipv4
                && before.length < block.length
                && high(block.bits, block.length, before.length) == before.bits
        };
        // A range is found by where its ends have led, not kept in its place.
        let is_in = |block: &Block| {
            block.is_ipv4 == before.is_ipv4
                && before.length >= block.length
                && high(before.bits, before.length, block.length) == block.bits
        };
        let of_text = self.kept.get(KEPT.len()..).unwrap_or_default();
        self.placed.iter().any(leads_to)
            || self.kept.iter().take(KEPT.len()).any(|block| leads_to(block) || is_in(block))
            || of_text.iter().any(is_in)
    }

    /// A device's address: another one, locally administered.
    fn device(&self, mac: u64) -> String {
        if mac == 0 || mac >> 40 & 1 == 1 {
            return written(mac);
        }
        written(self.key.hash_one(mac) & 0xfcff_ffff_ffff | 0x0200_0000_0000)
    }
}

fn written(mac: u64) -> String {
    let bytes = mac.to_be_bytes();
    let parts: Vec<_> = bytes.iter().skip(2).map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

/// The bits that both ends of a range have in common, where they are enough.
fn range(from: IpAddr, to: IpAddr) -> Option<Block> {
    let ((first, width), (last, _)) = (bits(from), bits(to));
    let common = (first ^ last).leading_zeros().saturating_sub(128 - width);
    let least = if from.is_ipv4() { RANGE[0] } else { RANGE[1] };
    (from.is_ipv4() == to.is_ipv4() && common >= least).then(|| Block::of(from, common))
}

fn bits(addr: IpAddr) -> (u128, u32) {
    match addr {
        IpAddr::V4(addr) => (addr.to_bits().into(), 32),
        IpAddr::V6(addr) => (addr.to_bits(), 128),
    }
}

/// An address of the same family.
fn from_bits(bits: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or_default()).into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(bits).into(),
    }
}

/// The first `length` bits of `width`.
fn high(bits: u128, width: u32, length: u32) -> u128 {
    bits.checked_shr(width - length).unwrap_or(0)
}

/// The length of a prefix that stands behind an address: `/24`, `/255.255.255.0`.
fn prefix(rest: &str, addr: IpAddr) -> Option<u32> {
    let rest = rest.strip_prefix('/')?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    let text = rest.get(..end)?;
    let (_, width) = bits(addr);
    match text.parse::<u32>() {
        Ok(length) => (length <= width).then_some(length),
        Err(_) => {
            let mask: Ipv4Addr = text.trim_end_matches('.').parse().ok()?;
            (mask.to_bits().leading_ones() + mask.to_bits().trailing_zeros() >= 32)
                .then(|| mask.to_bits().leading_ones())
        }
    }
}

/// What stands for a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Address(IpAddr),
    Device(u64),
}

impl What {
    fn addr(self) -> Option<IpAddr> {
        match self {
            Self::Address(addr) => Some(addr),
            Self::Device(_) => None,
        }
    }
}

/// One of them, and where it stands.
#[derive(Clone, Copy, Debug)]
struct Word {
    what: What,
    start: usize,
    end: usize,
}

/// The addresses of a text: runs of digits, colons and points that are one, alone or with a port.
fn words(text: &str) -> impl Iterator<Item = Word> + '_ {
    let is_of_word = |byte: u8| byte.is_ascii_hexdigit() || byte == b':' || byte == b'.';
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() {
            let start = at;
            let end = bytes.iter().skip(at).position(|byte| !is_of_word(*byte));
            let end = end.map_or(bytes.len(), |length| start + length);
            at = end.max(start + 1);
            let is_letter = |place: Option<&u8>| {
                place.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
            };
            let is_mask = start > 0 && bytes.get(start - 1) == Some(&b'/');
            let before = start.checked_sub(1).and_then(|place| bytes.get(place));
            if end == start || is_letter(before) || is_letter(bytes.get(end)) || is_mask {
                continue;
            }
            let Some(run) = text.get(start..end) else { continue };
            if let Some((what, length)) = host(run) {
                at = start + length;
                return Some(Word { what, start, end: at });
            }
        }
        None
    })
}

/// The host that a run begins with, and how long it is.
fn host(run: &str) -> Option<(What, usize)> {
    let address = |text: &str| text.parse().ok().map(|addr| (What::Address(addr), text.len()));
    if !run.contains(['.', ':']) {
        return None;
    }
    let trimmed = run.trim_end_matches(['.', ':']);
    // `198.51.100.7:80`, and `1::` whose colons are its own.
    address(run).or_else(|| address(trimmed)).or_else(|| device(trimmed)).or_else(|| {
        let (addr, port) = run.split_once(':')?;
        let is_port = port.trim_end_matches(['.', ':']).bytes().all(|byte| byte.is_ascii_digit());
        if is_port { addr.parse::<Ipv4Addr>().ok().and_then(|_| address(addr)) } else { None }
    })
}

/// `52:54:00:12:34:56`
fn device(text: &str) -> Option<(What, usize)> {
    let parts: Vec<_> = text.split(':').collect();
    if parts.len() != 6 || parts.iter().any(|part| part.len() != 2) {
        return None;
    }
    let mac = parts
        .iter()
        .try_fold(0, |mac, part| u64::from_str_radix(part, 16).ok().map(|byte| mac << 8 | byte));
    Some((What::Device(mac?), text.len()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::hash::RandomState;

    use proptest::prelude::*;

    use super::*;

    fn anonymous(text: &str) -> String {
        Anonymous::text(RandomState::new(), text)
    }

    fn addresses(text: &str) -> Vec<IpAddr> {
        words(text).filter_map(|word| word.what.addr()).collect()
    }

    fn common(one: IpAddr, other: IpAddr) -> u32 {
        let ((one, width), (other, _)) = (bits(one), bits(other));
        (one ^ other).leading_zeros() - (128 - width)
    }

    #[test]
    fn addresses_are_found_in_every_form_and_nothing_else_is_taken_for_one() {
        let text = "192.0.2.1:80 [2001:db8::1]:80, src=198.51.100.7 (198.51.100.8). from 2001:db8::2: \
            ::ffff:192.0.2.9 10.0.0.1-10.0.0.9:80 a@203.0.113.1/24 fe80::1%eth0";
        let found: Vec<_> = addresses(text).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "192.0.2.1",
                "2001:db8::1",
                "198.51.100.7",
                "198.51.100.8",
                "2001:db8::2",
                "::ffff:192.0.2.9",
                "10.0.0.1",
                "10.0.0.9",
                "203.0.113.1",
                "fe80::1"
            ]
        );
        let others = "2026-11-29T03:12:04Z 03:12 6.18.44 v1.0.2.3 nft_10.0.0.1 sk:1a ino:7 dead.beef \
            --to 1.2.3 x::y 0x1000 uid:33 ipv4 2 10.0.0.1x";
        assert_eq!(anonymous(others), others);
    }

    #[test]
    fn what_has_a_meaning_by_its_number_keeps_it() {
        let text =
            "0.0.0.0/0 127.0.0.1 224.0.0.1 10.1.2.3/255.255.0.0 255.255.255.0 :: ::1 ff02::1 ::/0";
        let now = anonymous(text);
        let kept =
            ["0.0.0.0/0 127.0.0.1 224.0.0.1 10.", "/255.255.0.0 255.255.255.0 :: ::1 ff02::1 ::/0"];
        assert!(now.starts_with(kept[0]) && now.ends_with(kept[1]), "{now}");
        for (private, start) in
            [("192.168.7.9", "192.168."), ("fe80::1:2", "fe80::"), ("10.9.9.9", "10.")]
        {
            assert!(anonymous(private).starts_with(start), "{private}");
        }
        let mac = anonymous("-m mac --mac-source 52:54:00:12:34:56 ff:ff:ff:ff:ff:ff");
        assert!(!mac.contains("52:54") && mac.ends_with(" ff:ff:ff:ff:ff:ff"), "{mac}");
    }

    #[test]
    fn networks_and_ranges_still_hold_what_they_held() {
        for _ in 0..50 {
            let text = "198.51.100.0/24 198.51.100.7 10.20.0.0/255.255.0.0 10.20.9.9 \
                203.0.113.17-203.0.113.40 203.0.113.20 203.0.113.41 198.51.100.9/24 2001:db8:1::/48 2001:db8:1::9 198.51.100.9";
            let now = anonymous(text);
            let words: Vec<_> = now.split_whitespace().collect();
            let net: ipnet::IpNet = words[0].parse().unwrap();
            assert!(
                net.trunc() == net && net.contains(&words[1].parse::<IpAddr>().unwrap()),
                "{now}"
            );
            let (net, mask) = words[2].split_once('/').unwrap();
            assert_eq!(mask, "255.255.0.0");
            assert!(
                net.ends_with(".0.0")
                    && common(net.parse().unwrap(), words[3].parse().unwrap()) >= 16
            );
            let ends: Vec<IpAddr> = words[4].split('-').map(|end| end.parse().unwrap()).collect();
            let inside: IpAddr = words[5].parse().unwrap();
            let outside: IpAddr = words[6].parse().unwrap();
            assert!(ends[0] <= inside && inside <= ends[1] && outside > ends[1], "{now}");
            let [host, alone] = [7, 10].map(|at| words[at].trim_end_matches("/24"));
            assert_eq!(host, alone, "no network: {now}");
            let net: ipnet::IpNet = words[8].parse().unwrap();
            assert!(net.contains(&words[9].parse::<IpAddr>().unwrap()), "{now}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in any::<String>(), parts in "[0-9a-f:./\\-\n é]{0,60}") {
            for text in [text, parts] {
                prop_assert_eq!(anonymous(&text).lines().count(), text.lines().count());
                drop(super::super::file::File::read(&format!("ctkeep report 1\n== sockets ==\n{text}")));
            }
        }

        #[test]
        fn one_for_one_and_what_they_have_in_common_stays(
            v4 in proptest::collection::vec(any::<u32>(), 2..20),
            v6 in proptest::collection::vec(any::<u128>(), 2..20),
        ) {
            let near = v4.iter().flat_map(|bits| [*bits, bits ^ 1, bits ^ 0x100]);
            let v4 = near.map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits)));
            let near = v6.iter().flat_map(|bits| [*bits, bits ^ 1, bits ^ (1 << 64)]);
            let v6 = near.map(|bits| IpAddr::from(Ipv6Addr::from_bits(bits)));
            let all: Vec<_> = v4.chain(v6).collect();
            let text: Vec<_> = all.iter().map(ToString::to_string).collect();
            let now = addresses(&anonymous(&text.join(" ")));
            prop_assert_eq!(now.len(), all.len());
            let distinct = |all: &[IpAddr]| all.iter().copied().collect::<HashSet<_>>().len();
            prop_assert_eq!(distinct(&now), distinct(&all));
            for (index, (one, now_one)) in all.iter().zip(&now).enumerate() {
                prop_assert_eq!(one.is_ipv4(), now_one.is_ipv4());
                for (other, now_other) in all.iter().zip(&now).skip(index) {
                    if one.is_ipv4() == other.is_ipv4() {
                        prop_assert_eq!(common(*one, *other), common(*now_one, *now_other));
                    }
                }
            }
        }
    }
}
