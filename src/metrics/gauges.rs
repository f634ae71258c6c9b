//! What a guard knows of the present: one value for each gauge and its labels, and how the values of
//! several guards become one.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Unit;

use crate::audit::classes::Class;
use crate::conntrack::TcpState;
use crate::shield::DECISIONS;
use crate::sockdiag::State;

/// Address families.
pub(super) const FAMILIES: [&str; 2] = ["ipv4", "ipv6"];
/// The two tables that are compared.
pub(super) const TABLES: [&str; 2] = ["sockets", "entries"];
/// Connections of one source that are worth a figure of their own.
pub(super) const THRESHOLDS: [u64; 7] = [10, 20, 50, 100, 200, 500, 1000];
/// Ways in which the kernel refuses or evicts entries.
pub(super) const DROPS: [&str; 4] = ["drop", "early_drop", "insert_failed", "chain_toolong"];
/// Sockets whose receive buffer can overrun.
pub(super) const BUFFERS: [&str; 2] = ["nflog", "ctnetlink"];
const MODES: [&str; 2] = ["enforce", "observe"];

/// Everything with a present value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Gauge {
    Mode,
    LastReload,
    Sockets,
    Mismatches,
    MismatchSources,
    Held,
    HeldSources,
    HeldOldest,
    SourceMaximum,
    SourcesOver,
    LastSweep,
    ReceiveBuffer,
    TableEntries,
    TableLimit,
    Timeout,
    TcpLoose,
    Drops,
    DefenceLevel,
    QueueConnections,
    QueueLimit,
    ShieldPackets,
    ShieldDevices,
    ShieldMissing,
}

/// How the values of several guards become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Merge {
    Sum,
    Largest,
    Smallest,
}

impl Gauge {
    const ALL: [Self; 23] = [
        Self::Mode,
        Self::LastReload,
        Self::Sockets,
        Self::Mismatches,
        Self::MismatchSources,
        Self::Held,
        Self::HeldSources,
        Self::HeldOldest,
        Self::SourceMaximum,
        Self::SourcesOver,
        Self::LastSweep,
        Self::ReceiveBuffer,
        Self::TableEntries,
        Self::TableLimit,
        Self::Timeout,
        Self::TcpLoose,
        Self::Drops,
        Self::DefenceLevel,
        Self::QueueConnections,
        Self::QueueLimit,
        Self::ShieldPackets,
        Self::ShieldDevices,
        Self::ShieldMissing,
    ];

