//! Which connections are shown, in the words of ss: `state close-wait and sport = :80`. Pure.

use std::net::IpAddr;

use ipnet::IpNet;

use super::rows::Shown;
use crate::flow::Connection;
use crate::sockdiag::State;

/// A filter; the empty one lets everything through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter(Option<Test>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    And(Box<Test>, Box<Test>),
    Or(Box<Test>, Box<Test>),
    Not(Box<Test>),
    State(State),
    Port(Side, Compare, u16),
    Address(Side, IpNet, Option<u16>),
    Process(String),
    Container(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Local,
    Remote,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compare {
    Is,
    IsNot,
    Below,
    Above,
    AtMost,
    AtLeast,
}

/// Parentheses in parentheses; a person writes two or three.
const DEPTH: usize = 32;

impl Filter {
    /// Reads one.
    ///
    /// # Errors
    /// The word that was not understood.
    pub fn parse(text: &str) -> Result<Self, String> {
        let words = words(text);
        if words.is_empty() {
            return Ok(Self(None));
        }
        let mut parser = Parser { words: &words, place: 0 };
        let test = parser.or(0)?;
        match parser.peek() {
            None => Ok(Self(Some(test))),
            Some(word) => Err(format!("'{word}' is not understood here")),
        }
    }

    /// Whether a connection is shown.
    pub fn admits(&self, connection: &Shown) -> bool {
        self.0.as_ref().is_none_or(|test| test.holds(connection))
    }
}

impl Test {
    fn holds(&self, connection: &Shown) -> bool {
        let Connection { local, remote } = connection.view.connection;
        let end = |side| if side == Side::Local { local } else { remote };
        let holder = connection.holder.as_ref();
        match self {
            Self::And(one, other) => one.holds(connection) && other.holds(connection),
            Self::Or(one, other) => one.holds(connection) || other.holds(connection),
            Self::Not(test) => !test.holds(connection),
            Self::State(state) => connection.view.socket.is_some_and(|it| it.state == *state),
            Self::Port(side, compare, wanted) => {
                let port = end(*side).port();
                match compare {
                    Compare::Is => port == *wanted,
                    Compare::IsNot => port != *wanted,
                    Compare::Below => port < *wanted,
                    Compare::Above => port > *wanted,
                    Compare::AtMost => port <= *wanted,
                    Compare::AtLeast => port >= *wanted,
                }
            }
            Self::Address(side, net, port) => {
                let end = end(*side);
                net.contains(&end.addr()) && port.is_none_or(|port| port == end.port())
            }
            Self::Process(name) => {
                holder.is_some_and(|it| it.command == *name || it.pid.to_string() == *name)
            }
            Self::Container(name) => holder.and_then(|it| it.container.as_ref()) == Some(name),
        }
    }
}

/// Parentheses and signs of comparison stand for themselves, with or without blanks.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let is_sign = |c: char| "()=!<>&|".contains(c);
    let mut last = ' ';
    for c in text.chars() {
        let joins = match words.last() {
            Some(_) if last.is_whitespace() || c.is_whitespace() => false,
            Some(word) if is_sign(c) && is_sign(last) => {
                !"()".contains(c) && !"()".contains(last) && word.len() < 2
            }
            Some(_) => is_sign(c) == is_sign(last),
            None => false,
        };
        match words.last_mut() {
            Some(word) if joins => word.push(c),
            _ if c.is_whitespace() => {}
            _ => words.push(c.to_string()),
        }
        last = c;
    }
    words
}

