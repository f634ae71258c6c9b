//! What systemd is told: started, alive, reloading, stopping. Nothing without `NOTIFY_SOCKET`.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{Instant, sleep_until};

/// Reports to the watchdog that every worker is alive.
#[derive(Debug)]
pub(super) struct Service {
    interval: Option<Duration>,
    due: Instant,
    beats: Vec<(String, u64)>,
}

impl Service {
    pub(super) fn new() -> Self {
        // Twice in the time that the watchdog allows.
        let interval = sd_notify::watchdog_enabled().map(|time| time / 2);
        Self { interval, due: Instant::now() + interval.unwrap_or_default(), beats: Vec::new() }
    }

    /// Returns when it is time to tell; never without a watchdog.
    pub(super) async fn is_due(&self) {
        match self.interval {
            Some(_) => sleep_until(self.due).await,
            None => std::future::pending().await,
        }
    }

    /// Reports to the watchdog, if every worker has been alive since the last time.
    pub(super) fn tell_alive(&mut self, beats: Vec<(String, u64)>) {
        // One that is new, or has gone, is not compared.
        let alive = beats.iter().all(|now| !self.beats.contains(now));
        if alive {
            tell(&[NotifyState::Watchdog]);
        } else {
            tracing::warn!("a worker shows no sign of life, systemd is not told that all is well");
        }
        self.beats = beats;
        self.due = Instant::now() + self.interval.unwrap_or_default();
    }
}

pub(super) fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("guarding")]);
}

pub(super) fn reloading() {
    // With MONOTONIC_USEC, which Type=notify-reload wants.
    match NotifyState::monotonic_usec_now() {
        Ok(time) => tell(&[NotifyState::Reloading, time]),
        Err(_) => tell(&[NotifyState::Reloading]),
    }
}

pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd cannot be reached");
    }
}
