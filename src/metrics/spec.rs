//! Every metric, one row each: name, help, unit, labels with their values, and how the values of
//! several guards become one. docs/metrics.md says what each means, and a test compares the two.

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use crate::audit::classes::Class;
use crate::audit::survey::TIMED;
use crate::conntrack::TcpState;
use crate::error::Error;
use crate::firewall::lists::Loss;
use crate::reconcile::checks::Counted;
use crate::reconcile::outgoing;
use crate::reconcile::outgoing::plan::Deed;
use crate::shield::DECISIONS;
use crate::sockdiag::State;

/// Address families.
pub(super) const FAMILIES: [&str; 2] = ["ipv4", "ipv6"];
/// The two tables that are compared.
pub(super) const TABLES: [&str; 2] = ["sockets", "entries"];
/// Connections of one source that are worth a figure of their own, as numbers and as label values.
pub(super) const THRESHOLDS: [(u64, &str); 7] =
    [(10, "10"), (20, "20"), (50, "50"), (100, "100"), (200, "200"), (500, "500"), (1000, "1000")];
/// Arrivals in which the kernel refuses or evicts entries.
pub(super) const DROPS: [&str; 4] = ["drop", "early_drop", "insert_failed", "chain_toolong"];
/// Sockets whose receive buffer can overrun.
pub(super) const BUFFERS: [&str; 2] = ["nflog", "ctnetlink"];
/// Actions of the plan, and what a repair takes beside them.
pub(super) const ACTIONS: [&str; 8] =
    ["extend", "revive", "reinsert", "reverse", "recount", "seal", "release", "reap"];
/// Arrivals of a nudge.
pub(super) const ROUTES: [&str; 2] = ["ingress", "loopback"];

/// Seconds. A repair by event takes some hundred microseconds; a sweep comes once a second.
const REACTION_BUCKETS: [f64; 16] = [
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0,
];
/// Seconds: from a handful of sockets to tables of millions.
const SWEEP_BUCKETS: [f64; 10] = [1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0];
/// Seconds: from a sweep to a day.
const CLOSE_WAIT_BUCKETS: [f64; 11] =
    [1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 86400.0];

/// A label, and the values that are there with 0 from the start.
pub(super) struct Label {
    name: &'static str,
    values: fn() -> Vec<&'static str>,
}

const fn label(name: &'static str, values: fn() -> Vec<&'static str>) -> Label {
    Label { name, values }
}

const ACTION: Label = label("action", || ACTIONS.to_vec());
const CLASS: Label = label("class", || Class::ALL.map(Class::name).to_vec());
const CT_STATE: Label = label("state", || TIMED.map(TcpState::name).to_vec());
const COUNTED: Label = label("result", || Counted::ALL.map(Counted::name).to_vec());
const DECISION: Label = label("decision", || DECISIONS.to_vec());
const DEED: Label = label("action", || Deed::ALL.map(Deed::name).to_vec());
const DIRECTION: Label = label("direction", || vec!["up", "down"]);
const DROP: Label = label("kind", || DROPS.to_vec());
const EVENT: Label = label("type", || vec!["update", "destroy", "nflog"]);
const FAMILY: Label = label("family", || FAMILIES.to_vec());
const LOSS: Label = label("kind", || Loss::ALL.map(Loss::name).to_vec());
const MODE: Label = label("mode", || vec!["enforce", "observe"]);
/// There while HTTP is served.
const PORT: Label = label("port", Vec::new);
const OUTGOING_LOSS: Label =
    label("reason", || outgoing::plan::Loss::ALL.map(outgoing::plan::Loss::name).to_vec());
const REASON: Label = label("reason", || Error::REASONS.to_vec());
const ROUTE: Label = label("route", || ROUTES.to_vec());
/// There when an overload is asked for.
const SET: Label = label("set", Vec::new);
const SOCKET: Label = label("socket", || BUFFERS.to_vec());
const STATE: Label = label("state", || State::ALL.map(State::name).to_vec());
const TABLE: Label = label("table", || TABLES.to_vec());
const THRESHOLD: Label = label("threshold", || THRESHOLDS.map(|(_, name)| name).to_vec());
const TRIGGER: Label = label("trigger", || vec!["event", "sweep", "rules"]);

