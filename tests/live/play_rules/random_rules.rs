//! Random rule sets of the grammar that people write limits in, each by its seed.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::vocabulary;

/// The server's addresses.
pub const SERVERS: [Ipv4Addr; 2] = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
/// Its ports.
pub const PORTS: [u16; 3] = [80, 443, 8080];
/// Who opens connections; by IPv6 the same with addresses of [`six`].
pub const SOURCES: [Ipv4Addr; 10] = [
    Ipv4Addr::new(198, 51, 100, 1),
    Ipv4Addr::new(198, 51, 100, 2),
    Ipv4Addr::new(198, 51, 100, 3),
    Ipv4Addr::new(198, 51, 100, 129),
    Ipv4Addr::new(198, 51, 100, 130),
    Ipv4Addr::new(203, 0, 113, 5),
    Ipv4Addr::new(203, 0, 113, 6),
    Ipv4Addr::new(203, 0, 113, 20),
    Ipv4Addr::new(203, 0, 113, 21),
    Ipv4Addr::new(203, 0, 113, 200),
];

/// The address with the same last byte in the network that stands for its own: lengths of prefixes
/// keep their meaning, 96 bits longer.
pub fn six(address: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = address.octets();
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
}

/// A word with the address, or the two of a range, or the prefix that it begins with, by IPv6.
fn six_word(word: &str) -> Option<String> {
    let end = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
    let (address, rest) = word.split_at(end);
    let address: Ipv4Addr = address.parse().ok()?;
    let first = six(address);
    if let Some(second) = rest.strip_prefix('-') {
        return Some(format!("{first}-{}", six_word(second)?));
    }
    let Some(length) = rest.strip_prefix('/') else { return Some(format!("{first}{rest}")) };
    let end = length.find(|c: char| !c.is_ascii_digit()).unwrap_or(length.len());
    let (length, rest) = length.split_at(end);
    // A mask of an address is no length.
    Some(format!("{first}/{}{rest}", length.parse::<u8>().ok()?.checked_add(96)?))
}

/// A rule by IPv6; `None` for what has no counterpart there.
fn six_rule(rule: &str) -> Option<String> {
    const OWN: [&str; 14] = [
        "allow",
        "nets",
        "empty",
        "pairs",
        "areas",
        "by_source0",
        "by_source1",
        "by_network0",
        "by_network1",
        "by_destination0",
        "by_destination1",
        "by_service0",
        "by_service1",
        "by_both",
    ];
    const ALONE: [&str; 9] =
        [" ttl", " id", " length", " hdrlength", " checksum", " frag-off", " dscp", " ecn", "@nh"];
    // Numbers that stand for an address or a part of one.
    let has_bits = rule.contains("saddr &") || rule.contains("saddr |") || rule.contains("saddr ^");
    let is_of_ip = |what: &&str| rule.contains(&format!("ip{what}"));
    if has_bits || ALONE.iter().any(is_of_ip) || rule.contains("@nh") || rule.contains("version") {
        return None;
    }
    let rule = rule.replace("and 255.255.255.0", "and ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00");
    let rule = rule.replace("ip protocol", "ip6 nexthdr").replace("nfproto ipv4", "nfproto ipv6");
    let words = rule.split(' ').map(|word| match word {
        "ip" => "ip6".to_owned(),
        "255.255.255.0" => word.to_owned(),
        _ => match word.strip_prefix('@') {
            Some(set) if OWN.iter().any(|own| set.starts_with(own)) => format!("{word}_6"),
            _ => six_word(word).unwrap_or_else(|| word.to_owned()),
        },
    });
    Some(words.collect::<Vec<_>>().join(" "))
}

/// A small source of numbers (xorshift64*), the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).unwrap() % end
    }

    /// So often of a hundred times.
    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }

    fn source(&mut self) -> Ipv4Addr {
        SOURCES[self.below(SOURCES.len())]
    }

    fn port(&mut self) -> u16 {
        PORTS[self.below(PORTS.len())]
    }

    fn not(&mut self) -> &'static str {
        if self.chance(25) { "!= " } else { "" }
    }
}

