//! The status page: one document with everything in it, readable without its script.

use std::fmt::{self, Display, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::gauges::Gauges;
use super::history::{History, SAMPLES, STEP};
use super::spec::{ACTIONS, Count, Gauge};
use super::{Liveness, Metrics, clock, locked};
use crate::error::Error;
use crate::firewall::lists::Loss;
use crate::reconcile::checks::Counted;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Nothing but the page's own style and script, by their SHA-256, and its own address for the
/// refresh. A test compares the digests.
pub(super) const POLICY: &str = "default-src 'none'; \
    style-src 'sha256-x9FIMlsf7Aekj7Ph7FaZYVwmiNGkH2YU/KRlAQQSOc0='; \
    script-src 'sha256-iyVPJegmVT5aqcDyBfsAV6g1p4le2qkNzyFg6feHza0='; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Size of the plot, in its own units.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 120.0;

/// Text that means nothing in HTML, neither between tags nor in an attribute.
struct Escaped<T>(T);

impl<T: Display> Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.to_string().chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The page as it is now.
pub(super) fn write(metrics: &Metrics) -> String {
    let mut out = String::new();
    // A String takes everything.
    let _ = page(&mut out, metrics);
    out
}

fn page(out: &mut String, metrics: &Metrics) -> fmt::Result {
    write!(
        out,
        "<!DOCTYPE html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>ctkeep</title>\
         <style>{STYLE}</style></head><body><main>"
    )?;
    let total = metrics.guards.total();
    let shown = metrics.addresses.load(Ordering::Relaxed);
    head(out, metrics)?;
    figures(out, metrics, &total)?;
    // A worker that has just repaired something must not wait for the drawing.
    let history = locked(&metrics.history).clone();
    plot(out, &history)?;
    repairs(out, &history, shown)?;
    errors(out, metrics)?;
    guards(out, metrics, shown)?;
    write!(out, "</main><script>{SCRIPT}</script></body></html>")
}

fn head(out: &mut String, metrics: &Metrics) -> fmt::Result {
    let (class, state) = match metrics.health() {
        Ok(()) => ("good", "guarding".to_owned()),
        Err(why) => ("bad", why),
    };
    let about = &metrics.about;
    let up = clock().duration_since(about.started).unwrap_or_default();
    write!(
        out,
        "<h1>ctkeep: <span id=\"state\" class=\"{class}\">{}</span></h1>\
         <p>version {}, Linux {}, up {}, mode {}; <a href=\"/metrics\">metrics</a></p>",
        Escaped(state),
        Escaped(env!("CARGO_PKG_VERSION")),
        Escaped(&about.kernel),
        age(up),
        Escaped(about.mode),
    )
}

fn figures(out: &mut String, metrics: &Metrics, total: &Gauges) -> fmt::Result {
    let level = total.value(Gauge::DefenceLevel, &[]);
    let level_name = match level {
        0.0 => "calm",
        1.0 => "under attack",
        _ => "by order",
    };
    let entries = total.value(Gauge::TableEntries, &[]);
    let limit = total.value(Gauge::TableLimit, &[]);
    let fill = if limit > 0.0 { 100.0 * entries / limit } else { 0.0 };
    let all = total.sum(Gauge::Mismatches);
    let mismatches = all - total.value(Gauge::Mismatches, &["agree"]);
    let oldest = Duration::try_from_secs_f64(total.value(Gauge::HeldOldest, &[]));
    let count = |count| metrics.counts.value(count, &[]);
    out.push_str("<dl>");
    let mut figure = |id: &str, name: &str, value: &dyn Display| {
        write!(out, "<div><dt>{name}</dt><dd id=\"{id}\">{value}</dd></div>")
    };
    figure("defence", "defence level", &format_args!("{level} ({level_name})"))?;
    figure("held", "held connections", &total.sum(Gauge::Held))?;
    figure("sources", "their sources", &total.sum(Gauge::HeldSources))?;
    figure("oldest", "longest held", &age(oldest.unwrap_or_default()))?;
    figure("table", "conntrack table", &format_args!("{entries} of {limit} ({fill:.1} %)"))?;
    figure("mismatches", "mismatches left", &mismatches)?;
    figure("uncounted", "open and not counted", &total.sum(Gauge::Uncounted))?;
    figure("overloads", "sources over an overload", &total.sum(Gauge::OverloadSources))?;
    let changes = Loss::ALL.map(|loss| metrics.counts.value(Count::RuleChanges, &[loss.name()]));
    figure("rules", "limits shown anew", &changes.iter().sum::<u64>())?;
    let checks = Counted::ALL.map(|counted| {
        let value = metrics.counts.value(Count::RecountChecks, &[counted.name()]);
        format!("{value} {}", counted.name())
    });
    figure("checks", "recount checks", &checks.join(", "))?;
    figure("late", "late repairs", &count(Count::LateRepairs))?;
    figure("overruns", "event overruns", &count(Count::EventOverruns))?;
    figure("sweep-errors", "sweep errors", &count(Count::SweepErrors))?;
    out.push_str("</dl>");
    Ok(())
}

fn plot(out: &mut String, history: &History) -> fmt::Result {
    let samples = &history.samples;
    let most = samples.iter().fold(1.0_f64, |most, sample| most.max(sample.held));
    let (right, step) = (WIDTH, WIDTH / (SAMPLES - 1) as f64);
    write!(
        out,
        "<h2>The last hour</h2><p><span class=\"key-held\">held connections</span>, \
         <span class=\"key-sources\">their sources</span>; at most {most}</p>\
         <svg viewBox=\"0 -12 {WIDTH} {}\" role=\"img\" aria-label=\"held connections and their \
         sources over the last hour\"><path class=\"axis\" d=\"M0 {HEIGHT}H{WIDTH}\"/>\
         <text x=\"0\" y=\"{}\">1 h ago</text>\
         <text x=\"{WIDTH}\" y=\"{}\" text-anchor=\"end\">now</text>\
         <text x=\"0\" y=\"-2\">{most}</text>",
        HEIGHT + 30.0,
        HEIGHT + 14.0,
        HEIGHT + 14.0,
    )?;
    for class in ["held", "sources"] {
        write!(out, "<polyline class=\"{class}\" points=\"")?;
        // The newest sample stands at the right.
        for (ago, sample) in samples.iter().rev().enumerate() {
            let value = if class == "held" { sample.held } else { sample.sources };
            let (x, y) = (right - ago as f64 * step, HEIGHT * (1.0 - value / most));
            write!(out, "{x:.1},{y:.1} ")?;
        }
        out.push_str("\"/>");
    }
    write!(out, "</svg><p>A sample every {} s.</p>", STEP.as_secs())
}

fn repairs(out: &mut String, history: &History, shown: bool) -> fmt::Result {
    out.push_str("<h2>Actions of the last hour, by reason</h2>");
    let actions = history.actions();
    if actions.is_empty() {
        out.push_str("<p>none</p>");
    } else {
        out.push_str("<table><tr><th>action<th>reason<th class=\"n\">count</tr>");
        for ((kind, reason), count) in actions {
            let (kind, reason) = (Escaped(kind), Escaped(reason));
            write!(out, "<tr><td>{kind}<td>{reason}<td class=\"n\">{count}</tr>")?;
        }
        out.push_str("</table>");
    }
    if history.last.is_empty() {
        return Ok(());
    }
    out.push_str("<h2>The last ones</h2><table><tr><th>ago<th>action<th>reason<th>trigger");
    out.push_str(if shown { "<th>connection</tr>" } else { "</tr>" });
    let now = clock();
    for deed in &history.last {
        write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}",
            age(now.duration_since(deed.at).unwrap_or_default()),
            Escaped(deed.kind),
            Escaped(deed.reason),
            Escaped(deed.trigger.name()),
        )?;
        if shown {
            write!(out, "<td>{}", Escaped(deed.flow))?;
        }
        out.push_str("</tr>");
    }
    out.push_str("</table>");
    Ok(())
}

