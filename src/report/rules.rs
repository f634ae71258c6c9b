//! The rules of a host as ctkeep has read them, one JSON object a line: a report is played as its host
//! is, whichever program has made the rules. Pure.
//!
//! Values that are compared with addresses are written as addresses, so that what replaces those of a
//! text replaces these too; values that nothing can be told of, hardware addresses among them, are
//! written as zeros.

use std::collections::HashMap;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::firewall::rule::{Adding, Counting, Threshold};
use crate::firewall::set::{Element, Set};
use crate::firewall::value::{Bits, Field, Operand};
use crate::firewall::{Base, Chain, Family, Outcome, Rule, Ruleset, Step, Test};

/// Elements of a set that a report has: 1 MB of addresses. A report ends a section after 8.
const ELEMENTS: usize = 20_000;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// The rules of this chain follow.
    Chain {
        family: Family,
        table: String,
        name: String,
        base: Option<Base>,
        is_dormant: bool,
        is_ours: bool,
    },
    /// A set of the rules that follow, which name it by the number of such lines before.
    Set {
        name: String,
        handle: u64,
        size: Option<u32>,
        unread: Option<String>,
        /// Bytes of the fields of each key.
        fields: Vec<u32>,
        elements: Vec<ElementLine>,
        otherwise: Option<ElementLine>,
    },
    /// A rule of the last chain.
    Rule { position: usize, handle: Option<u64>, steps: Vec<StepLine> },
    /// What could not be read on the host.
    Unread(String),
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct ElementLine {
    key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    verdict: Option<Outcome>,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<Threshold>,
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<String>,
    is_sometimes: bool,
}

/// A [`Step`] whose values are texts and whose sets are numbers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StepLine {
    Within { value: Operand, of: String, is: bool },
    In { values: Vec<Operand>, set: usize, is: bool },
    Rate(String),
    Unclear(String),
    Never,
    Count(Counting),
    Add { by: Vec<Operand>, set: usize, limit: Option<Threshold>, is_sometimes: bool },
    Remove(usize),
    Map(Vec<Operand>, usize),
    SetMark(Option<Operand>),
    SetCtMark(Option<Operand>),
    Write(Operand),
    SetZone(Option<u16>),
    Notrack,
    Log,
    Note(String),
    Verdict(Outcome),
    Leads(Option<u16>),
}

/// The lines of a rule set.
pub fn lines(rules: &Ruleset) -> String {
    let mut text = String::new();
    let mut add = |line: &Line| {
        let _ = writeln!(text, "{}", serde_json::to_string(line).unwrap_or_default());
    };
    rules.unread.iter().for_each(|what| add(&Line::Unread(what.clone())));
    let mut known: HashMap<*const Set, usize> = HashMap::new();
    for chain in &rules.chains {
        let Chain { family, table, name, base, is_dormant, is_ours, rules } = chain;
        let (table, name, base) = (table.clone(), name.clone(), base.clone());
        let (family, is_dormant, is_ours) = (*family, *is_dormant, *is_ours);
        add(&Line::Chain { family, table, name, base, is_dormant, is_ours });
        for Rule { position, handle, steps } in rules.iter() {
            for (values, set) in steps.iter().filter_map(set_of) {
                let number = known.len();
                known.entry(Arc::as_ptr(set)).or_insert_with(|| {
                    add(&set_line(values, set));
                    number
                });
            }
            let number =
                |set: &Arc<Set>| known.get(&Arc::as_ptr(set)).copied().unwrap_or(usize::MAX);
            let steps = steps.iter().map(|step| step_line(step, &number)).collect();
            add(&Line::Rule { position: *position, handle: *handle, steps });
        }
    }
    text
}

fn set_of(step: &Step) -> Option<(&[Operand], &Arc<Set>)> {
    match step {
        Step::Test(Test::In { values, set, .. }) | Step::Map(values, set) => Some((values, set)),
        Step::Add(adding) => Some((&adding.by, &adding.set)),
        Step::Remove(set) => Some((&[], set)),
        _ => None,
    }
}

