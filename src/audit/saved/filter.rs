//! What a command of a text has asked for: of an entry that it would not have shown nothing is known. Pure.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::flow::Connection;

/// A command that has listed entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    sought: Vec<Sought>,
    /// The one family that was asked for: IPv4, or not.
    family: Option<bool>,
    /// It leaves entries out, and the text does not show which.
    pub leaves_out: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Sought {
    Address(IpNet),
    Port(u16),
    /// A `grep`: all numbers of one of these stand in the line.
    Text(Vec<Vec<String>>),
}

/// Options of `conntrack` that name an address or a port.
const OPTIONS: [&str; 16] = [
    "-s",
    "--src",
    "--orig-src",
    "-d",
    "--dst",
    "--orig-dst",
    "-r",
    "--reply-src",
    "-q",
    "--reply-dst",
    "--sport",
    "--orig-port-src",
    "--dport",
    "--orig-port-dst",
    "--reply-port-src",
    "--reply-port-dst",
];
/// Those that ask for what sockets do not have.
const OTHERS: [&str; 18] = [
    "--state",
    "--status",
    "-u",
    "--mark",
    "-m",
    "--label",
    "-l",
    "--zone",
    "-w",
    "--orig-zone",
    "--reply-zone",
    "--src-nat",
    "-n",
    "--dst-nat",
    "-g",
    "--any-nat",
    "-j",
    "--id",
];
const GREPS: [&str; 4] = ["grep", "egrep", "fgrep", "rg"];
/// What passes all lines on.
const WHOLE: [&str; 9] = ["cat", "column", "less", "more", "nl", "sort", "tee", "uniq", "xclip"];

impl Filter {
    /// Of a command that lists entries; `None` of others.
    pub fn of(command: &str) -> Option<Self> {
        let pieces = pieces(command);
        let is_grep = |piece: &Vec<String>| piece.iter().any(|word| GREPS.contains(&word.as_str()));
        if !command.contains("conntrack") && !pieces.iter().any(is_grep) {
            return None;
        }
        let mut filter = Self::default();
        for (place, piece) in pieces.iter().enumerate() {
            let words: Vec<&str> = piece.iter().map(String::as_str).collect();
            if let Some(at) = words.iter().position(|word| GREPS.contains(word)) {
                filter.grep(words.get(at + 1..).unwrap_or_default());
            } else if words.iter().any(|word| word.rsplit('/').next() == Some("conntrack")) {
                filter.options(&words);
            } else if place > 0 && !words.first().is_some_and(|word| WHOLE.contains(word)) {
                filter.leaves_out = true;
            }
        }
        Some(filter)
    }

    fn options(&mut self, words: &[&str]) {
        let words: Vec<&str> = words.iter().flat_map(|word| word.split('=')).collect();
        self.leaves_out |= words.iter().any(|word| OTHERS.contains(word));
        for pair in words.windows(2) {
            let [option, value] = pair else { continue };
            if matches!(*option, "-f" | "--family") {
                self.family = Some(*value == "ipv4");
            }
            if !OPTIONS.contains(option) {
                continue;
            }
            let address = || value.parse::<IpAddr>().map(IpNet::from).or_else(|_| value.parse());
            match value.parse() {
                Ok(port) => self.sought.push(Sought::Port(port)),
                Err(_) => match address() {
                    Ok(net) => self.sought.push(Sought::Address(net)),
                    Err(_) => self.leaves_out = true,
                },
            }
        }
    }

    fn grep(&mut self, words: &[&str]) {
        let mut words = words.iter();
        let mut pattern = None;
        while let Some(word) = words.next() {
            match word.strip_prefix('-') {
                Some("A" | "B" | "C" | "m") => _ = words.next(),
                Some(flags) => {
                    self.leaves_out |=
                        !flags.starts_with('-') && flags.contains(['v', 'w', 'x', 'm', 'c', 'o']);
                }
                None => pattern = pattern.or(Some(*word)),
            }
        }
        let pattern = pattern.unwrap_or_default().replace("\\|", "|");
        let ways: Vec<_> = pattern.split('|').map(numbers).collect();
        if pattern.contains(['[', ']', '*', '+', '?', '(', ')', '\\', '^', '$'])
            || ways.iter().any(Vec::is_empty)
        {
            self.leaves_out = true;
        } else {
            self.sought.push(Sought::Text(ways));
        }
    }

    /// Whether it has searched what `conntrack` printed, and counted, for numbers.
    pub fn is_search(&self) -> bool {
        self.sought.iter().any(|sought| matches!(sought, Sought::Text(_)))
    }