/// What an nft rule may ask.
fn nft_match(random: &mut Random) -> String {
    let (source, other, port, not) =
        (random.source(), random.source(), random.port(), random.not());
    match random.below(44) {
        0 | 1 => format!("ip saddr {not}{source}"),
        2 => format!("ip saddr {not}198.51.100.128/25"),
        3 => format!("ip saddr {not}203.0.113.0-203.0.113.{}", random.below(64)),
        4 => format!("ip saddr {not}{{ {source}, {other} }}"),
        5 => format!("ip saddr {not}{{ 198.51.100.0/30, {source}, 203.0.113.16/28 }}")
            .replace(&format!("{source}, "), ""),
        6 => format!("ip saddr {not}@allow"),
        7 => format!("ip saddr {not}@nets"),
        8 => format!("ip saddr {not}@empty"),
        9 => format!("ip daddr {not}{}", SERVERS[random.below(2)]),
        10 | 11 => format!("tcp dport {not}{port}"),
        12 => format!("tcp dport {not}{}-{}", random.below(200), 200 + random.below(9000)),
        13 => format!("tcp dport {not}{{ {port}, 22, 8000-8100 }}"),
        14 => format!("tcp dport {} {}", random.one(&["<", "<=", ">", ">="]), random.port()),
        15 => format!("tcp dport {not}@ports"),
        16 => format!("th dport {not}{port}"),
        17 => format!("iifname {not}\"eth0\""),
        18 => format!("iifname {not}\"eth*\""),
        19 => format!("iifname {not}{{ \"lo\", \"eth1\" }}"),
        20 => format!("iif {not}\"lo\""),
        21 => "ct state new".to_owned(),
        22 => "ct state established,related".to_owned(),
        23 => format!("ct state {not}{{ new, untracked }}"),
        24 => "ct state != established".to_owned(),
        25 => "tcp flags syn".to_owned(),
        26 => format!("tcp flags & (fin|syn|rst|ack) {} syn", random.one(&["==", "!="])),
        27 => format!("meta l4proto {not}{}", random.one(&["tcp", "udp", "{ tcp, udp }"])),
        28 => format!("meta nfproto {}", random.one(&["ipv4", "ipv6"])),
        29 => format!("ip saddr . tcp dport {not}@pairs"),
        30 => format!("ip saddr . tcp dport {not}@areas"),
        31 => format!("meta l4proto . th dport {not}@services"),
        32 => format!("fib daddr type {not}local"),
        33 => format!("meta mark {not}0x{}", 1 + random.below(3)),
        34 => format!("iifname . ip saddr {not}{{ \"eth0\" . {source}, \"lo\" . {other} }}"),
        35 => "ip protocol tcp".to_owned(),
        36 => random.one(vocabulary::NFT_OF_IPV6).to_owned(),
        _ => random.one(vocabulary::NFT_TOLD).to_owned(),
    }
}

fn nft_matches(random: &mut Random) -> String {
    let count = random.below(3);
    // What cannot be told is a smaller part of what people write.
    let mut all: Vec<String> = Vec::new();
    while all.len() < count {
        let next = nft_match(random);
        if !next.contains("mark") || random.chance(15) {
            all.push(next);
        }
    }
    if random.chance(2) {
        all.push("limit rate 10/second burst 5 packets".to_owned());
    }
    all.join(" ")
}

