//! One log line for each repair while there are few of them; under attack a summary each second.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// Lines of one kind in a second: more than an administrator reads, too few to fill a disk.
const LINES_A_SECOND: u64 = 20;

/// Logs like `tracing::$level!` where `$fits`; else at debug, under a target of its own, so that
/// `CTKEEP_LOG=info,ctkeep::withheld=debug` still shows every one.
macro_rules! line {
    ($fits:expr, $level:ident, $($what:tt)+) => {
        if $fits {
            tracing::$level!($($what)+);
        } else {
            tracing::debug!(target: "ctkeep::withheld", $($what)+);
        }
    };
}
pub(super) use line;

/// Lines of this second, by kind.
#[derive(Debug)]
pub(super) struct Lines {
    second: Instant,
    counts: BTreeMap<&'static str, u64>,
}

impl Lines {
    pub(super) fn new(now: Instant) -> Self {
        Self { second: now, counts: BTreeMap::new() }
    }

    /// Whether one more line of this kind fits.
    pub(super) fn fits(&mut self, kind: &'static str) -> bool {
        let count = self.counts.entry(kind).or_default();
        *count += 1;
        *count <= LINES_A_SECOND
    }

    /// Once the second is over: how many lines of each kind it withheld.
    pub(super) fn withheld(&mut self, now: Instant) -> BTreeMap<&'static str, u64> {
        if now.saturating_duration_since(self.second) < SECOND {
            return BTreeMap::new();
        }
        self.second = now;
        let mut counts = std::mem::take(&mut self.counts);
        counts.retain(|_, count| {
            *count = count.saturating_sub(LINES_A_SECOND);
            *count > 0
        });
        counts
    }
}

/// How often it is said what others do: a cron job does so for as long as it is there.
const MINUTE: Duration = Duration::from_secs(60);

/// What others do beside us: entries of open connections that they delete, rules that they change.
#[derive(Debug, Default)]
pub(super) struct ByOthers {
    said: Option<Instant>,
    count: u64,
}

impl ByOthers {
    /// One more.
    pub(super) fn note(&mut self) {
        self.count += 1;
    }

    /// How many since it was said last, when it is to be said.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<u64> {
        let is_due = self.said.is_none_or(|said| now.saturating_duration_since(said) >= MINUTE);
        if self.count == 0 || !is_due {
            return None;
        }
        self.said = Some(now);
        Some(std::mem::take(&mut self.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_do_is_summed_up_once_a_minute() {
        let begun = Instant::now();
        let mut deleted = ByOthers::default();
        assert_eq!(deleted.take_due(begun), None);
        (0..3).for_each(|_| deleted.note());
        assert_eq!(deleted.take_due(begun), Some(3), "the first at once");
        (0..5).for_each(|_| deleted.note());
        assert_eq!(deleted.take_due(begun + MINUTE / 2), None);
        assert_eq!(deleted.take_due(begun + MINUTE), Some(5));
        assert_eq!(deleted.take_due(begun + MINUTE * 3), None, "it has ended");
    }

    #[test]
    fn what_is_too_much_for_a_second_is_summed_up_at_its_end() {
        let begun = Instant::now();
        let mut lines = Lines::new(begun);
        let written = (0..100).filter(|_| lines.fits("revive")).count();
        assert_eq!((written, lines.fits("release")), (20, true), "each kind for itself");
        assert!(lines.withheld(begun + SECOND / 2).is_empty(), "not yet");
        assert_eq!(lines.withheld(begun + SECOND), BTreeMap::from([("revive", 80)]));
        assert!(lines.fits("revive"), "another second");
        assert!(lines.withheld(begun + SECOND * 2).is_empty());
    }
}
