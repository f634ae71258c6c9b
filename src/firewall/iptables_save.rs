//! Reads what `iptables-legacy-save` prints.

use super::{Base, Chain, Family, Hook, Key, Limit, Match, Outcome, Ports, Rule};

/// The chains in saved rules of `family`; lines that it does not know are passed over.
pub fn parse(text: &str, family: Family) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut table = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('*') {
            table = name.to_owned();
        } else if let Some(declared) = line.strip_prefix(':') {
            let name = declared.split_whitespace().next().unwrap_or_default().to_owned();
            let base = base(&table, &name);
            chains.push(Chain { family, table: table.clone(), name, base, rules: Vec::new() });
        } else if let Some(words) = line.strip_prefix("-A ").map(words)
            && let Some((chain, rest)) = words.split_first()
            && let Some(chain) =
                chains.iter_mut().find(|known| known.table == table && known.name == *chain)
        {
            let position = chain.rules.len() + 1;
            chain.rules.push(Rule { position, ..rule(rest, family == Family::Ip) });
        }
    }
    chains
}

/// Priorities of the legacy tables (`enum nf_ip_hook_priorities`).
fn base(table: &str, chain: &str) -> Option<Base> {
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
    Some(Base { hook, priority })
}

fn rule(words: &[String], ipv4: bool) -> Rule {
    let mut rule = Rule::default();
    rule.matches.ipv4 = Some(ipv4);
    let mut count = Limit { count: 0, over: true, key: Key::Other, dynamic: false };
    let longest = if ipv4 { 32 } else { 128 };
    let (mut prefix, mut by_source, mut counts) = (longest, true, false);
    let mut rest = words.iter().map(String::as_str);
    let mut not = false;
    while let Some(word) = rest.next() {
        let inverse = std::mem::take(&mut not);
        let mut value = || rest.next().unwrap_or_default();
        match word {
            "!" => not = true,
            "-m" => {
                value();
            }
            "--comment" => {
                value();
            }
            "-p" => rule.matches.protocol = protocol(value()).filter(|_| !inverse),
            "-i" if !inverse => rule.matches.interfaces.push(value().replace('+', "*")),
            "-s" => match value().parse() {
                Ok(net) => rule.matches.sources.push((net, !inverse)),
                Err(_) => rule.matches.narrowed = true,
            },
            "--dport" | "--dports" => {
                let ports = ports(value());
                let ports = if inverse { ports.not() } else { ports };
                rule.matches.ports = rule.matches.ports.and(&ports);
            }
            "--ctstate" | "--state" => {
                let bits = states(value());
                let found =
                    Match { states: Some(if inverse { !bits } else { bits }), ..Match::default() };
                rule.matches = rule.matches.and(&found);
            }
            "--syn" => rule.matches.syn = !inverse,
            "--tcp-flags" => {
                value();
                let set = value();
                rule.matches.syn = !inverse && set.split(',').any(|flag| flag == "SYN");
                rule.matches.narrowed |= !rule.matches.syn;
            }
            "--connlimit-above" => {
                (counts, count.over, count.count) = (true, true, number(value()));
            }
            "--connlimit-upto" => {
                (counts, count.over, count.count) = (true, false, number(value()));
            }
            "--connlimit-mask" => {
                prefix = value().parse().map_or(longest, |bits: u8| bits.min(longest));
            }
            "--connlimit-saddr" => by_source = true,
            "--connlimit-daddr" => by_source = false,
            "-j" => rule.outcome = outcome(value()),
            "-g" => rule.outcome = Outcome::Goto(value().to_owned()),
            "--notrack" => rule.outcome = Outcome::Notrack,
            // Options of targets come behind their -j and do not narrow.
            option if option.starts_with('-') && rule.outcome == Outcome::Continue => {
                rule.matches.narrowed = true;
            }
            _ => {}
        }
    }
    if counts {
        count.key = if by_source { Key::Source(prefix) } else { Key::Destination(prefix) };
        rule.limit = Some(count);
    }
    rule
}

fn outcome(target: &str) -> Outcome {
    match target {
        "ACCEPT" | "DNAT" | "SNAT" | "REDIRECT" | "MASQUERADE" | "TPROXY" | "NFQUEUE" => {
            Outcome::Accept
        }
        "DROP" | "TARPIT" => Outcome::Drop,
        "REJECT" => Outcome::Reject,
        "RETURN" => Outcome::Return,
        "NOTRACK" => Outcome::Notrack,
        "SYNPROXY" => Outcome::Synproxy,
        // Targets in capitals that let the packet go on.
        "CT" | "LOG" | "NFLOG" | "MARK" | "CONNMARK" | "TCPMSS" | "TOS" | "DSCP" | "TRACE"
        | "SET" | "CLASSIFY" | "AUDIT" | "CHECKSUM" | "TEE" | "TTL" | "HL" => Outcome::Continue,
        chain => Outcome::Jump(chain.to_owned()),
    }
}

fn protocol(name: &str) -> Option<u8> {
    match name {
        "tcp" => Some(6),
        "udp" => Some(17),
        "icmp" => Some(1),
        "ipv6-icmp" | "icmpv6" => Some(58),
        "all" => None,
        other => Some(other.parse().unwrap_or(u8::MAX)),
    }
}

fn ports(list: &str) -> Ports {
    Ports::of(list.split(',').filter_map(|item| {
        let (from, to) = item.split_once(':').unwrap_or((item, item));
        let from = if from.is_empty() { 0 } else { from.parse().ok()? };
        Some((from, if to.is_empty() { u16::MAX } else { to.parse().ok()? }))
    }))
}

fn states(list: &str) -> u32 {
    list.split(',').fold(0, |bits, name| {
        bits | match name {
            "INVALID" => 1,
            "ESTABLISHED" => super::STATE_ESTABLISHED,
            "RELATED" => 4,
            "NEW" => super::STATE_NEW,
            "UNTRACKED" => 64,
            _ => 0,
        }
    })
}

fn number(text: &str) -> u32 {
    text.parse().unwrap_or(0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_never_longer_than_an_address() {
        let text = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m connlimit --connlimit-above 16 \
            --connlimit-mask 64 -j DROP\n";
        for (family, bits) in [(Family::Ip, 32), (Family::Ip6, 64)] {
            let chains = parse(text, family);
            let limit = chains[0].rules[0].limit.unwrap();
            assert_eq!(limit.key, Key::Source(bits));
        }
    }

    #[test]
    fn a_saved_connlimit_rule_is_read_with_its_context() {
        let text = "*filter\n:INPUT DROP [0:0]\n\
            -A INPUT -i lo -j ACCEPT\n\
            -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
            -A INPUT -p tcp -m tcp --dport 80 --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment \
            \"at most -j 40\" -m connlimit --connlimit-above 40 --connlimit-mask 24 \
            --connlimit-saddr -j REJECT --reject-with tcp-reset\nCOMMIT\n";
        let chains = parse(text, Family::Ip);
        let [chain] = chains.as_slice() else { panic!("{chains:?}") };
        let [lo, established, limit] = chain.rules.as_slice() else { panic!("{chain:?}") };
        assert!(lo.matches.is_loopback() && lo.outcome == Outcome::Accept);
        assert!(established.matches.is_established());
        assert_eq!(limit.outcome, Outcome::Reject);
        assert_eq!(limit.matches.ports.to_string(), "80");
        assert!(limit.matches.syn && !limit.matches.narrowed);
        let wanted = Limit { count: 40, over: true, key: Key::Source(24), dynamic: false };
        assert_eq!(limit.limit, Some(wanted));
    }
}
