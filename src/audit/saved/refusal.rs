//! What a text seems to be that cannot be read, and what to give instead. Pure.

use super::lines::{Line, Text};
use super::{CUT_SHORT, Parsed, Saved, conntrack, entries, sockets, ss};
use crate::sockdiag::State;

/// One of the two texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum File {
    /// `--sockets`
    Sockets,
    /// `--conntrack`
    Entries,
}

impl File {
    fn wanted(self) -> &'static str {
        match self {
            Self::Sockets => "give the output of ss -tanoie",
            Self::Entries => "give the output of conntrack -L -o extended",
        }
    }
}

/// Why a text is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Which of them.
    pub file: File,
    /// Where it shows, from 1.
    pub line: Option<usize>,
    /// What it seems to be, and what to give instead.
    pub what: String,
}

/// Takes texts of which something, and at least half, can be read.
pub(super) fn check(saved: &Saved, sockets: &Text, entries: &Text) -> Result<(), Refusal> {
    let first = check_sockets(saved, sockets);
    let second = check_entries(saved, entries);
    let (Err(refused), Err(_)) = (&first, &second) else { return first.and(second) };
    let as_entries = entries::entries(sockets);
    let as_sockets = sockets::sockets(entries, None);
    if is_read(&as_entries.parsed) && is_read(&as_sockets.parsed) {
        return Err(Refusal {
            what: "this is a text of entries, and the one of --conntrack is of sockets: the two \
                   files are swapped"
                .to_owned(),
            ..refused.clone()
        });
    }
    first
}

fn is_read(parsed: &Parsed) -> bool {
    parsed.read > 0 && parsed.mistakes.len() <= parsed.understood()
}

fn check_sockets(saved: &Saved, text: &Text) -> Result<(), Refusal> {
    let refuse = |line, what: String| Err(Refusal { file: File::Sockets, line, what });
    let instead = File::Sockets.wanted();
    let found = &saved.sockets;
    let without = found.without_state.len();
    let is_list = found.values.iter().all(|socket| socket.state == State::Listen);
    let is_title = |line: &Line| line.text.ends_with("(only servers)");
    if is_list
        && (text.commands.iter().any(|command| is_of_listeners(command))
            || text.lines.iter().any(is_title))
    {
        return refuse(None, format!("listening sockets alone (-l); {instead}"));
    }
    if is_read(&found.parsed) && without == 0 {
        return Ok(());
    }
    if let Some(line) = found.without_state.first() {
        return refuse(
            Some(*line),
            "no State column: ss leaves it out where a filter asks for one state; name that by \
             --socket-state, or give the output of ss -tan without a filter"
                .to_owned(),
        );
    }
    match seems(text, &found.parsed, File::Sockets) {
        Some((line, what)) => refuse(Some(line), format!("{what}; {instead}")),
        None if text.lines.is_empty() && found.parsed == Parsed::default() => {
            refuse(None, format!("the file is empty; {instead}"))
        }
        None if !found.parsed.passed.is_empty() => {
            refuse(None, format!("no TCP socket, but others; {instead}"))
        }
        None => refuse(None, format!("a heading without a socket; {instead}")),
    }
}

fn check_entries(saved: &Saved, text: &Text) -> Result<(), Refusal> {
    let refuse = |line, what: String| Err(Refusal { file: File::Entries, line, what });
    let instead = File::Entries.wanted();
    let found = &saved.entries;
    let is_something =
        found.parsed.understood() > found.parsed.passed.get("dying").copied().unwrap_or(0);
    let has_tcp = found.parsed.read > 0 || found.parsed.passed.contains_key("dying");
    if is_something && has_tcp && found.parsed.mistakes.len() <= found.parsed.understood()
        || found.is_empty_table && found.parsed.mistakes.is_empty()
    {
        return Ok(());
    }
    if let Some((line, why)) = &found.failure {
        return refuse(Some(*line), format!("conntrack failed there: {why}; {instead}, as root"));
    }
    match seems(text, &found.parsed, File::Entries) {
        Some((line, what)) => refuse(Some(line), format!("{what}; {instead}")),
        None if is_something => {
            refuse(None, format!("no TCP entry, but others (conntrack -p udp?); {instead}"))
        }
        None if found.parsed.understood() > 0 => refuse(
            text.lines.first().map(|line| line.number),
            format!("these entries have left the table (conntrack -L dying); {instead}"),
        ),
        None => refuse(
            None,
            format!(
                "the file is empty; {instead}, of an empty table with its last line, which goes to \
                 stderr: 2>&1"
            ),
        ),
    }
}

