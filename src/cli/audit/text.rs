//! The report of `ctkeep audit` as a text for people.

use super::super::output::{Rows, coloured, table, with_advice};
use crate::audit::cover::Coverage;
use crate::audit::finding::{Finding, Verdict};
use crate::audit::layers::{Application, Full, Layers, LimitFigures, Queue};
use crate::audit::report::{Report, ReportedConnection};
use crate::audit::sources::{Listed, Source};
use crate::reconcile::snapshot::View;
use crate::sockdiag::State;

/// So many limits are listed whatever they bear; of more only those of which there is something to
/// say.
const LIMITS: usize = 20;
/// So many sources that are at a limit are named with it.
const FULL: usize = 5;

/// The report for people: limits, sources, disagreements, layers, and the sum of it.
pub fn text(report: &Report, all: bool, top: Option<usize>, no_header: bool) -> String {
    let mut parts = Vec::new();
    parts.extend(limits(report, no_header));
    parts.extend(sources(report, top, no_header));
    parts.extend(connections(report, all, no_header));
    parts.push(layers(&report.layers, no_header));
    let counts: Vec<_> = report
        .classes()
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(class, n)| format!("{n} {class}"))
        .collect();
    let counts = if counts.is_empty() { "no connections".to_owned() } else { counts.join(", ") };
    let mut out = format!("{}\n{counts}\n", parts.join("\n"));
    if let Some(outgoing) = report.outgoing.filter(|outgoing| outgoing.sockets > 0) {
        let kept = report.outgoing_kept.map_or(String::new(), |[_, held, lost]| {
            format!(", {held} kept by ctkeep, {lost} lost")
        });
        out.push_str(&format!(
            "{} half-closed connections that this host or its containers opened: {} translated, {} without an \
             entry{kept}\n",
            outgoing.sockets, outgoing.translated, outgoing.without_entry
        ));
    }
    let all = &report.connections;
    let covered = all.iter().filter(|it| it.cover.is_some_and(Coverage::is_certain)).count();
    if covered > 0 {
        out.push_str(&format!("{covered} of {} connections under the shield\n", all.len()));
    }
    coloured(&out)
}

/// Each limit: what it is for, who passes before it, who is at it, whether it holds.
fn limits(report: &Report, no_header: bool) -> Option<String> {
    let rules = &report.layers.limiter.figures.rules;
    let mut rows: Vec<Vec<String>> = Vec::new();
    if let Some((limit, [mask, mask6], verdict)) = report.named_limit() {
        let full = report.sources.iter().filter(|source| source.held > 0);
        let full = full.filter(|source| size(limit) <= source.held).map(|source| Full {
            port: None,
            destination: None,
            source: source.net.to_string(),
            held: source.held,
            counted: source.counted,
            limit,
            over: source.over_limit,
        });
        let full: Vec<_> = full.collect();
        let what = format!("at most {limit} from each /{mask} (IPv6: /{mask6}), as you named it");
        let mut lines = vec![what];
        lines.extend(at_it(&full, limit, true));
        rows.push(vec!["--limit".to_owned(), verdict.to_string(), lines.join("\n")]);
    }
    let is_told = |rule: &&LimitFigures| !rule.full.is_empty() || rule.verdict != Verdict::Ok;
    let is_shown = |rule: &&LimitFigures| rules.len() <= LIMITS || is_told(rule);
    let shown: Vec<_> = rules.iter().filter(is_shown).collect();
    let left = rules.len() - shown.len();
    rows.extend(shown.into_iter().map(|rule| {
        vec![rule.rule.clone(), rule.verdict.to_string(), about(rule, report.is_asked)]
    }));
    if left > 0 {
        let what = format!("{left} more limits that have room for each source (--format json)");
        rows.push(vec!["...".to_owned(), Verdict::Ok.to_string(), what]);
    }
    let is_there = !rows.is_empty();
    is_there.then(|| table(&["RULE", "VERDICT", "LIMIT"], rows, Rows::Text, no_header))
}

/// The lines on one limit.
fn about(rule: &LimitFigures, is_asked: bool) -> String {
    let mut lines = vec![rule.what.clone()];
    let place = format!("{} ({})", rule.what, rule.rule);
    let is_told = |it: &&Finding| it.verdict != Verdict::Ok || it.id == "limit-unjudged";
    for finding in rule.findings.iter().filter(is_told) {
        // Who is over it is said below.
        if finding.id != "source-over-limit" {
            let what = finding.what.replacen(&place, "", 1);
            lines.push(what.trim_start_matches([':', ';', ' ']).to_owned());
        }
    }
    let list = |before: &str, all: &[String]| {
        let is_some = !all.is_empty();
        is_some.then(|| format!("{before}: {}", all.join("; ")))
    };
    lines.extend(list("passes before it", &rule.passes));
    lines.extend(list("may pass before it", &rule.may_pass));
    lines.extend(list("gets in beyond it", &rule.beyond));
    lines.extend(at_it(&rule.full, rule.limit, rule.counts == "in all"));
    // One that refuses nobody neither holds nor fails to.
    let noted = rule.findings.iter().find(|finding| finding.id == "limit-notes");
    if let Some(noted) = noted {
        if noted.verdict == Verdict::Ok {
            lines.push("refuses nobody: no rule stops what passes it".to_owned());
        }
        return with_advice(&lines.join("\n"), &noted.advice);
    }
    lines.push(match rule.holds {
        Some(true) => "holds now: yes, for the sources asked about".to_owned(),
        Some(false) => "holds now: no".to_owned(),
        None if is_asked => "holds now: no answer".to_owned(),
        None => "holds now: not asked (--ask)".to_owned(),
    });
    let troubled = rule.findings.iter().filter(|finding| finding.verdict == rule.verdict);
    let advice = troubled.map(|finding| finding.advice.as_str()).find(|advice| !advice.is_empty());
    with_advice(&lines.join("\n"), advice.unwrap_or_default())
}

