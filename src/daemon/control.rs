//! What the runtime and the workers share: the settings in force, the wish to end, signs of life.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::history::History;
use super::{Foundation, Live, Settings};
use crate::error::{Op, Result};
use crate::host::netns::Namespace;
use crate::metrics::Metrics;

/// Shared by all threads of the daemon.
#[derive(Debug)]
pub(super) struct Control {
    /// The figures that are published.
    pub(super) metrics: Arc<Metrics>,
    /// Where what was so is kept.
    pub(super) history: History,
    /// Which namespace the own one is: workers are elsewhere.
    pub(super) own: Option<(u64, u64)>,
    /// Set up at the start.
    pub(super) foundation: Arc<Foundation>,
    /// What it takes to enter other namespaces was there at the start, and was given up as nothing wanted it.
    pub(super) gave_up_others: bool,
    live: Mutex<Arc<Live>>,
    /// Containers with limits of their own.
    limited: Mutex<Vec<Namespace>>,
}

impl Control {
    pub(super) fn new(settings: Settings, gave_up_others: bool) -> Self {
        let Settings { foundation, live } = settings;
        let metrics = Metrics::new(foundation.dry_run);
        metrics.show_addresses(live.status_addresses);
        let history = History::open(foundation.history.clone(), foundation.history_room);
        Self {
            metrics: Arc::new(metrics),
            history,
            own: Namespace::Own.identity(),
            foundation: Arc::new(foundation),
            gave_up_others,
            live: Mutex::new(Arc::new(live)),
            limited: Mutex::default(),
        }
    }

    /// The settings in force.
    pub(super) fn live(&self) -> Arc<Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Containers with limits of their own, as they are now.
    pub(super) fn limited(&self) -> Vec<Namespace> {
        self.limited.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes which these are; whether others than before.
    pub(super) fn set_limited(&self, limited: Vec<Namespace>) -> bool {
        let mut known = self.limited.lock().unwrap_or_else(PoisonError::into_inner);
        let has_changed = *known != limited;
        *known = limited;
        has_changed
    }

    /// Puts other settings in force; workers take them up at their next turn.
    pub(super) fn replace(&self, live: Live) {
        self.metrics.show_addresses(live.status_addresses);
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(live);
    }
}

/// The string that one thread is led by.
#[derive(Debug)]
pub(super) struct Lead {
    stop: AtomicBool,
    wake: Wake,
    beats: AtomicU64,
}

impl Lead {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { stop: AtomicBool::new(false), wake: Wake::new()?, beats: AtomicU64::new(0) })
    }

    /// Asks the thread to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.wake.rouse();
    }

    /// Whether it is to end.
    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// It is alive.
    pub(super) fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has been alive.
    pub(super) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }
}

/// Readable once it is to end.
impl AsFd for Lead {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// Makes a thread that waits look.
#[derive(Debug)]
pub(super) struct Wake(EventFd);

impl Wake {
    pub(super) fn new() -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wake = EventFd::from_value_and_flags(0, flags)
            .map_err(|errno| Op::new("open eventfd").io(errno.into()))?;
        Ok(Self(wake))
    }

    /// Makes it readable.
    pub(super) fn rouse(&self) {
        // Fails only when it is full, and then it is readable anyway.
        let _ = self.0.write(1);
    }

    /// It has looked.
    pub(super) fn settle(&self) {
        // Fails only where it was not roused.
        let _ = self.0.read();
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