fn set_line(values: &[Operand], set: &Set) -> Line {
    let element = |element: &Element| ElementLine {
        key: key(values, element),
        verdict: element.verdict.clone(),
        limit: element.limit,
        object: element.object.clone(),
        is_sometimes: element.is_sometimes,
    };
    let keyed = set.keyed();
    let left_out = keyed.len() > ELEMENTS;
    let what = || format!("set {} has {} elements: not in the report", set.name, keyed.len());
    Line::Set {
        name: set.name.clone(),
        handle: set.handle,
        size: set.size,
        unread: set.unread.clone().or_else(|| left_out.then(what)),
        fields: values.iter().map(|value| value.length).collect(),
        elements: if left_out { Vec::new() } else { keyed.iter().map(element).collect() },
        otherwise: set.otherwise().map(element),
    }
}

fn step_line(step: &Step, number: &impl Fn(&Arc<Set>) -> usize) -> StepLine {
    match step.clone() {
        Step::Test(Test::Within { value, from, to, is }) => {
            let bytes = |bits: Bits| bits.bytes().unwrap_or_default();
            StepLine::Within { of: span(&value, &bytes(from), &bytes(to)), value, is }
        }
        Step::Test(Test::In { values, set, is }) => StepLine::In { values, set: number(&set), is },
        Step::Test(Test::Rate(what)) => StepLine::Rate(what),
        Step::Test(Test::Unclear(what)) => StepLine::Unclear(what),
        Step::Test(Test::Never) => StepLine::Never,
        Step::Count(counting) => StepLine::Count(counting),
        Step::Add(Adding { by, set, limit, is_sometimes }) => {
            StepLine::Add { by, set: number(&set), limit, is_sometimes }
        }
        Step::Remove(set) => StepLine::Remove(number(&set)),
        Step::Map(values, set) => StepLine::Map(values, number(&set)),
        Step::SetMark(value) => StepLine::SetMark(value),
        Step::SetCtMark(value) => StepLine::SetCtMark(value),
        Step::Write(value) => StepLine::Write(value),
        Step::SetZone(zone) => StepLine::SetZone(zone),
        Step::Notrack => StepLine::Notrack,
        Step::Log => StepLine::Log,
        Step::Note(what) => StepLine::Note(what.into_owned()),
        Step::Verdict(outcome) => StepLine::Verdict(outcome),
        Step::Leads(port) => StepLine::Leads(port),
    }
}

/// The rules of these lines. What cannot be read of them is said once.
pub fn read(text: &str) -> Ruleset {
    let mut rules = Ruleset::default();
    let mut sets: Vec<Arc<Set>> = Vec::new();
    let mut lost = 0_usize;
    for line in text.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Chain { family, table, name, base, is_dormant, is_ours }) => {
                let rules_of = Arc::default();
                let chain =
                    Chain { family, table, name, base, is_dormant, is_ours, rules: rules_of };
                rules.chains.push(chain);
            }
            Ok(Line::Set { name, handle, size, unread, fields, elements, otherwise }) => {
                let element = |line| element(line, &fields);
                let all: Option<Vec<_>> = elements.into_iter().map(element).collect();
                let unread =
                    unread.or_else(|| all.is_none().then(|| format!("set {name}: damaged")));
                let all = all.unwrap_or_default();
                let set = Set::new(&name, all, otherwise.and_then(element));
                sets.push(Arc::new(set.numbered(handle).with_room(size).or_unread(unread)));
            }
            Ok(Line::Rule { position, handle, steps }) => {
                let steps: Option<Vec<_>> = steps.into_iter().map(|it| step(it, &sets)).collect();
                match (steps, rules.chains.last_mut()) {
                    (Some(steps), Some(chain)) => {
                        Arc::make_mut(&mut chain.rules).push(Rule { position, handle, steps });
                    }
                    _ => lost += 1,
                }
            }
            Ok(Line::Unread(what)) => rules.unread.push(what),
            Err(_) => lost += 1,
        }
    }
    if lost > 0 {
        let what = format!("{lost} rules of the report: of another version of ctkeep, or damaged");
        rules.unread.push(what);
    }
    rules
}