    /// Name without its unit, and help.
    fn text(self) -> (&'static str, &'static str) {
        match self {
            Self::Mode => {
                ("ctkeep_mode", "1 for the mode in force: enforce repairs, observe only looks.")
            }
            Self::LastReload => (
                "ctkeep_config_last_reload_successful",
                "1 when the last reload of the configuration was taken up, or there was none.",
            ),
            Self::Sockets => ("ctkeep_sockets", "TCP sockets of the scope."),
            Self::Mismatches => (
                "ctkeep_mismatches",
                "Connections by how the tables stood to each other after the last deep sweep.",
            ),
            Self::MismatchSources => {
                ("ctkeep_mismatch_sources", "Distinct peer addresses of these connections.")
            }
            Self::Held => ("ctkeep_held_connections", "Conntrack entries that ctkeep answers for."),
            Self::HeldSources => {
                ("ctkeep_held_sources", "Distinct peer addresses of held connections.")
            }
            Self::HeldOldest => {
                ("ctkeep_held_oldest_age", "For how long the oldest held connection has been held.")
            }
            Self::SourceMaximum => (
                "ctkeep_source_connections_max",
                "Most connections of one peer address: open sockets, and entries that a limiter counts.",
            ),
            Self::SourcesOver => (
                "ctkeep_sources_over_threshold",
                "Peer addresses with more connections than the threshold.",
            ),
            Self::LastSweep => (
                "ctkeep_last_sweep_success_timestamp",
                "When the last good sweep ended, of the guard for which that is longest ago.",
            ),
            Self::ReceiveBuffer => {
                ("ctkeep_netlink_receive_buffer", "Receive buffers of event sockets, as granted.")
            }
            Self::TableEntries => {
                ("ctkeep_conntrack_table_entries", "Entries of the conntrack table.")
            }
            Self::TableLimit => {
                ("ctkeep_conntrack_table_entries_limit", "Most entries that the table takes.")
            }
            Self::Timeout => {
                ("ctkeep_conntrack_timeout", "The kernel's timeout of TCP entries in this state.")
            }
            Self::TcpLoose => (
                "ctkeep_conntrack_tcp_loose",
                "nf_conntrack_tcp_loose: 1 when conntrack picks connections up in their middle.",
            ),
            Self::Drops => (
                "ctkeep_conntrack_drops",
                "Packets and entries that conntrack dropped, refused or evicted, by its own counters.",
            ),
            Self::DefenceLevel => (
                "ctkeep_defence_level",
                "0 calm, 1 under attack, 2 by order of the operator; the highest of all guards.",
            ),
            Self::QueueConnections => (
                "ctkeep_listen_queue_connections",
                "Connections that wait to be accepted on this port.",
            ),
            Self::QueueLimit => {
                ("ctkeep_listen_queue_limit", "Connections that may wait on this port.")
            }
            Self::ShieldPackets => (
                "ctkeep_shield_packets",
                "FINs and RSTs of guarded connections, by what the shield made of them.",
            ),
            Self::ShieldDevices => {
                ("ctkeep_shield_devices", "Network devices that the shield is attached to.")
            }
            Self::ShieldMissing => (
                "ctkeep_shield_missing",
                "1 where the shield is asked for and is not up, or refused by a device.",
            ),
        }
    }

    fn unit(self) -> Option<Unit> {
        match self {
            Self::HeldOldest | Self::LastSweep | Self::Timeout => Some(Unit::Seconds),
            Self::ReceiveBuffer => Some(Unit::Bytes),
            _ => None,
        }
    }

    fn merge(self) -> Merge {
        match self {
            Self::HeldOldest | Self::SourceMaximum | Self::TcpLoose | Self::DefenceLevel => {
                Merge::Largest
            }
            Self::LastSweep | Self::Timeout => Merge::Smallest,
            _ => Merge::Sum,
        }
    }

    /// Label names.
    fn labels(self) -> &'static [&'static str] {
        match self {
            Self::Mode => &["mode"],
            Self::Sockets => &["family", "state"],
            Self::Mismatches | Self::MismatchSources => &["class"],
            Self::Held | Self::HeldSources => &["family"],
            Self::SourceMaximum => &["table"],
            Self::SourcesOver => &["table", "threshold"],
            Self::ReceiveBuffer => &["socket"],
            Self::Timeout => &["state"],
            Self::Drops => &["kind"],
            Self::ShieldPackets => &["decision"],
            Self::QueueConnections | Self::QueueLimit => &["port"],
            _ => &[],
        }
    }

    /// Every combination of label values that is there from the start. Ports are there when
    /// somebody listens.
    fn values(self) -> Vec<Vec<String>> {
        let one = |values: &[&str]| values.iter().map(|value| vec![(*value).to_owned()]).collect();
        let two = |first: &[&str], second: &[String]| {
            first
                .iter()
                .flat_map(|a| second.iter().map(|b| vec![(*a).to_owned(), b.clone()]))
                .collect()
        };
        match self {
            Self::Mode => one(&MODES),
            Self::Sockets => two(&FAMILIES, &State::ALL.map(|state| state.name().to_owned())),
            Self::Mismatches | Self::MismatchSources => one(&Class::ALL.map(Class::name)),
            Self::Held | Self::HeldSources => one(&FAMILIES),
            Self::SourceMaximum => one(&TABLES),
            Self::SourcesOver => two(&TABLES, &THRESHOLDS.map(|threshold| threshold.to_string())),
            Self::ReceiveBuffer => one(&BUFFERS),
            Self::Timeout => one(&timed_states().map(TcpState::name)),
            Self::Drops => one(&DROPS),
            Self::ShieldPackets => one(&DECISIONS),
            Self::QueueConnections | Self::QueueLimit => Vec::new(),
            _ => vec![Vec::new()],
        }
    }
}

