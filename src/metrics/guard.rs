//! What one guard adds to the metrics.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use super::gauges::Gauges;
use super::spec::{ACTIONS, BUFFERS, Count, DROPS, FAMILIES, Gauge, Histogram, ROUTES};
use super::{EventType, Guard, Liveness, Metrics, clock, locked, survey};
use crate::audit::survey::Survey;
use crate::conntrack::TableSize;
use crate::error::{Error, Result};
use crate::firewall::lists::Loss;
use crate::flow::Connection;
use crate::reconcile::apply::Outcome;
use crate::reconcile::checks::Counted;
use crate::reconcile::keeper::Trigger;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::outgoing::{self, plan::Deed};
use crate::reconcile::plan::ActionKind;
use crate::reconcile::pressure::Transition;
use crate::shield::DECISIONS;
use crate::sockdiag::{Cookie, Socket};

/// A sweep is recent for three intervals, and at least for this long.
const RECENT: Duration = Duration::from_secs(5);
/// Sources that the status page names.
const TOP: usize = 10;

/// One guard's part in the metrics.
#[derive(Debug)]
pub struct GuardMetrics {
    metrics: Arc<Metrics>,
    name: String,
    /// Since when each half-closed socket of the last sweep has been so.
    half_closed: HashMap<Cookie, Instant>,
    /// The ledger's holds that the gauges show, and the oldest of them.
    held: (u64, Option<Instant>),
    /// Connections that the sweep under way has repaired.
    repaired: HashSet<Connection>,
}

impl GuardMetrics {
    /// The part of the guard of this name, which begins its first sweep.
    pub fn new(metrics: &Arc<Metrics>, name: &str) -> Self {
        metrics.expect(name);
        let this = Self {
            metrics: metrics.clone(),
            name: name.to_owned(),
            half_closed: HashMap::new(),
            held: (0, None),
            repaired: HashSet::new(),
        };
        this.guard(|guard| guard.liveness = Liveness::Starting);
        this
    }

