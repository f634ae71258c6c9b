//! Inserts rest while the conntrack table is full: a storm of them would only make it worse. Pure.

use std::time::{Duration, Instant};

/// How long inserts rest after the table was found full, at first and at most.
const FIRST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(60);

/// Whether inserts may be tried.
#[derive(Clone, Copy, Debug, Default)]
pub enum BackOff {
    /// The table has taken the last one.
    #[default]
    Open,
    /// The table was full.
    Resting {
        /// Until then.
        until: Instant,
        /// For so long.
        rest: Duration,
        /// When it was last said.
        said: Instant,
    },
}

impl BackOff {
    /// Whether inserts rest.
    pub fn rests(&self, now: Instant) -> bool {
        matches!(self, Self::Resting { until, .. } if now < *until)
    }

    /// An insert was taken.
    pub fn succeeded(&mut self) {
        *self = Self::Open;
    }

    /// The table was full. Returns for how long inserts rest now where that should be said: at
    /// first, and then once in the longest rest.
    pub fn failed(&mut self, now: Instant) -> Option<Duration> {
        let (rest, last) = match *self {
            Self::Open => (FIRST, None),
            Self::Resting { rest, said, .. } => ((rest * 2).min(MOST), Some(said)),
        };
        let say = last.is_none_or(|said| now.saturating_duration_since(said) >= MOST);
        let said = if say { now } else { last.unwrap_or(now) };
        *self = Self::Resting { until: now + rest, rest, said };
        say.then_some(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_twice_as_long_as_the_last_and_is_said_once_a_minute() {
        let begun = Instant::now();
        let second = Duration::from_secs(1);
        let mut back_off = BackOff::default();
        assert!(!back_off.rests(begun));
        let mut now = begun;
        let mut said = Vec::new();
        for rest in [1, 2, 4, 8, 16, 32, 60, 60] {
            said.extend(back_off.failed(now));
            assert!(back_off.rests(now + second * (rest - 1)) || rest == 1);
            now += second * rest;
            assert!(!back_off.rests(now));
        }
        assert_eq!(said.first(), Some(&second));
        assert_eq!(said.len(), 3, "{said:?}");
        back_off.succeeded();
        assert_eq!(back_off.failed(now), Some(second));
    }
}