/// The sources that hold as much as a limit allows, or more.
fn at_it(full: &[Full], of_rule: u32, is_all: bool) -> Vec<String> {
    let line = |source: &Full| {
        let Full { held, counted, limit, .. } = source;
        let whose = match &source.destination {
            Some(to) => format!("what goes to {to}"),
            None if !source.source.ends_with("/0") => source.source.clone(),
            None if is_all => "all".to_owned(),
            None => "several clients together".to_owned(),
        };
        let port = source.port.map_or(String::new(), |port| format!(" to port {port}"));
        let how = match source.over {
            Some(true) => "over it",
            None => "perhaps over it",
            Some(false) => "at it",
        };
        let own = if *limit == of_rule { "" } else { " that its element of the set allows" };
        format!("{how}: {whose}{port}, {held} sockets of {limit}{own}, {counted} counted")
    };
    let mut lines: Vec<_> = full.iter().take(FULL).map(line).collect();
    if full.len() > FULL {
        lines.push(format!("and {} more sources", full.len() - FULL));
    }
    lines
}

/// The sources that hold something, or are charged for something.
fn sources(report: &Report, top: Option<usize>, no_header: bool) -> Option<String> {
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
                Some(Listed { count, is_full, limit }) => {
                    // Another limit than the one in the column before it may be the one that answered.
                    let is_other = source.limit.is_some_and(|it| it != limit);
                    let of = if is_other { format!(" of {limit}") } else { String::new() };
                    format!("{count}{of}{}", if is_full { " full" } else { "" })
                }
            });
        }
        row
    };
    let holding = report.sources.iter().filter(|source| source.held > 0 || source.counted > 0);
    let rows: Vec<_> = holding.take(top.unwrap_or(usize::MAX)).map(row).collect();
    let is_there = !rows.is_empty();
    is_there.then(|| table(&headings, rows, Rows::Whole, no_header))
}

/// The peer of the socket, behind the client that it stands for where that is another.
fn peer(view: &View) -> String {
    let (client, remote) = (view.client(), view.connection.remote);
    if client == remote { remote.to_string() } else { format!("{client} as {remote}") }
}

/// The connections about which the tables disagree, or all.
fn connections(report: &Report, all: bool, no_header: bool) -> Option<String> {
    let headings = ["CLASS", "REMOTE", "LOCAL", "SOCKET", "ENTRY", "LEFT", "PROCESS"];
    let row = |connection: &ReportedConnection| {
        let view = &connection.view;
        let entry = view.entry.and_then(|entry| entry.state());
        let timeout = view.entry.and_then(|entry| entry.timeout);
        let holder = connection.holder.as_ref();
        vec![
            connection.class.to_string(),
            peer(view),
            view.connection.local.to_string(),
            view.socket.map_or("-", |socket| socket.state.name()).to_owned(),
            entry.map_or("-".to_owned(), |state| {
                let unreplied = if view.is_unreplied() { "/unreplied" } else { "" };
                format!("{state}{unreplied}")
            }),
            timeout.map_or("-".to_owned(), |time| format!("{}s", time.as_secs())),
            holder.map_or("-".to_owned(), ToString::to_string),
        ]
    };
    let mut listed = report.listed(all);
    listed.retain(|connection| all || connection.class.is_disagreement());
    let rows: Vec<_> = listed.into_iter().map(row).collect();
    let is_there = !rows.is_empty();
    is_there.then(|| table(&headings, rows, Rows::Whole, no_header))
}

/// The layers, each with what is wrong in it; where nothing is, its first figure. What concerns one
/// limit stands with the limits.
fn layers(layers: &Layers, no_header: bool) -> String {
    let mut rows = Vec::new();
    let mut add = |layer: &str, findings: &[&Finding], all: bool| {
        let has_trouble = findings.iter().any(|finding| finding.verdict != Verdict::Ok);
        for (index, finding) in findings.iter().enumerate() {
            let is_first_of_good = index == 0 && !has_trouble;
            if all || finding.verdict != Verdict::Ok || is_first_of_good {
                let what = with_advice(&finding.what, &finding.advice);
                rows.push(vec![layer.to_owned(), finding.verdict.to_string(), what]);
            }
        }
    };
    if let Some(conntrack) = &layers.conntrack {
        add("conntrack", &conntrack.findings.iter().collect::<Vec<_>>(), false);
    }
    let told: Vec<_> = layers.limiter.figures.rules.iter().flat_map(|it| &it.findings).collect();
    let rest = layers.limiter.findings.iter().filter(|finding| !told.contains(finding));
    add("limiter", &rest.collect::<Vec<_>>(), true);
    if let Some(syn) = &layers.syn {
        add("syn", &syn.findings.iter().collect::<Vec<_>>(), false);
    }
    let listen: Vec<_> = layers.listen.iter().map(Queue::finding).collect();
    add("listen", &listen.iter().collect::<Vec<_>>(), true);
    let applications: Vec<_> = layers.application.iter().map(Application::finding).collect();
    add("application", &applications.iter().collect::<Vec<_>>(), true);
    table(&["LAYER", "VERDICT", "WHAT"], rows, Rows::Text, no_header)
}

fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}