/// How the values of several guards become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Merge {
    Sum,
    Largest,
    Smallest,
    /// That of the namespace that ctkeep was started in: its guard sees what others see again.
    Own,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Count,
    Seconds,
    Bytes,
}

/// One metric.
pub(super) struct Spec {
    /// Without unit and `_total`.
    name: &'static str,
    help: &'static str,
    base: Base,
    labels: &'static [Label],
    /// Of gauges alone.
    pub merge: Merge,
    /// Of histograms alone.
    pub buckets: &'static [f64],
}

const fn row(name: &'static str, help: &'static str) -> Spec {
    Spec { name, help, base: Base::Count, labels: &[], merge: Merge::Sum, buckets: &[] }
}

impl Spec {
    const fn by(self, labels: &'static [Label]) -> Self {
        Self { labels, ..self }
    }

    const fn seconds(self) -> Self {
        Self { base: Base::Seconds, ..self }
    }

    const fn bytes(self) -> Self {
        Self { base: Base::Bytes, ..self }
    }

    const fn largest(self) -> Self {
        Self { merge: Merge::Largest, ..self }
    }

    const fn of_own_namespace(self) -> Self {
        Self { merge: Merge::Own, ..self }
    }

    const fn smallest(self) -> Self {
        Self { merge: Merge::Smallest, ..self }
    }

    const fn buckets(self, buckets: &'static [f64]) -> Self {
        Self { buckets, ..self }
    }

