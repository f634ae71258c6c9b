//! The lines of a text as people send it: out of a mail, an issue, a terminal, an editor. Pure.
//!
//! Every reader gets lines without byte order mark, carriage return, colour, quotation mark and
//! control character. Lines that belong to the frame (fences, prompts, nothing) are left out; the
//! commands of prompts are kept, since `ss` leaves out a column that only its filter shows.

use crate::audit::processes::printable;

/// A line that may hold something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// From 1, as an editor counts.
    pub number: usize,
    /// Blanks before it.
    pub indent: usize,
    /// Without blanks at its ends.
    pub text: String,
}

impl Line {
    /// The column that it ends at.
    pub(super) fn end(&self) -> usize {
        self.indent + self.text.chars().count()
    }
}

/// A text, line by line.
#[derive(Clone, Debug, Default)]
pub(super) struct Text {
    /// Lines that may hold something.
    pub lines: Vec<Line>,
    /// The commands that were typed, as far as the text shows them: `ss -tan state close-wait`.
    pub commands: Vec<String>,
    /// A compressed file, a picture: more control characters than a text has.
    pub is_binary: bool,
    /// The number of the last line, where no line end follows it: it may have been cut off.
    pub open_end: Option<usize>,
    /// A line stands for others that were left out: `...`
    pub is_shortened: bool,
}

/// What a frame around pasted lines begins with.
const FENCES: [&str; 10] =
    ["```", "~~~", "<pre", "</pre", "<code", "</code", "[code", "[/code", "{code", "{noformat"];
/// What people write for lines that they leave out.
const LEFT_OUT: [&str; 7] = ["...", "\u{2026}", "[...]", "[\u{2026}]", "(...)", "[snip]", "<snip>"];
/// Programs whose output is read.
const PROGRAMS: [&str; 4] = ["ss", "netstat", "conntrack", "cat"];

impl Text {
    /// Takes a file to pieces. Bytes that are no UTF-8 are read as Latin-1.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let decoded = decode(bytes);
        let odd = decoded.chars().filter(|letter| letter.is_control() && !is_space(*letter));
        // A colour is begun by one control character; a binary file has one in every few.
        let is_binary = odd.take(decoded.len() / 8 + 1).count() > decoded.len() / 8;
        let plain = anstream::adapter::strip_str(&decoded).to_string();
        let plain = plain.replace("\r\n", "\n").replace(['\r', '\u{b}', '\u{c}'], "\n");
        let mut text = Self { is_binary: is_binary && !bytes.is_empty(), ..Self::default() };
        if !plain.is_empty() && !plain.ends_with('\n') {
            text.open_end = Some(plain.split('\n').count());
        }
        for (index, raw) in plain.split('\n').enumerate() {
            let raw = raw.replace(['\u{a0}', '\u{202f}'], " ");
            let raw = raw.replace(['\u{feff}', '\u{200b}', '\u{ad}'], "");
            // A quotation is marked at each of its lines.
            let content = raw.trim_start_matches(['>', ' ', '\t']);
            let indent = raw.chars().count() - content.chars().count();
            let content = printable(content.trim_end());
            if content.is_empty() || FENCES.iter().any(|fence| starts_with(&content, fence)) {
                continue;
            }
            if LEFT_OUT.contains(&content.as_str()) {
                text.is_shortened = true;
                continue;
            }
            match command(&content) {
                Some(typed) => text.commands.push(typed.to_owned()),
                None if is_bare_prompt(&content) => {}
                None => text.lines.push(Line { number: index + 1, indent, text: content }),
            }
        }
        text
    }
}

fn is_space(letter: char) -> bool {
    matches!(letter, '\n' | '\r' | '\t' | '\u{b}' | '\u{c}')
}

fn starts_with(text: &str, prefix: &str) -> bool {
    text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
}

/// UTF-8, UTF-16 where a mark says so (PowerShell writes that), else Latin-1.
fn decode(bytes: &[u8]) -> String {
    let utf16 = |bytes: &[u8], unit: fn([u8; 2]) -> u16| {
        let units = bytes.chunks_exact(2).filter_map(|pair| pair.try_into().ok()).map(unit);
        char::decode_utf16(units).map(|letter| letter.unwrap_or('\u{fffd}')).collect()
    };
    match bytes {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        _ => match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect(),
        },
    }
}

/// The command of a line such as `root@web:~# ss -tan`: `ss -tan`.
fn command(line: &str) -> Option<&str> {
    let mut before: Option<&str> = None;
    let mut at = 0;
    for word in line.split(' ').take(8) {
        let name = word.rsplit('/').next().unwrap_or(word);
        let is_prompted = before.is_none_or(|before| {
            before.ends_with(['$', '#', '%', '>', ':']) || matches!(before, "sudo" | "doas")
        });
        let typed = line.get(at..)?;
        let mut rest = typed.split_whitespace().skip(1);
        let takes = match rest.next() {
            None => name == "ss" || name == "netstat",
            Some(next) => next.starts_with('-') || name == "cat" && next.contains("conntrack"),
        };
        if is_prompted && takes && PROGRAMS.contains(&name) {
            return Some(typed);
        }
        if !word.is_empty() {
            before = Some(word);
        }
        at += word.len() + 1;
    }
    None
}

/// `root@web:~#` at the end of a session.
fn is_bare_prompt(line: &str) -> bool {
    let ends = line.ends_with(['$', '#', '%']);
    ends && (line.len() == 1 || line.contains('@')) && line.split_whitespace().count() <= 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(bytes: &[u8]) -> Vec<String> {
        Text::of(bytes).lines.into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn what_stands_around_the_lines_is_left_out() {
        let text = "\u{feff}```console\r\nroot@web:~# ss -tan state close-wait\r\n\r\n> a\r\n\
            >> b\r\n\tc\r\n```\r\nroot@web:~#\r\n";
        let read = Text::of(text.as_bytes());
        let found: Vec<_> =
            read.lines.iter().map(|line| (line.number, line.indent, line.text.as_str())).collect();
        assert_eq!(found, [(4, 2, "a"), (5, 3, "b"), (6, 1, "c")]);
        assert_eq!(read.commands, ["ss -tan state close-wait"]);
    }

    #[test]
    fn a_command_is_known_by_what_stands_around_it() {
        for line in ["$ ss -tan", "ss -tan", "[root@web ~]# ss -tan", "sudo ss -tan"] {
            assert_eq!(command(line), Some("ss -tan"), "{line}");
        }
        assert_eq!(command("Every 2.0s: ss -tan  web1"), Some("ss -tan  web1"));
        assert_eq!(command("# cat /proc/net/nf_conntrack"), Some("cat /proc/net/nf_conntrack"));
        assert_eq!(command("conntrack v1.4.8 (conntrack-tools): 3 flow entries"), None);
        assert_eq!(command("we saw this with ss -tan today"), None);
    }

    #[test]
    fn every_encoding_that_people_send_is_read() {
        let utf16: Vec<u8> =
            "\u{feff}a\n\u{e9}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert_eq!(texts(&utf16), ["a", "\u{e9}"]);
        assert_eq!(texts(b"OU\xc7A"), ["OU\u{c7}A"]);
        assert_eq!(texts(b"\x1b[1mESTAB\x1b[0m\rx"), ["ESTAB", "x"]);
        assert_eq!(texts(b"a\x07b\xc2\x9b\xe2\x80\xaec"), ["ab??c"]);
        assert!(Text::of(b"\x1f\x8b\x08\x00\x00\x01\x02\x03\x04").is_binary);
        assert!(!Text::of(b"").is_binary);
    }
}
