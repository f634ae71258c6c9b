//! Sources whose connections were shown to a limit, and that are to be asked for: a recount is done
//! only when the limit says so. Pure.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::firewall::limits::LimitRule;
use crate::firewall::lists::Limited;
use crate::flow::Endpoint;
use crate::recount::HeldUp;
use crate::sockdiag::Socket;

/// From a recount to the question: the repairs of one burst are asked for together.
const FIRST: Duration = Duration::from_millis(20);
/// From one try to the next, at first; twice as long with each further one. What a rate rule has
/// swallowed gets through when its bucket is full again, a second later mostly.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// Tries of one source, some five minutes.
const TRIES: u32 = 64;
/// Sources that wait. More are not asked for: their recounts stay "sent".
const SOURCES: usize = 4096;
/// Sources asked for at one turn, a millisecond each. One alone where a program holds questions up.
const TOGETHER: usize = 16;
/// A source is forgotten so long after its last try.
const REMEMBERED: Duration = Duration::from_secs(60);

/// What a limit said of a source that holds as many connections as it allows, or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Counted {
    /// It lets no further one in.
    Yes,
    /// It does: its list lacks connections.
    No,
    /// It cannot be asked, or another rule answered.
    Unknown,
}

impl Counted {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Yes, Self::No, Self::Unknown];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Yes => "counted",
            Self::No => "not-counted",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Checked {
    /// For whose connections.
    pub source: IpAddr,
    /// And to which endpoint of this host.
    pub local: Endpoint,
    /// The limit, in words; `None` where it is not known which one answers.
    pub limit: Option<String>,
    /// How many connections it counts together with them.
    pub held: usize,
    /// What it said.
    pub counted: Counted,
    /// Why that is not known.
    pub why: Option<String>,
    /// When it is tried again; `None` where it is not.
    pub again: Option<Duration>,
}

/// One source that waits.
#[derive(Clone, Copy, Debug)]
struct Check {
    /// `None`: it is only remembered.
    due: Option<Instant>,
    tries: u32,
    last: Instant,
    /// Connections shown so far in a row.
    shown: usize,
}

/// What waits to be asked.
#[derive(Clone, Debug, Default)]
pub struct Checks {
    known: Arc<Limited>,
    held_up: HeldUp,
    sources: HashMap<IpAddr, Check>,
    /// Limits whose lists may be younger than what is open, each with a connection to ask for.
    samples: VecDeque<(LimitRule, Socket)>,
}

impl Checks {
    /// These limits count what is guarded here.
    pub fn know(&mut self, known: Limited) {
        self.held_up = match (known.queues_before_conntrack(), known.queues()) {
            (true, _) => HeldUp::BeforeConntrack,
            (false, true) => HeldUp::BehindConntrack,
            (false, false) => HeldUp::Nowhere,
        };
        self.known = Arc::new(known);
        self.samples.clear();
    }

    /// Where a program may hold up what is sent to them.
    pub fn held_up(&self) -> HeldUp {
        self.held_up
    }

    /// The limits, and their rules.
    pub fn known(&self) -> Arc<Limited> {
        self.known.clone()
    }

    /// Whether limits tell of what exceeds them: nothing of ours may.
    pub fn are_told_of(&self) -> bool {
        self.known.limits.iter().any(|rule| rule.tells)
    }

    /// Connections of this source were shown to limits.
    pub fn shown(&mut self, source: IpAddr, now: Instant) {
        if self.known.limits.is_empty() {
            return;
        }
        if self.sources.len() >= SOURCES {
            self.sources.retain(|_, check| check.due.is_some() || now - check.last < REMEMBERED);
            if self.sources.len() >= SOURCES && !self.sources.contains_key(&source) {
                return;
            }
        }
        let new = Check { due: None, tries: 0, last: now, shown: 0 };
        let check = self.sources.entry(source).or_insert(new);
        if now.saturating_duration_since(check.last) >= REMEMBERED {
            *check = new;
        }
        // One that waits for its next try keeps its pause.
        check.due.get_or_insert(now + FIRST);
        check.last = now;
    }

    /// When the next one is due.
    pub fn next(&self) -> Option<Instant> {
        self.sources.values().filter_map(|check| check.due).min()
    }

    /// The sources that are due, some of them.
    pub fn take_due(&mut self, now: Instant) -> Vec<IpAddr> {
        let is_due = |check: &Check| check.due.is_some_and(|due| due <= now);
        let due = self.sources.iter().filter(|(_, check)| is_due(check));
        let mut due: Vec<_> = due.map(|(source, check)| (check.due, *source)).collect();
        due.sort_unstable();
        due.truncate(if self.held_up == HeldUp::Nowhere { TOGETHER } else { 1 });
        for (_, source) in &due {
            if let Some(check) = self.sources.get_mut(source) {
                check.due = None;
            }
        }
        due.into_iter().map(|(_, source)| source).collect()
    }

    /// A source has been asked for. Where it is not counted: when it is asked for again, and of its
    /// `held` connections those that are to be shown until then, by their places. A rate rule lets
    /// some through at each try, so later tries show fewer, and begin where the one before has
    /// ended.
    pub fn answered(
        &mut self,
        source: IpAddr,
        counted: Counted,
        held: usize,
        now: Instant,
    ) -> (Option<Duration>, Vec<usize>) {
        let Some(check) = self.sources.get_mut(&source) else { return (None, Vec::new()) };
        check.last = now;
        if counted == Counted::Yes {
            self.sources.remove(&source);
            return (None, Vec::new());
        }
        check.tries += 1;
        if check.tries > TRIES || counted == Counted::Unknown && check.tries > TRIES / 8 {
            return (None, Vec::new());
        }
        let factor = 1_u32.checked_shl(check.tries - 1).unwrap_or(u32::MAX);
        let pause = PAUSE.saturating_mul(factor).min(LONGEST);
        check.due = Some(now + pause);
        if counted == Counted::Unknown || held == 0 {
            return (Some(pause), Vec::new());
        }
        let fewer = held.checked_shr(check.tries - 1).unwrap_or(0).max(1);
        let from = check.shown;
        check.shown += fewer;
        (Some(pause), (from..from + fewer).map(|place| place % held).collect())
    }

    /// This source is not asked for again: nothing would come of it.
    pub fn give_up(&mut self, source: IpAddr) {
        self.sources.remove(&source);
    }

    /// These connections are to be asked for, each for the sake of a limit.
    pub fn sample(&mut self, samples: impl IntoIterator<Item = (LimitRule, Socket)>) {
        self.samples.extend(samples);
    }

    /// The next of them.
    pub fn next_sample(&mut self) -> Option<(LimitRule, Socket)> {
        self.samples.pop_front()
    }

    /// Whether there are more.
    pub fn has_samples(&self) -> bool {
        !self.samples.is_empty()
    }

    /// Enough is known of this limit.
    pub fn drop_samples(&mut self, limit: &LimitRule) {
        self.samples.retain(|(other, _)| other.place() != limit.place());
    }
}