    /// Whether it would have shown the entry of this connection.
    pub fn may_show(&self, connection: Connection) -> bool {
        let ends = [connection.local, connection.remote];
        let stands = |number: &String| {
            let stands_in = |text: String| text.contains(number.as_str());
            ends.iter()
                .any(|end| stands_in(end.addr().to_string()) || stands_in(end.port().to_string()))
        };
        let is_met = |sought: &Sought| match sought {
            Sought::Address(net) => ends.iter().any(|end| net.contains(&end.addr())),
            Sought::Port(port) => ends.iter().any(|end| end.port() == *port),
            Sought::Text(ways) => ways.iter().any(|all| all.iter().all(stands)),
        };
        self.family.is_none_or(|ipv4| connection.sent().is_ipv4() == ipv4)
            && self.sought.iter().all(is_met)
    }
}

/// The words of each program of a pipeline, without their quotes.
fn pieces(command: &str) -> Vec<Vec<String>> {
    let mut pieces = vec![Vec::new()];
    let (mut word, mut quote) = (String::new(), None);
    for letter in command.chars().chain([' ']) {
        match (quote, letter) {
            (Some(open), _) if letter == open => quote = None,
            (None, '\'' | '"') => quote = Some(letter),
            (None, _) if letter == '|' || letter.is_whitespace() => {
                if !word.is_empty() {
                    pieces.last_mut().into_iter().for_each(|all| all.push(word.clone()));
                    word.clear();
                }
                if letter == '|' {
                    pieces.push(Vec::new());
                }
            }
            _ => word.push(letter),
        }
    }
    pieces
}

/// Addresses and ports in a pattern.
fn numbers(pattern: &str) -> Vec<String> {
    let is_part = |letter: char| letter.is_ascii_hexdigit() || matches!(letter, '.' | ':');
    let words = pattern.split(|letter: char| !is_part(letter));
    let words = words.map(|word| word.trim_matches(['.', ':']));
    let is_number = |word: &&str| {
        word.parse::<u16>().is_ok()
            || word.contains(['.', ':']) && word.contains(|letter: char| letter.is_ascii_digit())
    };
    words.filter(is_number).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Endpoint;

    fn shows(command: &str, remote: &str) -> Option<bool> {
        let end = |text: &str| text.parse::<std::net::SocketAddr>().expect("an end");
        let end = |text: &str| Endpoint::new(end(text).ip(), end(text).port());
        let connection = Connection { local: end("192.0.2.1:8080"), remote: end(remote) };
        let filter = Filter::of(command).expect("a command that lists entries");
        (!filter.leaves_out).then(|| filter.may_show(connection))
    }

    #[test]
    fn options_name_whole_addresses_and_ports() {
        for (command, expected) in [
            ("conntrack -L", true),
            ("conntrack -L -s 198.51.100.7", false),
            ("conntrack -L -s 198.51.100.70", true),
            ("conntrack -L --src=198.51.100.0/24", true),
            ("conntrack -L --dport 80", false),
            ("conntrack -L -p tcp --dport 8080", true),
            ("conntrack -L -f ipv6", false),
            ("sudo /usr/sbin/conntrack -L -f ipv4 -d 192.0.2.1 | sort -n", true),
        ] {
            assert_eq!(shows(command, "198.51.100.70:41002"), Some(expected), "{command}");
        }
    }

    #[test]
    fn a_search_shows_each_line_that_has_its_numbers() {
        for (command, expected) in [
            ("conntrack -L|grep 80", Some(true)),
            ("conntrack -L | grep dport=8080", Some(true)),
            ("conntrack -L | grep 'sport=41002 dport=80'", Some(true)),
            ("conntrack -L | grep 41003", Some(false)),
            ("conntrack -L 2>/dev/null | grep -E '443|8080' | grep 198.51", Some(true)),
            ("conntrack -L | grep -A 5 CLOSE", None),
            ("conntrack -L | grep -A5 8080", Some(true)),
            ("conntrack -L | grep -v 8080", None),
            ("conntrack -L | grep -w 80", None),
            ("conntrack -L | grep 198.51.100.7[0-9]", None),
            ("conntrack -L | head -n 20", None),
            ("conntrack -L -p tcp --state CLOSE_WAIT", None),
            ("grep 8080 /proc/net/nf_conntrack", Some(true)),
        ] {
            assert_eq!(shows(command, "198.51.100.70:41002"), expected, "{command}");
        }
        assert_eq!((Filter::of("date"), Filter::of("ss -tan")), (None, None));
    }
}
