//! What the daemon tells the world: `/metrics`, `/healthz`, a status page, and a file for
//! node_exporter.
//!
//! Each guard has a [`Share`]: it adds to counters that all guards have in common, and sets gauges
//! of its own after each sweep. A scrape adds the gauges of all guards up; it asks the kernel
//! nothing, and a guard never waits for it longer than that takes. docs/metrics.md lists the metrics.

mod counts;
mod gauges;
pub(crate) mod history;
pub mod http;
mod page;
mod process;
mod survey;
mod text;
pub(crate) mod textfile;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::{self, Debug};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use self::counts::{ACTIONS, Counts, ROUTES};
use self::gauges::{BUFFERS, Gauge, Gauges};
use self::history::History;
pub use self::survey::Look;
use self::text::from_open_metrics;
use crate::conntrack::TableSize;
use crate::error::{Error, Result};
use crate::flow::FourTuple;
use crate::netlink::Transport;
use crate::reconcile::apply::Outcome;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::pressure::Transition;
use crate::reconcile::snapshot::Snapshot;
use crate::shield::DECISIONS;
use crate::sockdiag::{Cookie, State};

/// A written exposition serves for this long: a flood of scrapes costs copies.
const FRESH: Duration = Duration::from_millis(100);
/// A sweep is recent for three intervals, and at least for this long.
const RECENT: Duration = Duration::from_secs(5);
/// Sources that the status page names.
const TOP: usize = 10;

/// Why a repair is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// An event told of it.
    Event,
    /// A sweep found it.
    Sweep,
}

impl Trigger {
    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Sweep => "sweep",
        }
    }
}

/// A kind of event, as metrics count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventType {
    /// A conntrack entry has changed.
    Update,
    /// A conntrack entry is gone.
    Destroy,
    /// Our nftables table has logged a packet.
    Nflog,
}

/// All figures of the daemon.
pub struct Metrics {
    registry: Registry,
    counts: Counts,
    guards: Arc<Guards>,
    history: Mutex<History>,
    written: Mutex<Option<Written>>,
    addresses: AtomicBool,
    about: About,
}

/// What never changes.
#[derive(Debug)]
struct About {
    kernel: String,
    started: SystemTime,
    mode: &'static str,
}

/// An exposition in both forms.
#[derive(Clone)]
struct Written {
    at: Instant,
    open_metrics: hyper::body::Bytes,
    text: hyper::body::Bytes,
}

impl Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// The guards' gauges, and those of the daemon itself.
#[derive(Debug)]
struct Guards {
    own: Mutex<Gauges>,
    all: Vec<Mutex<Guard>>,
}

/// One guard, as it was last.
#[derive(Debug)]
struct Guard {
    name: String,
    seen: Seen,
    gauges: Gauges,
    failure: Option<String>,
    top: Vec<(IpAddr, u64)>,
}

/// How a guard fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It waits for its namespaces.
    Absent,
    /// Its first sweep is under way.
    Starting,
    /// It has swept.
    Swept { at: Instant, patience: Duration },
}

impl Guards {
    fn total(&self) -> Gauges {
        let mut total = locked(&self.own).clone();
        for guard in &self.all {
            total.merge(&locked(guard).gauges);
        }
        total
    }
}

/// Gauges are added up when they are read.
#[derive(Debug)]
struct Present(Arc<Guards>);

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.total().encode(&mut encoder)
    }
}

impl Metrics {
    /// All names with all label values, at 0, for guards with these names.
    pub fn new(guards: Vec<String>, dry_run: bool) -> Self {
        let mut registry = Registry::default();
        let kernel = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("ctkeep_build", "Version of this program", version);
        let release = Info::new([("release", kernel.clone())]);
        registry.register("ctkeep_kernel", "Release of the running kernel", release);
        let counts = Counts::new(&mut registry);
        let mode = if dry_run { "observe" } else { "enforce" };
        let mut own = Gauges::default();
        own.set(Gauge::Mode, &[mode], 1.0);
        own.set(Gauge::LastReload, &[], 1.0);
        let all = guards.into_iter().map(|name| {
            Mutex::new(Guard {
                name,
                seen: Seen::Starting,
                gauges: Gauges::default(),
                failure: None,
                top: Vec::new(),
            })
        });
        let guards = Arc::new(Guards { own: Mutex::new(own), all: all.collect() });
        registry.register_collector(Box::new(Present(guards.clone())));
        registry.register_collector(Box::new(process::Figures));
        Self {
            registry,
            counts,
            guards,
            history: Mutex::default(),
            written: Mutex::new(None),
            addresses: AtomicBool::new(false),
            about: About { kernel, started: clock(), mode },
        }
    }

    /// Whether the status page shows addresses of peers from now on.
    pub fn show_addresses(&self, shown: bool) {
        self.addresses.store(shown, Ordering::Relaxed);
    }

    /// Takes note of how a reload of the configuration ended.
    pub fn reloaded(&self, well: bool) {
        locked(&self.guards.own).set(Gauge::LastReload, &[], f64::from(u8::from(well)));
    }