fn errors(out: &mut String, metrics: &Metrics) -> fmt::Result {
    out.push_str("<h2>Failed actions since the start</h2>");
    let mut rows = String::new();
    for action in ACTIONS {
        for reason in Error::REASONS {
            let count = metrics.counts.value(Count::ActionErrors, &[action, reason]);
            if count > 0 {
                write!(rows, "<tr><td>{action}<td>{reason}<td class=\"n\">{count}</tr>")?;
            }
        }
    }
    if rows.is_empty() {
        out.push_str("<p>none</p>");
        return Ok(());
    }
    write!(out, "<table><tr><th>action<th>reason<th class=\"n\">count</tr>{rows}</table>")
}

fn guards(out: &mut String, metrics: &Metrics, shown: bool) -> fmt::Result {
    out.push_str("<h2>Guards</h2><table><tr><th>guard<th>last good sweep<th>failure</tr>");
    let mut top = Vec::new();
    for (name, guard) in locked(&metrics.guards.all).iter() {
        let swept = match guard.liveness {
            Liveness::Swept { at, .. } => format!("{} ago", age(at.elapsed())),
            Liveness::Starting => "none yet".to_owned(),
            Liveness::Absent => "the namespace is not there".to_owned(),
        };
        let failure = guard.failure.as_deref().unwrap_or("none");
        let name = Escaped(name);
        write!(out, "<tr><td>{name}<td>{swept}<td>{}</tr>", Escaped(failure))?;
        top.extend(guard.top.iter().copied());
    }
    out.push_str("</table>");
    if shown && !top.is_empty() {
        top.sort_by_key(|(addr, count)| (std::cmp::Reverse(*count), *addr));
        out.push_str("<h2>Sources</h2><table><tr><th>source<th class=\"n\">held</tr>");
        for (addr, held) in top {
            write!(out, "<tr><td>{}<td class=\"n\">{held}</tr>", Escaped(addr))?;
        }
        out.push_str("</table>");
    }
    Ok(())
}

/// In whole seconds, as people say it.
fn age(time: Duration) -> humantime::FormattedDuration {
    humantime::format_duration(Duration::from_secs(time.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_written_is_markup() {
        let text = Escaped("<script>alert('\"&')</script>").to_string();
        assert_eq!(text, "&lt;script&gt;alert(&#39;&quot;&amp;&#39;)&lt;/script&gt;");
    }

    #[test]
    fn the_policy_names_the_digests_of_style_and_script() {
        use base64::Engine;
        use sha2::Digest;
        for text in [STYLE, SCRIPT] {
            let digest = sha2::Sha256::digest(text.as_bytes());
            let digest = base64::engine::general_purpose::STANDARD.encode(digest);
            assert!(POLICY.contains(&format!("'sha256-{digest}'")), "{digest}: {text}");
        }
    }

    #[test]
    fn a_page_has_its_figures_and_no_addresses() {
        let metrics = Metrics::new(false);
        metrics.expect("<web>");
        metrics.sample();
        let page = write(&metrics);
        assert!(page.contains("id=\"held\">0<") && page.contains("&lt;web&gt;"), "{page}");
        assert!(!page.contains("<web>") && !page.contains("Sources</h2>"), "{page}");
        assert_eq!(page.matches("<polyline").count(), 2);
    }
}
