//! When each kind of work is due. Pure.

use std::time::{Duration, Instant};

/// A kind of work that comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// A sweep over half-closed sockets and held entries.
    Shallow,
    /// A sweep over every socket of the scope.
    Deep,
    /// Another look at connections that were just repaired.
    SecondLook,
    /// Another try of recounts that failed.
    Retry,
    /// Showing limits that have lost their lists what is open.
    Recount,
    /// The next part of a deep sweep.
    Part,
    /// The looks of a sweep that are left.
    Look,
    /// The first look that may act at connections without FIN that conntrack believes closed.
    OpenLook,
    /// Asking limits whether they count what was shown to them. The last one.
    Check,
}

const TIMERS: usize = Timer::Check as usize + 1;

/// The moment at which each kind of work is due.
#[derive(Clone, Debug, Default)]
pub struct Timers {
    due: [Option<Instant>; TIMERS],
    /// Failures in a row.
    failures: [u32; TIMERS],
}

impl Timers {
    /// `timer` is due at `at`, and not before.
    pub fn set(&mut self, timer: Timer, at: Instant) {
        *self.slot(timer) = Some(at);
    }

    /// `timer` is due at `at`, or as before where that is sooner.
    pub fn hasten(&mut self, timer: Timer, at: Instant) {
        let slot = self.slot(timer);
        *slot = Some(slot.map_or(at, |due| due.min(at)));
    }

    /// `timer` is due later by `by`, if it is set.
    pub fn delay(&mut self, timer: Timer, by: Duration) {
        if let Some(due) = self.slot(timer) {
            *due += by;
        }
    }

    /// `timer` is not due any more.
    pub fn clear(&mut self, timer: Timer) {
        *self.slot(timer) = None;
    }

    /// Whether `timer` is due.
    pub fn is_due(&self, timer: Timer, now: Instant) -> bool {
        self.due(timer).is_some_and(|due| due <= now)
    }

    /// When `timer` is due, if it is set.
    pub fn due(&self, timer: Timer) -> Option<Instant> {
        self.due.get(timer as usize).copied().flatten()
    }

    /// Whether `timer` was due; if so it is not set any more.
    pub fn take(&mut self, timer: Timer, now: Instant) -> bool {
        let is_due = self.is_due(timer, now);
        if is_due {
            *self.slot(timer) = None;
        }
        is_due
    }

    /// The first moment at which anything is due, other than this.
    pub fn next_but(&self, not_now: Option<Timer>) -> Option<Instant> {
        let others = self
            .due
            .iter()
            .enumerate()
            .filter(|(at, _)| not_now.is_none_or(|it| it as usize != *at));
        others.filter_map(|(_, due)| *due).min()
    }

    /// The work of `timer` has failed: it is due again after `first`, and after twice as long with
    /// each further failure, up to `most`.
    pub fn failed(&mut self, timer: Timer, now: Instant, first: Duration, most: Duration) {
        let failures = self.failures.get_mut(timer as usize);
        let before = failures.map_or(0, |count| std::mem::replace(count, count.saturating_add(1)));
        let pause = first.saturating_mul(1_u32.checked_shl(before).unwrap_or(u32::MAX));
        self.set(timer, now + pause.min(most.max(first)));
    }

    /// The work of `timer` has been done.
    pub fn succeeded(&mut self, timer: Timer) {
        if let Some(failures) = self.failures.get_mut(timer as usize) {
            *failures = 0;
        }
    }

    #[allow(clippy::indexing_slicing, reason = "an array of one slot for each timer")]
    fn slot(&mut self, timer: Timer) -> &mut Option<Instant> {
        &mut self.due[timer as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_one_timer_do_not_touch_another_and_come_back_ever_later() {
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        let mut timers = Timers::default();
        timers.set(Timer::Shallow, begun);
        for pause in [1, 2, 4, 8, 10, 10] {
            timers.failed(Timer::Deep, begun, second, second * 10);
            assert_eq!(timers.due(Timer::Deep), Some(begun + second * pause));
        }
        assert!(timers.is_due(Timer::Shallow, begun));
        timers.succeeded(Timer::Deep);
        timers.failed(Timer::Deep, begun, second, second * 10);
        assert_eq!(timers.due(Timer::Deep), Some(begun + second));
    }

    #[test]
    fn every_timer_has_its_slot() {
        let begun = Instant::now();
        let mut timers = Timers::default();
        timers.set(Timer::Check, begun);
        assert!(timers.take(Timer::Check, begun));
    }

    #[test]
    fn the_next_is_the_soonest() {
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        let mut timers = Timers::default();
        assert_eq!(timers.next_but(None), None);
        timers.set(Timer::Deep, begun + second * 30);
        timers.set(Timer::Shallow, begun + second);
        timers.hasten(Timer::Deep, begun + second * 40);
        assert_eq!(timers.due(Timer::Deep), Some(begun + second * 30));
        assert_eq!(timers.next_but(None), Some(begun + second));
        assert!(timers.take(Timer::Shallow, begun + second));
        assert!(!timers.take(Timer::Shallow, begun + second));
        assert_eq!(timers.next_but(None), Some(begun + second * 30));
    }
}