fn nft_end(random: &mut Random, last: usize, chain: usize) -> String {
    let count = random.below(3);
    let next = chain + 1 + random.below(2);
    let key = random.one(&[
        "ip saddr",
        "ip saddr",
        "ip daddr",
        "ip saddr . tcp dport",
        "ip saddr and 255.255.255.0",
        "ip saddr . ip daddr",
    ]);
    let set = match key {
        "ip saddr" => "by_source",
        "ip daddr" => "by_destination",
        "ip saddr . tcp dport" => "by_service",
        "ip saddr . ip daddr" => "by_both",
        _ => "by_network",
    };
    match random.below(20) {
        0..=4 => {
            let add = random.one(&["add", "update"]);
            let end = random.one(&["drop", "drop", "reject with tcp reset"]);
            format!("{add} @{set}{} {{ {key} ct count over {count} }} {end}", random.below(2))
        }
        5 | 6 => format!("ct count over {count} drop"),
        7 => format!("ct count {} accept", count + 1),
        8 => format!("meter m{} {{ {key} ct count over {count} }} drop", random.below(100_000)),
        9 | 10 => "accept".to_owned(),
        11 => "drop".to_owned(),
        12 => "return".to_owned(),
        13 | 14 if next <= last => format!("jump c{next}"),
        15 if next <= last => format!("goto c{next}"),
        16 if chain + 2 <= last => format!(
            "tcp dport vmap {{ 80 : jump c{}, 443 : {}, 8000-8100 : goto c{} }}",
            chain + 1,
            random.one(&["accept", "drop", "return", "continue"]),
            chain + 2
        ),
        17 => format!(
            "ip saddr vmap {{ 198.51.100.0/25 : {}, {} : accept, * : continue }}",
            random.one(&["return", "continue", "accept"]),
            SOURCES[5 + random.below(5)]
        ),
        18 => format!("meta mark set 0x{}", 1 + random.below(3)),
        _ => "counter".to_owned(),
    }
}

/// A rule set for `nft -f`.
pub fn nft(random: &mut Random) -> String {
    const LAST: usize = 4;
    let mut text = String::from("table inet fw {\n");
    let (a, b, c) = (random.source(), random.source(), random.source());
    let (port, other) = (random.port(), random.port());
    let mut sets = format!(
        "set allow {{ type ipv4_addr; elements = {{ {a}, {b} }}; }}\n\
         set nets {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {c}, 198.51.100.2/31 }}; }}\n\
         set empty {{ type ipv4_addr; }}\n\
         set pairs {{ type ipv4_addr . inet_service; elements = {{ {a} . {port}, {c} . {other} }}; }}\n\
         set areas {{ type ipv4_addr . inet_service; flags interval; \
         elements = {{ 198.51.100.0/25 . {port}, 203.0.113.5 . 1-1000 }}; }}\n"
    );
    for number in 0..2 {
        for (name, kind) in [
            ("by_source", "ipv4_addr"),
            ("by_network", "ipv4_addr"),
            ("by_destination", "ipv4_addr"),
            ("by_service", "ipv4_addr . inet_service"),
            ("by_both", "ipv4_addr . ipv4_addr"),
        ] {
            writeln!(sets, "set {name}{number} {{ type {kind}; flags dynamic; size 65535; }}")
                .unwrap();
        }
    }
    for set in sets.lines() {
        let (name, rest) = set.split_once(" {").unwrap();
        let words = rest.split(' ').map(|word| six_word(word).unwrap_or_else(|| word.to_owned()));
        let rest = words.collect::<Vec<_>>().join(" ").replace("ipv4_addr", "ipv6_addr");
        writeln!(text, "{set}\n{name}_6 {{{rest}").unwrap();
    }
    write!(
        text,
        "set ports {{ type inet_service; flags interval; elements = {{ {port}, 1000-2000 }}; }}\n\
         set services {{ type inet_proto . inet_service; flags interval;\n\
         elements = {{ tcp . {port}, udp . 1-9000 }}; }}\n"
    )
    .unwrap();
    for chain in (1..=LAST).rev() {
        writeln!(text, "chain c{chain} {{").unwrap();
        rules(random, &mut text, LAST, chain);
        text += "}\n";
    }
    if random.chance(20) {
        let port = random.port();
        writeln!(
            text,
            "chain raw {{ type filter hook prerouting priority raw;\n\
             ip saddr {} tcp dport {port} notrack\n}}",
            random.source()
        )
        .unwrap();
    }
    let bases = [("mangle", "prerouting", "mangle"), ("input", "input", "filter")];
    let later = ("later", "input", "filter + 10");
    for (name, hook, priority) in bases.into_iter().chain(random.chance(30).then_some(later)) {
        if name == "mangle" && random.chance(60) {
            continue;
        }
        let policy = if random.chance(25) { "drop" } else { "accept" };
        writeln!(
            text,
            "chain {name} {{ type filter hook {hook} priority {priority}; policy {policy};\n\
             arp operation request accept"
        )
        .unwrap();
        text.truncate(text.len() - "arp operation request accept\n".len());
        // Everything but opening packets passes: the play is about those.
        text += "tcp flags & (syn|ack) != syn accept\n";
        rules(random, &mut text, LAST, 0);
        text += "}\n";
    }
    text + "}\n"
}

