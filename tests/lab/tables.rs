//! The server's two tables as an administrator sees them: `conntrack -L` and `ss`.
//!
//! Taken from the tools and not from ctkeep's own code: a test must not share its eyes with what
//! it tests.

use std::net::{IpAddr, SocketAddr};

use super::Lab;
use super::peer::RawConn;

/// A TCP entry of the connection tracking table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Source and destination of the direction that opened the connection.
    pub orig: (SocketAddr, SocketAddr),
    /// Source and destination of the answers.
    pub reply: (SocketAddr, SocketAddr),
    /// The kernel's name, for example `CLOSE_WAIT`.
    pub state: String,
    /// Seconds left.
    pub timeout: u64,
    pub assured: bool,
    /// The tool's line without the two words that change by themselves: the timeout, and the
    /// number of users at the moment of looking.
    pub line: String,
}

/// A TCP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    pub local: SocketAddr,
    /// Port 0 for a listener.
    pub remote: SocketAddr,
    /// As `ss state` takes it, for example `close-wait`.
    pub state: String,
}

impl Lab {
    /// All TCP entries of the server, both families.
    pub fn entries(&self) -> Vec<Entry> {
        ["ipv4", "ipv6"]
            .iter()
            .flat_map(|family| self.entry_lines(family))
            .map(|line| Entry::parse(&line).unwrap_or_else(|| panic!("conntrack line: {line}")))
            .collect()
    }

    /// The entry of one connection in the right direction.
    pub fn entry(&self, conn: &RawConn) -> Option<Entry> {
        let wanted = |entry: &Entry| entry.orig == (conn.client, conn.server);
        // To ask for it is far cheaper than the list, and finds what is in the default zone.
        let question = format!(
            "conntrack -G -p tcp -s {} -d {} --sport {} --dport {} -o id,extended",
            conn.client.ip(),
            conn.server.ip(),
            conn.client.port(),
            conn.server.port()
        );
        let answer = self.server.try_run(&question).ok();
        let asked = answer.as_deref().and_then(Entry::parse).filter(wanted);
        asked.or_else(|| self.entries().into_iter().find(wanted))
    }

    /// The entry's TCP state, for example `CLOSE_WAIT`.
    pub fn entry_state(&self, conn: &RawConn) -> Option<String> {
        self.entry(conn).map(|entry| entry.state)
    }

    /// Whether the entry is one of an open or half-closed connection.
    pub fn is_alive(&self, conn: &RawConn) -> bool {
        matches!(self.entry_state(conn).as_deref(), Some("ESTABLISHED" | "CLOSE_WAIT"))
    }

    fn entry_lines(&self, family: &str) -> Vec<String> {
        let list = format!("conntrack -L -f {family} -p tcp -o id,extended");
        let lines = self.server.output(&list);
        lines.lines().map(str::to_owned).collect()
    }

    /// All TCP sockets of the server, listeners included.
    pub fn all_sockets(&self) -> Vec<Socket> {
        let lines = self.server.output("ss -Htan");
        lines.lines().filter_map(Socket::parse).collect()
    }

    /// How many sockets of the server are in `state`, for example `close-wait`.
    pub fn sockets(&self, state: &str) -> usize {
        let sockets = self.all_sockets();
        sockets.iter().filter(|socket| socket.state == state).count()
    }

    /// How many sockets that cost the server something this source holds.
    pub fn open_sockets_of(&self, source: &str) -> usize {
        let source: IpAddr = source.parse().expect("an address");
        let sockets = self.all_sockets();
        sockets.iter().filter(|it| it.remote.ip() == source && it.is_open()).count()
    }

    /// The state of the server's socket of one connection; `None` when it is gone.
    pub fn socket_state(&self, conn: &RawConn) -> Option<String> {
        let mut sockets = self.all_sockets().into_iter();
        let ours = |socket: &Socket| (socket.local, socket.remote) == (conn.server, conn.client);
        sockets.find(ours).map(|socket| socket.state)
    }
}

impl Entry {
    /// `ipv4 2 tcp 6 117 CLOSE_WAIT src=... dst=... sport=... dport=... src=... [ASSURED] id=...`
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let every = |key: &str| -> Vec<&str> {
            let values = words.iter().filter_map(|word| word.strip_prefix(key));
            values.collect()
        };
        let (src, dst) = (every("src="), every("dst="));
        let (sport, dport) = (every("sport="), every("dport="));
        let tuple = |index: usize| {
            let source = endpoint(src.get(index)?, sport.get(index)?)?;
            Some((source, endpoint(dst.get(index)?, dport.get(index)?)?))
        };
        const TIMEOUT: usize = 4;
        let lasting = words
            .iter()
            .enumerate()
            .filter(|(index, word)| *index != TIMEOUT && !word.starts_with("use="));
        Some(Self {
            orig: tuple(0)?,
            reply: tuple(1)?,
            state: (*words.get(TIMEOUT + 1)?).to_owned(),
            timeout: words.get(TIMEOUT)?.parse().ok()?,
            assured: words.contains(&"[ASSURED]"),
            line: lasting.map(|(_, word)| *word).collect::<Vec<_>>().join(" "),
        })
    }
}

impl Socket {
    /// Whether it is established or half-closed.
    pub fn is_open(&self) -> bool {
        matches!(self.state.as_str(), "established" | "close-wait")
    }

    /// `CLOSE-WAIT 1 0 [::ffff:192.0.2.1]:80 [::ffff:198.51.100.7]:20000`
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let state = match *words.first()? {
            "ESTAB" => "established".to_owned(),
            name => name.to_lowercase(),
        };
        Some(Self { local: shown(words.get(3)?)?, remote: shown(words.get(4)?)?, state })
    }
}

fn endpoint(address: &str, port: &str) -> Option<SocketAddr> {
    Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?))
}

/// An address as ss prints it: `*` for any, IPv4 clients of an IPv6 listener as mapped, and behind
/// it the device that the socket is bound to.
fn shown(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.rsplit_once(':')?;
    let port = if port == "*" { "0" } else { port };
    let address = address.split('%').next()?;
    let address = match address.trim_start_matches('[').trim_end_matches(']') {
        "*" => "::",
        address => address,
    };
    let address: IpAddr = address.parse().ok()?;
    Some(SocketAddr::new(address.to_canonical(), port.parse().ok()?))
}