    /// Takes a sample for the status page.
    pub fn sample(&self) {
        let total = self.guards.total();
        let (held, sources) = (total.sum(Gauge::Held), total.sum(Gauge::HeldSources));
        locked(&self.history).sample(held, sources);
    }

    /// The metrics as they are now, or were a moment ago.
    fn written(&self) -> Written {
        let mut kept = locked(&self.written);
        let fresh = kept.as_ref().filter(|written| written.at.elapsed() < FRESH);
        if let Some(written) = fresh {
            return written.clone();
        }
        let mut text = String::new();
        // A String takes everything.
        let _ = encode(&mut text, &self.registry);
        let written = Written {
            at: Instant::now(),
            text: from_open_metrics(&text).into(),
            open_metrics: text.into(),
        };
        *kept = Some(written.clone());
        written
    }

    /// Whether every guard has swept not long ago.
    ///
    /// # Errors
    /// Which has not, and why.
    fn health(&self) -> std::result::Result<(), String> {
        for guard in &self.guards.all {
            let guard = locked(guard);
            let name = &guard.name;
            match guard.seen {
                Seen::Swept { at, patience } if at.elapsed() <= patience => {}
                Seen::Swept { at, .. } => {
                    let age = at.elapsed().as_secs();
                    let why = guard.failure.as_deref().unwrap_or("a sweep is still under way");
                    return Err(format!("{name}: last good sweep {age} s ago: {why}"));
                }
                Seen::Absent => return Err(format!("{name}: the namespace is not there")),
                Seen::Starting => {
                    let why = guard.failure.as_deref().unwrap_or("it is under way");
                    return Err(format!("{name}: no sweep yet: {why}"));
                }
            }
        }
        Ok(())
    }
}

/// One guard's part in the metrics.
#[derive(Debug)]
pub struct Share {
    metrics: Arc<Metrics>,
    number: usize,
    /// Since when each half-closed socket of the last sweep has been so.
    half_closed: HashMap<Cookie, Instant>,
    /// Connections that the sweep under way has repaired.
    repaired: HashSet<FourTuple>,
}

impl Share {
    /// The part of guard `number`, which begins its first sweep.
    pub fn new(metrics: &Arc<Metrics>, number: usize) -> Self {
        let this = Self {
            metrics: metrics.clone(),
            number,
            half_closed: HashMap::new(),
            repaired: HashSet::new(),
        };
        this.guard(|guard| guard.seen = Seen::Starting);
        this
    }

    fn guard(&self, change: impl FnOnce(&mut Guard)) {
        if let Some(guard) = self.metrics.guards.all.get(self.number) {
            change(&mut locked(guard));
        }
    }

    /// So many events of one kind have come.
    pub fn events(&self, kind: EventType, count: u64) {
        let kind = match kind {
            EventType::Update => "update",
            EventType::Destroy => "destroy",
            EventType::Nflog => "nflog",
        };
        if count == 0 {
            return;
        }
        self.metrics.counts.events.get_or_create(&[("type", kind)]).inc_by(count);
    }

