//! Output: aligned tables, JSON lines, and nothing else on stdout.

use std::borrow::Cow;
use std::io::{self, Write};

use anstream::ColorChoice;
use anstyle::{AnsiColor, Effects, Style};
use comfy_table::{ColumnConstraint, ContentArrangement, Table, Width, presets};

use crate::audit::cover::Cover;
use crate::audit::finding::{Finding, Verdict};
use crate::audit::layers::{Application, Layers, Queue};
use crate::audit::report::{Connection, Report};
use crate::audit::sources::{Listed, Source};
use crate::error::{Op, Result};
use crate::sockdiag::State;

/// Text is wrapped here, whatever the terminal.
const WIDTH: u16 = 100;
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
pub fn line(value: &serde_json::Value) -> Result<()> {
    text(&format!("{value}\n"))
}

/// The report for people: sources, disagreements, and the sum of it.
pub fn report(report: &Report, all: bool, top: Option<usize>, no_header: bool) -> String {
    let mut headings = vec![
        "SOURCE",
        "HELD",
        "COUNTED",
        "UNCOUNTED",
        "STALE",
        "CLOSE-WAIT",
        "ESTAB",
        "OLDEST",
        "LIMIT",
    ];
    if report.is_asked {
        headings.push("LISTED");
    }
    let row = |source: &Source| {
        let of = |state| source.sockets.get(&state).copied().unwrap_or(0);
        let limit = match (source.limit, source.over_limit) {
            (None, _) => "-".to_owned(),
            (Some(limit), Some(false)) => limit.to_string(),
            (Some(limit), Some(true)) => format!("over {limit}"),
            (Some(limit), None) => format!("perhaps over {limit}"),
        };
        let mut row = vec![
            source.net.to_string(),
            source.held.to_string(),
            source.counted.to_string(),
            source.uncounted.to_string(),
            source.stale.to_string(),
            of(State::CloseWait).to_string(),
            of(State::Established).to_string(),
            source.oldest_half_close.map_or("-".to_owned(), |age| format!("{age}s")),
            limit,
        ];
        if report.is_asked {
            row.push(match source.listed {
                None => "-".to_owned(),
                Some(Listed { count, is_full: true }) => format!("{count} full"),
                Some(Listed { count, is_full: false }) => count.to_string(),
            });
        }
        row
    };
    let rows = report.sources.iter().take(top.unwrap_or(usize::MAX)).map(row).collect();
    let sources = table(&headings, rows, Rows::Whole, no_header);
    let headings = ["CLASS", "REMOTE", "LOCAL", "SOCKET", "ENTRY", "LEFT", "PROCESS"];
    let row = |connection: &Connection| {
        let view = &connection.view;
        let entry = view.entry.and_then(|entry| entry.state());
        let timeout = view.entry.and_then(|entry| entry.timeout);
        let holder = connection.holder.as_ref();
        vec![
            connection.class.to_string(),
            view.flow.dst.to_string(),
            view.flow.src.to_string(),
            view.socket.map_or("-", |socket| socket.state.name()).to_owned(),
            entry.map_or("-".to_owned(), |state| {
                let unreplied = if view.is_unreplied() { "/unreplied" } else { "" };
                format!("{state}{unreplied}")
            }),
            timeout.map_or("-".to_owned(), |time| format!("{}s", time.as_secs())),
            holder.map_or("-".to_owned(), |holder| format!("{}/{}", holder.pid, holder.command)),
        ]
    };
    let connections: Vec<_> = report.listed(all).into_iter().map(row).collect();
    let mut out = format!("{}\n", layers(&report.layers, no_header));
    if !report.sources.is_empty() {
        out.push_str(&format!("{sources}\n"));
    }
    if !connections.is_empty() {
        out.push_str(&table(&headings, connections, Rows::Whole, no_header));
        out.push('\n');
    }
    let counts: Vec<_> = report
        .classes()
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(class, n)| format!("{n} {class}"))
        .collect();
    let counts = if counts.is_empty() { "no connections".to_owned() } else { counts.join(", ") };
    out.push_str(&format!("{counts}\n"));
    let all = &report.connections;
    let covered = all.iter().filter(|it| it.cover.is_some_and(Cover::is_certain)).count();
    if covered > 0 {
        out.push_str(&format!("{covered} of {} connections under the shield\n", all.len()));
    }
    coloured(&out)
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

fn with_advice(what: &str, advice: &str) -> String {
    if advice.is_empty() { what.to_owned() } else { format!("{what}\n-> {advice}") }
}

/// The layers, each with what is wrong in it; where nothing is, its first figure.
fn layers(layers: &Layers, no_header: bool) -> String {
    let mut rows = Vec::new();
    let mut add = |layer: &str, verdict: Verdict, what: &str, advice: &str| {
        rows.push(vec![layer.to_owned(), verdict.to_string(), with_advice(what, advice)]);
    };
    let mut findings = |layer: &str, findings: &[Finding], all: bool| {
        let has_trouble = findings.iter().any(|finding| finding.verdict != Verdict::Ok);
        for (index, finding) in findings.iter().enumerate() {
            let is_first_of_good = index == 0 && !has_trouble;
            if all || finding.verdict != Verdict::Ok || is_first_of_good {
                add(layer, finding.verdict, &finding.what, &finding.advice);
            }
        }
    };
    if let Some(conntrack) = &layers.conntrack {
        findings("conntrack", &conntrack.findings, false);
    }
    findings("limiter", &layers.limiter.findings, true);
    if let Some(syn) = &layers.syn {
        findings("syn", &syn.findings, false);
    }
    let listen: Vec<_> = layers.listen.iter().map(Queue::finding).collect();
    findings("listen", &listen, true);
    let applications: Vec<_> = layers.application.iter().map(Application::finding).collect();
    findings("application", &applications, true);
    table(&["LAYER", "VERDICT", "WHAT"], rows, Rows::Text, no_header)
}

/// The same text with what hurts in colour.
fn coloured(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", painted(line))).collect()
}

fn painted(line: &str) -> String {
    let paint =
        |word: &str, style: Style| line.replacen(word, &format!("{style}{word}{style:#}"), 1);
    match line.split_whitespace().nth(1) {
        Some("bad") => paint("bad", BAD),
        Some("warn") => paint("warn", WARN),
        _ if line.trim_start().starts_with("entry-") => {
            paint(line.split_whitespace().next().unwrap_or_default(), BAD)
        }
        _ if line.contains(" over ") && line.contains('/') => paint("over", BAD),
        _ => line.to_owned(),
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
