//! Connections that this host opened, beside the keeper of one worker: what is asked for, the log, the
//! metrics.

use std::time::Instant;

use super::Live;
use super::log::{Lines, line};
use crate::conntrack::TcpState;
use crate::error::Result;
use crate::metrics::GuardMetrics;
use crate::reconcile::keeper::Keeper;
use crate::reconcile::observe::Tables;
use crate::reconcile::outgoing::plan::Deed;
use crate::reconcile::outgoing::{By, Done, Outgoing, Pass};
use crate::sockdiag::Cookie;

use super::worker::kernel_timeout;

/// The outgoing connections of one worker, where they are looked after.
#[derive(Debug)]
pub(super) struct OutgoingConnections {
    kept: Option<Outgoing>,
    lines: Lines,
    dry_run: bool,
}

impl OutgoingConnections {
    pub(super) fn new(live: &Live, dry_run: bool, now: Instant) -> Self {
        let kept = live.outgoing.then(|| Outgoing::new(now));
        Self { kept, lines: Lines::new(now), dry_run }
    }

    /// Goes by these settings from now on; what is not looked after any more lives out its lease.
    pub(super) fn apply_settings(&mut self, live: &Live, share: &GuardMetrics, now: Instant) {
        if live.outgoing {
            self.kept.get_or_insert_with(|| Outgoing::new(now));
        } else if self.kept.take().is_some() {
            share.outgoing(Default::default());
        }
    }

    /// When there is something to do; `None` where nothing is asked for.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.kept.as_ref().map(Outgoing::next_timeout)
    }

    /// How many connections there are, whose entries are held, and lost, for the audit.
    pub(super) fn figures(&self) -> Option<[usize; 3]> {
        let figures = self.kept.as_ref()?.figures();
        Some([figures.outgoing, figures.held, figures.lost])
    }

    /// The sockets whose entries are held, and since when.
    pub(super) fn held(&self) -> impl Iterator<Item = (Cookie, Instant)> + '_ {
        self.kept.iter().flat_map(Outgoing::held)
    }

    /// Does what is due.
    ///
    /// # Errors
    /// A conversation broke; it is tried again.
    pub(super) fn turn(&mut self, keeper: &mut Keeper, share: &GuardMetrics) -> Result<()> {
        let now = Instant::now();
        let Some(kept) = self.kept.as_mut().filter(|kept| kept.next_timeout() <= now) else {
            return Ok(());
        };
        let (tables, by) = parts(keeper, self.dry_run);
        let pass = kept.turn(tables, by, now);
        share.outgoing(kept.figures());
        self.report(&pass?, share);
        let withheld = self.lines.withheld(now);
        if !withheld.is_empty() {
            tracing::info!(?withheld, "and more of the same in the last second");
        }
        Ok(())
    }

    /// Gives what is held the timeouts of the kernel.
    pub(super) fn give_back(&mut self, keeper: &mut Keeper) -> Result<()> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let (tables, by) = parts(keeper, self.dry_run);
        kept.give_back(tables, by)
    }

    fn report(&mut self, pass: &Pass, share: &GuardMetrics) {
        for Done { deed, connection, entry, result } in &pass.done {
            let (flow, action) = (connection.sent(), deed.name());
            if !self.dry_run {
                share.outgoing_done(*deed, result);
            }
            match (result, deed) {
                // Routine, each minute for each of them.
                (Ok(()), Deed::Extend | Deed::Release) => {
                    tracing::debug!(action, %flow, dry_run = self.dry_run, "outgoing");
                }
                (Ok(()), _) if self.dry_run => {
                    line!(self.lines.fits(action), info, action, %flow, "would act");
                }
                (Ok(()), _) => line!(
                    self.lines.fits(action),
                    info,
                    action,
                    %flow,
                    reply = %entry.reply,
                    zone = entry.zone.id(),
                    "the entry of an outgoing connection is as it was"
                ),
                (Err(error), Deed::Reinsert) => tracing::debug!(action, %flow, %error, "outgoing"),
                (Err(error), _) => tracing::debug!(action, %flow, %error, "will be tried again"),
            }
        }
        for (own, loss) in &pass.lost {
            share.outgoing_lost(*loss);
            line!(
                self.lines.fits("lost"),
                warn,
                flow = %own.entry.orig,
                reply = %own.entry.reply,
                reason = %loss,
                "an open outgoing connection has lost its entry"
            );
        }
        if let Some(rest) = pass.table_full {
            tracing::warn!(retry_in = ?rest, "conntrack table full");
        }
    }
}

/// The tables, and what a pass goes by.
fn parts(keeper: &mut Keeper, dry_run: bool) -> (&mut Tables, By<'_>) {
    let interval = keeper.settings().sweep_interval;
    let (tables, scope, policy, ledger) = keeper.parts();
    let (close_wait, timeout) = (kernel_timeout(TcpState::CloseWait), &kernel_timeout);
    (tables, By { scope, policy, ledger, close_wait, timeout, interval, dry_run })
}
