//! The firewall's rules as one worker follows them: what changes, when it is looked at, and which
//! limits have lost their lists.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::threads::{cpu_time, cpu_time_of_children};
use crate::error::Result;
use crate::firewall::Hook;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::{Anew, Limited, Lists, Loss, Since};
use crate::firewall::tracking::Tracking;
use crate::watch::rules::{Heard, RuleEvents};

/// A reload is several transactions, one for each family, one for each table; or several programs, one
/// after the other. Between them a limit can stand there twice, and what is open is shown to both.
const SETTLE: Duration = Duration::from_millis(50);
/// How long to wait after rules that could not be read.
const RETRY: Duration = Duration::from_secs(1);
/// What following the rules may cost, of a core: an eighth, and a second in advance. A reload is
/// followed at once, however large; ten a second for half a minute cost less than a fifth.
const SHARE: u32 = 8;
const IN_ADVANCE: Duration = Duration::from_secs(1);
/// A look costs so many times more where only elements were added to sets, as block lists do all the
/// time: a hundredth of a core.
const ONLY_GROWN: u32 = 12;
/// From one run of iptables-legacy that shows nothing to the next that is believed to have replaced
/// its table, at first and at most: it may be a listing, which monitoring makes all the time.
const DOUBT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// The rules of one network namespace, and the limits in them.
#[derive(Debug)]
pub(super) struct Rules {
    events: RuleEvents,
    lists: Lists,
    /// Limits of what is forwarded are for sockets of other namespaces.
    of_forwarded: bool,
    /// Tables whose name begins so are our own.
    own: String,
    heard: Heard,
    first_heard: Option<Instant>,
    /// When what was heard is looked at.
    due: Option<Instant>,
    spare: Spare,
    doubt: Duration,
    /// Until then a run of iptables-legacy that shows nothing is not believed.
    believed: Instant,
    /// Limits were kept back.
    is_doubted: bool,
    is_failing: bool,
}

impl Rules {
    /// Begins to follow the rules of the network namespace that the calling thread is in; those for
    /// what is forwarded too where sockets of other namespaces are asked about.
    ///
    /// # Errors
    /// No descriptors are left.
    pub(super) fn follow(of_forwarded: bool, own: &str, now: Instant) -> Result<Self> {
        // Before the first reading, so that no change is between the two.
        let events = RuleEvents::open()?;
        for (source, reason) in events.shortfalls() {
            tracing::warn!(source, reason, "changes of these rules cannot be followed");
        }
        let lists = Lists::read(None).unwrap_or_else(|error| {
            tracing::warn!(%error, "rules could not be read");
            Lists::default()
        });
        for reason in lists.unread() {
            tracing::warn!(reason, "limits of iptables-legacy, if any, are not followed");
        }
        tracing::info!(limits = lists.limits().count(), "following the rules");
        Ok(Self {
            events,
            lists,
            of_forwarded,
            own: own.to_owned(),
            heard: Heard::default(),
            first_heard: None,
            due: None,
            spare: Spare::new(now),
            doubt: DOUBT.0,
            believed: now,
            is_doubted: false,
            is_failing: false,
        })
    }

    /// What the rules say of conntrack; `None` where they say nothing.
    pub(super) fn tracking(&self) -> Option<Arc<Tracking>> {
        self.lists.tracking().map(Arc::new)
    }

    /// When what was heard is looked at.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// From then on more may be done about rules.
    pub(super) fn free_at(&self) -> Instant {
        self.spare.free_at()
    }

    /// So much was done to show limits their connections.
    pub(super) fn spend(&mut self, cost: Duration, now: Instant) {
        self.spare.spend(cost, now);
    }

    /// The limits that count these sockets, and all rules.
    pub(super) fn limited(&self) -> Limited {
        self.lists.limited(|rule| self.is_of_these(rule.hook))
    }

    /// Whether the rules of nf_tables are those that were read last, as far as the kernel has said by now.
    ///
    /// # Errors
    /// A source is broken.
    pub(super) fn are_as_read(&mut self, now: Instant) -> Result<bool> {
        self.hear(now)?;
        Ok(self.events.hears_nft() && self.heard.leaves_rules())
    }

    /// All limits, where all are known and no rule closes entries by itself.
    pub(super) fn all_limits(&self) -> Option<Vec<LimitRule>> {
        self.lists.is_clear().then(|| self.lists.limits().cloned().collect())
    }

    /// Whether a rule gives connections a policy of timeouts by its name (`CT --timeout`).
    pub(super) fn name_policies(&self) -> bool {
        self.lists.name_policies()
    }

    fn is_of_these(&self, hook: Hook) -> bool {
        match hook {
            Hook::Prerouting | Hook::Input => true,
            Hook::Forward => self.of_forwarded,
            Hook::Ingress | Hook::Output | Hook::Postrouting => false,
        }
    }

