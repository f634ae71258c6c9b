//! `ctkeep run`: one worker thread for each namespace, and a runtime for everything else.
//!
//! The workers speak blocking netlink and never wait for the runtime; it serves signals.

mod events;
mod tally;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::error::{Op, Result};
use crate::host::netns::Namespace;
use crate::reconcile::policy::Policy;
use crate::reconcile::recount;

/// Where the fast path learns that an entry has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EventSource {
    /// The cheapest source that works.
    #[default]
    Auto,
    /// FINs and RSTs of half-closed connections, logged by an nftables table of our own.
    Nflog,
    /// Conntrack's own events.
    Ctnetlink,
    /// None: the sweep alone.
    Off,
}

/// What happens to held entries at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExit {
    /// They live out their lease.
    #[default]
    Keep,
    /// They get the timeout that the kernel would have given them.
    Release,
}

/// Everything that the daemon is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Scope and lease.
    pub policy: Policy,
    /// How the limiter is made to count again.
    pub recount: recount::Mode,
    /// Name of the helper device and of the nftables table.
    pub device: String,
    /// Event source.
    pub events: EventSource,
    /// NFLOG group of the source `nflog`.
    pub nflog_group: u16,
    /// From sweep to sweep over half-closed sockets.
    pub sweep_interval: Duration,
    /// From sweep to sweep over every socket of the scope.
    pub deep_interval: Duration,
    /// What happens to held entries at the end.
    pub on_exit: OnExit,
    /// Observe, count and log; change nothing.
    pub dry_run: bool,
    /// Namespaces to guard, each on its own.
    pub namespaces: Vec<Namespace>,
}

/// One conntrack table, and the namespaces whose sockets it tracks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Guard {
    /// Where the table and the limiting rules are.
    conntrack: Namespace,
    /// Where the servers' sockets are.
    sockets: Vec<Namespace>,
}

impl Guard {
    /// Each namespace on its own; and, where others than the own one are named, their sockets
    /// by the own table too: it tracks them when this host translates addresses for them.
    fn all(namespaces: &[Namespace]) -> Vec<Self> {
        let mut all: Vec<_> = namespaces
            .iter()
            .map(|namespace| Self {
                conntrack: namespace.clone(),
                sockets: vec![namespace.clone()],
            })
            .collect();
        let others: Vec<_> =
            namespaces.iter().filter(|namespace| **namespace != Namespace::Own).cloned().collect();
        if !others.is_empty() {
            all.push(Self { conntrack: Namespace::Own, sockets: others });
        }
        all
    }

    /// Whether the table is one that only passes the connections on.
    fn is_for_others(&self) -> bool {
        !self.sockets.contains(&self.conntrack)
    }
}

/// Tells workers to end.
#[derive(Debug)]
pub(crate) struct Stop {
    wanted: AtomicBool,
    wake: EventFd,
}

impl Stop {
    fn new() -> Result<Self> {
        let wake = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Op::new("open eventfd").io(errno.into()))?;
        Ok(Self { wanted: AtomicBool::new(false), wake })
    }

    fn now(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        // Fails only when it is full, and then it is readable anyway.
        let _ = self.wake.write(1);
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    pub(crate) fn wake(&self) -> &EventFd {
        &self.wake
    }
}

/// Runs until SIGTERM, SIGINT, or the failure of a worker.
///
/// # Errors
/// The first worker's error.
pub fn run(settings: Settings) -> Result<()> {
    let op = Op::new("start runtime");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| op.io(error))?;
    let stop = Arc::new(Stop::new()?);
    let (ended, mut endings) = mpsc::unbounded_channel();
    let settings = Arc::new(settings);

    let mut workers = 0;
    for guard in Guard::all(&settings.namespaces) {
        let (settings, stop, ended) = (settings.clone(), stop.clone(), ended.clone());
        thread::Builder::new()
            .name("worker".to_owned())
            .spawn(move || {
                let result = worker::run(&guard, &settings, &stop);
                // The receiver outlives every worker.
                let _ = ended.send(result);
            })
            .map_err(|error| op.io(error))?;
        workers += 1;
    }
    drop(ended);

    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| op.io(error))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| op.io(error))?;
        let mut first = Ok(());
        while workers > 0 {
            tokio::select! {
                _ = terminate.recv() => stop.now(),
                _ = interrupt.recv() => stop.now(),
                ending = endings.recv() => {
                    workers -= 1;
                    // One namespace that fails must not go unnoticed beside others that work.
                    if let Some(Err(error)) = ending {
                        stop.now();
                        if first.is_ok() {
                            first = Err(error);
                        }
                    }
                }
            }
        }
        first
    });
    tracing::info!("stopped");
    result
}
