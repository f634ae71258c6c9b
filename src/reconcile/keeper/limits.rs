//! Limits that have lost their lists are shown what is open of theirs, part by part.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::checks::QUIET;
use super::deep::PART;
use super::{Keeper, Trigger, Witness};
use crate::error::Result;
use crate::firewall::lists::{Anew, Loss};
use crate::netlink::Transport;
use crate::reconcile::behind::Behind;
use crate::reconcile::groups::{Groups, Member};
use crate::reconcile::plan::{Action, ActionKind};
use crate::reconcile::timers::Timer;
use crate::recount::{HeldUp, Recount};
use crate::sockdiag::Cookie;

/// The longest (`CONFIG_HZ_100`).
const JIFFY: Duration = Duration::from_millis(10);

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// These limits have lost their lists: what is open of theirs is shown to them in the next
    /// turns, part by part, from `at` on. `since` is when that became known.
    pub fn limits_lost(&mut self, anew: Vec<Anew>, since: Instant, at: Instant) {
        if anew.is_empty() {
            return;
        }
        self.no_questions_before(at + QUIET);
        self.uncounted.add(anew);
        self.rules_changed.get_or_insert(since);
        self.timers.hasten(Timer::Recount, at);
    }

    /// When limits are shown what is open of theirs next.
    pub fn next_recount(&self) -> Option<Instant> {
        self.timers.due(Timer::Recount)
    }

    /// Whether limits wait for what is open of theirs.
    pub fn recount_is_due(&self, now: Instant) -> bool {
        self.timers.is_due(Timer::Recount, now)
    }

    /// Shows limits that have lost their lists one part of what is open of theirs; more is due at
    /// once, so that events come in between.
    ///
    /// # Errors
    /// A conversation broke: the sweeps show what was left.
    pub fn recount(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        let recounted = self.try_recount(now, witness);
        if recounted.is_err() {
            self.timers.set(Timer::Recount, now + self.settings.sweep_interval);
        }
        recounted
    }

    fn try_recount(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        if !self.uncounted.is_waiting() && self.uncounted.is_new() {
            let sockets = self.guarded()?;
            let ledger = &mut self.ledger;
            self.uncounted.find(&sockets, |socket, loss| ledger.set_uncounted(socket, loss));
        }
        let doubles = self.recounter.as_ref().is_some_and(Recount::doubles);
        let is_slow = doubles && self.uncounted.may_be_known();
        let lookups = match is_slow {
            true => self.uncounted.next_of_each(PART),
            false => self.uncounted.next(PART),
        };
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        for view in snapshot.views.iter().filter(|view| !self.uncounted.concerns(view)) {
            if let Some(socket) = view.socket {
                self.ledger.set_counted(&socket);
            }
        }
        let since = self.rules_changed.unwrap_or(now);
        let confirmed = self.confirmed(&snapshot);
        self.carry_out(confirmed, Trigger::Rules, since, now, witness)?;
        self.timers.take(Timer::Recount, now);
        if self.uncounted.is_waiting() || self.uncounted.is_new() {
            let pause = if is_slow { JIFFY } else { Duration::ZERO };
            self.timers.set(Timer::Recount, now + pause);
        } else {
            self.rules_changed = None;
        }
        Ok(())
    }

    /// Of connections that a limit with a new list is to be shown: the limits before it whose lists are
    /// not new.
    pub(super) fn behind_others(&mut self, actions: &[Action]) -> Result<Behind> {
        let mut behind = Behind::new();
        let known = self.checks.known();
        if known.limits.len() < 2 {
            return Ok(behind);
        }
        let mut groups = Groups::new(&known);
        for action in actions.iter().filter(|action| action.kind == ActionKind::Recount) {
            let Some(socket) = action.view.socket else { continue };
            let syn = self.syn(socket.connection(), Some(&action.template), &groups)?;
            let members = groups.of(&syn);
            let is_lacking = |member: &Member<'_>| self.uncounted.loss(member.rule).is_some();
            let Some(last) = members.iter().rposition(is_lacking) else { continue };
            let before = members.iter().take(last).map(|member| member.rule);
            let kept = before
                .filter(|rule| self.uncounted.loss(rule).is_none_or(|loss| loss == Loss::Unknown));
            let kept: Vec<_> = kept.cloned().collect();
            if !kept.is_empty() {
                behind.insert(socket.cookie, kept);
            }
        }
        Ok(behind)
    }

    /// Connections that new lists are to get, more than the kernel likes to walk through.
    pub(super) fn of_long_lists(&self, actions: &[Action]) -> HashSet<Cookie> {
        // Where a list may have it, one that meets no entry could get there twice; and a program may hold
        // it up in which time none can be missing.
        if self.uncounted.may_be_known() || self.checks.held_up() == HeldUp::BeforeConntrack {
            return HashSet::new();
        }
        let recounts = actions.iter().filter(|action| action.kind == ActionKind::Recount);
        let sockets = recounts.filter_map(|action| action.view.socket);
        let of_long = sockets.filter(|it| self.uncounted.is_list_long(it.remote.addr()));
        of_long.map(|socket| socket.cookie).collect()
    }

    /// Limits that lost their lists while what is open was shown to them begin anew at `at`.
    pub fn put_off_recount(&mut self, at: Instant) {
        if !self.uncounted.is_waiting() && self.uncounted.is_new() {
            self.timers.set(Timer::Recount, at);
        }
    }
}
