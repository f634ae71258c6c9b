//! One line of `conntrack -L`, `conntrack -E` or `/proc/net/nf_conntrack`. Pure.

use std::time::Duration;

use super::{CUT_SHORT, Mistake, Read};
use crate::conntrack::uapi::{
    IP_CT_TCP_FLAG_BE_LIBERAL, IP_CT_TCP_FLAG_SACK_PERM, IPS_ASSURED, IPS_CONFIRMED, IPS_SEEN_REPLY,
};
use crate::conntrack::{Entry, Status, Tcp, TcpState, Zone};
use crate::flow::{Endpoint, FourTuple};

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is in the table.
    Listed,
    /// It was made or changed (`-E`).
    Changed,
    /// It was removed (`-E`).
    Destroyed,
    /// It has left the table and waits to be freed (`-L dying`).
    Dying,
}

/// A line that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// A TCP entry.
    Tcp(Kind, Box<Entry>),
    /// Another protocol.
    Other(String),
}

/// A line without time stamp and event: `tcp 6 117 CLOSE_WAIT src=...`
fn body(text: &str) -> (Option<Kind>, &str) {
    let mut rest = text;
    let mut kind = None;
    while let Some(inner) = rest.strip_prefix('[') {
        let Some((word, behind)) = inner.split_once(']') else { break };
        match word.trim() {
            "NEW" | "UPDATE" => kind = Some(Kind::Changed),
            "DESTROY" => kind = Some(Kind::Destroyed),
            stamp if stamp.parse::<f64>().is_ok() => {}
            _ => break,
        }
        rest = behind.trim_start();
    }
    (kind, rest)
}

/// The words of a line from its protocol on.
fn words(text: &str) -> (Option<Kind>, Vec<&str>) {
    let (kind, body) = body(text);
    let words: Vec<&str> = body.split_whitespace().collect();
    match words.as_slice() {
        ["ipv4" | "ipv6", number, rest @ ..] if number.parse::<u8>().is_ok() => {
            (kind, rest.to_vec())
        }
        _ => (kind, words),
    }
}

fn is_protocol(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

/// Whether a line begins an entry: a protocol and its number.
pub(super) fn is_start(text: &str) -> bool {
    let (kind, words) = words(text);
    match words.as_slice() {
        [name, number, ..] if is_protocol(name) => number.parse::<u8>().is_ok(),
        // An event whose rest stands in the next line.
        [] => kind.is_some(),
        _ => false,
    }
}

/// Whether both tuples are there.
pub(super) fn is_complete(text: &str) -> bool {
    let (_, words) = words(text);
    let count = |key: &str| words.iter().filter(|word| word.starts_with(key)).count();
    words.first() != Some(&"tcp")
        || ["src=", "dst=", "sport=", "dport="].iter().all(|k| count(k) > 1)
}

/// Whether a line goes on with an entry, as mailers break them: `[ASSURED] mark=0 use=1`.
pub(super) fn is_continued_by(text: &str) -> bool {
    let Some(word) = text.split_whitespace().next() else { return false };
    let is_flag = matches!(word, "[ASSURED]" | "[UNREPLIED]" | "[OFFLOAD]" | "[HW_OFFLOAD]");
    is_flag || word.starts_with("[start=") || word.starts_with("[stop=") || {
        word.split_once('=').is_some_and(|(key, _)| {
            !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '-')
        })
    }
}

/// What a word begins with, or is, that a line may be broken in.
const WORDS: [&str; 21] = [
    "src=",
    "dst=",
    "sport=",
    "dport=",
    "type=",
    "code=",
    "id=",
    "packets=",
    "bytes=",
    "mark=",
    "use=",
    "zone=",
    "zone-orig=",
    "zone-reply=",
    "secctx=",
    "helper=",
    "labels=",
    "[ASSURED]",
    "[UNREPLIED]",
    "[OFFLOAD]",
    "[HW_OFFLOAD]",
];

