//! The form of a report: lines of what it is, then sections between lines of equals signs. Pure.

use std::fmt::Write;

/// The first line.
const FIRST: &str = "ctkeep report 1";
/// A section has at most so many bytes: its end is cut, and that is said.
const SECTION: usize = 8 << 20;
/// Lines of a section that look like headings get a blank before.
const MARK: &str = "== ";
/// What begins the text of a section that could not be had.
const FAILED: &str = "not read: ";
/// What begins the last line of one that was too long.
const CUT: &str = "cut here: ";
/// What begins a line of the head that qualifies the rest.
const NOTE: &str = "note";

/// `ss -tanep`
pub const SOCKETS: &str = "sockets";
/// `conntrack -L -o extended`
pub const ENTRIES: &str = "entries";
/// Peer, local address, device, where rules ask for it.
pub const ARRIVALS: &str = "arrivals";
/// What neither of the two programs prints of a connection.
pub const BESIDE: &str = "beside";
/// The rules as ctkeep has read them.
pub const RULES: &str = "rules";

/// A report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct File {
    /// `made: 2026-11-29T03:12:00Z`
    head: Vec<(String, String)>,
    sections: Vec<(String, String)>,
}

impl File {
    /// Adds a line to its head.
    pub fn say(&mut self, name: &str, value: impl Into<String>) {
        self.head.push((name.to_owned(), value.into()));
    }

    /// Adds what a reader has to know before he believes the rest.
    pub fn note(&mut self, note: impl Into<String>) {
        self.say(NOTE, note);
    }

    /// Adds a section; what could not be had says why.
    pub fn add(&mut self, name: &str, text: Result<String, String>) {
        let mut text = text.unwrap_or_else(|error| format!("{FAILED}{error}\n"));
        if text.len() > SECTION {
            let start = text.as_bytes().get(..SECTION).unwrap_or_default();
            let end = start.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let left = text.get(end..).unwrap_or_default().lines().count();
            text.truncate(end);
            let _ = writeln!(text, "{CUT}{left} more lines");
        }
        self.sections.push((name.to_owned(), text));
    }

    /// A line of the head.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// What its head has to say to the reader.
    pub fn notes(&self) -> impl Iterator<Item = &str> {
        self.head.iter().filter(|(name, _)| name == NOTE).map(|(_, value)| value.as_str())
    }

    /// The text of a section; nothing of one that could not be had.
    pub fn section(&self, name: &str) -> Option<&str> {
        let (_, text) = self.sections.iter().find(|(known, _)| known == name)?;
        (!text.starts_with(FAILED)).then_some(text)
    }

    /// Why a section is not there, or not whole.
    pub fn failure(&self, name: &str) -> Option<String> {
        let (_, text) = self.sections.iter().find(|(known, _)| known == name)?;
        let is_bad = |line: &&str| line.starts_with(FAILED) || line.starts_with(CUT);
        text.lines()
            .next()
            .filter(is_bad)
            .or_else(|| text.lines().last().filter(is_bad))
            .map(|line| format!("{name}: {line}"))
    }

    /// The file.
    pub fn text(&self) -> String {
        let mut all = format!("{FIRST}\n");
        for (name, value) in &self.head {
            let _ = writeln!(all, "{name}: {value}");
        }
        for (name, text) in &self.sections {
            let _ = writeln!(all, "\n{MARK}{name} ==");
            for line in text.lines() {
                let blank = if line.starts_with(MARK) { " " } else { "" };
                let _ = writeln!(all, "{blank}{line}");
            }
        }
        all
    }

    /// Reads one; lines may end as on any system.
    ///
    /// # Errors
    /// It is none, or one of another form.
    pub fn read(text: &str) -> Result<Self, String> {
        let mut lines = text.trim_start_matches('\u{feff}').lines().map(str::trim_end);
        match lines.find(|line| !line.is_empty()) {
            Some(FIRST) => {}
            Some(line) if line.starts_with("ctkeep report ") => {
                return Err(format!("'{line}': of another version of ctkeep"));
            }
            _ => return Err("no report: its first line is not 'ctkeep report 1'".to_owned()),
        }
        let mut file = Self::default();
        for line in lines {
            let heading = line.strip_prefix(MARK).and_then(|rest| rest.strip_suffix(" =="));
            if let Some(name) = heading {
                file.sections.push((name.to_owned(), String::new()));
            } else if let Some((_, text)) = file.sections.last_mut() {
                text.push_str(line);
                text.push('\n');
            } else if let Some((name, value)) = line.split_once(": ") {
                file.say(name, value);
            }
        }
        // The blank line between sections is none of theirs.
        for (_, text) in &mut file.sections {
            if text.ends_with("\n\n") || text == "\n" {
                text.pop();
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut file = File::default();
        file.say("made", "2026-11-29T03:12:00Z");
        file.note("one of three connections");
        file.add(SOCKETS, Ok("ESTAB 0 0\n\n  == x ==\n".to_owned()));
        file.add(RULES, Err("no nft".to_owned()));
        file.add(ENTRIES, Ok(String::new()));
        let text = file.text();
        assert_eq!(File::read(&text).unwrap(), file, "{text}");
        assert_eq!(File::read(&text.replace('\n', "\r\n")).unwrap(), file);
        assert_eq!(file.section(RULES), None);
        assert_eq!(file.failure(RULES).unwrap(), "rules: not read: no nft");
        assert_eq!((file.failure(SOCKETS), file.section(ENTRIES)), (None, Some("")));
        assert_eq!(file.notes().collect::<Vec<_>>(), ["one of three connections"]);
    }

    #[test]
    fn no_line_of_a_section_begins_another() {
        let mut file = File::default();
        file.add(RULES, Ok("== sockets ==\nESTAB\n".to_owned()));
        let read = File::read(&file.text()).unwrap();
        assert_eq!(
            (read.section(SOCKETS), read.section(RULES)),
            (None, Some(" == sockets ==\nESTAB\n"))
        );
    }

    #[test]
    fn what_is_too_long_is_cut_at_a_line_and_says_so() {
        let mut file = File::default();
        file.add(ENTRIES, Ok("tcp é\n".repeat(2 << 20)));
        let text = file.section(ENTRIES).unwrap();
        assert!(text.len() < SECTION + 100 && text.ends_with(" more lines\n"));
        assert!(text.lines().rev().skip(1).all(|line| line == "tcp é"));
        assert!(file.failure(ENTRIES).is_some());
    }

    #[test]
    fn other_files_are_refused() {
        assert!(File::read("").is_err());
        assert!(File::read("State Recv-Q Send-Q\n").unwrap_err().contains("no report"));
        assert!(File::read("ctkeep report 2\n").unwrap_err().contains("another version"));
    }
}
