//! Output: aligned tables, JSON lines, and nothing else on stdout.

use std::borrow::Cow;
use std::io::{self, Write};

use anstream::ColorChoice;
use anstyle::{AnsiColor, Effects, Style};
use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width, presets};

use crate::audit::finding::Finding;
use crate::error::{Op, Result};

/// Text is wrapped here, whatever the terminal.
const WIDTH: u16 = 100;
/// JSON is written in pieces of so many bytes: what a pipe holds.
const PIECE: usize = 64 * 1024;
/// Blanks between columns.
const GAP: u16 = 2;
const BAD: Style = AnsiColor::Red.on_default().effects(Effects::BOLD);
const WARN: Style = AnsiColor::Yellow.on_default();

/// What a table does with a row that is too wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Stays in one line, whatever its width: for rows of addresses.
    Whole,
    /// Its last column is text, broken at spaces.
    Text,
}

/// A table in the manner of `ss`: aligned, no blanks at the ends of lines, no word ever cut.
pub fn table(headings: &[&str], rows: Vec<Vec<String>>, kind: Rows, no_header: bool) -> String {
    let words = rows.iter().filter_map(|row| row.last()).flat_map(|text| text.split_whitespace());
    let longest = words.map(|word| word.chars().count()).max().unwrap_or(0);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if !no_header {
        table.set_header(headings);
    }
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, GAP));
    }
    if kind == Rows::Text {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(WIDTH);
        let last = table.column_count().saturating_sub(1);
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_constraint(if index < last {
                ColumnConstraint::ContentWidth
            } else {
                let padded = u16::try_from(longest).unwrap_or(u16::MAX).saturating_add(GAP);
                ColumnConstraint::LowerBoundary(Width::Fixed(padded))
            });
        }
    }
    table.to_string().lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Writes text to stdout; its colours only on a terminal, and not where NO_COLOR is set.
///
/// # Errors
/// stdout is closed or full.
pub fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    // In one piece: a stripping stream writes line by line.
    let wanted = match anstream::AutoStream::choice(&out) {
        ColorChoice::Never => Cow::Owned(anstream::adapter::strip_str(text).to_string()),
        _ => Cow::Borrowed(text),
    };
    out.write_all(wanted.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Op::new("write to stdout").io(error))
}

/// Writes one JSON value and a line feed to stdout.
///
/// # Errors
/// As [`text`].
pub fn line(value: &impl serde::Serialize) -> Result<()> {
    // Control characters are escaped in it, so there is nothing to strip; it may be as long as the table.
    let mut out = io::BufWriter::with_capacity(PIECE, io::stdout().lock());
    serde_json::to_writer(&mut out, value)
        .map_err(io::Error::from)
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush())
        .map_err(|error| Op::new("write to stdout").io(error))
}

/// Findings, each with what to do about it.
pub fn findings(findings: &[Finding], no_header: bool) -> String {
    let row = |finding: &Finding| {
        vec![
            finding.id.to_owned(),
            finding.verdict.to_string(),
            with_advice(&finding.what, &finding.advice),
        ]
    };
    let rows = findings.iter().map(row).collect();
    coloured(&table(&["FINDING", "VERDICT", "WHAT"], rows, Rows::Text, no_header))
}

pub(super) fn with_advice(what: &str, advice: &str) -> String {
    if advice.is_empty() { what.to_owned() } else { format!("{what}\n-> {advice}") }
}

/// The same text with what hurts in colour.
pub(super) fn coloured(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", painted(line))).collect()
}

fn painted(line: &str) -> String {
    let paint =
        |word: &str, style: Style| line.replacen(word, &format!("{style}{word}{style:#}"), 1);
    // Columns stand two blanks apart, words one.
    let column = |word: &str, style: Style| {
        let painted = format!("  {style}{word}{style:#}  ");
        line.replacen(&format!("  {word}  "), &painted, 1)
    };
    match () {
        () if line.contains("  bad  ") => column("bad", BAD),
        () if line.contains("  warn  ") => column("warn", WARN),
        () if line.trim_start().starts_with("entry-") => {
            paint(line.split_whitespace().next().unwrap_or_default(), BAD)
        }
        () if line.contains(" over ") && line.contains('/') => paint("over", BAD),
        () => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_whole_and_only_text_is_wrapped() {
        let long = "x".repeat(120);
        let row = |text: &str| vec!["name".to_owned(), text.to_owned()];
        let address = "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:20003 ".repeat(3);
        let whole = table(&["A", "B"], vec![row(address.trim_end())], Rows::Whole, true);
        assert_eq!(whole, format!("name  {}\n", address.trim_end()));
        let text = table(&["A", "B"], vec![row(&"word ".repeat(30))], Rows::Text, true);
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().all(|line| line.chars().count() <= usize::from(WIDTH)), "{text}");
        assert!(text.split_whitespace().skip(1).all(|word| word == "word"), "{text}");
        let cut = table(&["A", "B"], vec![row(&format!("a {long} b"))], Rows::Text, true);
        assert!(cut.contains(&long), "{cut}");
    }

    #[test]
    fn only_the_verdict_of_a_line_is_painted() {
        assert_eq!(painted(" syn  ok  bad cookies"), " syn  ok  bad cookies");
        assert!(painted(" syn  bad  bad cookies").contains("\u{1b}[31m"));
        assert_eq!(painted(" syn  bad  x").matches("bad").count(), 1);
    }
}
