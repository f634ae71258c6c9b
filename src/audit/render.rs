//! Output: aligned tables, JSON lines, and nothing else on stdout.

use std::io::{self, Write};

use comfy_table::{Cell, ContentArrangement, Table, presets};

use super::classes::Class;
use super::report::Report;
use crate::error::{Op, Result};
use crate::sockdiag::State;

/// An empty table in the manner of `ss`.
pub fn table(headings: &[&str], no_header: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !no_header {
        table.set_header(headings);
    }
    table
}

/// Writes text to stdout.
///
/// # Errors
/// stdout is closed or full.
pub fn text(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
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
        let limit = match (report.limit(), source.over_limit) {
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
    let mut listed = 0;
    for connection in &report.connections {
        if !all && connection.class == Class::Agree {
            continue;
        }
        listed += 1;
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
    let mut out = String::new();
    if !report.sources.is_empty() {
        out.push_str(&format!("{sources}\n\n"));
    }
    if listed > 0 {
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

/// Tables pad their last column; nobody wants the blanks.
fn trim_ends(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}
