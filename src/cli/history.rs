//! `ctkeep history`: what was so, from the files that the daemon keeps.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::Exit;
use super::args::{Format, History};
use super::output::{self, Rows};
use crate::error::{Error, Result};
use crate::history::record::{Record, Source};
use crate::history::{now, store};

pub(super) fn run(args: &History) -> Result<Exit> {
    let since = now().saturating_sub(args.since.as_secs());
    let (records, damaged) = read(&args.dir)?;
    if damaged > 0 {
        eprintln!("ctkeep: passed over {damaged} damaged lines of {}", args.dir.display());
    }
    let is_narrow = !args.sources.is_empty() || !args.ports.is_empty();
    let rows = rows(self::since(&records, since), args.top, |of| match of {
        Some((source, port)) => {
            (args.sources.is_empty() || args.sources.iter().any(|net| net.contains(&source)))
                && (args.ports.is_empty() || args.ports.contains(&port))
        }
        None => !is_narrow,
    });
    match args.output.format {
        Format::Json => {
            let records: Vec<_> = rows.into_iter().map(|(_, value)| value).collect();
            output::line(&json!({"schema": 1, "damaged": damaged, "records": records}))?;
        }
        Format::Table if rows.is_empty() => output::text("nothing is kept of that time\n")?,
        Format::Table => output::text(&table(rows, args.output.no_header))?,
    }
    Ok(Exit::Done)
}

/// The records from that time on; those of a clock that was set back stay: they are newer than what
/// stands before them.
pub(super) fn since(records: &[Record], since: u64) -> &[Record] {
    let first = records.iter().position(|record| record.at() >= since).unwrap_or(records.len());
    records.get(first..).unwrap_or_default()
}

/// The rows of what `is_wanted`, by source and port, or of what is of all of them; of each minute the
/// first `top` sources.
pub(super) fn rows(
    records: &[Record],
    top: usize,
    is_wanted: impl Fn(Option<(IpAddr, u16)>) -> bool,
) -> Vec<Row> {
    let mut rows = Vec::new();
    for record in records {
        match record {
            Record::Minute { at, netns, sources, .. } => {
                let wanted = sources.iter().filter(|it| is_wanted(Some((it.source, it.port))));
                rows.extend(wanted.take(top).map(|it| minute(*at, netns, it)));
            }
            Record::Action { source, port, .. } if is_wanted(Some((*source, *port))) => {
                rows.push(event(record));
            }
            Record::Reload { .. } | Record::Limit { .. } | Record::Level { .. }
                if is_wanted(None) =>
            {
                rows.push(event(record));
            }
            _ => {}
        }
    }
    rows
}

pub(super) fn table(rows: Vec<Row>, no_header: bool) -> String {
    let headings = ["TIME", "WHAT", "SOURCE", "PORT", "OPEN", "HALF", "COUNTED", "LIMIT", "MORE"];
    let rows = rows.into_iter().map(|(row, _)| row).collect();
    output::table(&headings, rows, Rows::Whole, no_header)
}

/// The records of a folder.
///
/// # Errors
/// There are none: a usage error.
pub(super) fn read(dir: &Path) -> Result<(Vec<Record>, usize)> {
    store::read(dir).map_err(|error| Error::usage("history", none(dir, &error)))
}

/// Why a folder shows no history, and what makes one.
pub(super) fn none(dir: &Path, error: &io::Error) -> String {
    let dir = dir.display();
    match error.kind() {
        io::ErrorKind::NotFound => format!(
            "no history is kept in {dir}: ctkeep run --history {dir} keeps one there (the service does, \
             in /var/lib/ctkeep); --dir names another folder"
        ),
        io::ErrorKind::PermissionDenied => {
            format!("the history in {dir} is for its owner alone: run it as root")
        }
        _ => format!("the history in {dir} cannot be read: {error}"),
    }
}

pub(super) fn time(at: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(at)).to_string()
}

pub(super) type Row = (Vec<String>, serde_json::Value);

fn minute(at: u64, netns: &str, it: &Source) -> Row {
    let numbers = [it.port.into(), it.open, it.half_closed, it.counted].map(|n: u64| n.to_string());
    let [port, open, half, counted] = numbers;
    let more = if it.uncounted > 0 { format!("{} uncounted", it.uncounted) } else { String::new() };
    let limit = it.limit.map_or("-".to_owned(), |limit| limit.to_string());
    let source = it.source.to_string();
    let row = vec![time(at), "held".to_owned(), source, port, open, half, counted, limit, more];
    let value = json!({
        "at": time(at), "what": "held", "netns": netns, "source": it.source, "port": it.port,
        "open": it.open, "half_closed": it.half_closed, "counted": it.counted,
        "uncounted": it.uncounted, "limit": it.limit,
        "limit_of": it.net,
    });
    (row, value)
}

fn event(record: &Record) -> Row {
    let at = time(record.at());
    let row = |what: &str, source: String, port: String, more: String| {
        let none = String::new;
        vec![at.clone(), what.to_owned(), source, port, none(), none(), none(), none(), more]
    };
    match record {
        Record::Action { netns, action, reason, source, port, .. } => (
            row(action, source.to_string(), port.to_string(), reason.clone()),
            json!({"at": at, "what": action, "netns": netns, "source": source, "port": port,
                   "reason": reason}),
        ),
        Record::Reload { well, .. } => (
            row(
                "reload",
                String::new(),
                String::new(),
                if *well { "in force" } else { "refused" }.to_owned(),
            ),
            json!({"at": at, "what": "reload", "well": well}),
        ),
        Record::Limit { netns, limit, loss, .. } => (
            row("limit", String::new(), String::new(), format!("{limit} lost its list: {loss}")),
            json!({"at": at, "what": "limit", "netns": netns, "limit": limit, "loss": loss}),
        ),
        Record::Level { netns, from, to, .. } => (
            row("level", String::new(), String::new(), format!("{from} to {to}")),
            json!({"at": at, "what": "level", "netns": netns, "from": from, "to": to}),
        ),
        Record::Minute { .. } => (Vec::new(), serde_json::Value::Null),
    }
}
