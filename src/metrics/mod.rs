//! What the daemon publishes: `/metrics`, `/healthz`, a status page, and a file for
//! node_exporter.
//!
//! Each guard has a [`GuardMetrics`]: it adds to counters that all guards have in common, and sets gauges
//! of its own after each sweep. A scrape sums the gauges of all guards. It asks the kernel nothing and
//! holds their lock only while it sums. docs/metrics.md lists the metrics.

mod counts;
mod gauges;
mod guard;
pub(crate) mod history;
pub mod http;
mod page;
mod process;
mod spec;
mod survey;
mod text;
pub(crate) mod textfile;

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Debug};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use self::counts::Counts;
use self::gauges::Gauges;
pub use self::guard::{Done, GuardMetrics};
use self::history::History;
use self::spec::{Count, Gauge};
use self::text::from_open_metrics;
pub use crate::watch::instant_of;

/// A written exposition serves for this long: a flood of scrapes costs copies.
const FRESH: Duration = Duration::from_millis(100);

/// The name of the guard of the namespace that ctkeep was started in.
pub const OWN: &str = "own namespace";

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
    counts: Arc<Counts>,
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
    /// By their names.
    all: Mutex<BTreeMap<String, Guard>>,
}

/// One guard, as it was last.
#[derive(Debug, Default)]
struct Guard {
    liveness: Liveness,
    gauges: Gauges,
    failure: Option<String>,
    top: Vec<(IpAddr, u64)>,
    /// The kernel's own counters as they were last: they outlive a namespace that comes and goes.
    kernel: HashMap<(Count, &'static str), u64>,
}

impl Guard {
    /// How far the kernel's counter has come since the last look; one that is lower than it was has
    /// begun anew.
    fn since_last(&mut self, count: Count, label: &'static str, now: u64) -> u64 {
        let last = self.kernel.insert((count, label), now).unwrap_or(0);
        now.checked_sub(last).unwrap_or(now)
    }
}

/// How a guard fares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Liveness {
    /// It waits for its namespace.
    Absent,
    /// Its first sweep is under way.
    #[default]
    Starting,
    /// It has swept.
    Swept { at: Instant, patience: Duration },
}

impl Guards {
    fn total(&self) -> Gauges {
        let mut total = locked(&self.own).clone();
        for (name, guard) in locked(&self.all).iter() {
            total.merge(&guard.gauges, name == OWN);
        }
        total
    }
}

/// All of the table; gauges are added up when they are read.
#[derive(Debug)]
struct Figures(Arc<Guards>, Arc<Counts>);

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.total().encode(&mut encoder)?;
        self.1.encode(&mut encoder)
    }
}

impl Metrics {
    /// All names with all label values, at 0.
    pub fn new(dry_run: bool) -> Self {
        let mut registry = Registry::default();
        let kernel = nix::sys::utsname::uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("ctkeep_build", "Version of this program", version);
        let release = Info::new([("release", kernel.clone())]);
        registry.register("ctkeep_kernel", "Release of the running kernel", release);
        let counts = Arc::new(Counts::default());
        let mode = if dry_run { "observe" } else { "enforce" };
        let mut own = Gauges::default();
        own.set(Gauge::Mode, &[mode], 1.0);
        own.set(Gauge::LastReload, &[], 1.0);
        let guards = Arc::new(Guards { own: Mutex::new(own), all: Mutex::default() });
        registry.register_collector(Box::new(Figures(guards.clone(), counts.clone())));
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

    /// A guard of this name is expected to sweep from now on.
    pub fn expect(&self, name: &str) {
        locked(&self.guards.all).entry(name.to_owned()).or_default();
    }

    /// The guard of this name is not expected any more.
    pub fn forget(&self, name: &str) {
        locked(&self.guards.all).remove(name);
    }

    /// The guard of this name waits for its namespace.
    pub fn absent(&self, name: &str) {
        if let Some(guard) = locked(&self.guards.all).get_mut(name) {
            guard.liveness = Liveness::Absent;
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
        for (name, guard) in locked(&self.guards.all).iter() {
            match guard.liveness {
                Liveness::Swept { at, patience } if at.elapsed() <= patience => {}
                Liveness::Swept { at, .. } => {
                    let age = at.elapsed().as_secs();
                    let why = guard.failure.as_deref().unwrap_or("a sweep is still under way");
                    return Err(format!("{name}: last good sweep {age} s ago: {why}"));
                }
                Liveness::Absent => return Err(format!("{name}: the namespace is not there")),
                Liveness::Starting => {
                    let why = guard.failure.as_deref().unwrap_or("it is under way");
                    return Err(format!("{name}: no sweep yet: {why}"));
                }
            }
        }
        Ok(())
    }
}

#[allow(clippy::disallowed_methods, reason = "what is published has the time of day")]
fn clock() -> SystemTime {
    SystemTime::now()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
