//! What the runtime and the workers share: the settings in force, the wish to end, signs of life.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Settings;
use crate::error::{Op, Result};
use crate::metrics::Metrics;

/// Shared by all threads of the daemon.
#[derive(Debug)]
pub(super) struct Control {
    /// What is published.
    pub(super) metrics: Arc<Metrics>,
    settings: Mutex<Arc<Settings>>,
    stop: AtomicBool,
    wake: EventFd,
    beats: Vec<AtomicU64>,
}

impl Control {
    /// For the workers of guards with these names.
    pub(super) fn new(settings: Settings, guards: Vec<String>) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Op::new("open eventfd").io(errno.into()))?;
        let workers = guards.len();
        let metrics = Metrics::new(guards, settings.dry_run);
        metrics.show_addresses(settings.publishing.addresses);
        Ok(Self {
            metrics: Arc::new(metrics),
            settings: Mutex::new(Arc::new(settings)),
            stop: AtomicBool::new(false),
            wake,
            beats: (0..workers).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    /// The settings in force.
    pub(super) fn settings(&self) -> Arc<Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts other settings in force; workers take them up at their next turn.
    pub(super) fn replace(&self, settings: Settings) {
        self.metrics.show_addresses(settings.publishing.addresses);
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
    }

    /// Tells all workers to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // Fails only when it is full, and then it is readable anyway.
        let _ = self.wake.write(1);
    }

    /// Whether they are to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Readable once they are to end.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Worker number `worker` is alive.
    pub(super) fn beat(&self, worker: usize) {
        if let Some(beat) = self.beats.get(worker) {
            beat.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often each worker has been alive.
    pub(super) fn beats(&self) -> Vec<u64> {
        self.beats.iter().map(|beat| beat.load(Ordering::Relaxed)).collect()
    }
}
