//! Carries a plan out, remembers what came of it, and schedules the second look.

use std::time::{Duration, Instant};

use super::suspects::SECOND_LOOK;
use super::{Acted, Keeper, Trigger, Witness};
use crate::error::{Error, Result};
use crate::firewall::lists::Loss;
use crate::netlink::Transport;
use crate::reconcile::apply::{Known, Outcome, apply};
use crate::reconcile::confirm::Confirmed;
use crate::reconcile::plan::{Action, ActionKind};
use crate::reconcile::timers::Timer;
use crate::recount::Recount;
use crate::sockdiag::{Lookup, State};

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// Carries a plan out and arranges the second look.
    pub(super) fn carry_out(
        &mut self,
        mut confirmed: Confirmed,
        trigger: Trigger,
        since: Instant,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        for socket in confirmed.opened_here() {
            self.ledger.remember_own(socket);
        }
        if self.may_not_insert(now) {
            confirmed.retain(|action| action.kind != ActionKind::Reinsert);
        }
        if confirmed.actions().is_empty() {
            return Ok(());
        }
        let settings = self.settings.clone();
        if settings.dry_run {
            witness.planned(confirmed.actions(), trigger);
            return Ok(());
        }
        if self.recounter.is_none() {
            confirmed.retain(|action| action.kind != ActionKind::Recount);
        }
        let known = Known {
            on_list: self.on_their_lists(confirmed.actions())?,
            behind: self.behind_others(confirmed.actions())?,
            of_long_lists: self.of_long_lists(confirmed.actions()),
        };
        let withheld = self.withheld(confirmed.actions())?;
        let is_withheld = |action: &Action| {
            let socket = action.view.socket.filter(|_| action.kind.needs_recount());
            socket.is_some_and(|socket| withheld.contains(&socket.cookie))
        };
        let mut in_place = confirmed.clone();
        in_place.retain(is_withheld);
        confirmed.retain(|action| !is_withheld(action));
        let recounter = &mut self.recounter;
        let (tables, ledger) = (&mut self.tables, &mut self.ledger);
        let (policy, none) = (&settings.policy, &mut None::<R>);
        let applied = apply(tables, recounter, &confirmed, &known, policy, ledger, now).and_then(
            |mut all| {
                if !in_place.actions().is_empty() {
                    all.extend(apply(tables, none, &in_place, &known, policy, ledger, now)?);
                }
                Ok(all)
            },
        );
        self.note_not_shown(in_place.actions().iter());
        let outcomes = match applied {
            Ok(outcomes) => outcomes,
            Err(error) => {
                self.note_not_shown(confirmed.actions().iter());
                return Err(error);
            }
        };
        let table_full = self.note_full_table(&outcomes, now);
        self.note_repairs(&outcomes, trigger, now);
        let failed = outcomes.iter().filter(|outcome| outcome.result.is_err());
        self.note_not_shown(failed.map(|outcome| &outcome.action));
        let lost = self.have_lost_their_lists(&outcomes)?;
        self.note_not_shown(lost.iter());
        self.note_shown(&outcomes, now);
        self.attend_repaired(&outcomes, now);
        witness.acted(Acted { outcomes, trigger, since, table_full });
        Ok(())
    }

    /// Repairs that were broken off: an entry may be back, and look well, of which no limit has been
    /// shown the connection.
    pub(super) fn note_not_shown<'a>(&mut self, actions: impl Iterator<Item = &'a Action>) {
        let repairs = actions.filter(|action| action.kind.needs_recount());
        for socket in repairs.filter_map(|action| action.view.socket) {
            self.ledger.set_uncounted(&socket, Loss::Unknown);
        }
    }

    /// Remembers what was repaired, against its source and for a second look.
    pub(super) fn note_repairs(&mut self, outcomes: &[Outcome], trigger: Trigger, now: Instant) {
        let (mut again, mut retry) = (Vec::new(), Vec::new());
        let mut fooled_open = false;
        for outcome in outcomes.iter().filter(|outcome| outcome.result.is_ok()) {
            if outcome.action.kind.needs_recount()
                && let Some(socket) = outcome.action.view.socket
            {
                // Forgetting (a flush, an idle timeout, an early drop) is no offence of the source.
                if outcome.action.reason.is_fooled() {
                    fooled_open |= socket.state == State::Established;
                    let source = socket.remote.addr();
                    let hardened = self.ledger.pressure().pins_early(source);
                    self.ledger.pressure_mut().repaired(source, now);
                    if !hardened && self.ledger.pressure().pins_early(source) {
                        self.sources.insert(source);
                    }
                }
                match &outcome.recount {
                    // Another look at once would find it as it is, and fail as this one did.
                    Some(Err(error))
                        if outcome.action.kind == ActionKind::Recount
                            || !error.is_unavailable() =>
                    {
                        self.ledger.set_uncounted(&socket, Loss::Unknown);
                        retry.push(Lookup::from(&socket));
                    }
                    _ => again.push(Lookup::from(&socket)),
                }
            }
        }
        if fooled_open && trigger == Trigger::Event {
            self.hasten_deep();
        }
        self.defer(Timer::SecondLook, SECOND_LOOK, again, now, now);
        self.defer(Timer::Retry, self.settings.sweep_interval, retry, now, now);
    }

    pub(super) fn note_full_table(
        &mut self,
        outcomes: &[Outcome],
        now: Instant,
    ) -> Option<Duration> {
        let refused = |outcome: &Outcome| outcome.result.as_ref().is_err_and(Error::is_table_full);
        if outcomes.iter().any(refused) {
            return self.back_off.failed(now);
        }
        let is_inserted = |outcome: &Outcome| {
            outcome.result.is_ok() && outcome.action.kind == ActionKind::Reinsert
        };
        if outcomes.iter().any(is_inserted) {
            self.back_off.succeeded();
        }
        None
    }

    pub(super) fn may_not_insert(&self, now: Instant) -> bool {
        self.back_off.rests(now) || !self.ledger.pressure().allows_inserts()
    }
}
