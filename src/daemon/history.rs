//! The thread that writes the history: no worker ever waits for a disk, and a full one stops the
//! history alone.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::threads::be_patient;
use crate::audit::arrivals::arrivals;
use crate::audit::plays::Plays;
use crate::audit::survey::SourceCounts;
use crate::firewall::Ruleset;
use crate::firewall::limits::Limiter;
use crate::history::now;
use crate::history::record::{Record, SOURCES, Source};
use crate::history::store::Store;
use crate::reconcile::snapshot::{Snapshot, View};

/// Records that wait for the disk; more are lost, and counted.
const QUEUE: usize = 4096;
/// From minute to minute.
const MINUTE: Duration = Duration::from_secs(60);

/// Where records go to. Without a history they go nowhere.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    queue: Option<SyncSender<Record>>,
}

impl History {
    /// Begins to write into this folder; what fails is logged, and tried again each minute.
    pub(super) fn open(dir: Option<PathBuf>, room: u64) -> Self {
        let Some(dir) = dir else { return Self::default() };
        let (queue, records) = mpsc::sync_channel::<Record>(QUEUE);
        let write = move || {
            let (mut store, mut tried) = (None, None::<Instant>);
            let mut is_failing = false;
            for record in records {
                if store.is_none() && tried.is_some_and(|at| at.elapsed() < MINUTE) {
                    continue;
                }
                let opened = store.take().map_or_else(|| Store::open(&dir, room), Ok);
                let written = opened.and_then(|mut opened| {
                    opened.append(&record)?;
                    Ok(opened)
                });
                match written {
                    Ok(opened) => {
                        store = Some(opened);
                        if std::mem::take(&mut is_failing) {
                            tracing::info!("history goes on");
                        }
                    }
                    Err(error) => {
                        tried = Some(Instant::now());
                        if !std::mem::replace(&mut is_failing, true) {
                            tracing::warn!(%error, dir = %dir.display(), "no history for now");
                        }
                    }
                }
            }
        };
        let thread = thread::Builder::new().name("history".to_owned()).spawn(write);
        Self { queue: thread.is_ok().then_some(queue) }
    }

    /// Whether anything is kept.
    pub(super) fn is_kept(&self) -> bool {
        self.queue.is_some()
    }

    /// Has a record kept, as of now.
    pub(super) fn keep(&self, record: impl FnOnce(u64) -> Record) {
        if let Some(queue) = &self.queue {
            // A disk that hangs: what does not fit is lost.
            let _ = queue.try_send(record(now()));
        }
    }
}

/// The minutes of one worker.
#[derive(Debug)]
pub(super) struct Minutes {
    due: Instant,
}

impl Minutes {
    pub(super) fn new(now: Instant) -> Self {
        Self { due: now }
    }

    /// Keeps what sources hold, once a minute; `snapshot` has a connection of each, and to the
    /// addresses of `behind` packets are forwarded.
    pub(super) fn note(
        &mut self,
        history: &History,
        netns: &str,
        sources: &HashMap<(IpAddr, u16), SourceCounts>,
        snapshot: &Snapshot,
        behind: impl FnOnce() -> HashSet<IpAddr>,
        now: Instant,
    ) {
        if now < self.due || !history.is_kept() {
            return;
        }
        self.due = now + MINUTE;
        let mut all: Vec<_> = sources
            .iter()
            .map(|((source, port), counts)| Source {
                source: *source,
                port: *port,
                open: counts.open,
                half_closed: counts.half_closed,
                counted: counts.counted,
                uncounted: counts.uncounted,
                limit: None,
                net: None,
            })
            .collect();
        all.sort_by_key(|it| (Reverse(it.open.max(it.counted)), it.source, it.port));
        let left_out = all.len().saturating_sub(SOURCES);
        all.truncate(SOURCES);
        let mut views: HashMap<_, _> = all.iter().map(|it| ((it.source, it.port), None)).collect();
        for view in snapshot.views.iter().filter(|view| !view.is_outgoing()) {
            let key = (view.client().addr(), view.connection.local.port());
            if let Some(one) = views.get_mut(&key) {
                one.get_or_insert(view);
            }
        }
        let (netns, history, behind) = (netns.to_owned(), history.clone(), behind());
        // Rules are read and played beside the worker, in its namespace.
        let work = move || {
            be_patient();
            know_limits(&mut all, &views, &behind);
            history.keep(|at| Record::Minute { at, netns, sources: all, left_out });
        };
        let spawned = thread::Builder::new().name("minute".to_owned()).spawn(work);
        if let Err(error) = spawned {
            tracing::warn!(%error, "a minute of the history is missing");
        }
    }
}

/// Which limit counts each source, by one connection of it.
fn know_limits(
    sources: &mut [Source],
    views: &HashMap<(IpAddr, u16), Option<View>>,
    behind: &HashSet<IpAddr>,
) {
    let rules = Ruleset::read();
    let limiter = Limiter::of(&rules);
    if limiter.rules.is_empty() {
        return;
    }
    let all = views.values().copied().flatten();
    let Ok(arrivals) = arrivals(&rules, all, behind) else { return };
    let mut plays = Plays::new(&limiter, &rules).arriving(&arrivals).behind(behind);
    for source in sources {
        let view = views.get(&(source.source, source.port)).copied().flatten();
        if let Some((limit, net)) = view.and_then(|view| plays.limit_of(&view)) {
            source.limit = Some(limit);
            source.net = (net != IpNet::from(source.source)).then_some(net);
        }
    }
}