/// Whether a line that goes on with this one was broken within a word, as terminals do.
pub(super) fn is_broken_word(before: &str, after: &str) -> bool {
    let ends = (before.split_whitespace().next_back(), after.split_whitespace().next());
    let (Some(last), Some(first)) = ends else { return false };
    let is_rest = first.chars().all(|c| c.is_ascii_hexdigit() || c == '.' || c == ':');
    if is_rest && last.contains('=') && !last.starts_with('[') {
        return true;
    }
    let word = format!("{last}{first}");
    state(&word).is_some() || WORDS.iter().any(|it| word.starts_with(it) && last.len() < it.len())
}

/// `[ipv4 2] tcp 6 117 CLOSE_WAIT src=... dst=... sport=... dport=... src=... [ASSURED] mark=0`
pub(super) fn item(text: &str) -> Read<Item> {
    let (kind, words) = words(text);
    let rest = match words.as_slice() {
        ["tcp", "6", rest @ ..] => rest,
        [name, number, ..] if is_protocol(name) && number.parse::<u8>().is_ok() => {
            return Ok(Item::Other((*name).to_owned()));
        }
        _ => return Err(Mistake::new("not understood", "no entry")),
    };
    let every = |key: &str| -> Vec<&str> {
        rest.iter().filter_map(|word| word.strip_prefix(key)).collect()
    };
    let (src, dst, sport, dport) = (every("src="), every("dst="), every("sport="), every("dport="));
    if src.len() > 2 {
        return Err(Mistake::new("not understood", "several entries in one line"));
    }
    let end = |addr: Option<&&str>, port: Option<&&str>, what: &str| {
        let wrong = || Mistake::new(CUT_SHORT, format!("no {what}"));
        let addr = addr.and_then(|text| text.parse().ok()).ok_or_else(wrong)?;
        let port = port.and_then(|text| text.parse().ok()).ok_or_else(wrong)?;
        Ok::<_, Mistake>(Endpoint::new(addr, port))
    };
    let tuple = |index: usize, what: &str| {
        Ok::<_, Mistake>(FourTuple::new(
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
    let mut entry = Entry { reply, status: Some(status(rest)), ..Entry::plain(orig, zone) };
    let (timeout, name) = match rest {
        [seconds, name, ..] if seconds.parse::<u64>().is_ok() => (seconds.parse().ok(), *name),
        [name, ..] => (None, *name),
        [] => (None, ""),
    };
    entry.timeout = timeout.map(Duration::from_secs);
    // An entry that a flow table has taken over shows neither timeout nor state.
    let has_state = !name.contains('=') && !name.starts_with('[');
    if has_state {
        let state = state(name).ok_or_else(|| Mistake::state(name))?;
        let flags = if was_picked_up(state, rest) { PICKED_UP } else { 0 };
        entry.tcp = Some(Tcp { state, wscale: [0; 2], flags: [flags; 2] });
    }
    let kind = kind.unwrap_or(match timeout {
        None if has_state => Kind::Dying,
        _ => Kind::Listed,
    });
    Ok(Item::Tcp(kind, Box::new(entry)))
}

/// The flags of an entry that the kernel made from a packet in the middle of a connection.
const PICKED_UP: u8 = IP_CT_TCP_FLAG_BE_LIBERAL | IP_CT_TCP_FLAG_SACK_PERM;

/// No handshake ends without an answer: an entry beyond it that has seen none was begun by a packet
/// in the middle of the connection. Of others the text does not tell how they were begun.
fn was_picked_up(state: TcpState, words: &[&str]) -> bool {
    use TcpState::{CloseWait, Established, FinWait, LastAck, TimeWait};
    words.contains(&"[UNREPLIED]")
        && matches!(state, Established | FinWait | CloseWait | LastAck | TimeWait)
}

fn status(words: &[&str]) -> Status {
    let seen = if words.contains(&"[UNREPLIED]") { 0 } else { IPS_SEEN_REPLY };
    let assured = if words.contains(&"[ASSURED]") { IPS_ASSURED } else { 0 };
    Status(IPS_CONFIRMED | seen | assured)
}

fn state(name: &str) -> Option<TcpState> {
    // As kernels before 2.6.31 have it.
    if name == "LISTEN" {
        return Some(TcpState::SynSent2);
    }
    let name = name.to_lowercase().replace('_', "-");
    TcpState::ALL.into_iter().find(|state| state.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TUPLES: &str = "src=198.51.100.7 dst=192.0.2.1 sport=4000 dport=80 \
        src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=4000";

    fn tcp(text: &str) -> (Kind, Entry) {
        match item(text) {
            Ok(Item::Tcp(kind, entry)) => (kind, *entry),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn entries_are_read_in_every_form() {
        for (head, tail, kind) in [
            ("tcp      6 117 CLOSE_WAIT", "[ASSURED] mark=0 use=1", Kind::Listed),
            ("ipv4     2 tcp      6 117 CLOSE_WAIT", "[ASSURED] mark=0 zone=0 use=2", Kind::Listed),
            (" [UPDATE] tcp      6 117 CLOSE_WAIT", "[ASSURED]", Kind::Changed),
            (
                "[1748509201.118871]\t [UPDATE] ipv4 2 tcp 6 117 CLOSE_WAIT",
                "[ASSURED] id=3",
                Kind::Changed,
            ),
        ] {
            let text = format!("{head} {TUPLES} {tail}");
            let (read, entry) = tcp(text.trim());
            assert!(is_start(text.trim()) && is_complete(text.trim()), "{text}");
            assert_eq!((read, entry.state()), (kind, Some(TcpState::CloseWait)), "{text}");
            assert_eq!(entry.timeout, Some(Duration::from_secs(117)), "{text}");
            assert!(entry.is_translated() && entry.status == Some(Status::ASSURED), "{text}");
        }
        let counted = TUPLES.replace(" src=192", " packets=5 bytes=312 src=192");
        let (kind, entry) = tcp(&format!("[DESTROY] tcp 6 {counted} packets=4 bytes=2 id=3"));
        assert_eq!((kind, entry.tcp, entry.reply.src.port()), (Kind::Destroyed, None, 8080));
        assert_eq!(tcp(&format!("tcp 6 CLOSE {TUPLES}")).0, Kind::Dying);
        let (kind, entry) = tcp(&format!("tcp 6 {TUPLES} [OFFLOAD] mark=0 use=3"));
        assert_eq!((kind, entry.tcp, entry.timeout), (Kind::Listed, None, None));
        assert_eq!(
            tcp(&format!("tcp 6 9 CLOSE {TUPLES} zone-orig=3")).1.zone,
            Zone { orig: 3, reply: 0 }
        );
        let stamped =
            format!("tcp 6 9 CLOSE {TUPLES} delta-time=3 [start=Sat May 31 10:00:01 2025] use=1");
        assert_eq!(tcp(&stamped).1.state(), Some(TcpState::Close));
    }

    #[test]
    fn what_is_no_entry_is_named() {
        assert_eq!(item("udp 17 29 src=192.0.2.2"), Ok(Item::Other("udp".to_owned())));
        for (text, what) in [
            ("tcp 6 9 CLOSE src=192.0.2.2 dst=192.0.2.1 sport=1", "destination of the original"),
            (
                "tcp 6 9 HALF src=192.0.2.2 dst=192.0.2.1 sport=1 dport=2 src=192.0.2.1 dst=192.0.2.2 sport=2 dport=1",
                "unknown state 'HALF'",
            ),
            ("rubbish", "no entry"),
        ] {
            assert!(item(text).unwrap_err().what.contains(what), "{text}");
        }
        for text in
            ["[NEW] 300 proto=6 src=192.0.2.2", "CLOSE-WAIT 1 0 192.0.2.1:80 a:1", "6 9 CLOSE"]
        {
            assert!(!is_start(text), "{text}");
        }
    }

    #[test]
    fn only_an_entry_without_an_answer_is_known_to_be_picked_up() {
        let (_, entry) = tcp(&format!("tcp 6 300 ESTABLISHED {TUPLES} mark=0"));
        assert!(!entry.is_picked_up());
        let (_, entry) = tcp(&format!(
            "tcp 6 300 ESTABLISHED {} mark=0",
            TUPLES.replace("80 src", "80 [UNREPLIED] src")
        ));
        assert!(entry.is_picked_up());
        let (_, entry) = tcp(&format!(
            "tcp 6 110 SYN_SENT {} mark=0",
            TUPLES.replace("80 src", "80 [UNREPLIED] src")
        ));
        assert!(!entry.is_picked_up());
    }
}