    /// The name of the guard.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn guard(&self, change: impl FnOnce(&mut Guard)) {
        if let Some(guard) = locked(&self.metrics.guards.all).get_mut(&self.name) {
            change(guard);
        }
    }

    /// So many events of one kind have come.
    pub fn events(&self, kind: EventType, count: u64) {
        let kind = match kind {
            EventType::Update => "update",
            EventType::Destroy => "destroy",
            EventType::Nflog => "nflog",
        };
        self.metrics.counts.add(Count::Events, &[kind], count);
    }

    /// Events were lost, or could not be read, and a deep sweep follows.
    pub fn lost_events(&self, overrun: bool) {
        self.metrics.counts.add(Count::EventOverruns, &[], u64::from(overrun));
        self.metrics.counts.add(Count::Resyncs, &[], 1);
    }

    /// These receive buffers, in bytes, have been granted to the socket that events come from.
    pub fn receive_buffer(&self, source: &str, bytes: usize) {
        self.guard(|guard| {
            for socket in BUFFERS {
                let bytes = if socket == source { bytes as f64 } else { 0.0 };
                guard.gauges.set(Gauge::ReceiveBuffer, &[socket], bytes);
            }
        });
    }

    /// Whether the shield is asked for and is not up, or refused by a device.
    pub fn shield_missing(&self, is_missing: bool) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::ShieldMissing, &[], f64::from(u8::from(is_missing)));
        });
    }

    /// The shield is at this many devices, and has decided so often.
    pub fn shield(&self, devices: usize, decisions: [u64; DECISIONS.len()]) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::ShieldDevices, &[], devices as f64);
            for (decision, count) in DECISIONS.into_iter().zip(decisions) {
                let more = guard.since_last(Count::ShieldPackets, decision, count);
                self.metrics.counts.add(Count::ShieldPackets, &[decision], more);
            }
        });
    }

    /// Actions were carried out, or failed; `since` is when the worker learned of their need.
    pub fn acted(&mut self, outcomes: &[Outcome], trigger: Trigger, since: Instant) {
        let counts = &self.metrics.counts;
        let took = since.elapsed().as_secs_f64();
        let done = |action| counts.add(Count::Actions, &[action], 1);
        let failed =
            |action, error: &Error| counts.add(Count::ActionErrors, &[action, error.reason()], 1);
        let mut history = locked(&self.metrics.history);
        for outcome in outcomes {
            let action = &outcome.action;
            match &outcome.result {
                Ok(()) => {
                    // A recount is counted below, where it is known what became of it.
                    if action.kind != ActionKind::Recount {
                        done(action.kind.name());
                    }
                    if action.kind != ActionKind::Recount || matches!(outcome.recount, Some(Ok(_)))
                    {
                        history.done(action, trigger);
                    }
                    if action.kind.is_repair() {
                        counts.add(Count::LateRepairs, &[], u64::from(!outcome.is_in_place));
                        counts.observe(Histogram::Reaction, &[trigger.name()], took);
                    }
                    if trigger == Trigger::Sweep {
                        self.repaired.insert(action.view.connection);
                    }
                }
                Err(error) => failed(action.kind.name(), error),
            }
            match &outcome.recount {
                Some(Ok(route)) => {
                    done("recount");
                    counts.add(Count::Recounts, &[route.name()], 1);
                    if trigger == Trigger::Rules {
                        counts.observe(Histogram::Reaction, &[trigger.name()], took);
                    }
                }
                Some(Err(error)) => failed("recount", error),
                None => {}
            }
            match &outcome.seal {
                Some(Ok(())) => done("seal"),
                Some(Err(error)) => failed("seal", error),
                None => {}
            }
        }
    }

    /// A limit has lost its list.
    pub fn rules_changed(&self, loss: Loss) {
        self.metrics.counts.add(Count::RuleChanges, &[loss.name()], 1);
    }

    /// A limit was asked whether it counts what was shown to it.
    pub fn checked(&self, counted: Counted) {
        self.metrics.counts.add(Count::RecountChecks, &[counted.name()], 1);
    }

    /// Whether this kernel counts a connection again by some way; also where none is wanted.
    pub fn recount_available(&self, is_available: bool) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::RecountAvailable, &[], f64::from(u8::from(is_available)));
        });
    }

    /// So many open connections are counted by no limit, as far as is known, that should be.
    pub fn uncounted(&self, sockets: usize) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::Uncounted, &[], sockets as f64);
        });
    }

    /// The sockets of so many other namespaces are looked at.
    pub fn containers(&self, namespaces: usize) {
        self.guard(|guard| guard.gauges.set(Gauge::Containers, &[], namespaces as f64));
    }

    /// So many sources are in the sets of an overload.
    pub fn overload_sources(&self, set: &str, sources: usize) {
        self.guard(|guard| guard.gauges.set(Gauge::OverloadSources, &[set], sources as f64));
    }

    /// So many outgoing connections are looked after.
    pub fn outgoing(&self, figures: outgoing::Figures) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::Outgoing, &[], figures.outgoing as f64);
            guard.gauges.set(Gauge::OutgoingHeld, &[], figures.held as f64);
            guard.gauges.set(Gauge::OutgoingLost, &[], figures.lost as f64);
        });
    }

    /// The entry of an outgoing connection was changed, or not.
    pub fn outgoing_done(&self, deed: Deed, result: &Result<()>) {
        let more = u64::from(result.is_ok());
        self.metrics.counts.add(Count::OutgoingActions, &[deed.name()], more);
    }

    /// An open outgoing connection has lost its entry.
    pub fn outgoing_lost(&self, loss: outgoing::plan::Loss) {
        self.metrics.counts.add(Count::OutgoingLosses, &[loss.name()], 1);
    }

    /// The defence level has changed.
    pub fn defence_changed(&self, change: &Transition) {
        let direction = if change.to > change.from { "up" } else { "down" };
        self.metrics.counts.add(Count::DefenceTransitions, &[direction], 1);
    }

    /// The size of the table, as the kernel reports it.
    pub fn table(&self, size: TableSize, maximum: Option<u64>) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::TableEntries, &[], f64::from(size.entries));
            guard.gauges.set(Gauge::TableLimit, &[], maximum.unwrap_or(0) as f64);
        });
    }

    /// A sweep that looked at the whole tables has ended.
    pub fn forget_repaired(&mut self) {
        self.repaired = HashSet::new();
    }

    /// The connections that the sweep under way has put right.
    pub fn repaired(&self) -> &HashSet<Connection> {
        &self.repaired
    }

    /// The whole tables were looked at.
    pub fn surveyed(&mut self, survey: &Survey) {
        let mut gauges = Gauges::default();
        survey::publish(survey, &mut gauges);
        let counters = survey.kernel.counters;
        let drops =
            [counters.drop, counters.early_drop, counters.insert_failed, counters.chain_toolong];
        self.guard(|guard| {
            guard.gauges.replace(gauges);
            for (kind, count) in DROPS.into_iter().zip(drops) {
                let more = guard.since_last(Count::Drops, kind, count);
                self.metrics.counts.add(Count::Drops, &[kind], more);
            }
        });
    }

    /// A sweep that began then has ended well; the next comes after about `interval`.
    pub fn swept(&mut self, ledger: &Ledger, began: Instant, interval: Duration) {
        let now = Instant::now();
        let counts = &self.metrics.counts;
        counts.add(Count::Sweeps, &[], 1);
        counts.observe(Histogram::SweepDuration, &[], (now - began).as_secs_f64());
        self.show_held(ledger);
        let oldest = self.held.1.map_or(Duration::ZERO, |oldest| now - oldest);
        let time = clock().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.guard(|guard| {
            guard.gauges.set(Gauge::HeldOldest, &[], oldest.as_secs_f64());
            guard.gauges.set(Gauge::LastSweep, &[], time.as_secs_f64());
            guard.gauges.set(Gauge::Uncounted, &[], ledger.uncounted_sockets() as f64);
            guard.gauges.set(Gauge::DefenceLevel, &[], f64::from(ledger.pressure().level() as u8));
            guard.liveness = Liveness::Swept { at: now, patience: (interval * 3).max(RECENT) };
            guard.failure = None;
        });
    }

    /// Shows what is held, where that is not what it was: it can be very many.
    fn show_held(&mut self, ledger: &Ledger) {
        if self.held.0 == ledger.holds_changed() {
            return;
        }
        let mut sources: HashMap<IpAddr, u64> = HashMap::new();
        let (mut held, mut oldest) = ([0_u32; 2], None);
        for entry in ledger.held() {
            let addr = entry.lookup.connection.remote.addr();
            let [ipv4, ipv6] = &mut held;
            *(if addr.is_ipv4() { ipv4 } else { ipv6 }) += 1;
            *sources.entry(addr).or_default() += 1;
            oldest = Some(oldest.map_or(entry.since, |oldest: Instant| oldest.min(entry.since)));
        }
        self.held = (ledger.holds_changed(), oldest);
        let of_ipv4 = sources.keys().filter(|addr| addr.is_ipv4()).count();
        let of_family = [of_ipv4, sources.len() - of_ipv4];
        let mut top: Vec<_> = sources.into_iter().collect();
        top.sort_by_key(|(addr, count)| (std::cmp::Reverse(*count), *addr));
        top.truncate(TOP);
        self.guard(|guard| {
            for ((family, held), sources) in FAMILIES.into_iter().zip(held).zip(of_family) {
                guard.gauges.set(Gauge::Held, &[family], f64::from(held));
                guard.gauges.set(Gauge::HeldSources, &[family], sources as f64);
            }
            guard.top = top;
        });
    }

    /// Takes note of all sockets in CLOSE_WAIT, and of the age of those that are not any more.
    pub fn half_closed(&mut self, sockets: &[Socket], now: Instant) {
        let mut before = std::mem::take(&mut self.half_closed);
        for socket in sockets {
            let since = before.remove(&socket.cookie).unwrap_or(now);
            self.half_closed.insert(socket.cookie, since);
        }
        for since in before.into_values() {
            let age = (now - since).as_secs_f64();
            self.metrics.counts.observe(Histogram::CloseWaitAge, &[], age);
        }
    }

    /// Since when each half-closed socket is known to be so.
    pub fn half_closed_since(&self) -> impl Iterator<Item = (Cookie, Instant)> + '_ {
        self.half_closed.iter().map(|(cookie, since)| (*cookie, *since))
    }

    /// A round of work has failed.
    pub fn failed(&self, error: &Error) {
        self.metrics.counts.add(Count::SweepErrors, &[], 1);
        // Without the connection that it was about: that would name a peer.
        self.guard(|guard| guard.failure = Some(format!("{}: {}", error.op.verb, error.cause)));
    }

    /// What all guards have done so far.
    pub fn done(&self) -> Done {
        let counts = &self.metrics.counts;
        let value = |count, labels: &[&'static str]| counts.value(count, labels);
        let errors = ACTIONS.into_iter().flat_map(|action| {
            Error::REASONS
                .map(|reason| ((action, reason), value(Count::ActionErrors, &[action, reason])))
        });
        Done {
            actions: nonzero(ACTIONS, |action| value(Count::Actions, &[action])),
            errors: errors.filter(|(_, count)| *count > 0).collect(),
            recounts: nonzero(ROUTES, |route| value(Count::Recounts, &[route])),
            late_repairs: value(Count::LateRepairs, &[]),
            sweeps: value(Count::Sweeps, &[]),
            sweep_errors: value(Count::SweepErrors, &[]),
            event_overruns: value(Count::EventOverruns, &[]),
        }
    }
}

