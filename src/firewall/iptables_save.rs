//! Reads what `iptables-legacy-save` prints. Pure.

use std::net::{IpAddr, SocketAddr};

use super::ask::{self, Side, asks};
use super::rule::{Counting, Threshold};
use super::value::{Bits, Field, Operand};
use super::{Base, Chain, Family, Hook, Outcome, Step, Test, xt};

/// The chains in saved rules of `family`; lines that it does not know are passed over.
pub fn parse(text: &str, family: Family) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        } else if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split_whitespace();
            let name = words.next().unwrap_or_default();
            let base = base(&table, name, words.next() == Some("DROP"));
            chains.push(Chain::new(family, &table, name, base));
        } else if let Some(words) = line.strip_prefix("-A ").map(words)
            && let Some((chain, rest)) = words.split_first()
            && let Some(chain) =
                chains.iter_mut().find(|known| known.table == table && known.name == *chain)
        {
            chain.push(None, Line::new(rest, family == Family::Ip).steps());
        }
    }
    chains
}

/// Priorities of the legacy tables (`enum nf_ip_hook_priorities`).
fn base(table: &str, chain: &str, drops: bool) -> Option<Base> {
    let hook = match chain {
        "PREROUTING" => Hook::Prerouting,
        "INPUT" => Hook::Input,
        "FORWARD" => Hook::Forward,
        "OUTPUT" => Hook::Output,
        "POSTROUTING" => Hook::Postrouting,
        _ => return None,
    };
    let priority = match table {
        "raw" => -300,
        "mangle" => -150,
        "nat" => -100,
        "security" => 50,
        _ => 0,
    };
    Some(Base { hook, priority, drops, is_nat: table == "nat", devices: Vec::new() })
}

/// One rule while it is read.
struct Line<'w> {
    words: &'w [String],
    ipv4: bool,
    /// The match that options belong to.
    module: &'w str,
    /// Matches that ask what cannot be told, or a rate, are asked for once.
    asked: Vec<&'w str>,
    steps: Vec<Step>,
    limit: Option<Threshold>,
    /// The step before which the limit counts.
    counts_at: usize,
    prefix: u8,
    side: Side,
    end: Option<Step>,
}

impl<'w> Line<'w> {
    fn new(words: &'w [String], ipv4: bool) -> Self {
        Self {
            words,
            ipv4,
            module: "",
            asked: Vec::new(),
            steps: Vec::new(),
            limit: None,
            counts_at: 0,
            prefix: if ipv4 { 32 } else { 128 },
            side: Side::Source,
            end: None,
        }
    }

