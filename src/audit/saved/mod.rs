//! Reads what `ss -tan`, `netstat -tan`, `conntrack -L` and their like print. Pure.
//!
//! So a case can be sent in and looked at without root, and on another machine. A text comes as
//! people have it: from a mail, with the wrong option, in another language. Each format has a
//! reader of its own that reads one line; what cannot be read for its greater part is refused with
//! a word on what it seems to be, since "nothing found" would read like "nothing wrong".

mod address;
mod conntrack;
mod entries;
mod filter;
mod join;
mod lines;
mod netstat;
mod refusal;
mod sockets;
mod ss;
mod unlisted;
mod users;

use std::collections::BTreeMap;

pub use self::entries::Entries;
pub use self::join::Host;
use self::lines::Text;
pub use self::refusal::{File, Refusal};
pub use self::sockets::Sockets;
use crate::sockdiag::State;

/// Why a line could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// As it is counted: "without numbers".
    pub kind: &'static str,
    /// With the place in the line.
    pub what: String,
}

type Read<T> = Result<T, Mistake>;

/// How a record is counted that ends too soon.
const CUT_SHORT: &str = "cut short";
/// How a record is counted of which a later look has come.
const EARLIER: &str = "of an earlier look";

impl Mistake {
    fn new(kind: &'static str, what: impl Into<String>) -> Self {
        Self { kind, what: what.into() }
    }

    fn state(name: &str) -> Self {
        Self::new("with an unknown state", format!("unknown state '{}'", short(name)))
    }

    fn no_socket(text: &str) -> Self {
        Self::new("not understood", format!("no socket: '{}'", short(text)))
    }
}

/// Enough of a text to find it again.
fn short(text: &str) -> String {
    const LETTERS: usize = 40;
    let cut: String = text.chars().take(LETTERS).collect();
    if cut.len() < text.len() { format!("{cut}...") } else { cut }
}

/// What became of the lines of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// How many records gave something.
    pub read: usize,
    /// Lines that the audit has no use for, by kind: `udp`.
    pub passed: BTreeMap<&'static str, usize>,
    /// What could not be read, with the number of the line.
    pub mistakes: Vec<(usize, Mistake)>,
}

impl Parsed {
    fn pass(&mut self, kind: &'static str) {
        *self.passed.entry(kind).or_default() += 1;
    }

    fn mistaken(&mut self, line: usize, mistake: Mistake) {
        self.mistakes.push((line, mistake));
    }

    /// Whether the last record stops in its middle, as in a text that was cut off.
    fn is_cut_off(&self, last: Option<usize>) -> bool {
        let last = self.mistakes.iter().find(|(line, _)| Some(*line) == last);
        last.is_some_and(|(_, mistake)| mistake.kind == CUT_SHORT)
    }

    /// How many records were understood, wanted or not.
    fn understood(&self) -> usize {
        self.read + self.passed.values().sum::<usize>()
    }

    /// Counts in one line the lines that were passed over; `None` where none was. `path` is that of the text.
    pub fn summary(&self, path: &str) -> Option<String> {
        let mut counts: BTreeMap<&str, usize> = self.passed.clone();
        for (_, mistake) in &self.mistakes {
            *counts.entry(mistake.kind).or_default() += 1;
        }
        let count: usize = counts.values().sum();
        let total = self.understood() + self.mistakes.len();
        let counts: Vec<_> = counts.into_iter().map(|(kind, n)| format!("{n} {kind}")).collect();
        let counts = format!("passed over {count} of {total} lines: {}", counts.join(", "));
        match self.mistakes.first() {
            Some((line, mistake)) => Some(format!("{path}:{line}: {}; {counts}", mistake.what)),
            None if count > 0 => Some(format!("{path}: {counts}")),
            None => None,
        }
    }
}

/// Both tables of a host, as texts show them.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// Its sockets.
    pub sockets: Sockets,
    /// Its entries.
    pub entries: Entries,
}

impl Saved {
    /// Reads both texts. `filter` is the state of sockets that the text shows none of.
    ///
    /// # Errors
    /// One of them holds nothing, or cannot be read for its greater part.
    pub fn read(sockets: &[u8], entries: &[u8], filter: Option<State>) -> Result<Self, Refusal> {
        let (sockets, entries) = (Text::of(sockets), Text::of(entries));
        let saved = Self {
            sockets: self::sockets::sockets(&sockets, filter),
            entries: self::entries::entries(&entries),
        };
        refusal::check(&saved, &sockets, &entries)?;
        Ok(saved)
    }
}