fn element(line: ElementLine, fields: &[u32]) -> Option<Element> {
    let ElementLine { key, verdict, limit, object, is_sometimes } = line;
    let (mut first, mut last) = (Vec::new(), Vec::new());
    let mut words = key.split(" . ").filter(|word| !word.is_empty());
    for length in fields {
        let Some(word) = words.next() else { break };
        let (from, to) = ends(word, *length)?;
        first.extend(from);
        last.extend(to);
        if fields.len() > 1 {
            first.resize(first.len().next_multiple_of(4), 0);
            last.resize(last.len().next_multiple_of(4), 0);
        }
    }
    // Of a key that does not fit its fields.
    for word in words {
        first.extend(ends(word, 0)?.0);
    }
    let end = (last != first && !last.is_empty()).then_some(last);
    Some(Element { key: first, end, verdict, limit, is_sometimes, object })
}

fn step(line: StepLine, sets: &[Arc<Set>]) -> Option<Step> {
    let of = |number: usize| sets.get(number).map(Arc::clone);
    Some(match line {
        StepLine::Within { value, of, is } => {
            let (from, to) = ends(&of, value.length)?;
            Step::Test(Test::Within { value, from: Bits::of(&from), to: Bits::of(&to), is })
        }
        StepLine::In { values, set, is } => Step::Test(Test::In { values, set: of(set)?, is }),
        StepLine::Rate(what) => Step::Test(Test::Rate(what)),
        StepLine::Unclear(what) => Step::Test(Test::Unclear(what)),
        StepLine::Never => Step::Test(Test::Never),
        StepLine::Count(counting) => Step::Count(counting),
        StepLine::Add { by, set, limit, is_sometimes } => {
            Step::Add(Adding { by, set: of(set)?, limit, is_sometimes })
        }
        StepLine::Remove(set) => Step::Remove(of(set)?),
        StepLine::Map(values, set) => Step::Map(values, of(set)?),
        StepLine::SetMark(value) => Step::SetMark(value),
        StepLine::SetCtMark(value) => Step::SetCtMark(value),
        StepLine::Write(value) => Step::Write(value),
        StepLine::SetZone(zone) => Step::SetZone(zone),
        StepLine::Notrack => Step::Notrack,
        StepLine::Log => Step::Log,
        StepLine::Note(what) => Step::Note(what.into()),
        StepLine::Verdict(outcome) => Step::Verdict(outcome),
        StepLine::Leads(port) => Step::Leads(port),
    })
}

/// The key of an element, field by field, as `0x0050 . 198.51.100.0-198.51.100.255`.
fn key(values: &[Operand], element: &Element) -> String {
    let last = element.end.as_ref().unwrap_or(&element.key);
    let mut at = 0_usize;
    let mut words = Vec::new();
    for value in values {
        let length = usize::try_from(value.length).unwrap_or(usize::MAX);
        let part = |key: &Vec<u8>| key.get(at..at.saturating_add(length)).map(<[u8]>::to_vec);
        let (Some(from), Some(to)) = (part(&element.key), part(last)) else { break };
        words.push(span(value, &from, &to));
        at = at.saturating_add(length);
        if values.len() > 1 {
            at = at.next_multiple_of(4);
        }
    }
    if at < element.key.len() {
        return hex(&element.key);
    }
    words.join(" . ")
}

/// The values from one to another, or the one; those that are compared with addresses as addresses.
fn span(value: &Operand, from: &[u8], to: &[u8]) -> String {
    let is_whole = |bytes: &[u8]| u32::try_from(bytes.len()) == Ok(value.length);
    let word = |bytes: &[u8]| match (value.field, is_ipv4(value)) {
        (Field::Unknown, _) => hex(&vec![0; bytes.len()]),
        (_, Some(ipv4)) if is_whole(bytes) => address(bytes, ipv4).to_string(),
        _ => hex(bytes),
    };
    if from != to {
        return format!("{}-{}", word(from), word(to));
    }
    let width = if is_ipv4(value) == Some(true) { 32 } else { 128 };
    match value.prefix() {
        Some(bits) if is_ipv4(value).is_some() && is_whole(from) && bits < width => {
            format!("{}/{bits}", word(from))
        }
        _ => word(from),
    }
}

