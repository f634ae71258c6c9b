//! Output: aligned tables, JSON lines, and nothing else on stdout.

use std::io::{self, Write};

use anstyle::{AnsiColor, Effects, Style};
use comfy_table::{Cell, ContentArrangement, Table, presets};

use super::finding::{Finding, Verdict};
use super::layers::Layers;
use super::report::Report;
use crate::error::{Op, Result};
use crate::sockdiag::State;

/// No line of a table is longer, whatever the terminal.
const WIDTH: u16 = 100;
const BAD: Style = AnsiColor::Red.on_default().effects(Effects::BOLD);
const WARN: Style = AnsiColor::Yellow.on_default();

/// An empty table in the manner of `ss`.
pub fn table(headings: &[&str], no_header: bool) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH);
    if !no_header {
        table.set_header(headings);
    }
    table
}

/// Writes text to stdout; its colours only on a terminal, and not where NO_COLOR is set.
///
/// # Errors
/// stdout is closed or full.
pub fn text(text: &str) -> Result<()> {
    let mut out = anstream::AutoStream::auto(io::stdout().lock());
    out.write_all(text.as_bytes())
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
    let headings =
        ["SOURCE", "HELD", "COUNTED", "UNCOUNTED", "STALE", "CLOSE-WAIT", "ESTABLISHED", "LIMIT"];
    let mut sources = table(&headings, no_header);
    for source in report.sources.iter().take(top.unwrap_or(usize::MAX)) {
        let of = |state| source.sockets.get(&state).copied().unwrap_or(0);
        let limit = match (source.limit, source.over_limit) {
            (None, _) => "-".to_owned(),
            (Some(limit), false) => limit.to_string(),
            (Some(limit), true) => format!("over {limit}"),
        };
        sources.add_row(vec![
            Cell::new(source.net),
            Cell::new(source.held),
            Cell::new(source.counted),
            Cell::new(source.uncounted),
            Cell::new(source.stale),
            Cell::new(of(State::CloseWait)),
            Cell::new(of(State::Established)),
            Cell::new(limit),
        ]);
    }
    let headings = ["CLASS", "REMOTE", "LOCAL", "SOCKET", "ENTRY", "EXPIRES", "PROCESS"];
    let mut connections = table(&headings, no_header);
    let listed = report.listed(all);
    for connection in &listed {
        let view = &connection.view;
        let entry = view.entry.and_then(|entry| entry.state());
        let timeout = view.entry.and_then(|entry| entry.timeout);
        connections.add_row(vec![
            Cell::new(connection.class),
            Cell::new(view.flow.dst),
            Cell::new(view.flow.src),
            Cell::new(view.socket.map_or("-", |socket| socket.state.name())),
            Cell::new(entry.map_or("-", |state| state.name())),
            Cell::new(timeout.map_or("-".to_owned(), |time| format!("{}s", time.as_secs()))),
            Cell::new(
                connection
                    .holder
                    .as_ref()
                    .map_or("-".to_owned(), |holder| format!("{}/{}", holder.pid, holder.command)),
            ),
        ]);
    }
    let mut out = format!("{}\n\n", layers(&report.layers, no_header));
    if !report.sources.is_empty() {
        out.push_str(&format!("{sources}\n\n"));
    }
    if !listed.is_empty() {
        out.push_str(&format!("{connections}\n\n"));
    }
    let counts: Vec<_> = report
        .classes()
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(class, n)| format!("{n} {class}"))
        .collect();
    let counts = if counts.is_empty() { "no connections".to_owned() } else { counts.join(", ") };
    out.push_str(&format!("{counts}\n"));
    trim_ends(&out)
}

/// Findings, each with what to do about it.
pub fn findings(findings: &[Finding], no_header: bool) -> String {
    let mut rows = table(&["FINDING", "VERDICT", "WHAT"], no_header);
    for finding in findings {
        rows.add_row(vec![
            finding.id.to_owned(),
            finding.verdict.to_string(),
            with_advice(&finding.what, &finding.advice),
        ]);
    }
    trim_ends(&rows.to_string())
}

fn with_advice(what: &str, advice: &str) -> String {
    if advice.is_empty() { what.to_owned() } else { format!("{what}\n-> {advice}") }
}

/// The layers, each with what is wrong in it; where nothing is, its first figure.
fn layers(layers: &Layers, no_header: bool) -> Table {
    let mut rows = table(&["LAYER", "VERDICT", "WHAT"], no_header);
    let mut add = |layer: &str, verdict: Verdict, what: &str, advice: &str| {
        rows.add_row(vec![layer.to_owned(), verdict.to_string(), with_advice(what, advice)]);
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
    for queue in &layers.listen {
        let who = queue.command.as_deref().map_or(String::new(), |name| format!(" by {name}"));
        let what = format!(
            "{}: {} of {} wait to be accepted{who}",
            queue.local, queue.waiting, queue.limit
        );
        add("listen", queue.verdict, &what, queue.advice.as_deref().unwrap_or_default());
    }
    for application in &layers.application {
        let who = match (application.pid, &application.command) {
            (Some(pid), Some(command)) if application.processes > 1 => {
                format!("{command} ({pid} and {} more)", application.processes - 1)
            }
            (Some(pid), Some(command)) => format!("{command} ({pid})"),
            _ => "no process".to_owned(),
        };
        let what = format!("{who}: {}", application.what);
        add(
            "application",
            application.verdict,
            &what,
            application.advice.as_deref().unwrap_or_default(),
        );
    }
    rows
}

/// Tables pad their last column; nobody wants the blanks. What hurts is coloured.
fn trim_ends(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", painted(line.trim_end()))).collect()
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
    fn only_the_verdict_of_a_line_is_painted() {
        assert_eq!(painted(" syn  ok  bad cookies"), " syn  ok  bad cookies");
        assert!(painted(" syn  bad  bad cookies").contains("\u{1b}[31m"));
        assert_eq!(painted(" syn  bad  x").matches("bad").count(), 1);
    }
}
