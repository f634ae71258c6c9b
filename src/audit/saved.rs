//! Reads what `ss -tan` (with any of `-o -i -e -p`) and `conntrack -L` (with any `-o`) print. Pure.
//!
//! So a case can be sent in and looked at without root, and on another machine.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use super::report::Seen;
use crate::conntrack::uapi::IP_CT_TCP_FLAG_BE_LIBERAL;
use crate::conntrack::{Entry, Tcp, TcpState, Zone};
use crate::flow::{Endpoint, FourTuple};
use crate::reconcile::observe::join;
use crate::reconcile::policy::{Policy, Scope};
use crate::sockdiag::{Cookie, Socket, State};

/// A line that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: String,
}

/// Values, and the lines that gave none.
#[derive(Clone, Debug)]
pub struct Parsed<T> {
    /// What could be read.
    pub values: Vec<T>,
    /// What could not.
    pub malformed: Vec<Malformed>,
}

type Line<T> = Result<Option<T>, String>;

fn parse<T>(text: &str, line: impl Fn(usize, &str) -> Line<T>) -> Parsed<T> {
    let mut parsed = Parsed { values: Vec::new(), malformed: Vec::new() };
    for (index, content) in text.lines().enumerate() {
        match line(index + 1, content) {
            Ok(value) => parsed.values.extend(value),
            Err(what) => parsed.malformed.push(Malformed { line: index + 1, what }),
        }
    }
    parsed
}

/// Sockets as `ss -tan` prints them; headings and lines of details are passed over.
pub fn sockets(text: &str) -> Parsed<Socket> {
    parse(text, socket)
}

/// TCP entries as `conntrack -L` prints them; other protocols are passed over.
pub fn entries(text: &str) -> Parsed<Entry> {
    parse(text, |_, line| entry(line))
}

/// Puts saved tables together as a look at their host would.
pub fn seen(sockets: &[Socket], entries: &[Entry], policy: &Policy) -> (Seen, Scope) {
    let (listeners, connected): (Vec<_>, Vec<_>) =
        sockets.iter().partition(|socket: &&Socket| socket.state == State::Listen);
    let scope = policy.scope(&listeners);
    // The text does not say that an entry was picked up midway; one that begins at a served port
    // was.
    let marked = entries.iter().map(|entry| {
        let is_reversed = scope.ports.contains(&entry.orig.src.port());
        let flags = if is_reversed { [IP_CT_TCP_FLAG_BE_LIBERAL; 2] } else { [0; 2] };
        Entry { tcp: entry.tcp.map(|tcp| Tcp { flags, ..tcp }), ..*entry }
    });
    let local: HashSet<IpAddr> = sockets.iter().map(|socket| socket.local.addr()).collect();
    let mut snapshot = join(marked, connected, &scope, policy);
    snapshot.views.retain(|view| view.socket.is_some() || local.contains(&view.flow.src.addr()));
    let mut seen =
        Seen { netns: "saved tables".to_owned(), snapshot, listeners, ..Seen::default() };
    seen.ledger.note(&seen.snapshot);
    seen.limiter.unread.push("rules are not part of saved tables".to_owned());
    (seen, scope)
}