/// `ss -tulpn`, `netstat -ltn`, whose list is no sign of an idle host.
fn is_of_listeners(command: &str) -> bool {
    let words = || command.split_whitespace();
    let has = |letter: char, long: &str| {
        words().any(|word| {
            let short = word.strip_prefix('-').is_some_and(|flags| !flags.starts_with('-'));
            short && word.contains(letter) || word == long
        })
    };
    let is_tool = words().next().is_some_and(|tool| tool.ends_with("ss") || tool.ends_with("stat"));
    is_tool && has('l', "--listening") && !has('a', "--all")
}

/// What a text is, and the line that shows it.
fn seems(text: &Text, parsed: &Parsed, wanted: File) -> Option<(usize, String)> {
    if text.is_binary {
        return Some((1, "this is no text: a compressed file or a picture".to_owned()));
    }
    for line in &text.lines {
        if let Some(what) = known(&line.text, wanted) {
            return Some((line.number, what.to_owned()));
        }
    }
    let names: Vec<_> =
        parsed.mistakes.iter().filter(|(_, mistake)| mistake.kind == "without numbers").collect();
    if let Some((line, mistake)) = names.first()
        && names.len() * 2 >= parsed.mistakes.len()
    {
        return Some((*line, format!("{}: names instead of numbers (no -n)", mistake.what)));
    }
    let (line, mistake) = parsed.mistakes.first()?;
    let is_cut = parsed.mistakes.iter().all(|(_, mistake)| mistake.kind == CUT_SHORT);
    let why = if is_cut { ": the lines are cut short" } else { "" };
    Some((*line, format!("{}{why}", mistake.what)))
}

