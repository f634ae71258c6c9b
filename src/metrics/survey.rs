//! A survey of the whole tables, as gauges.

use std::collections::HashMap;
use std::net::IpAddr;

use super::gauges::Gauges;
use super::spec::{FAMILIES, Gauge, TABLES, THRESHOLDS};
use crate::audit::survey::Survey;

/// Sets the gauges that take whole tables.
pub(super) fn publish(survey: &Survey, gauges: &mut Gauges) {
    for (family, states) in FAMILIES.into_iter().zip(&survey.sockets) {
        for (state, count) in states {
            gauges.set(Gauge::Sockets, &[family, state.name()], *count as f64);
        }
    }
    for (port, queue) in &survey.queues {
        let port = port.to_string();
        gauges.set(Gauge::QueueConnections, &[&port], queue.waiting as f64);
        gauges.set(Gauge::QueueLimit, &[&port], queue.limit as f64);
    }
    sources(survey, gauges);
    for (class, found) in &survey.classes {
        gauges.set(Gauge::Mismatches, &[class.name()], found.connections as f64);
        gauges.set(Gauge::MismatchSources, &[class.name()], found.sources.len() as f64);
    }
    for (state, seconds) in &survey.kernel.timeouts {
        gauges.set(Gauge::Timeout, &[state.name()], *seconds as f64);
    }
    if let Some(loose) = survey.kernel.tcp_loose {
        gauges.set(Gauge::TcpLoose, &[], loose as f64);
    }
}

fn sources(survey: &Survey, gauges: &mut Gauges) {
    let mut sources: HashMap<IpAddr, [u64; 2]> = HashMap::new();
    for ((addr, _), counts) in &survey.sources {
        let [sockets, entries] = sources.entry(*addr).or_default();
        *sockets += counts.open;
        *entries += counts.counted;
    }
    for (index, table) in TABLES.into_iter().enumerate() {
        let counts = || sources.values().filter_map(|counts| counts.get(index).copied());
        gauges.set(Gauge::SourceMaximum, &[table], counts().max().unwrap_or(0) as f64);
        for (threshold, name) in THRESHOLDS {
            let over = counts().filter(|count| *count > threshold).count();
            gauges.set(Gauge::SourcesOver, &[table, name], over as f64);
        }
    }
}