    /// Events were lost, or could not be read, and a deep sweep follows.
    pub fn lost_events(&self, overrun: bool) {
        self.metrics.counts.overruns.inc_by(u64::from(overrun));
        self.metrics.counts.resyncs.inc();
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
                guard.gauges.set(Gauge::ShieldPackets, &[decision], count as f64);
            }
        });
    }

    /// Actions were carried out, or failed; `since` is when the worker learned of their need.
    pub fn acted(&mut self, outcomes: &[Outcome], trigger: Trigger, since: Instant) {
        let counts = &self.metrics.counts;
        let took = since.elapsed().as_secs_f64();
        let reaction = counts.reaction.get_or_create(&[("trigger", trigger.name())]);
        let done = |action| Counts::bump(&counts.actions, "action", action);
        let failed = |action, error: &Error| {
            let labels = [("action", action), ("reason", error.reason())];
            counts.errors.get_or_create(&labels).inc();
        };
        let mut history = locked(&self.metrics.history);
        for outcome in outcomes {
            let action = &outcome.action;
            match &outcome.result {
                Ok(()) => {
                    done(action.kind.name());
                    history.done(action, trigger);
                    if action.kind.needs_recount() {
                        counts.late_repairs.inc();
                        reaction.observe(took);
                    }
                    if trigger == Trigger::Sweep {
                        self.repaired.insert(action.view.flow);
                    }
                }
                Err(error) => failed(action.kind.name(), error),
            }
            match &outcome.recount {
                Some(Ok(route)) => {
                    done("recount");
                    Counts::bump(&counts.recounts, "route", route.name());
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

    /// The defence level has changed.
    pub fn defence_changed(&self, change: &Transition) {
        let direction = if change.to > change.from { "up" } else { "down" };
        Counts::bump(&self.metrics.counts.transitions, "direction", direction);
    }

    /// The size of the table, as the kernel tells it.
    pub fn table(&self, size: TableSize, maximum: Option<u64>) {
        self.guard(|guard| {
            guard.gauges.set(Gauge::TableEntries, &[], f64::from(size.entries));
            guard.gauges.set(Gauge::TableLimit, &[], maximum.unwrap_or(0) as f64);
        });
    }

    /// Takes the figures that need whole tables from what a deep sweep saw.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost; the figures stay as they were.
    pub fn survey<T: Transport>(&mut self, tables: &mut Tables<T>, look: Look<'_>) -> Result<()> {
        let mut gauges = Gauges::default();
        survey::survey(tables, look, &self.repaired, &mut gauges)?;
        self.guard(|guard| guard.gauges.replace(gauges));
        Ok(())
    }

    /// A sweep that began then has ended well; the next comes after about `interval`.
    pub fn swept(
        &mut self,
        snapshot: &Snapshot,
        ledger: &Ledger,
        began: Instant,
        interval: Duration,
    ) {
        let now = Instant::now();
        self.repaired = HashSet::new();
        self.note_half_closed(snapshot, now);
        let counts = &self.metrics.counts;
        counts.sweeps.inc();
        counts.sweep_duration.observe((now - began).as_secs_f64());
        let mut sources: HashMap<IpAddr, u64> = HashMap::new();
        let (mut held, mut oldest) = ([0_u32; 2], now);
        for entry in ledger.held() {
            let addr = entry.lookup.flow.dst.addr();
            let [ipv4, ipv6] = &mut held;
            *(if addr.is_ipv4() { ipv4 } else { ipv6 }) += 1;
            *sources.entry(addr).or_default() += 1;
            oldest = oldest.min(entry.since);
        }
        let of_ipv4 = sources.keys().filter(|addr| addr.is_ipv4()).count();
        let of_family = [of_ipv4, sources.len() - of_ipv4];
        let mut top: Vec<_> = sources.into_iter().collect();
        top.sort_by_key(|(addr, count)| (std::cmp::Reverse(*count), *addr));
        top.truncate(TOP);
        let time = clock().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.guard(|guard| {
            for ((family, held), sources) in gauges::FAMILIES.into_iter().zip(held).zip(of_family) {
                guard.gauges.set(Gauge::Held, &[family], f64::from(held));
                guard.gauges.set(Gauge::HeldSources, &[family], sources as f64);
            }
            guard.gauges.set(Gauge::HeldOldest, &[], (now - oldest).as_secs_f64());
            guard.gauges.set(Gauge::LastSweep, &[], time.as_secs_f64());
            guard.gauges.set(Gauge::DefenceLevel, &[], f64::from(ledger.pressure().level() as u8));
            guard.seen = Seen::Swept { at: now, patience: (interval * 3).max(RECENT) };
            guard.failure = None;
            guard.top = top;
        });
    }

    /// Tells the age of sockets that have left CLOSE_WAIT since the last sweep.
    fn note_half_closed(&mut self, snapshot: &Snapshot, now: Instant) {
        let mut before = std::mem::take(&mut self.half_closed);
        for socket in snapshot.views.iter().filter_map(|view| view.socket) {
            if socket.state == State::CloseWait {
                let since = before.remove(&socket.cookie).unwrap_or(now);
                self.half_closed.insert(socket.cookie, since);
            }
        }
        for since in before.into_values() {
            self.metrics.counts.close_wait_age.observe((now - since).as_secs_f64());
        }
    }

    /// A round of work has failed.
    pub fn failed(&self, error: &Error) {
        self.metrics.counts.sweep_errors.inc();
        // Without the connection that it was about: that would name a peer.
        self.guard(|guard| guard.failure = Some(format!("{}: {}", error.op.verb, error.cause)));
    }

    /// What all guards have done so far.
    pub fn done(&self) -> Done {
        let counts = &self.metrics.counts;
        let errors = ACTIONS.into_iter().flat_map(|action| {
            Error::REASONS.map(|reason| {
                let count = counts.errors.get_or_create(&[("action", action), ("reason", reason)]);
                ((action, reason), count.get())
            })
        });
        Done {
            actions: nonzero(ACTIONS, |action| {
                counts.actions.get_or_create(&[("action", action)]).get()
            }),
            errors: errors.filter(|(_, count)| *count > 0).collect(),
            recounts: nonzero(ROUTES, |route| {
                counts.recounts.get_or_create(&[("route", route)]).get()
            }),
            late_repairs: counts.late_repairs.get(),
            sweeps: counts.sweeps.get(),
            sweep_errors: counts.sweep_errors.get(),
            event_overruns: counts.overruns.get(),
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

impl Drop for Share {
    /// What is not guarded any more has no figures.
    fn drop(&mut self) {
        self.guard(|guard| {
            guard.gauges = Gauges::default();
            guard.top.clear();
            guard.seen = Seen::Absent;
        });
    }
}

/// No event waits longer to be read.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// The time of day as the workers' clock has it; now, where it lies in the future or so long ago
/// that the time of day has been set since.
pub fn instant_of(time: SystemTime) -> Instant {
    let now = Instant::now();
    let age = clock().duration_since(time).ok().filter(|age| *age < LONGEST_WAIT);
    age.and_then(|age| now.checked_sub(age)).unwrap_or(now)
}

#[allow(clippy::disallowed_methods, reason = "what is published has the time of day")]
fn clock() -> SystemTime {
    SystemTime::now()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
