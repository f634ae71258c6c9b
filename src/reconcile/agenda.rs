//! When each watched connection is looked at next. Pure: time is an argument.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::Instant;

use crate::sockdiag::Cookie;

/// The next look at each connection, in the order of time; as many as are watched.
#[derive(Clone, Debug, Default)]
pub struct Agenda {
    looks: BTreeSet<(Instant, Cookie)>,
    /// The last one that was sampled.
    sampled: Option<(Instant, Cookie)>,
}

impl Agenda {
    /// Puts the next look at a connection off or forward; `None` is none.
    pub fn move_look(&mut self, cookie: Cookie, from: Option<Instant>, to: Option<Instant>) {
        if from == to {
            return;
        }
        if let Some(from) = from {
            self.looks.remove(&(from, cookie));
        }
        if let Some(to) = to {
            self.looks.insert((to, cookie));
        }
    }

    /// The next look, if it is due.
    pub fn due(&self, now: Instant) -> Option<Cookie> {
        self.looks.first().filter(|(at, _)| *at <= now).map(|(_, cookie)| *cookie)
    }

    /// When the next look is due.
    pub fn next(&self) -> Option<Instant> {
        self.looks.first().map(|(at, _)| *at)
    }

    /// Connections whose look is not due yet: other ones each time, until all have had their turn.
    pub fn sample(&mut self, most: usize) -> Vec<Cookie> {
        let behind = self.sampled.map_or(Bound::Unbounded, Bound::Excluded);
        let (behind, before) = (
            self.looks.range((behind, Bound::Unbounded)),
            self.sampled.into_iter().flat_map(|last| self.looks.range(..=last)),
        );
        let sample: Vec<_> = behind.chain(before).take(most).copied().collect();
        self.sampled = sample.last().copied();
        sample.into_iter().map(|(_, cookie)| cookie).collect()
    }

    /// Every connection whose look comes later than `at`.
    pub fn later_than(&self, at: Instant) -> Vec<Cookie> {
        self.looks.iter().rev().take_while(|(due, _)| *due > at).map(|(_, it)| *it).collect()
    }

    /// How many connections are watched.
    pub fn len(&self) -> usize {
        self.looks.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.looks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn samples_go_round_while_looks_are_put_off() {
        let begun = Instant::now();
        let at = |seconds: u64| begun + Duration::from_secs(seconds);
        let mut agenda = Agenda::default();
        for number in 0..5 {
            agenda.move_look(Cookie(number), None, Some(at(number)));
        }
        let of = |cookies: Vec<Cookie>| cookies.into_iter().map(|it| it.0).collect::<Vec<_>>();
        assert_eq!(of(agenda.sample(2)), [0, 1]);
        agenda.move_look(Cookie(0), Some(at(0)), Some(at(9)));
        assert_eq!(of(agenda.sample(2)), [2, 3]);
        assert_eq!(of(agenda.sample(2)), [4, 0]);
        assert_eq!(of(agenda.sample(9)), [1, 2, 3, 4, 0], "each once");
        assert_eq!(agenda.due(at(0)), None);
        assert_eq!(agenda.due(at(1)), Some(Cookie(1)));
        assert_eq!(of(agenda.later_than(at(3))), [0, 4]);
        agenda.move_look(Cookie(1), Some(at(1)), None);
        assert_eq!((agenda.due(at(1)), agenda.len()), (None, 4));
    }
}
