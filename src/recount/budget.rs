//! How many nudges may be sent: a bound for each connection, and one for all.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::flow::FourTuple;

/// Connections whose nudges are counted one by one. A connection that is new while all places are
/// taken gets its nudge from the bound for all alone: 5 MiB are enough.
const KNOWN: usize = 65_536;

/// A peer that fools conntrack again and again gets no more than this from us.
const EACH: Rate = Rate { burst: 100, per_second: 50 };
/// Far above what repairs reach (docs/performance.md), far below what would hurt the host.
const ALL: Rate = Rate { burst: 100_000, per_second: 50_000 };

/// An empty bucket of [`EACH`] is full again, with a second to spare.
const FULL_AGAIN: Duration = Duration::from_secs(3);

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
    pruned: Instant,
}

impl Budget {
    pub(super) fn new(now: Instant) -> Self {
        Self { all: Bucket::full(ALL, now), each: HashMap::new(), pruned: now }
    }

    /// Takes one nudge for this connection out of the budget; `false` when there is none left.
    pub(super) fn take(&mut self, flow: FourTuple, now: Instant) -> bool {
        self.all.fill(ALL, now);
        if self.each.len() >= KNOWN && !self.each.contains_key(&flow) {
            // Not more often: it is a walk through all of them.
            if now.saturating_duration_since(self.pruned) >= FULL_AGAIN {
                self.prune(now);
            }
            if self.each.len() >= KNOWN {
                let granted = self.all.tokens > 0;
                self.all.tokens -= u32::from(granted);
                return granted;
            }
        }
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
        self.pruned = now;
        self.each.retain(|_, bucket| now.saturating_duration_since(bucket.filled) < FULL_AGAIN);
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

    #[test]
    fn what_is_remembered_of_single_connections_is_bounded() {
        let begun = Instant::now();
        let mut budget = Budget::new(begun);
        let flow = |n: u32| {
            let addr = std::net::Ipv4Addr::from(n);
            FourTuple::new(
                crate::flow::Endpoint::new(addr.into(), 4000),
                "192.0.2.1:80".parse().unwrap(),
            )
        };
        let granted = (0..200_000).filter(|n| budget.take(flow(*n), begun)).count();
        assert_eq!(granted, 100_000, "the bound for all");
        assert_eq!(budget.each.len(), KNOWN);
    }
}