    /// Takes in what is queued.
    ///
    /// # Errors
    /// A source is broken.
    pub(super) fn hear(&mut self, now: Instant) -> Result<()> {
        let heard = self.events.drain(&self.own)?;
        if heard.is_nothing() {
            return Ok(());
        }
        if heard.lost {
            tracing::warn!(
                "notifications of rule changes were lost: every limit is shown its open connections"
            );
        }
        let settled = now + if heard.is_loss() { SETTLE } else { RETRY };
        let due = self.spare.free_at().max(settled);
        self.due = Some(self.due.map_or(due, |known| known.min(due)));
        self.first_heard.get_or_insert(now);
        self.heard.add(heard);
        Ok(())
    }

    /// Looks at the rules if that is due: the limits whose lists are not those of before, and since
    /// when that is so. `None` where it has not looked.
    pub(super) fn look(&mut self, now: Instant) -> Option<(Vec<Anew>, Instant)> {
        if self.due.is_none_or(|due| due > now) {
            return None;
        }
        self.due = None;
        // The save programs of iptables-legacy are processes of their own.
        let worked = cpu_time() + cpu_time_of_children();
        let known = (!self.heard.is_of_nft()).then_some(&self.lists);
        let lists = match Lists::read(known) {
            Ok(lists) => lists,
            Err(error) => {
                if !self.is_failing {
                    tracing::warn!(%error, "rules could not be read, will be tried again");
                }
                self.is_failing = true;
                self.due = Some(now + RETRY);
                return None;
            }
        };
        self.is_failing = false;
        let heard = std::mem::take(&mut self.heard);
        let factor = if heard.is_loss() { 1 } else { ONLY_GROWN };
        let ran = heard.legacy > 0;
        let since = Since {
            deleted: heard.deleted,
            emptied: heard.emptied,
            legacy_ran: ran,
            lost: heard.lost,
        };
        let mut anew = lists.anew(&self.lists, &since);
        self.lists = lists;
        anew.retain(|one| self.is_of_these(one.rule.hook));
        if ran && !heard.lost {
            self.weigh_doubt(&mut anew, now);
        }
        let first = self.first_heard.take().unwrap_or(now);
        let ended = Instant::now();
        let cost = (cpu_time() + cpu_time_of_children()).saturating_sub(worked);
        self.spare.spend(cost * factor, ended);
        Some((anew, first))
    }

    /// Whether limits may have lost their lists and were kept back since: they are to be asked.
    pub(super) fn take_doubt(&mut self) -> bool {
        std::mem::take(&mut self.is_doubted)
    }

    /// Keeps limits that may have lost their lists, for all that a run of iptables-legacy shows, back
    /// for a while that grows.
    fn weigh_doubt(&mut self, anew: &mut Vec<Anew>, now: Instant) {
        if anew.iter().all(|one| one.loss != Loss::Unknown) {
            return;
        }
        if now < self.believed {
            anew.retain(|one| one.loss != Loss::Unknown);
            self.is_doubted = true;
            self.heard.legacy += 1;
            self.due = Some(self.due.map_or(self.believed, |due| due.min(self.believed)));
            return;
        }
        let is_quiet = now.saturating_duration_since(self.believed) > DOUBT.1 * 10;
        self.doubt = if is_quiet { DOUBT.0 } else { (self.doubt * 2).min(DOUBT.1) };
        self.believed = now + self.doubt;
    }
}

/// What may be spent: each piece of work must have been earned, but for what is given in advance.
#[derive(Debug)]
struct Spare {
    /// When all that was spent has been earned.
    earned: Instant,
}

impl Spare {
    fn new(now: Instant) -> Self {
        let earned = now.checked_sub(IN_ADVANCE * SHARE).unwrap_or(now);
        Self { earned }
    }

    fn spend(&mut self, cost: Duration, now: Instant) {
        self.earned = self.earned.max(Self::new(now).earned) + cost * SHARE;
    }

    /// From then on more may be spent.
    fn free_at(&self) -> Instant {
        self.earned
    }
}

impl AsFd for Rules {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_reload_is_followed_at_once_and_many_cost_less_than_a_fifth_of_a_core() {
        let begun = Instant::now();
        let mut spare = Spare::new(begun);
        let work = Duration::from_millis(200);
        let (mut now, mut spent, mut at_once) = (begun, Duration::ZERO, 0);
        while now < begun + Duration::from_secs(30) {
            if spare.free_at() <= now {
                spent += work;
                now += work;
                spare.spend(work, now);
                at_once += u32::from(now < begun + Duration::from_secs(2));
            }
            now += Duration::from_millis(100);
        }
        assert!(at_once >= 5, "{at_once}");
        assert!(spent < Duration::from_secs(6), "{spent:?}");
        // Rested, it may do as much again at once.
        let rested = now + Duration::from_secs(60);
        assert!(spare.free_at() <= rested);
    }
}
