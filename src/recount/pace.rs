//! How soon after a question the next one is asked: when no list has the last probe any more. Pure.
//!
//! A probe stays on a list until that is swept in another jiffy; where another processor has put it
//! there, for two jiffies. Until then it has a place: a second one would take a second place of an honest
//! client, and find the place of the first one taken.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

/// Jiffies after which every processor throws a tuple without an entry off a list, and one for the
/// jiffy that has begun (`find_or_evict()`).
pub(super) const FORGOTTEN: u32 = 3;

/// Keeps questions apart. Time is that of the last tick.
#[derive(Debug)]
pub(super) struct Pace {
    jiffy: Duration,
    /// Whose lists may still have a probe, since when; older ones go.
    asked: HashMap<IpAddr, Duration>,
    /// The last probe that got a place: in a list of many sources maybe.
    let_in: Option<Duration>,
}

impl Pace {
    pub(super) fn new(jiffy: Duration) -> Self {
        Self { jiffy, asked: HashMap::new(), let_in: None }
    }

    /// How much later this source may be asked; `None` is now.
    pub(super) fn wait(&mut self, client: IpAddr, now: Duration) -> Option<Duration> {
        // The clock is slewed: half a jiffy tells one number of ticks from the next.
        let pause = self.jiffy * FORGOTTEN - self.jiffy / 2;
        let is_recent = |asked: &Duration| now < *asked + pause;
        self.asked.retain(|_, asked| is_recent(asked));
        self.let_in = self.let_in.filter(is_recent);
        let last = self.asked.get(&client).copied().max(self.let_in)?;
        Some(last + pause - now)
    }

    /// This source's probe has had its answer, or none.
    pub(super) fn asked(&mut self, client: IpAddr, is_let_in: bool, now: Duration) {
        self.asked.insert(client, now);
        if is_let_in {
            self.let_in = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JIFFY: Duration = Duration::from_millis(4);
    const SOURCE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 7));
    const OTHER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 8));

    /// The first tick at which a source may be asked.
    fn tick(pace: &mut Pace, source: IpAddr) -> u32 {
        let is_now = |tick: &u32| pace.wait(source, JIFFY * *tick).is_none();
        (0..100).find(is_now).expect("within 100 ticks")
    }

    #[test]
    fn a_source_is_asked_again_three_ticks_later() {
        let mut pace = Pace::new(JIFFY);
        assert_eq!(tick(&mut pace, SOURCE), 0);
        pace.asked(SOURCE, false, JIFFY * 7);
        // Slewed by a thousandth.
        assert!(pace.wait(SOURCE, JIFFY * 10 - JIFFY / 100).is_none());
        pace.asked(SOURCE, false, JIFFY * 7);
        assert_eq!(pace.wait(SOURCE, JIFFY * 9), Some(JIFFY / 2));
        assert_eq!(tick(&mut pace, SOURCE), 10);
    }

    #[test]
    fn what_was_stopped_takes_no_other_source_a_place() {
        let mut pace = Pace::new(JIFFY);
        pace.asked(SOURCE, false, JIFFY);
        assert_eq!(tick(&mut pace, OTHER), 0);
    }

    #[test]
    fn the_place_of_one_source_may_be_that_of_another() {
        let mut pace = Pace::new(JIFFY);
        pace.asked(SOURCE, true, JIFFY);
        assert_eq!(tick(&mut pace, OTHER), 4);
    }

    #[test]
    fn sources_are_forgotten() {
        let mut pace = Pace::new(JIFFY);
        for last in 0..=255 {
            pace.wait(SOURCE, JIFFY * u32::from(last));
            pace.asked(IpAddr::from([192, 0, 2, last]), true, JIFFY * u32::from(last));
            assert!(pace.asked.len() <= 3);
        }
    }
}