fn nonzero<const N: usize>(
    names: [&'static str; N],
    count: impl Fn(&'static str) -> u64,
) -> BTreeMap<&'static str, u64> {
    names.into_iter().map(|name| (name, count(name))).filter(|(_, count)| *count > 0).collect()
}

/// What has been done since the start, for the log: only what is not 0.
#[derive(Clone, Debug)]
pub struct Done {
    /// Changes by action.
    pub actions: BTreeMap<&'static str, u64>,
    /// Failed ones by action and reason.
    pub errors: BTreeMap<(&'static str, &'static str), u64>,
    /// Nudges by route.
    pub recounts: BTreeMap<&'static str, u64>,
    /// Repairs before which the limiter may have thrown the connection out.
    pub late_repairs: u64,
    /// Sweeps that ended well.
    pub sweeps: u64,
    /// Rounds of work that did not.
    pub sweep_errors: u64,
    /// Times that the kernel dropped events.
    pub event_overruns: u64,
}

impl Drop for GuardMetrics {
    /// A namespace that is not guarded any more has no figures.
    fn drop(&mut self) {
        self.guard(|guard| {
            guard.gauges = Gauges::default();
            guard.top.clear();
            guard.liveness = Liveness::Absent;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guard whose namespace goes takes its gauges away, and no counter goes down: Prometheus would
    /// take that for a restart, and count all that is left once more.
    #[test]
    fn counters_never_go_down() {
        let metrics = Arc::new(Metrics::new(false));
        let hidden = || {
            let text = metrics.written().text;
            metrics.written.lock().unwrap().take();
            let text = String::from_utf8(text.to_vec()).unwrap();
            let line = text.lines().find(|line| line.contains("decision=\"rst_hidden\"")).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        let packets =
            |count| DECISIONS.map(|decision| if decision == "rst_hidden" { count } else { 0 });
        let (web, db) = (GuardMetrics::new(&metrics, "web"), GuardMetrics::new(&metrics, "db"));
        web.shield(1, packets(5));
        db.shield(1, packets(2));
        assert_eq!(hidden(), 7.0);
        web.shield(1, packets(6));
        assert_eq!(hidden(), 8.0);
        drop(web);
        assert_eq!(hidden(), 8.0, "its namespace has gone");
        // The kernel counts on where the table was the same, and from 0 in a new one.
        let web = GuardMetrics::new(&metrics, "web");
        web.shield(1, packets(7));
        assert_eq!(hidden(), 9.0);
        web.shield(1, packets(3));
        assert_eq!(hidden(), 12.0);
    }
}