fn rules(random: &mut Random, text: &mut String, last: usize, chain: usize) {
    for _ in 0..1 + random.below(5) {
        let matches = nft_matches(random);
        let mut end = nft_end(random, last, chain);
        // What ends everything for everybody leaves nothing to see.
        if matches.is_empty() && ["accept", "drop"].contains(&end.as_str()) {
            end = "counter".to_owned();
        }
        let mut rule = format!("{matches} {end}");
        // What excludes itself is no rule to nft.
        if rule.matches("ip ").count() > 0 {
            rule = rule.replace("nfproto ipv6", "nfproto ipv4");
        }
        if rule.contains("tcp ") {
            rule = rule.replace("l4proto udp", "l4proto tcp").replace("!= tcp", "!= udp");
            rule = rule.replace("l4proto { tcp, udp }", "l4proto tcp");
            rule = rule.replace("l4proto != { tcp, udp }", "l4proto != udp");
        }
        let by_six = if random.chance(45) { six_rule(&rule) } else { None };
        // What names both families is no rule to nft.
        let is_mixed = |rule: &str| rule.contains("ip ") && rule.contains("ip6 ");
        let rule = by_six.unwrap_or(rule);
        if !is_mixed(&rule) {
            writeln!(text, "{rule}").unwrap();
        }
    }
}

/// What an iptables rule may ask.
fn xt_match(random: &mut Random) -> String {
    let not = if random.chance(25) { "! " } else { "" };
    let (source, port) = (random.source(), random.port());
    match random.below(27) {
        0 | 1 => format!("{not}-s {source}/32"),
        2 => format!("{not}-s 198.51.100.128/25"),
        3 => format!("{not}-d {}/32", SERVERS[random.below(2)]),
        4 | 5 => format!("-p tcp -m tcp {not}--dport {port}"),
        6 => format!("-p tcp -m tcp {not}--dport 1:{}", 100 + random.below(9000)),
        7 => format!("-p tcp -m multiport {not}--dports {port},22,8000:8100"),
        8 => format!("-p tcp -m multiport {not}--sports 1:1023"),
        9 => format!("{not}-i eth0"),
        10 => format!("{not}-i eth+"),
        11 => format!("{not}-i lo"),
        12 => "-m conntrack --ctstate NEW".to_owned(),
        13 => "-m conntrack --ctstate RELATED,ESTABLISHED".to_owned(),
        14 => format!("-m conntrack {not}--ctstate NEW,UNTRACKED"),
        15 => format!("-p tcp -m tcp {not}--syn"),
        16 => "-p udp -m udp --dport 80".to_owned(),
        17 => format!("-m iprange {not}--src-range 203.0.113.0-203.0.113.{}", random.below(64)),
        18 => format!("-m addrtype {not}--dst-type LOCAL"),
        19 => format!("-p tcp -m conntrack {not}--ctorigdstport {port} --ctdir ORIGINAL"),
        20 => format!("-m mark {not}--mark 0x{}", 1 + random.below(3)),
        21 => "-m state --state NEW".to_owned(),
        _ => random.one(vocabulary::XT_TOLD).to_owned(),
    }
}

