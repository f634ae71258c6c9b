//! Defence levels: how hard entries are held, by how hard they are fought over.
//!
//! After the modes of the LVS drop entry defence. Level 0 holds entries as the kernel would.
//! Level 1 is entered by itself when repairs come fast or the table fills, and left by itself when
//! that is over: it holds half-closed connections of repeat offenders as ESTABLISHED *before* a
//! stale RST comes (conntrack then ignores it, and early drop spares them), sweeps faster, and
//! stops re-inserting into a table that is nearly full. Level 2 is the same, set by the operator
//! and never left by itself.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Defence {
    /// Levels 0 and 1, as needed.
    #[default]
    Auto,
    /// This level, always.
    Fixed(Level),
}

/// How hard entries are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// As the kernel would.
    #[default]
    Calm = 0,
    /// Against an attack, for as long as it lasts.
    Alert = 1,
    /// Against an attack, until the operator says otherwise.
    Manual = 2,
}

/// Repairs are counted over this time.
const WINDOW: Duration = Duration::from_secs(5);
/// Repairs a second that raise the level, and below which it may fall. A broken proxy makes a few.
const HIGH_RATE: f64 = 20.0;
const LOW_RATE: f64 = 2.0;
/// Fill of the conntrack table likewise. At 0.95 the kernel begins to drop closing entries early.
const HIGH_FILL: f64 = 0.90;
const LOW_FILL: f64 = 0.80;
/// No re-inserts beyond this fill.
const FULL: f64 = 0.95;
/// The level stays at least this long.
const STAY: Duration = Duration::from_secs(60);
/// So many repairs make a source a repeat offender, and for this long after the last.
const OFFENCES: u32 = 3;
const OFFENDER_MEMORY: Duration = Duration::from_secs(600);
/// Clients remembered at most; the oldest go first.
const SOURCES: usize = 65_536;

/// Whom an address belongs to: of IPv6 one client has a whole /64 (RFC 6177), and could take
/// another address for each connection.
pub fn client_of(source: IpAddr) -> IpAddr {
    const HOST: u128 = u64::MAX as u128;
    match source {
        IpAddr::V4(_) => source,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) & !HOST).into()),
    }
}

/// A change of level, with the figures that caused it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Transition {
    /// The level before.
    pub from: Level,
    /// The level now.
    pub to: Level,
    /// Repairs a second.
    pub rate: f64,
    /// Fill of the table, 0 to 1.
    pub fill: f64,
}

/// The state of defence of one namespace. Pure: time is an argument.
#[derive(Clone, Debug)]
pub struct Pressure {
    defence: Defence,
    level: Level,
    entered: Option<Instant>,
    window: Option<Instant>,
    repairs: u32,
    rate: f64,
    fill: f64,
    /// By what one client is taken for ([`client_of`]).
    offenders: HashMap<IpAddr, (u32, Instant)>,
}

impl Default for Pressure {
    fn default() -> Self {
        Self::new(Defence::Auto)
    }
}

impl Pressure {
    /// No pressure yet.
    pub fn new(defence: Defence) -> Self {
        let level = match defence {
            Defence::Auto => Level::Calm,
            Defence::Fixed(level) => level,
        };
        Self {
            defence,
            level,
            entered: None,
            window: None,
            repairs: 0,
            rate: 0.0,
            fill: 0.0,
            offenders: HashMap::new(),
        }
    }

    /// The level in force.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Takes note of a repair for this source.
    pub fn repaired(&mut self, source: IpAddr, now: Instant) {
        self.repairs = self.repairs.saturating_add(1);
        let client = client_of(source);
        if self.offenders.len() >= SOURCES && !self.offenders.contains_key(&client) {
            self.forget_oldest();
        }
        let offender = self.offenders.entry(client).or_insert((0, now));
        offender.0 = offender.0.saturating_add(1);
        offender.1 = now;
    }

    /// A quarter at once: to find the oldest is a walk through all of them.
    fn forget_oldest(&mut self) {
        let mut times: Vec<_> = self.offenders.values().map(|(_, last)| *last).collect();
        let (_, limit, _) = times.select_nth_unstable(SOURCES / 4);
        let limit = *limit;
        self.offenders.retain(|_, (_, last)| *last > limit);
    }

    /// Weighs what has happened, at least once a second; `fill` is that of the table, 0 to 1.
    pub fn tick(&mut self, fill: f64, now: Instant) -> Option<Transition> {
        self.fill = fill;
        let begun = *self.window.get_or_insert(now);
        let passed = now.saturating_duration_since(begun);
        // A burst counts at once; calm only after a whole window.
        let rate = f64::from(self.repairs) / passed.max(WINDOW).as_secs_f64();
        self.rate = if passed >= WINDOW { rate } else { self.rate.max(rate) };
        if passed >= WINDOW {
            self.window = Some(now);
            self.repairs = 0;
            self.offenders
                .retain(|_, (_, last)| now.saturating_duration_since(*last) < OFFENDER_MEMORY);
        }
        if self.defence != Defence::Auto {
            return None;
        }
        let high = self.rate >= HIGH_RATE || self.fill >= HIGH_FILL;
        let low = self.rate < LOW_RATE && self.fill < LOW_FILL;
        let stayed =
            self.entered.is_none_or(|entered| now.saturating_duration_since(entered) >= STAY);
        let to = match self.level {
            Level::Calm if high => Level::Alert,
            Level::Alert if low && stayed => Level::Calm,
            level => level,
        };
        if self.level == Level::Alert && high {
            // The stay begins anew while the danger lasts.
            self.entered = Some(now);
        }
        if to == self.level {
            return None;
        }
        let transition = Transition { from: self.level, to, rate: self.rate, fill: self.fill };
        self.level = to;
        self.entered = Some(now);
        Some(transition)
    }