/// `CLOSE-WAIT 1 0 192.0.2.1:80 198.51.100.7:20000 uid:33 ino:123 sk:1a`
fn socket(number: usize, line: &str) -> Line<Socket> {
    // Details of the line before, a heading, or nothing.
    if line.starts_with(char::is_whitespace) || line.is_empty() || line.starts_with("State") {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let mut word = |what: &str| words.next().ok_or_else(|| format!("no {what}"));
    let name = word("state")?;
    let state = match name {
        "ESTAB" => State::Established,
        "UNCONN" => State::Close,
        "LISTEN" => State::Listen,
        _ => name.to_lowercase().parse().map_err(|_| format!("unknown state '{name}'"))?,
    };
    let queue = |text: &str| text.parse().map_err(|_| format!("'{text}' is no queue length"));
    let recv_queue = queue(word("Recv-Q")?)?;
    let send_queue = queue(word("Send-Q")?)?;
    let local = endpoint(word("local address")?)?;
    let remote = endpoint(word("peer address")?)?;
    let rest: Vec<&str> = words.collect();
    let value = |key: &str| rest.iter().find_map(|word| word.strip_prefix(key));
    let cookie = value("sk:").and_then(|text| u64::from_str_radix(text, 16).ok());
    Ok(Some(Socket {
        local,
        remote,
        state,
        inode: value("ino:").and_then(|text| text.parse().ok()).unwrap_or(0),
        uid: value("uid:").and_then(|text| text.parse().ok()).unwrap_or(0),
        // Without -e any number that no other line has.
        cookie: Cookie(cookie.unwrap_or(number as u64 | 1 << 63)),
        interface: 0,
        recv_queue,
        send_queue,
    }))
}

/// An address as ss prints it: `*` for any, a device behind `%`.
fn endpoint(text: &str) -> Result<Endpoint, String> {
    let wrong = || format!("'{text}' is no numeric address and port (ss needs -n)");
    let (address, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let address = address.split('%').next().unwrap_or(address);
    let address = match address.trim_start_matches('[').trim_end_matches(']') {
        "*" => "::",
        address => address,
    };
    let port = if port == "*" { 0 } else { port.parse().map_err(|_| wrong())? };
    Ok(Endpoint::new(address.parse().map_err(|_| wrong())?, port))
}

/// `[ipv4 2] tcp 6 117 CLOSE_WAIT src=... dst=... sport=... dport=... src=... [ASSURED] mark=0`
fn entry(line: &str) -> Line<Entry> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut rest = words.as_slice();
    if let [family, _, more @ ..] = rest
        && matches!(*family, "ipv4" | "ipv6")
    {
        rest = more;
    }
    let ["tcp", "6", rest @ ..] = rest else {
        // Another protocol has its number in second place; anything else is no entry.
        let is_entry = rest.get(1).is_some_and(|word| word.parse::<u8>().is_ok());
        let is_comment = words.is_empty() || line.starts_with("conntrack v");
        return if is_entry || is_comment { Ok(None) } else { Err("no entry".to_owned()) };
    };
    let every = |key: &str| -> Vec<&str> {
        rest.iter().filter_map(|word| word.strip_prefix(key)).collect()
    };
    let (src, dst, sport, dport) = (every("src="), every("dst="), every("sport="), every("dport="));
    let end = |addr: Option<&&str>, port: Option<&&str>, what: &str| {
        let wrong = || format!("no {what}");
        let addr = addr.and_then(|text| text.parse().ok()).ok_or_else(wrong)?;
        let port = port.and_then(|text| text.parse().ok()).ok_or_else(wrong)?;
        Ok::<_, String>(Endpoint::new(addr, port))
    };
    let tuple = |index: usize, what: &str| {
        Ok::<_, String>(FourTuple::new(
            end(src.get(index), sport.get(index), &format!("source of the {what} tuple"))?,
            end(dst.get(index), dport.get(index), &format!("destination of the {what} tuple"))?,
        ))
    };
    let (orig, reply) = (tuple(0, "original")?, tuple(1, "reply")?);
    let number = |key: &str| every(key).first().and_then(|text| text.parse::<u16>().ok());
    let zone = match number("zone=") {
        Some(id) => Zone::both(id),
        None => Zone {
            orig: number("zone-orig=").unwrap_or(0),
            reply: number("zone-reply=").unwrap_or(0),
        },
    };
    let mut entry = Entry { reply, ..Entry::plain(orig, zone) };
    // What a flow table has taken over shows neither.
    if let [timeout, name, ..] = rest
        && let Ok(seconds) = timeout.parse()
    {
        let state = state(name).ok_or_else(|| format!("unknown state '{name}'"))?;
        entry.timeout = Some(Duration::from_secs(seconds));
        entry.tcp = Some(Tcp { state, wscale: [0; 2], flags: [0; 2] });
    }
    Ok(Some(entry))
}

fn state(name: &str) -> Option<TcpState> {
    let name = name.to_lowercase().replace('_', "-");
    TcpState::ALL.into_iter().find(|state| state.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_with_and_without_details() {
        let text = "State      Recv-Q Send-Q Local Address:Port  Peer Address:Port Process\n\
            LISTEN     0      511    *:80                *:*\n\
            CLOSE-WAIT 422    0      [::ffff:192.0.2.1]:80 [::ffff:198.51.100.7]:4000 \
            users:((\"apache2\",pid=12,fd=9)) uid:33 ino:4711 sk:1a <->\n\
            \t cubic rto:204 mss:1448\n\
            ESTAB      0      0      192.0.2.1%eth0:443  203.0.113.9:5000\n\
            FIN-WAIT-2 0      0      192.0.2.1:http      203.0.113.9:5001\n\
            HALF-SHUT  0      0      192.0.2.1:80        203.0.113.9:5002\n";
        let parsed = sockets(text);
        let [listener, half, open] = parsed.values.as_slice() else { panic!("{parsed:?}") };
        assert_eq!((listener.state, listener.local.port()), (State::Listen, 80));
        assert_eq!(half.flow().to_string(), "192.0.2.1:80 > 198.51.100.7:4000");
        assert_eq!(
            (half.inode, half.uid, half.cookie, half.recv_queue),
            (4711, 33, Cookie(26), 422)
        );
        assert_eq!(open.local.to_string(), "192.0.2.1:443");
        let lines: Vec<_> = parsed.malformed.iter().map(|malformed| malformed.line).collect();
        assert_eq!(lines, [6, 7]);
        assert!(parsed.malformed[0].what.contains("-n"), "{parsed:?}");
    }

    #[test]
    fn entries_are_read_in_either_form() {
        let text = "ipv4     2 tcp      6 117 CLOSE_WAIT src=198.51.100.7 dst=192.0.2.1 sport=4000 \
            dport=80 src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=4000 [ASSURED] mark=0 zone=3 use=1\n\
            tcp      6 9 CLOSE src=2001:db8:1::7 dst=2001:db8::1 sport=4000 dport=80 \
            src=2001:db8::1 dst=2001:db8:1::7 sport=80 dport=4000 mark=0 use=1\n\
            udp      17 29 src=192.0.2.2 dst=192.0.2.1 sport=1 dport=53 [UNREPLIED] src=192.0.2.1 \
            dst=192.0.2.2 sport=53 dport=1 mark=0 use=1\n\
            conntrack v1.4.8 (conntrack-tools): 3 flow entries have been shown.\n\
            tcp      6 9 CLOSE src=2001:db8:1::7 dst=2001:db8::1 sport=4000\n\
            tcp      6 9 HALF src=192.0.2.2 dst=192.0.2.1 sport=1 dport=53 src=192.0.2.1 \
            dst=192.0.2.2 sport=53 dport=1\nrubbish\n";
        let parsed = entries(text);
        let [translated, plain] = parsed.values.as_slice() else { panic!("{parsed:?}") };
        assert!(translated.is_translated() && translated.zone == Zone::both(3));
        assert_eq!(translated.timeout, Some(Duration::from_secs(117)));
        assert_eq!(plain.state(), Some(TcpState::Close));
        let lines: Vec<_> = parsed.malformed.iter().map(|malformed| malformed.line).collect();
        assert_eq!(lines, [5, 6, 7]);
    }
}