/// What a line belongs to that is none of the wanted text.
fn known(line: &str, wanted: File) -> Option<&'static str> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| line.starts_with(prefix));
    let first = *words.first()?;
    if begins(&["<?xml", "<conntrack", "<flow"]) {
        return Some("this is XML (conntrack -o xml)");
    }
    if begins(&["{", "[{", "[\"", "\"", "}"]) || matches!(line, "[" | "[]") {
        return Some("this is JSON");
    }
    if begins(&["-A -", "-I -", "-D -"]) {
        return Some("these are commands (conntrack -o save)");
    }
    if begins(&["*filter", "*mangle", "*raw", "*nat", "-A ", ":INPUT", "Chain "]) {
        return Some("these are rules (iptables)");
    }
    if first == "table" && line.ends_with('{') {
        return Some("these are rules (nft list ruleset)");
    }
    if words.starts_with(&["sl", "local_address"]) {
        return Some("this is /proc/net/tcp");
    }
    if words.starts_with(&["COMMAND", "PID"]) {
        return Some("this is the output of lsof");
    }
    if words.starts_with(&["Proto", "Local", "Address"]) {
        return Some("this is the netstat of another system (Windows)");
    }
    if matches!(first, "tcp4" | "tcp46" | "udp46") {
        return Some("this is the netstat of another system (BSD, macOS)");
    }
    if words.contains(&"proto=6") {
        return Some("these are expectations (conntrack -L expect)");
    }
    if begins(&["Total:", "TCP:", "Tcp:", "Ip:", "entries  clashres", "cpu="]) {
        return Some("these are counters (ss -s, netstat -s, conntrack -S)");
    }
    match wanted {
        File::Sockets
            if conntrack::is_start(line) && words.iter().any(|w| w.starts_with("src=")) =>
        {
            Some("these are conntrack entries")
        }
        File::Entries if ss::is_complete(&words) || super::netstat::is_row(&words) => {
            Some("these are sockets (ss, netstat)")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKETS: &str = "ESTAB 0 0 192.0.2.1:8080 198.51.100.7:41001\n";
    const ENTRIES: &str = "tcp 6 9 CLOSE src=198.51.100.7 dst=192.0.2.1 sport=41001 dport=8080 \
        src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=41001\n";

    fn refused(sockets: &str, entries: &str) -> (File, Option<usize>, String) {
        let refusal = Saved::read(sockets.as_bytes(), entries.as_bytes(), None)
            .expect_err(&format!("{sockets:?} {entries:?}"));
        (refusal.file, refusal.line, refusal.what)
    }

    #[test]
    fn a_text_of_sockets_that_cannot_be_read_is_named() {
        for (text, line, what) in [
            ("", None, "the file is empty"),
            ("\n```\n\n```\n", None, "the file is empty"),
            (
                "State Recv-Q Send-Q Local Address:Port Peer Address:Port\n",
                None,
                "without a socket",
            ),
            ("udp UNCONN 0 0 0.0.0.0:53 0.0.0.0:*\n", None, "no TCP socket"),
            ("\nESTAB 0 0 192.0.2.1:https host.example.net:41001\n", Some(2), "no -n"),
            ("1 0 192.0.2.1:8080 198.51.100.7:41002\n", Some(1), "--socket-state"),
            ("<?xml version=\"1.0\"?>\n<conntrack>\n", Some(1), "XML"),
            ("{\"a\": 1}\n", Some(1), "JSON"),
            ("*filter\n:INPUT ACCEPT [0:0]\n", Some(1), "iptables"),
            ("  sl  local_address rem_address   st\n", Some(1), "/proc/net/tcp"),
            ("tcp4  0  0  192.0.2.1.80  198.51.100.7.41001  ESTABLISHED\n", Some(1), "BSD"),
            (
                "Proto  Local Address  Foreign Address  State\nTCP 192.0.2.1:80 198.51.100.7:1 ESTABLISHED\n",
                Some(1),
                "Windows",
            ),
            (
                "Active Internet connections (only servers)\nProto Recv-Q Send-Q Local Address Foreign \
                 Address State\ntcp 0 0 0.0.0.0:8080 0.0.0.0:* LISTEN\n",
                None,
                "listening sockets alone",
            ),
            (ENTRIES, Some(1), "conntrack entries"),
            ("hello\nworld\n", Some(1), "no socket: 'hello'"),
        ] {
            let (file, at, said) = refused(text, ENTRIES);
            assert_eq!((file, at), (File::Sockets, line), "{text:?}: {said}");
            assert!(said.contains(what), "{text:?}: {said}");
        }
        let (_, line, said) = refused(&format!("{SOCKETS}one\ntwo\n"), ENTRIES);
        assert_eq!((line, said.contains("'one'")), (Some(2), true), "{said}");
        assert!(
            Saved::read(format!("{SOCKETS}one\n").as_bytes(), ENTRIES.as_bytes(), None).is_ok()
        );
    }

    #[test]
    fn a_text_of_entries_that_cannot_be_read_is_named() {
        let dying = ENTRIES.replace("9 CLOSE", "CLOSE");
        let failed =
            "conntrack v1.4.8 (conntrack-tools): Operation failed: sorry, you must be root\n";
        for (text, line, what) in [
            ("", None, "2>&1"),
            (SOCKETS, Some(1), "sockets"),
            ("<?xml version=\"1.0\"?>\n", Some(1), "XML"),
            ("[\n  {\"a\": 1}\n", Some(1), "JSON"),
            ("-A -t 120 -u ASSURED\n", Some(1), "conntrack -o save"),
            ("-A -w 0 -s 198.51.100.7\n", Some(1), "conntrack -o save"),
            (
                "tcp 6 9 CLOSE src=198.51.100.7 dst=192.0.2.1 sport=41001 dport=8080\n",
                Some(1),
                "cut short",
            ),
            ("298 proto=6 src=192.0.2.1\n", Some(1), "expectations"),
            (&dying, Some(1), "dying"),
            (failed, Some(1), "you must be root"),
        ] {
            let (file, at, said) = refused(SOCKETS, text);
            assert_eq!((file, at), (File::Entries, line), "{text:?}: {said}");
            assert!(said.contains(what), "{text:?}: {said}");
        }
        let empty = "conntrack v1.4.8 (conntrack-tools): 0 flow entries have been shown.\n";
        assert!(Saved::read(SOCKETS.as_bytes(), empty.as_bytes(), None).is_ok());
    }

    #[test]
    fn swapped_files_are_named() {
        let (file, _, said) = refused(ENTRIES, SOCKETS);
        assert_eq!(file, File::Sockets);
        assert!(said.contains("swapped"), "{said}");
    }
}
