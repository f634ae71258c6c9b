//! Counters and histograms. All workers add to the same, so several guards sum up by themselves.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::error::Error;

/// Labels with their values.
pub(super) type Labels<const N: usize> = [(&'static str, &'static str); N];

/// Actions of the plan, and what a repair takes beside them.
pub(super) const ACTIONS: [&str; 8] =
    ["extend", "revive", "reinsert", "reverse", "recount", "seal", "release", "reap"];
/// Ways of a nudge.
pub(super) const ROUTES: [&str; 2] = ["ingress", "loopback"];
const TRIGGERS: [&str; 2] = ["event", "sweep"];
const EVENTS: [&str; 3] = ["update", "destroy", "nflog"];
const DIRECTIONS: [&str; 2] = ["up", "down"];

/// Seconds. A repair by event takes some hundred microseconds; a sweep comes once a second.
const REACTION: [f64; 16] = [
    1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0,
];
/// Seconds: from a handful of sockets to tables of millions.
const SWEEP: [f64; 10] = [1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0];
/// Seconds: from a sweep to a day.
const CLOSE_WAIT: [f64; 11] =
    [1.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 86400.0];

/// What has happened since the start.
#[derive(Debug)]
pub(super) struct Counts {
    pub actions: Family<Labels<1>, Counter>,
    pub errors: Family<Labels<2>, Counter>,
    pub late_repairs: Counter,
    pub recounts: Family<Labels<1>, Counter>,
    pub reaction: Family<Labels<1>, Histogram, fn() -> Histogram>,
    pub sweeps: Counter,
    pub sweep_errors: Counter,
    pub sweep_duration: Histogram,
    pub close_wait_age: Histogram,
    pub events: Family<Labels<1>, Counter>,
    pub overruns: Counter,
    pub resyncs: Counter,
    pub transitions: Family<Labels<1>, Counter>,
}

impl Counts {
    /// All of them at 0, in this registry.
    pub(super) fn new(registry: &mut Registry) -> Self {
        let reasons =
            |action| Error::REASONS.map(|reason| [("action", action), ("reason", reason)]);
        let this = Self {
            actions: counters("action", &ACTIONS),
            errors: Family::default(),
            late_repairs: Counter::default(),
            recounts: counters("route", &ROUTES),
            reaction: Family::new_with_constructor(|| Histogram::new(REACTION)),
            sweeps: Counter::default(),
            sweep_errors: Counter::default(),
            sweep_duration: Histogram::new(SWEEP),
            close_wait_age: Histogram::new(CLOSE_WAIT),
            events: counters("type", &EVENTS),
            overruns: Counter::default(),
            resyncs: Counter::default(),
            transitions: counters("direction", &DIRECTIONS),
        };
        for labels in ACTIONS.into_iter().flat_map(reasons) {
            drop(this.errors.get_or_create(&labels));
        }
        for trigger in TRIGGERS {
            drop(this.reaction.get_or_create(&[("trigger", trigger)]));
        }
        registry.register(
            "ctkeep_actions",
            "Changes of conntrack entries that the kernel has acknowledged",
            this.actions.clone(),
        );
        registry.register(
            "ctkeep_action_errors",
            "Changes that failed; they are planned again",
            this.errors.clone(),
        );
        registry.register(
            "ctkeep_late_repairs",
            "Repairs before which the limiter may have admitted a SYN too many",
            this.late_repairs.clone(),
        );
        registry.register(
            "ctkeep_recounts",
            "Connections shown to the limiter again, by the way that the packet took",
            this.recounts.clone(),
        );
        registry.register_with_unit(
            "ctkeep_reaction",
            "From the event or the begin of the sweep that told of it to the acknowledged repair",
            Unit::Seconds,
            this.reaction.clone(),
        );
        registry.register(
            "ctkeep_sweeps",
            "Sweeps that ended well, shallow and deep",
            this.sweeps.clone(),
        );
        registry.register(
            "ctkeep_sweep_errors",
            "Rounds of sweep or events that failed",
            this.sweep_errors.clone(),
        );
        registry.register_with_unit(
            "ctkeep_sweep_duration",
            "Time that a sweep took, its repairs included",
            Unit::Seconds,
            this.sweep_duration.clone(),
        );
        registry.register_with_unit(
            "ctkeep_close_wait_age",
            "How long sockets were in CLOSE_WAIT, told when they have left it",
            Unit::Seconds,
            this.close_wait_age.clone(),
        );
        registry.register("ctkeep_events", "Events received from the kernel", this.events.clone());
        registry.register(
            "ctkeep_event_overruns",
            "Times that the kernel dropped events because the receive buffer was full",
            this.overruns.clone(),
        );
        registry.register(
            "ctkeep_resyncs",
            "Deep sweeps made because events were lost or unreadable",
            this.resyncs.clone(),
        );
        registry.register(
            "ctkeep_defence_transitions",
            "Changes of the defence level",
            this.transitions.clone(),
        );
        this
    }

    /// One more, of a family with one label; its values are all there already.
    pub(super) fn bump(
        family: &Family<Labels<1>, Counter>,
        label: &'static str,
        value: &'static str,
    ) {
        family.get_or_create(&[(label, value)]).inc();
    }
}

fn counters(label: &'static str, values: &[&'static str]) -> Family<Labels<1>, Counter> {
    let family = Family::default();
    for value in values {
        drop(family.get_or_create(&[(label, *value)]));
    }
    family
}