    /// Whether this source is, after so many more repairs, one that fools conntrack on purpose.
    pub fn offends(&self, source: IpAddr, more: u32) -> bool {
        let before = self.offenders.get(&client_of(source)).map_or(0, |(offences, _)| *offences);
        before.saturating_add(more) >= OFFENCES
    }

    /// Whether half-closed connections of this source are held as ESTABLISHED beforehand.
    pub fn pins_early(&self, source: IpAddr) -> bool {
        self.pins_all_early() || self.level > Level::Calm && self.offends(source, 0)
    }

    /// Whether those of every source are.
    pub fn pins_all_early(&self) -> bool {
        self.level > Level::Calm && self.fill >= HIGH_FILL
    }

    /// Whether a missing entry may be inserted.
    pub fn allows_inserts(&self) -> bool {
        self.level == Level::Calm || self.fill < FULL
    }

    /// An interval between two looks, shortened under attack.
    pub fn scale_interval(&self, interval: Duration) -> Duration {
        match self.level {
            Level::Calm => interval,
            Level::Alert | Level::Manual => {
                (interval / 4).max(Duration::from_millis(100)).min(interval)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> IpAddr {
        "198.51.100.7".parse().unwrap()
    }

    #[test]
    fn fast_repairs_raise_the_level_and_calm_lowers_it_after_a_minimum_stay() {
        let begun = Instant::now();
        let mut pressure = Pressure::default();
        assert_eq!(pressure.tick(0.1, begun), None);
        for _ in 0..200 {
            pressure.repaired(source(), begun);
        }
        let up = pressure.tick(0.1, begun + Duration::from_secs(1)).unwrap();
        assert_eq!((up.from, up.to), (Level::Calm, Level::Alert));
        assert!(up.rate >= HIGH_RATE);
        let mut level = Level::Alert;
        for second in 2..200 {
            if let Some(down) = pressure.tick(0.1, begun + Duration::from_secs(second)) {
                assert!(second >= 60, "left after {second} s");
                level = down.to;
            }
        }
        assert_eq!(level, Level::Calm);
    }

    #[test]
    fn between_the_marks_nothing_changes() {
        let begun = Instant::now();
        let mut pressure = Pressure::default();
        for second in 0..120 {
            for _ in 0..10 {
                pressure.repaired(source(), begun);
            }
            assert_eq!(pressure.tick(0.85, begun + Duration::from_secs(second)), None);
        }
        assert_eq!(pressure.level(), Level::Calm);
    }

    #[test]
    fn a_full_table_hardens_everybody_and_stops_inserts() {
        let begun = Instant::now();
        let mut pressure = Pressure::default();
        assert!(!pressure.pins_early(source()));
        assert!(pressure.tick(0.96, begun).is_some());
        assert!(pressure.pins_early(source()));
        assert!(!pressure.allows_inserts());
    }

    #[test]
    fn the_operators_level_is_never_left_by_itself() {
        let begun = Instant::now();
        let mut pressure = Pressure::new(Defence::Fixed(Level::Manual));
        for second in 0..600 {
            assert_eq!(pressure.tick(0.0, begun + Duration::from_secs(second)), None);
        }
        assert_eq!(pressure.level(), Level::Manual);
    }

    #[test]
    fn a_source_is_an_offender_from_the_third_repair_on() {
        let begun = Instant::now();
        let mut pressure = Pressure::new(Defence::Fixed(Level::Manual));
        for repairs in 1..=3 {
            pressure.repaired(source(), begun);
            assert_eq!(pressure.pins_early(source()), repairs >= 3);
        }
        assert!(!pressure.pins_early("198.51.100.8".parse().unwrap()));
    }

    #[test]
    fn the_addresses_of_one_network_are_one_client_of_ipv6() {
        let now = Instant::now();
        let mut pressure = Pressure::new(Defence::Auto);
        let host = |host: u16| IpAddr::from([0x2001, 0xdb8, 1, 2, 0, 0, 0, host]);
        (1..=3).for_each(|number| pressure.repaired(host(number), now));
        assert!(pressure.offends(host(4), 0));
        assert!(!pressure.offends(IpAddr::from([0x2001, 0xdb8, 1, 3, 0, 0, 0, 1]), 0));
    }

    #[test]
    fn more_clients_than_are_remembered_push_out_the_oldest() {
        let now = Instant::now();
        let mut pressure = Pressure::new(Defence::Auto);
        let client = |number: u32| IpAddr::V4(number.into());
        let all = u32::try_from(SOURCES).unwrap() + 1;
        for number in 0..all {
            for _ in 0..3 {
                pressure.repaired(client(number), now + Duration::from_micros(number.into()));
            }
        }
        assert!(pressure.offenders.len() <= SOURCES);
        assert!(pressure.offends(client(all - 1), 0) && !pressure.offends(client(0), 0));
    }
}