    /// Every combination of label values that is there from the start; one without labels where
    /// there are none.
    pub(super) fn values(&self) -> Vec<Vec<&'static str>> {
        let mut all = vec![Vec::new()];
        for label in self.labels {
            let with = |one: &Vec<_>, value| one.iter().copied().chain([value]).collect();
            all = all
                .iter()
                .flat_map(|one| (label.values)().into_iter().map(move |value| with(one, value)))
                .collect();
        }
        all
    }

    /// Writes one value for each combination of label values.
    pub(super) fn encode<M: EncodeMetric>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        kind: MetricType,
        values: impl IntoIterator<Item = (Vec<String>, M)>,
    ) -> fmt::Result {
        let unit = match self.base {
            Base::Count => None,
            Base::Seconds => Some(Unit::Seconds),
            Base::Bytes => Some(Unit::Bytes),
        };
        let mut encoder = encoder.encode_descriptor(self.name, self.help, unit.as_ref(), kind)?;
        for (values, metric) in values {
            let labels: Vec<_> = self.labels.iter().map(|it| it.name).zip(values).collect();
            if labels.is_empty() {
                metric.encode(encoder)?;
                return Ok(());
            }
            metric.encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// Makes an enum of the rows' names, and the table of the rows.
macro_rules! table {
    ($(#[$doc:meta])* $name:ident: $($variant:ident = $row:expr;)+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(super) enum $name { $($variant),+ }

        impl $name {
            pub(super) const ALL: &[Self] = &[$(Self::$variant),+];

            pub(super) fn spec(self) -> &'static Spec {
                match self { $(Self::$variant => const { &$row }),+ }
            }
        }
    };
}

table! {
    /// Everything with a present value, of each guard.
    Gauge:
    Mode = row("ctkeep_mode", "1 for the mode in force: enforce repairs, observe only looks.")
        .by(&[MODE]);
    LastReload = row(
        "ctkeep_config_last_reload_successful",
        "1 when the last reload of the configuration was taken up, or there was none.",
    );
    Sockets = row("ctkeep_sockets", "TCP sockets of the scope.")
        .by(&[FAMILY, STATE])
        .of_own_namespace();
    Containers = row(
        "ctkeep_containers",
        "Other namespaces whose sockets are looked at beside the own one's.",
    ).of_own_namespace();
    Mismatches = row(
        "ctkeep_mismatches",
        "Connections by how the tables stood to each other after the last deep sweep.",
    ).by(&[CLASS]);
    MismatchSources = row(
        "ctkeep_mismatch_sources",
        "Distinct peer addresses of these connections.",
    ).by(&[CLASS]);
    Held = row("ctkeep_held_connections", "Conntrack entries that ctkeep answers for.")
        .by(&[FAMILY]);
    HeldSources = row("ctkeep_held_sources", "Distinct peer addresses of held connections.")
        .by(&[FAMILY]);
    Uncounted = row(
        "ctkeep_uncounted_connections",
        "Open connections that a limit has lost and that were not shown to it yet.",
    );
    RecountAvailable = row(
        "ctkeep_recount_available",
        "0 where connections are to be shown to limits and no way of it is counted by this kernel.",
    ).smallest();
    HeldOldest = row(
        "ctkeep_held_oldest_age",
        "For how long the oldest held connection has been held.",
    ).seconds().largest();
    SourceMaximum = row(
        "ctkeep_source_connections_max",
        "Most connections of one peer address: open sockets, and entries that a limiter counts.",
    ).by(&[TABLE]).largest();
    SourcesOver = row(
        "ctkeep_sources_over_threshold",
        "Peer addresses with more connections than the threshold.",
    ).by(&[TABLE, THRESHOLD]).of_own_namespace();
    LastSweep = row(
        "ctkeep_last_sweep_success_timestamp",
        "When the last good sweep ended, of the guard for which that is longest ago.",
    ).seconds().smallest();
    ReceiveBuffer = row(
        "ctkeep_netlink_receive_buffer",
        "Receive buffers of event sockets, as granted.",
    ).by(&[SOCKET]).bytes();
    TableEntries = row("ctkeep_conntrack_table_entries", "Entries of the conntrack table.")
        .of_own_namespace();
    TableLimit = row(
        "ctkeep_conntrack_table_entries_limit",
        "Most entries that the table takes.",
    ).of_own_namespace();
    Timeout = row(
        "ctkeep_conntrack_timeout",
        "The kernel's timeout of TCP entries in this state.",
    ).by(&[CT_STATE]).seconds().smallest();
    TcpLoose = row(
        "ctkeep_conntrack_tcp_loose",
        "nf_conntrack_tcp_loose: 1 when conntrack picks connections up in their middle.",
    ).largest();
    DefenceLevel = row(
        "ctkeep_defence_level",
        "0 calm, 1 under attack, 2 by order of the operator; the highest of all guards.",
    ).largest();
    QueueConnections = row(
        "ctkeep_listen_queue_connections",
        "Connections that wait to be accepted on this port.",
    ).by(&[PORT]);
    QueueLimit = row("ctkeep_listen_queue_limit", "Connections that may wait on this port.")
        .by(&[PORT]);
    OverloadSources = row(
        "ctkeep_overload_sources",
        "Sources that hold too much and are in a set for it.",
    ).by(&[SET]);
    Outgoing = row(
        "ctkeep_outgoing_sockets",
        "Half-closed sockets that this host opened, as far as outgoing connections are looked after.",
    );
    OutgoingHeld = row(
        "ctkeep_outgoing_held_entries",
        "Entries of these that are kept beyond the kernel's time.",
    );
    OutgoingLost = row(
        "ctkeep_outgoing_lost_entries",
        "Sockets of these whose entry is lost and cannot be put back now.",
    );
    ShieldDevices = row(
        "ctkeep_shield_devices",
        "Network devices that the shield is attached to.",
    );
    ShieldMissing = row(
        "ctkeep_shield_missing",
        "1 where the shield is asked for and is not up, or refused by a device.",
    );
}

table! {
    /// What only grows, of all guards together: a namespace that goes takes nothing away.
    Count:
    Actions = row(
        "ctkeep_actions",
        "Changes of conntrack entries that the kernel has acknowledged.",
    ).by(&[ACTION]);
    ActionErrors = row("ctkeep_action_errors", "Changes that failed; they are planned again.")
        .by(&[ACTION, REASON]);
    LateRepairs = row(
        "ctkeep_late_repairs",
        "Repairs before which the limiter may have admitted a SYN too many.",
    );
    Recounts = row(
        "ctkeep_recounts",
        "Connections shown to the limiter again, by the way that the packet took.",
    ).by(&[ROUTE]);
    RecountChecks = row(
        "ctkeep_recount_checks",
        "Questions to limits whether they count what was shown to them, by their answer.",
    ).by(&[COUNTED]);
    RuleChanges = row(
        "ctkeep_rule_changes",
        "Limits that lost their lists because rules changed, by kind of change.",
    ).by(&[LOSS]);
    OutgoingActions = row(
        "ctkeep_outgoing_actions",
        "Changes of entries of connections that this host opened, acknowledged by the kernel.",
    ).by(&[DEED]);
    OutgoingLosses = row(
        "ctkeep_outgoing_lost",
        "Open connections that this host opened, and whose entry could not be put back.",
    ).by(&[OUTGOING_LOSS]);
    Sweeps = row("ctkeep_sweeps", "Sweeps that ended well, shallow and deep.");
    SweepErrors = row("ctkeep_sweep_errors", "Rounds of sweep or events that failed.");
    Events = row("ctkeep_events", "Events received from the kernel.").by(&[EVENT]);
    EventOverruns = row(
        "ctkeep_event_overruns",
        "Times that the kernel dropped events because the receive buffer was full.",
    );
    Resyncs = row(
        "ctkeep_resyncs",
        "Deep sweeps made because events were lost or unreadable.",
    );
    DefenceTransitions = row("ctkeep_defence_transitions", "Changes of the defence level.")
        .by(&[DIRECTION]);
    Drops = row(
        "ctkeep_conntrack_drops",
        "Packets and entries that conntrack dropped, refused or evicted, by its own counters.",
    ).by(&[DROP]);
    ShieldPackets = row(
        "ctkeep_shield_packets",
        "FINs and RSTs of guarded connections, by what the shield made of them.",
    ).by(&[DECISION]);
}

table! {
    /// Distributions, of all guards together.
    Histogram:
    Reaction = row(
        "ctkeep_reaction",
        "From the event or the begin of the sweep that showed the need to the acknowledged repair.",
    ).by(&[TRIGGER]).seconds().buckets(&REACTION_BUCKETS);
    SweepDuration = row("ctkeep_sweep_duration", "Time that a sweep took, its repairs included.")
        .seconds().buckets(&SWEEP_BUCKETS);
    CloseWaitAge = row(
        "ctkeep_close_wait_age",
        "How long sockets were in CLOSE_WAIT, observed when they have left it.",
    ).seconds().buckets(&CLOSE_WAIT_BUCKETS);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Beside these the registry holds two of what never changes.
    const INFOS: [&str; 2] = ["ctkeep_build_info{version}", "ctkeep_kernel_info{release}"];

    /// As the documentation names it: `ctkeep_events_total{type}`.
    fn title(spec: &Spec, suffix: &str) -> String {
        let unit = match spec.base {
            Base::Count => "",
            Base::Seconds => "_seconds",
            Base::Bytes => "_bytes",
        };
        let labels: Vec<_> = spec.labels.iter().map(|label| label.name).collect();
        let labels =
            if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        format!("{}{unit}{suffix}{labels}", spec.name)
    }

    #[test]
    fn the_documentation_has_a_line_for_each_metric_and_no_other() {
        let gauges = Gauge::ALL.iter().map(|gauge| title(gauge.spec(), ""));
        let counts = Count::ALL.iter().map(|count| title(count.spec(), "_total"));
        let histograms = Histogram::ALL.iter().map(|it| title(it.spec(), ""));
        let mut rows: Vec<_> = gauges.chain(counts).chain(histograms).collect();
        rows.extend(INFOS.map(str::to_owned));
        let all: BTreeSet<_> = rows.iter().map(String::as_str).collect();
        assert_eq!(all.len(), rows.len(), "a name twice");
        let documented: BTreeSet<_> = include_str!("../../docs/metrics.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"))
            .map(|(title, _)| title)
            .filter(|title| title.starts_with("ctkeep_"))
            .collect();
        assert_eq!(documented, all);
    }

    #[test]
    fn a_row_is_whole() {
        let all = Gauge::ALL.iter().map(|gauge| gauge.spec());
        let all = all.chain(Count::ALL.iter().map(|count| count.spec()));
        for spec in all.chain(Histogram::ALL.iter().map(|it| it.spec())) {
            assert!(spec.help.ends_with('.'), "{}", spec.name);
        }
        for histogram in Histogram::ALL {
            assert!(histogram.spec().buckets.is_sorted() && !histogram.spec().buckets.is_empty());
        }
    }

    #[test]
    fn label_values_are_combined() {
        assert_eq!(Gauge::HeldOldest.spec().values(), [Vec::<&str>::new()]);
        assert_eq!(Gauge::QueueLimit.spec().values(), Vec::<Vec<&str>>::new());
        assert_eq!(Gauge::Held.spec().values(), [["ipv4"], ["ipv6"]]);
        assert_eq!(Gauge::SourcesOver.spec().values().len(), 2 * 7);
    }
}