struct Parser<'w> {
    words: &'w [String],
    place: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&str> {
        self.words.get(self.place).map(String::as_str)
    }

    fn next(&mut self, wanted: &str) -> Result<String, String> {
        let word = self.words.get(self.place).cloned();
        self.place += 1;
        word.ok_or_else(|| format!("{wanted} is missing at the end"))
    }

    fn take(&mut self, words: &[&str]) -> bool {
        let is_it = self.peek().is_some_and(|word| words.contains(&word));
        self.place += usize::from(is_it);
        is_it
    }

    fn or(&mut self, depth: usize) -> Result<Test, String> {
        let mut test = self.and(depth)?;
        while self.take(&["or", "|", "||"]) {
            test = Test::Or(Box::new(test), Box::new(self.and(depth)?));
        }
        Ok(test)
    }

    /// Tests behind each other without a word between them are all to hold, as in ss.
    fn and(&mut self, depth: usize) -> Result<Test, String> {
        let mut test = self.one(depth)?;
        loop {
            let is_named = self.take(&["and", "&", "&&"]);
            let ends = matches!(self.peek(), None | Some("or" | "|" | "||" | ")"));
            if ends && !is_named {
                return Ok(test);
            }
            test = Test::And(Box::new(test), Box::new(self.one(depth)?));
        }
    }

    fn one(&mut self, depth: usize) -> Result<Test, String> {
        if depth > DEPTH {
            return Err("too many parentheses".to_owned());
        }
        if self.take(&["not", "!"]) {
            return Ok(Test::Not(Box::new(self.one(depth + 1)?)));
        }
        if self.take(&["("]) {
            let test = self.or(depth + 1)?;
            return if self.take(&[")"]) { Ok(test) } else { Err("')' is missing".to_owned()) };
        }
        match self.next("a test")?.as_str() {
            "state" => {
                let name = self.next("a state")?;
                name.parse()
                    .map(Test::State)
                    .map_err(|error: crate::sockdiag::UnknownState| error.to_string())
            }
            "sport" => self.port(Side::Local),
            "dport" => self.port(Side::Remote),
            "src" => self.address(Side::Local),
            "dst" => self.address(Side::Remote),
            "process" => Ok(Test::Process(self.next("a process")?)),
            "container" => Ok(Test::Container(self.next("a container")?)),
            word => Err(format!(
                "'{word}' is not understood; there are state, sport, dport, src, dst, process, container"
            )),
        }
    }

    fn port(&mut self, side: Side) -> Result<Test, String> {
        let compare = match self.peek() {
            Some("=" | "==" | "eq") => Compare::Is,
            Some("!=" | "ne" | "neq") => Compare::IsNot,
            Some("<" | "lt") => Compare::Below,
            Some(">" | "gt") => Compare::Above,
            Some("<=" | "le" | "leq") => Compare::AtMost,
            Some(">=" | "ge" | "geq") => Compare::AtLeast,
            _ => return Err("sport and dport want a comparison: sport = :80".to_owned()),
        };
        self.place += 1;
        let word = self.next("a port")?;
        let port = word.trim_start_matches(':').parse();
        port.map(|port| Test::Port(side, compare, port)).map_err(|_| format!("'{word}' is no port"))
    }

    fn address(&mut self, side: Side) -> Result<Test, String> {
        self.take(&["=", "==", "eq"]);
        let word = self.next("an address")?;
        let (net, port) = address(&word).ok_or_else(|| format!("'{word}' is no address"))?;
        Ok(Test::Address(side, net, port))
    }
}

/// `198.51.100.0/24`, `198.51.100.7:4000`, `[2001:db8::7]:4000`, `2001:db8::/64`
fn address(word: &str) -> Option<(IpNet, Option<u16>)> {
    if let Ok(end) = word.parse::<std::net::SocketAddr>() {
        return Some((IpNet::from(end.ip()), Some(end.port())));
    }
    let bare = word.trim_start_matches('[').trim_end_matches(']');
    let net = bare.parse::<IpNet>().ok();
    net.or_else(|| bare.parse::<IpAddr>().ok().map(IpNet::from)).map(|net| (net.trunc(), None))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::connection;
    use super::*;

    fn admits(text: &str, peer: &str, port: u16, state: State) -> bool {
        let filter = Filter::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        filter.admits(&connection(peer, port, state, 1))
    }

    #[test]
    fn filters_are_those_of_ss() {
        let half_closed = |text| admits(text, "198.51.100.7:4000", 80, State::CloseWait);
        for text in [
            "",
            "state close-wait",
            "state close-wait and sport = :80",
            "state close-wait sport = 80",
            "( sport = :80 or sport = :443 )",
            "(sport=:80|sport=:443)&dport>=:4000",
            "not state established",
            "! ( dst 203.0.113.0/24 )",
            "dst 198.51.100.7",
            "dst 198.51.100.7:4000",
            "dst = 198.51.100.0/24 and src 192.0.2.1:80",
            "process nginx",
            "process 7",
        ] {
            assert!(half_closed(text), "{text}");
        }
        for text in [
            "state established",
            "sport != :80",
            "sport = :443 or dport < :4000",
            "dst 198.51.100.7:4001",
            "dst 2001:db8::/32",
            "process apache2",
            "container web",
        ] {
            assert!(!half_closed(text), "{text}");
        }
        assert!(admits("dst [2001:db8::7]:5", "[2001:db8::7]:5", 80, State::Established));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, word) in [
            ("state closed-wait", "close-wait"),
            ("sport :80", "comparison"),
            ("sport = :http", ":http"),
            ("( state close-wait", "')'"),
            ("state close-wait )", "')'"),
            ("dst nowhere", "nowhere"),
            ("colour red", "colour"),
            ("state", "missing"),
            ("state close-wait and", "missing"),
        ] {
            let error = Filter::parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(Filter::parse(&"(".repeat(100_000)).is_err());
        assert!(Filter::parse(&"! ".repeat(100_000)).is_err());
    }
}
