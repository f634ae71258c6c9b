//! One line of `ss`, with and without Netid and State. Pure.

use super::address::{endpoint, is_endpoint};
use super::users::{Extras, extras};
use super::{CUT_SHORT, Mistake, Read};
use crate::flow::Endpoint;
use crate::sockdiag::State;

/// A TCP socket as a line of text shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// `None` where the text has no such column: its filter says it.
    pub state: Option<State>,
    /// Bytes not read; of a listener the connections that wait.
    pub recv_queue: u32,
    /// Bytes not sent; of a listener the length of its queue.
    pub send_queue: u32,
    /// This host's end.
    pub local: Endpoint,
    /// The peer's end.
    pub remote: Endpoint,
    /// What stands behind.
    pub extras: Extras,
}

/// Tables of `ss` and protocols of `netstat` that are not TCP, and how they are counted.
const OTHERS: [(&str, &str); 27] = [
    ("udp", "udp"),
    ("udp4", "udp"),
    ("udp6", "udp"),
    ("udplite", "udp"),
    ("udpl", "udp"),
    ("udplite6", "udp"),
    ("udpl6", "udp"),
    ("mptcp", "mptcp"),
    ("sctp", "sctp"),
    ("dccp", "dccp"),
    ("raw", "raw"),
    ("raw6", "raw"),
    ("icmp6", "raw"),
    ("p_raw", "packet"),
    ("p_dgr", "packet"),
    ("packet", "packet"),
    ("nl", "netlink"),
    ("netlink", "netlink"),
    ("u_str", "unix"),
    ("u_dgr", "unix"),
    ("u_seq", "unix"),
    ("unix", "unix"),
    ("v_str", "vsock"),
    ("v_dgr", "vsock"),
    ("ti_rd", "tipc"),
    ("ti_st", "tipc"),
    ("xdp", "xdp"),
];

/// The name of a protocol that is not TCP.
pub(super) fn other(word: &str) -> Option<&'static str> {
    OTHERS.iter().find(|(name, _)| *name == word).map(|(_, counted)| *counted)
}

/// A state by any of the names that ss and netstat have for it.
pub(super) fn state(name: &str) -> Option<State> {
    match name {
        "ESTAB" => Some(State::Established),
        "UNCONN" => Some(State::Close),
        "FIN_WAIT1" => Some(State::FinWait1),
        "FIN_WAIT2" => Some(State::FinWait2),
        _ => name.to_lowercase().replace('_', "-").parse().ok(),
    }
}

/// Whether a line begins a socket: the number of its columns before the queues.
pub(super) fn before_queues(words: &[&str]) -> Option<usize> {
    let is_number = |at: usize| words.get(at).is_some_and(|word| word.parse::<u32>().is_ok());
    let first = *words.first()?;
    let is_tcp = first == "tcp";
    match () {
        () if is_tcp && is_number(1) => Some(1),
        () if is_tcp => Some(2),
        () if is_number(0) && is_number(1) => {
            words.get(2).is_some_and(|word| is_endpoint(word)).then_some(0)
        }
        () if is_number(1) && is_number(2) || state(first).is_some() => Some(1),
        () => None,
    }
}

/// Whether a line begins with a state and both queues, which no rest of a broken line does.
pub(super) fn has_state(words: &[&str]) -> bool {
    let words = words.strip_prefix(&["tcp"]).unwrap_or(words);
    words.first().is_some_and(|word| state(word).is_some())
        && words.get(1..3).is_some_and(|two| two.iter().all(|word| word.parse::<u32>().is_ok()))
}

/// Whether the line holds all that a socket has, up to the peer.
pub(super) fn is_complete(words: &[&str]) -> bool {
    before_queues(words).is_some_and(|before| {
        words.get(before + 2..before + 4).is_some_and(|ends| ends.iter().all(|w| is_endpoint(w)))
    })
}

/// `CLOSE-WAIT 1 0 192.0.2.1:80 198.51.100.7:20000 uid:33 ino:123 sk:1a`
pub(super) fn row(text: &str) -> Read<Row> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let before = before_queues(&words).ok_or_else(|| Mistake::no_socket(text))?;
    let name = before.checked_sub(1).and_then(|at| words.get(at)).filter(|word| **word != "tcp");
    let state = match name {
        Some(name) => Some(state(name).ok_or_else(|| Mistake::state(name))?),
        None => None,
    };
    let mut word = words.iter().skip(before);
    let mut next =
        |what: &str| word.next().ok_or_else(|| Mistake::new(CUT_SHORT, format!("no {what}")));
    let recv_queue = queue(next("Recv-Q")?)?;
    let send_queue = queue(next("Send-Q")?)?;
    let local = endpoint(next("local address")?)?;
    let remote = endpoint(next("peer address")?)?;
    let extras = extras(behind(text, before + 4));
    Ok(Row { state, recv_queue, send_queue, local, remote, extras })
}

pub(super) fn queue(word: &str) -> Read<u32> {
    word.parse()
        .map_err(|_| Mistake::new("not understood", format!("'{word}' is no length of a queue")))
}

/// The text behind that many words, blanks and all.
pub(super) fn behind(text: &str, words: usize) -> &str {
    let mut rest = text.trim_start();
    for _ in 0..words {
        rest = rest.split_once(char::is_whitespace).map_or("", |(_, rest)| rest).trim_start();
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_read_with_and_without_its_first_columns() {
        let ends = "192.0.2.1%eth0:80   [::ffff:198.51.100.7]:4000 ino:7";
        for (columns, expected) in [
            ("CLOSE-WAIT 422 0", Some(State::CloseWait)),
            ("tcp   CLOSE-WAIT 422 0", Some(State::CloseWait)),
            ("tcp 422 0", None),
            ("422 0", None),
        ] {
            let read = row(&format!("{columns} {ends}")).unwrap();
            assert_eq!((read.state, read.recv_queue, read.extras.inode), (expected, 422, Some(7)));
            assert_eq!(read.remote.to_string(), "198.51.100.7:4000");
        }
        for (text, what) in [
            ("HALF-SHUT 0 0 192.0.2.1:80 203.0.113.9:5002", "unknown state 'HALF-SHUT'"),
            ("ESTAB 0 0 192.0.2.1:http 203.0.113.9:5001", "numeric"),
            ("ESTAB 0 0 192.0.2.1:80", "no peer address"),
            ("ESTAB 0 -1 192.0.2.1:80 203.0.113.9:5001", "queue"),
        ] {
            assert!(row(text).unwrap_err().what.contains(what), "{text}");
        }
    }
}
