//! Which containers have limits of their own: their own tables are guarded, too. Of the others no
//! table is opened.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::firewall::lists::Lists;
use crate::host::netns::Namespace;

/// From look to look at the rules of a container, at first and at most: it sets them when it starts, as
/// a rule.
const LOOKS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// What a look takes is rested this many times: a fiftieth of a core.
const SHARE: u32 = 50;

/// The rules of containers as they were last.
#[derive(Debug)]
pub(super) struct Inside {
    /// By the inodes of the namespaces.
    all: BTreeMap<u64, Rules>,
    free_at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Rules {
    count: bool,
    due: Instant,
    interval: Duration,
}

impl Inside {
    pub(super) fn new(now: Instant) -> Self {
        Self { all: BTreeMap::new(), free_at: now }
    }

    /// Looks at the rules of those that are due; returns those whose rules count.
    pub(super) fn look(
        &mut self,
        there: &BTreeMap<u64, Namespace>,
        now: Instant,
    ) -> Vec<Namespace> {
        self.all.retain(|id, _| there.contains_key(id));
        for (id, namespace) in there {
            if self.free_at > now {
                break;
            }
            let new = Rules { count: false, due: now, interval: LOOKS.0 };
            let rules = self.all.entry(*id).or_insert(new);
            if rules.due > now {
                continue;
            }
            let began = Instant::now();
            // What cannot be read this time may be the next.
            rules.count = have_limits(namespace).unwrap_or(rules.count);
            rules.due = now + rules.interval;
            rules.interval = (rules.interval * 2).min(LOOKS.1);
            // iptables-legacy has a process of its own.
            self.free_at = self.free_at.max(now) + began.elapsed() * SHARE;
        }
        let counting = there.iter().filter(|(id, _)| self.all.get(id).is_some_and(|it| it.count));
        counting.map(|(_, namespace)| namespace.clone()).collect()
    }
}

fn have_limits(namespace: &Namespace) -> Result<bool> {
    namespace.run(|| Ok(Lists::read(None)?.limits().next().is_some()))
}