    fn next(&mut self) -> &'w str {
        match self.words.split_first() {
            Some((first, rest)) => {
                self.words = rest;
                first
            }
            None => "",
        }
    }

    fn steps(mut self) -> Vec<Step> {
        let (mut not, mut leads) = (false, None);
        while !self.words.is_empty() {
            let word = self.next();
            let is = !std::mem::take(&mut not);
            match word {
                "!" => not = true,
                _ if self.end.is_some() => {
                    // Options of targets do not narrow.
                    match word {
                        "--notrack" => self.end = Some(Step::Notrack),
                        "tcp-reset" => self.end = Some(Step::Verdict(Outcome::Reset)),
                        _ => {}
                    }
                    if word == "--to-destination" {
                        leads = to(self.next());
                    }
                    if word == "--zone" || word == "--zone-orig" {
                        self.end = Some(Step::SetZone(self.next().parse().ok()));
                    }
                }
                word => self.option(word, is),
            }
        }
        if let Some(limit) = self.limit {
            let by = ask::counted_by(self.side, self.prefix, self.ipv4);
            let at = self.counts_at.min(self.steps.len());
            self.steps.insert(at, Step::Count(Counting { limit, by }));
        }
        self.steps.extend(self.end);
        self.steps.extend(leads.map(Step::Leads));
        self.steps
    }

    fn ask(&mut self, test: Option<Test>) {
        let module = self.module;
        let test = test.unwrap_or_else(|| Test::Unclear(module.to_owned()));
        self.steps.push(asks(test));
    }

    fn option(&mut self, word: &'w str, is: bool) {
        let longest = if self.ipv4 { 32 } else { 128 };
        match word {
            "-m" => {
                self.module = self.next();
                self.matched();
            }
            "--comment" => {
                self.next();
            }
            "-p" => match self.next() {
                "all" => {}
                name => self.ask(Some(ask::protocol(protocol(name), is))),
            },
            "-i" | "-o" => {
                let field = if word == "-i" { Field::InterfaceName } else { Field::OutName };
                let name = self.next();
                self.ask(Some(ask::interface(field, name, is)));
            }
            "-s" | "-d" => {
                let side = if word == "-s" { Side::Source } else { Side::Destination };
                let value = side.address(self.ipv4);
                let test = network(value, self.next());
                self.ask(test.map(|test| test.not_if(!is)));
            }
            // Conntrack puts fragments together before any of these rules.
            "-f" if is => self.ask(Some(Test::Never)),
            "-f" => {}
            "--sport" | "--sports" | "--dport" | "--dports" => {
                let side = if word.starts_with("--s") { Side::Source } else { Side::Destination };
                let ranges = ports(self.next());
                self.ask(Some(ask::ports(side.port(), &ranges, is)));
            }
            "--syn" => self.ask(Some(ask::flags(SYN_MASK, SYN, is))),
            "--tcp-flags" => {
                let (mask, set) = (flags(self.next()), flags(self.next()));
                self.ask(Some(ask::flags(mask, set, is)));
            }
            "--connlimit-above" | "--connlimit-upto" => {
                let over = word == "--connlimit-above";
                let count = self.next().parse().unwrap_or(0);
                self.limit = Some(Threshold { count, over: over == is });
            }
            "--connlimit-mask" => {
                self.prefix = self.next().parse().map_or(longest, |bits: u8| bits.min(longest));
            }
            "--connlimit-saddr" => self.side = Side::Source,
            "--connlimit-daddr" => self.side = Side::Destination,
            "-j" => {
                let name = self.next();
                self.end = Some(target(name));
            }
            "-g" => self.end = Some(Step::Verdict(Outcome::Goto(self.next().to_owned()))),
            _ if self.more(word, is) => {}
            option if option.starts_with('-') && !self.asked.contains(&self.module) => {
                self.ask(None);
                self.asked.push(self.module);
            }
            _ => {}
        }
    }

    /// A match that is named: those that ask one thing, whatever their options.
    fn matched(&mut self) {
        let module = self.module;
        let test = match module {
            "limit" | "hashlimit" | "quota" | "statistic" => Test::Rate(module.to_owned()),
            "connlimit" => {
                self.counts_at = self.steps.len();
                return;
            }
            // These have an option for each question.
            "tcp" | "multiport" | "comment" | "conntrack" | "state" | "addrtype" | "mark"
            | "connmark" | "iprange" | "pkttype" | "recent" => return,
            "udp" => ask::protocol(protocol("udp"), true),
            _ => Test::Unclear(module.to_owned()),
        };
        self.steps.push(asks(test));
        self.asked.push(module);
    }

    /// Options of the lesser matches; whether it was one.
    fn more(&mut self, word: &str, is: bool) -> bool {
        match (self.module, word) {
            (_, "--ctstate" | "--state") => {
                let bits = states(self.next());
                self.ask(Some(ask::states(bits, is)));
            }
            ("conntrack", "--ctdir") => {
                if (self.next() == "ORIGINAL") != is {
                    self.ask(Some(Test::Never));
                }
            }
            ("conntrack", "--ctproto") => {
                let number = protocol(self.next());
                self.ask(Some(ask::protocol(number, is)));
            }
            ("conntrack", "--ctorigdstport" | "--ctorigsrcport") => {
                let field = match word {
                    "--ctorigdstport" => Field::CtDestinationPort(true),
                    _ => Field::CtSourcePort(true),
                };
                let ranges = ports(self.next());
                self.ask(Some(ask::ports(Operand::plain(field, 2), &ranges, is)));
            }
            ("conntrack", "--ctorigsrc" | "--ctorigdst") => {
                let field = match word {
                    "--ctorigsrc" => Field::CtSource(true),
                    _ => Field::CtDestination(true),
                };
                let length = if self.ipv4 { 4 } else { 16 };
                let test = network(Operand::plain(field, length), self.next());
                self.ask(test.map(|test| test.not_if(!is)));
            }
            ("addrtype", "--src-type" | "--dst-type") => {
                let side = if word == "--src-type" { Side::Source } else { Side::Destination };
                let kinds = address_types(self.next());
                self.ask(kinds.map(|kinds| ask::address_types(side, kinds, is)));
            }
            ("mark" | "connmark", "--mark") => {
                let field = if self.module == "mark" { Field::Mark } else { Field::CtMark };
                let (mark, mask) = masked(self.next());
                self.ask(Some(ask::mark(field, mark, mask, is)));
            }
            ("iprange", "--src-range" | "--dst-range") => {
                let side = if word == "--src-range" { Side::Source } else { Side::Destination };
                let range = self.next();
                let (from, to) = range.split_once('-').unwrap_or((range, range));
                let test = bytes(from)
                    .zip(bytes(to))
                    .filter(|(from, to)| from.len() == to.len())
                    .map(|(from, to)| ask::addresses(side, &from, &to, is));
                self.ask(test);
            }
            ("pkttype", "--pkt-type") => {
                let is_host = matches!(self.next(), "unicast" | "host");
                if is_host != is {
                    self.ask(Some(Test::Never));
                }
            }
            // Setting always matches.
            ("recent", "--set") if is => {
                self.steps.push(xt::RECENT);
                self.asked.push("recent");
            }
            ("recent", "--update") => {
                self.steps.push(xt::RECENT);
                return false;
            }
            _ => return false,
        }
        true
    }
}

const SYN: u8 = 0x02;
/// FIN, SYN, RST and ACK.
const SYN_MASK: u8 = 0x17;

