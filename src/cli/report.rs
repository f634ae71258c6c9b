//! The report of `ctkeep audit` as a text for people.

use super::output::{Rows, coloured, table, with_advice};
use crate::audit::cover::Cover;
use crate::audit::finding::{Finding, Verdict};
use crate::audit::layers::{Application, Layers, Queue};
use crate::audit::report::{Connection, Report};
use crate::audit::sources::{Listed, Source};
use crate::sockdiag::State;

/// The report for people: sources, disagreements, and the sum of it.
pub fn text(report: &Report, all: bool, top: Option<usize>, no_header: bool) -> String {
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