/// The first and the last value of a text, `length` bytes each where they are addresses.
fn ends(text: &str, length: u32) -> Option<(Vec<u8>, Vec<u8>)> {
    let one = |word: &str| match word.strip_prefix("0x") {
        Some(digits) => {
            let bytes = (0..digits.len()).step_by(2).map(|at| digits.get(at..at + 2));
            bytes.map(|byte| u8::from_str_radix(byte?, 16).ok()).collect()
        }
        None => {
            let mut bytes = match word.split('/').next()?.parse().ok()? {
                IpAddr::V4(addr) => addr.octets().to_vec(),
                IpAddr::V6(addr) => addr.octets().to_vec(),
            };
            bytes.truncate(usize::try_from(length).ok()?);
            Some(bytes)
        }
    };
    match text.split_once('-') {
        Some((from, to)) => Some((one(from)?, one(to)?)),
        None => one(text).map(|bytes: Vec<u8>| (bytes.clone(), bytes)),
    }
}

/// Whether a value is an address of IPv4, or of IPv6, or the first bytes of one.
fn is_ipv4(value: &Operand) -> Option<bool> {
    match (value.field, value.length) {
        (Field::Ip(12 | 16), 1..=4) => Some(true),
        (Field::Ip(8 | 24), 2..=16) => Some(false),
        (Field::CtSource(_) | Field::CtDestination(_), 4) => Some(true),
        (Field::CtSource(_) | Field::CtDestination(_), 16) => Some(false),
        _ => None,
    }
}

fn address(bytes: &[u8], ipv4: bool) -> IpAddr {
    let mut octets = [0; 16];
    octets.iter_mut().zip(bytes).for_each(|(octet, byte)| *octet = *byte);
    match (ipv4, octets) {
        (true, [a, b, c, d, ..]) => Ipv4Addr::new(a, b, c, d).into(),
        _ => Ipv6Addr::from(octets).into(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::parse_saved;

    fn rules(text: &str, family: Family) -> Ruleset {
        Ruleset { chains: parse_saved(text, family), unread: vec!["a set".to_owned()] }
    }

    #[test]
    fn rules_come_back_from_their_lines() {
        let four = "*raw\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -p tcp -m tcp --dport 82 -j CT --zone 7\n\
            -A PREROUTING -i eth+ -j CT --notrack\nCOMMIT\n\
            *filter\n:INPUT DROP [0:0]\n:lim - [0:0]\n\
            -A INPUT -m iprange --src-range 198.51.100.50-198.51.100.60 -j ACCEPT\n\
            -A INPUT ! -s 198.51.100.0/24 -p tcp -m multiport --dports 80,8000:8010 -g lim\n\
            -A INPUT -s 10.1.2.3/255.0.255.0 -m mark --mark 0x1/0xff -m recent --set --name x -j LOG\n\
            -A lim -m hashlimit --hashlimit-above 1/sec --hashlimit-name x -j DROP\n\
            -A lim -p tcp -m tcp --syn -m connlimit --connlimit-above 9 --connlimit-mask 24 \
            -j REJECT --reject-with tcp-reset\nCOMMIT\n";
        let six = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -s 2001:db8:5::/48 -d 2001:db8::1/128 -p tcp \
            -m connlimit --connlimit-above 9 -j DROP\nCOMMIT\n";
        for (text, family) in [(four, Family::Ip), (six, Family::Ip6)] {
            let rules = rules(text, family);
            assert!(rules.chains.iter().any(|chain| !chain.rules.is_empty()));
            let text = lines(&rules);
            assert_eq!(read(&text), rules, "{text}");
        }
        let text = lines(&rules(four, Family::Ip));
        for wanted in ["\"198.51.100.50-198.51.100.60\"", "\"198.51.100.0/24\""] {
            assert!(text.contains(wanted), "no {wanted} in {text}");
        }
    }

    #[test]
    fn lines_that_are_not_understood_are_counted_and_those_of_others_stay() {
        let text = lines(&rules("*filter\n:INPUT DROP [0:0]\n-A INPUT -j ACCEPT\n", Family::Ip));
        let broken = text.replace("{\"rule\"", "{\"later\"") + "{\"rule\":";
        let read = read(&broken);
        assert!(read.chains.len() == 1 && read.unread.len() == 2, "{read:?}");
        assert!(read.unread.iter().any(|what| what.starts_with("2 rules")), "{read:?}");
    }
}