fn target(name: &str) -> Step {
    let known = xt::named_target(name);
    // Targets in capitals that let the packet go on.
    let goes_on = matches!(
        name,
        "CT" | "TCPMSS"
            | "TCPOPTSTRIP"
            | "TRACE"
            | "CLASSIFY"
            | "AUDIT"
            | "CHECKSUM"
            | "TEE"
            | "TTL"
            | "HL"
            | "RATEEST"
            | "SECMARK"
            | "CONNSECMARK"
            | "LED"
            | "IDLETIMER"
            | "ECN"
            | "HMARK"
    );
    match known {
        Some(step) => step,
        None if goes_on => Step::Verdict(Outcome::Continue),
        None => Step::Verdict(Outcome::Jump(name.to_owned())),
    }
}

fn protocol(name: &str) -> u8 {
    match name {
        "tcp" => 6,
        "udp" => 17,
        "icmp" => 1,
        "ipv6-icmp" | "icmpv6" => 58,
        "esp" => 50,
        "ah" => 51,
        "sctp" => 132,
        "udplite" => 136,
        other => other.parse().unwrap_or(u8::MAX),
    }
}

/// `192.0.2.0/24`, `192.0.2.0/255.255.255.0`, or with a mask that is no prefix.
fn network(value: Operand, text: &str) -> Option<Test> {
    let (addr, mask) = text.split_once('/').unwrap_or((text, ""));
    let with = Bits::of(&bytes(addr)?);
    let all = Bits::number(u128::MAX, value.length).value()?;
    let mask = match mask.parse::<u32>() {
        _ if mask.is_empty() => all,
        Ok(prefix) => all & !all.checked_shr(prefix).unwrap_or(0),
        Err(_) => Bits::of(&bytes(mask)?).value()?,
    };
    if with.length() != value.length {
        return None;
    }
    let value = if mask == all { value } else { value.masked(mask) };
    Some(Test::equals(value, with.masked(mask, 0)))
}

/// The port of `10.0.0.2:80`, or none of `10.0.0.2`; of ranges it cannot be told.
fn to(destination: &str) -> Option<Option<u16>> {
    let whole = destination.parse::<SocketAddr>().map(|it| Some(it.port()));
    whole.or_else(|_| destination.parse::<IpAddr>().map(|_| None)).ok()
}

fn ports(list: &str) -> Vec<(u16, u16)> {
    let range = |item: &str| {
        let (from, to) = item.split_once(':').unwrap_or((item, item));
        let from = if from.is_empty() { 0 } else { from.parse().ok()? };
        Some((from, if to.is_empty() { u16::MAX } else { to.parse().ok()? }))
    };
    list.split(',').filter_map(range).collect()
}

fn flags(list: &str) -> u8 {
    list.split(',').fold(0, |bits, name| {
        bits | match name {
            "FIN" => 0x01,
            "SYN" => SYN,
            "RST" => 0x04,
            "PSH" => 0x08,
            "ACK" => 0x10,
            "URG" => 0x20,
            "ALL" => 0x3f,
            _ => 0,
        }
    })
}

/// `XT_CONNTRACK_STATE_*`
fn states(list: &str) -> u32 {
    list.split(',').fold(0, |bits, name| {
        bits | match name {
            "INVALID" => 1,
            "ESTABLISHED" => super::STATE_ESTABLISHED,
            "RELATED" => 4,
            "NEW" => super::STATE_NEW,
            "SNAT" => 1 << 6,
            "DNAT" => 1 << 7,
            "UNTRACKED" => 1 << 8,
            _ => 0,
        }
    })
}

/// Bits by `RTN_*`.
fn address_types(list: &str) -> Option<u32> {
    list.split(',').try_fold(0, |bits, name| {
        let names = [
            "UNSPEC",
            "UNICAST",
            "LOCAL",
            "BROADCAST",
            "ANYCAST",
            "MULTICAST",
            "BLACKHOLE",
            "UNREACHABLE",
            "PROHIBIT",
            "THROW",
            "NAT",
            "XRESOLVE",
        ];
        names.iter().position(|known| *known == name).map(|at| bits | 1_u32 << at)
    })
}

/// `0x1/0xff`
fn masked(text: &str) -> (u32, u32) {
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).unwrap_or(0),
        None => text.parse().unwrap_or(0),
    };
    match text.split_once('/') {
        Some((mark, mask)) => (number(mark), number(mask)),
        None => (number(text), u32::MAX),
    }
}

fn bytes(addr: &str) -> Option<Vec<u8>> {
    Some(match addr.parse().ok()? {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    })
}

/// Words of a line; a quoted one (a comment) may hold blanks and `\"`.
fn words(line: &str) -> Vec<String> {
    let mut all = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut escaped) = (false, false);
    for letter in line.chars() {
        match letter {
            _ if std::mem::take(&mut escaped) => word.push(letter),
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            ' ' if !quoted => all.push(std::mem::take(&mut word)),
            _ => word.push(letter),
        }
    }
    all.push(word);
    all.retain(|word| !word.is_empty());
    all
}