fn xt_rule(random: &mut Random, chain: usize, last: usize) -> String {
    let mut protocol = String::new();
    let mut rest: Vec<String> = Vec::new();
    for _ in 0..random.below(3) {
        let next = xt_match(random);
        if next.contains("-m mark") && random.chance(85) {
            continue;
        }
        let flag = |what: &str| next.split(' ').find(|word| *word == what).map(str::to_owned);
        // One option of each kind in a rule.
        let again = rest.iter().any(|known| {
            ["-s", "-d", "-i", "tcp", "udp", "multiport", "conntrack", "state"]
                .iter()
                .any(|kind| flag(kind).is_some() && known.split(' ').any(|word| word == *kind))
        });
        if !again {
            rest.push(next);
        }
    }
    if rest.iter().any(|m| m.starts_with("-p udp")) {
        rest.retain(|m| !m.starts_with("-p tcp"));
    }
    if rest.iter().any(|m| m.starts_with("-p tcp")) {
        protocol = "-p tcp ".to_owned();
        rest = rest.iter().map(|m| m.trim_start_matches("-p tcp ").to_owned()).collect();
    }
    if random.chance(2) {
        rest.push("-m limit --limit 10/second".to_owned());
    }
    let count = random.below(3);
    let side = random.one(&["saddr", "saddr", "daddr"]);
    let mask = random.one(&["32", "32", "24", "0", "25"]);
    let next = chain + 1 + random.below(2);
    let end = match random.below(16) {
        0..=5 => {
            protocol = "-p tcp ".to_owned();
            rest.retain(|m| !m.starts_with("-p "));
            let how = if random.chance(75) { "above" } else { "upto" };
            let end = match how {
                "above" => random.one(&["DROP", "DROP", "REJECT --reject-with tcp-reset"]),
                _ => random.one(&["ACCEPT", "RETURN"]),
            };
            format!(
                "-m connlimit --connlimit-{how} {count} --connlimit-mask {mask} \
                 --connlimit-{side} -j {end}"
            )
        }
        6 | 7 => "-j ACCEPT".to_owned(),
        8 => "-j DROP".to_owned(),
        9 => "-j RETURN".to_owned(),
        10 | 11 if next <= last => format!("-j c{next}"),
        12 if next <= last => format!("-g c{next}"),
        13 => format!("-j MARK --set-xmark 0x{}/0xffffffff", 1 + random.below(3)),
        _ => String::new(),
    };
    let end = match end.as_str() {
        "-j ACCEPT" | "-j DROP" if rest.is_empty() => String::new(),
        // A mark can only be set in mangle.
        end if end.contains("MARK") => String::new(),
        end => end.to_owned(),
    };
    format!("{protocol}{} {end}", rest.join(" "))
}

/// A rule set for `ip6tables-restore`.
pub fn ip6tables(random: &mut Random) -> String {
    let text = iptables(random);
    let rules = text.lines().map(|rule| {
        let mut is_mask = false;
        let words = rule.split(' ').map(|word| {
            let longer = |length: u8| if length == 0 { 0 } else { length + 96 };
            let mask = word.parse().ok().filter(|_| is_mask).map(|mask| longer(mask).to_string());
            is_mask = word == "--connlimit-mask";
            mask.or_else(|| six_word(word)).unwrap_or_else(|| word.to_owned())
        });
        words.collect::<Vec<_>>().join(" ")
    });
    rules.map(|rule| rule + "\n").collect()
}

/// A rule set for `iptables-restore`.
pub fn iptables(random: &mut Random) -> String {
    const LAST: usize = 4;
    let mut text = String::from("*raw\n:PREROUTING ACCEPT [0:0]\n");
    if random.chance(20) {
        writeln!(
            text,
            "-A PREROUTING -s {}/32 -p tcp -m tcp --dport {} -j CT --notrack",
            random.source(),
            random.port()
        )
        .unwrap();
    }
    text += "COMMIT\n";
    for (table, base) in [("mangle", "PREROUTING"), ("filter", "INPUT")] {
        let policy = if table == "filter" && random.chance(25) { "DROP" } else { "ACCEPT" };
        writeln!(text, "*{table}\n:{base} {policy} [0:0]").unwrap();
        for chain in 1..=LAST {
            writeln!(text, ":c{chain} - [0:0]").unwrap();
        }
        if table == "filter" || random.chance(40) {
            let first = "-p tcp -m tcp ! --tcp-flags SYN,ACK SYN -j ACCEPT";
            writeln!(text, "-A {base} {first}").unwrap();
            for chain in 0..=LAST {
                let name = if chain == 0 { base.to_owned() } else { format!("c{chain}") };
                for _ in 0..1 + random.below(5) {
                    let rule = xt_rule(random, chain, LAST);
                    let rule = match table {
                        // REJECT stands in the filter table alone.
                        "mangle" => rule.replace("REJECT --reject-with tcp-reset", "DROP"),
                        _ => rule,
                    };
                    writeln!(text, "-A {name} {rule}").unwrap();
                }
            }
        }
        text += "COMMIT\n";
    }
    text
}
