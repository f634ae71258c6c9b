//! What the audit is told when it asks the daemon.

use std::time::Instant;

use super::Worker;
use crate::daemon::members::Members;
use crate::host::instance;
use crate::reconcile::ledger::Held;

impl Worker<'_> {
    /// Lets the audit read what is held.
    pub(super) fn answer(&self) {
        let Some(claim) = &self.claim else { return };
        let now = Instant::now();
        let age = |held: Held| (held.cookie.0, (now - held.since).as_secs());
        let outgoing = self.outgoing.held();
        let outgoing = outgoing.map(|(cookie, since)| (cookie.0, (now - since).as_secs()));
        let shield = self.desk.shield.as_ref().filter(|shield| shield.is_up());
        let shield = shield.map(|shield| instance::Shielded {
            ports: self.keeper.scope().ports.clone(),
            is_whole: shield.is_whole(),
        });
        let containers = self.members.map(Members::are_looked_for);
        let half_closed = self.desk.share.half_closed_since();
        let half_closed = half_closed.map(|(cookie, since)| (cookie.0, (now - since).as_secs()));
        let held = self.keeper.held().map(age).chain(outgoing);
        let repairs = self.desk.repairs(now);
        instance::answer(
            claim,
            instance::Said {
                ages: &mut { held },
                half_closed: &mut { half_closed },
                repairs: &mut repairs.into_iter(),
                level: self.keeper.ledger().pressure().level() as u64,
                shield: shield.as_ref(),
                containers,
                outgoing: self.outgoing.figures(),
            },
        );
    }
}