/// Conntrack states that have a timeout.
pub(super) fn timed_states() -> [TcpState; 8] {
    [
        TcpState::SynSent,
        TcpState::SynRecv,
        TcpState::Established,
        TcpState::FinWait,
        TcpState::CloseWait,
        TcpState::LastAck,
        TcpState::TimeWait,
        TcpState::Close,
    ]
}

/// Values by gauge and label values; what is not there is 0.
#[derive(Clone, Debug, Default)]
pub(super) struct Gauges(BTreeMap<Gauge, BTreeMap<Vec<String>, f64>>);

impl Gauges {
    /// Sets one value.
    pub(super) fn set(&mut self, gauge: Gauge, labels: &[&str], value: f64) {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.0.entry(gauge).or_default().insert(labels, value);
    }

    /// Takes all values of these gauges instead of its own.
    pub(super) fn replace(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// One value.
    pub(super) fn value(&self, gauge: Gauge, labels: &[&str]) -> f64 {
        let values = self.0.get(&gauge);
        let found = values.and_then(|values| values.iter().find(|(key, _)| *key == labels));
        found.map_or(0.0, |(_, value)| *value)
    }

    /// All values of a gauge added up.
    pub(super) fn sum(&self, gauge: Gauge) -> f64 {
        self.0.get(&gauge).map_or(0.0, |values| values.values().sum())
    }

    /// Takes another guard's values in.
    pub(super) fn merge(&mut self, other: &Self) {
        for (gauge, values) in &other.0 {
            let own = self.0.entry(*gauge).or_default();
            for (labels, value) in values {
                let merged = own.entry(labels.clone()).or_insert(match gauge.merge() {
                    Merge::Sum => 0.0,
                    Merge::Largest | Merge::Smallest => *value,
                });
                *merged = match gauge.merge() {
                    Merge::Sum => *merged + value,
                    Merge::Largest => merged.max(*value),
                    Merge::Smallest => merged.min(*value),
                };
            }
        }
    }

    /// Writes all gauges, those without a value as 0.
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for gauge in Gauge::ALL {
            let (name, help) = gauge.text();
            let mut values: BTreeMap<_, _> =
                gauge.values().into_iter().map(|labels| (labels, 0.0)).collect();
            if let Some(known) = self.0.get(&gauge) {
                values.extend(known.iter().map(|(labels, value)| (labels.clone(), *value)));
            }
            let is_counter = matches!(gauge, Gauge::Drops | Gauge::ShieldPackets);
            let kind = if is_counter { MetricType::Counter } else { MetricType::Gauge };
            let unit = gauge.unit();
            let mut encoder = encoder.encode_descriptor(name, help, unit.as_ref(), kind)?;
            for (labels, value) in values {
                let labels: Vec<_> = gauge.labels().iter().copied().zip(labels).collect();
                if labels.is_empty() {
                    encoder.encode_gauge(&value)?;
                } else if is_counter {
                    ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
                } else {
                    encoder.encode_family(&labels)?.encode_gauge(&value)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_add_up_and_the_worst_of_them_counts() {
        let mut total = Gauges::default();
        for (held, level, sweep) in [(3.0, 0.0, 70.0), (4.0, 1.0, 60.0)] {
            let mut guard = Gauges::default();
            guard.set(Gauge::Held, &["ipv4"], held);
            guard.set(Gauge::DefenceLevel, &[], level);
            guard.set(Gauge::LastSweep, &[], sweep);
            total.merge(&guard);
        }
        assert_eq!(total.value(Gauge::Held, &["ipv4"]), 7.0);
        assert_eq!(total.value(Gauge::DefenceLevel, &[]), 1.0);
        assert_eq!(total.value(Gauge::LastSweep, &[]), 60.0);
    }
}
