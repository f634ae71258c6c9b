//! How many nudges may be sent: a bound for each connection, and one for all.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::flow::FourTuple;

/// A peer that fools conntrack again and again gets no more than this from us.
const EACH: Rate = Rate { burst: 100, per_second: 50 };
/// Far above what repairs reach (docs/performance.md), far below what would hurt the host.
const ALL: Rate = Rate { burst: 100_000, per_second: 50_000 };

#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: u32,
    per_second: u32,
}

/// A token bucket.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: u32,
    filled: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self { tokens: rate.burst, filled: now }
    }

    fn fill(&mut self, rate: Rate, now: Instant) {
        let passed = now.saturating_duration_since(self.filled);
        let new = passed.as_micros() * u128::from(rate.per_second) / 1_000_000;
        let Ok(new) = u32::try_from(new) else {
            *self = Self::full(rate, now);
            return;
        };
        if new > 0 {
            self.tokens = self.tokens.saturating_add(new).min(rate.burst);
            self.filled = now;
        }
    }
}

/// Counts nudges against their bounds.
#[derive(Debug)]
pub(super) struct Budget {
    all: Bucket,
    each: HashMap<FourTuple, Bucket>,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { all: Bucket::full(ALL, now), each: HashMap::new() }
    }

    /// Takes one nudge for this connection out of the budget; `false` when there is none left.
    pub(super) fn take(&mut self, flow: FourTuple, now: Instant) -> bool {
        self.all.fill(ALL, now);
        let each = self.each.entry(flow).or_insert_with(|| Bucket::full(EACH, now));
        each.fill(EACH, now);
        let granted = self.all.tokens > 0 && each.tokens > 0;
        if granted {
            self.all.tokens -= 1;
            each.tokens -= 1;
        }
        granted
    }

    /// Forgets connections that have been quiet long enough to have a full bucket.
    pub(super) fn prune(&mut self, now: Instant) {
        let full_again = Duration::from_secs(u64::from(EACH.burst / EACH.per_second) + 1);
        self.each.retain(|_, bucket| now.saturating_duration_since(bucket.filled) < full_again);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_connection_cannot_use_up_what_others_need() {
        let flow = |port: u16| {
            FourTuple::new(
                format!("198.51.100.7:{port}").parse().unwrap(),
                "192.0.2.1:80".parse().unwrap(),
            )
        };
        let begun = Instant::now();
        let mut budget = Budget::new(begun);
        let granted = (0..1000).filter(|_| budget.take(flow(1), begun)).count();
        assert_eq!(granted, 100);
        assert!(budget.take(flow(2), begun));
        let later = begun + Duration::from_millis(100);
        let granted = (0..1000).filter(|_| budget.take(flow(1), later)).count();
        assert_eq!(granted, 5);
        budget.prune(later + Duration::from_secs(10));
        assert!(budget.each.is_empty());
    }
}
