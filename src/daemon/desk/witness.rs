//! What the keeper tells of itself: logged, counted, kept.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::Desk;
use crate::audit::survey::{Survey, SweepResult};
use crate::daemon::log::line;
use crate::history::record::Record;
use crate::reconcile::apply::Outcome;
use crate::reconcile::checks::{Checked, Counted};
use crate::reconcile::keeper::{Acted, Shown, Trigger, Witness};
use crate::reconcile::plan::{Action, ActionKind, Reason};
use crate::sockdiag::Socket;

/// Repairs that are remembered for [`Desk::repairs`]: as many as an attack has in a minute, in a
/// megabyte or two.
const REPAIRS: usize = 65_536;

/// For so long.
const MINUTE: Duration = Duration::from_secs(60);

impl Witness for Desk<'_> {
    fn seen(&mut self, ports: &HashSet<u16>, half_closed: Option<&[Socket]>) {
        if let Some(sockets) = half_closed {
            self.share.half_closed(sockets, Instant::now());
        }
        let flows = half_closed.map(|sockets| sockets.iter().map(Socket::connection).collect());
        let followed = self.events.follow(ports, flows);
        self.check_events(followed);
        self.update_shield(|shield| shield.follow(ports));
    }

    fn acted(&mut self, acted: Acted) {
        self.share.acted(&acted.outcomes, acted.trigger, acted.since);
        self.note_repairs(&acted.outcomes, Instant::now());
        for outcome in acted.outcomes.iter().filter(|it| it.result.is_ok()) {
            let Action { kind, reason, view, .. } = &outcome.action;
            // Routine, each minute for each connection that is held.
            if *kind != ActionKind::Extend {
                self.history.keep(|at| Record::Action {
                    at,
                    netns: self.share.name().to_owned(),
                    action: kind.name().to_owned(),
                    reason: reason.to_string(),
                    source: outcome.action.client(),
                    port: view.connection.local.port(),
                });
            }
        }
        for outcome in &acted.outcomes {
            self.log_outcome(outcome, acted.trigger);
        }
        if let Some(rest) = acted.table_full {
            let full = |outcome: &&Outcome| {
                outcome.result.as_ref().is_err_and(crate::error::Error::is_table_full)
            };
            if let Some(Err(error)) = acted.outcomes.iter().find(full).map(|it| &it.result) {
                tracing::warn!(%error, retry_in = ?rest, "conntrack table full");
            }
        }
    }

    fn shown(&mut self, shown: Shown<'_>) {
        if !self.is_published() {
            return;
        }
        let Shown { whole, part, scope, policy, ledger } = shown;
        let repaired = self.share.repaired();
        let sweep = SweepResult { snapshot: &whole.snapshot, scope, policy, ledger, repaired };
        if part.start == 0 {
            self.survey = Some(Survey::begin(sweep, &whole.aside));
        }
        if let Some(survey) = &mut self.survey {
            survey.take(sweep, part);
        }
    }

    fn checked(&mut self, checked: Checked) {
        self.share.checked(checked.counted);
        let Checked { source, local, limit, held, counted, why, again } = checked;
        match (counted, again) {
            (Counted::Yes, _) => line!(
                self.lines.fits("recounted"),
                info,
                %source,
                %local,
                limit,
                held,
                "recounted"
            ),
            (Counted::No, Some(again)) => line!(
                self.lines.fits("not counted"),
                warn,
                %source,
                %local,
                limit,
                held,
                ?again,
                "sent, and the limit does not count them, will be shown again"
            ),
            (Counted::No, None) => line!(
                self.lines.fits("never counted"),
                warn,
                %source,
                %local,
                limit,
                held,
                "the limit does not count them, however often they were shown"
            ),
            (Counted::Unknown, _) => line!(
                self.lines.fits("unknown"),
                info,
                %source,
                %local,
                limit,
                why,
                "sent, and the limit could not be asked"
            ),
        }
    }

    fn planned(&mut self, actions: &[Action], trigger: Trigger) {
        for action in actions {
            self.log_action(action, trigger, "would act");
        }
    }
}

impl Desk<'_> {
    /// How often connections of each peer were repaired in the last minute.
    pub(in crate::daemon) fn repairs(&self, now: Instant) -> HashMap<IpAddr, u64> {
        let mut repairs = HashMap::new();
        for (_, peer) in self.repairs.iter().filter(|(at, _)| now - *at < MINUTE) {
            *repairs.entry(*peer).or_default() += 1;
        }
        repairs
    }

    fn note_repairs(&mut self, outcomes: &[Outcome], now: Instant) {
        let is_repair = |it: &&Outcome| it.result.is_ok() && it.action.kind.is_repair();
        let peers = outcomes.iter().filter(is_repair).map(|it| it.action.client());
        self.repairs.extend(peers.map(|peer| (now, peer)));
        let is_old = |(at, _): &(Instant, IpAddr)| now - *at >= MINUTE;
        while self.repairs.len() > REPAIRS || self.repairs.front().is_some_and(is_old) {
            self.repairs.pop_front();
        }
    }

    fn log_outcome(&mut self, outcome: &Outcome, trigger: Trigger) {
        let action = &outcome.action;
        let flow = action.view.connection.received();
        // ctkeep comes before an entry that it has seen expires.
        if action.reason == Reason::EntryMissing && action.template.tcp.is_some() {
            self.deleted.note();
        }
        match &outcome.result {
            // Routine: a sealed connection with traffic has it at every sweep.
            Ok(()) if action.kind == ActionKind::Extend => tracing::debug!(%flow, "extended"),
            Ok(()) if action.kind == ActionKind::Recount && outcome.recount.is_none() => {
                tracing::debug!(%flow, "not shown to a limit that logs or bans what exceeds it");
            }
            // Told below.
            Ok(())
                if action.kind == ActionKind::Recount
                    && matches!(outcome.recount, Some(Err(_))) => {}
            Ok(()) if outcome.is_in_place => {
                self.log_action(action, trigger, "acted, and its limits have it on their lists");
            }
            Ok(()) => self.log_action(action, trigger, "acted"),
            Err(error) if error.is_table_full() => {}
            Err(error) => line!(
                self.lines.fits("action failed"),
                warn,
                action = action.kind.name(),
                %flow,
                %error,
                "action failed, will be planned again"
            ),
        }
        if let Some(Err(error)) = &outcome.recount {
            line!(self.lines.fits("recount failed"), warn, %flow, %error, "recount failed");
        }
        if let Some(Err(error)) = &outcome.seal {
            line!(self.lines.fits("seal failed"), warn, %flow, %error, "seal failed");
        }
    }

    fn log_action(&mut self, action: &Action, trigger: Trigger, message: &'static str) {
        line!(
            self.lines.fits(action.kind.name()),
            info,
            action = action.kind.name(),
            flow = %action.view.connection.received(),
            reason = %action.reason,
            trigger = ?trigger,
            zone = action.template.zone.id(),
            // An entry that was never seen is put back as a plain one, without mark, labels and the like.
            seen = action.template.tcp.is_some(),
            "{message}"
        );
    }
}
