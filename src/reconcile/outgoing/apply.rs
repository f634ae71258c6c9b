//! Carries out what was decided for outgoing connections, and takes note of what has come of it.

use std::time::{Duration, Instant};

use super::plan::{Deed, Loss};
use super::{By, Done, Outgoing, Pass, SECOND_LOOK, Seen, unseen_for};
use crate::conntrack::{Change, Entry, Insert, Status, TcpState};
use crate::error::{Error, Result};
use crate::netlink::Transport;
use crate::reconcile::apply::change::{CLOSE_TIMEOUT, believed};
use crate::reconcile::observe::Tables;

impl Outgoing {
    pub(super) fn carry_out<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        by: By<'_>,
        deeds: Vec<(Seen, Deed)>,
        pass: &mut Pass,
        now: Instant,
    ) -> Result<()> {
        let lease = by.policy.lease;
        let mut changes = Vec::with_capacity(deeds.len());
        let mut all = Vec::with_capacity(deeds.len());
        for (seen, deed) in deeds {
            let Some(own) = self.memory.get(seen.cookie).and_then(|it| it.known.own()) else {
                continue;
            };
            let entry = seen.entry.unwrap_or(own.entry);
            changes.push(change(deed, &entry, &seen, lease));
            all.push((seen, deed, entry));
        }
        let results = match by.dry_run || changes.is_empty() {
            true => all.iter().map(|_| Ok(())).collect(),
            false => tables.conntrack.change(&changes)?,
        };
        for ((seen, deed, entry), result) in all.into_iter().zip(results) {
            if by.dry_run {
                self.memory.set_look(seen.cookie, Some(now + lease));
            } else {
                self.note(&seen, deed, &result, by, pass, now);
            }
            pass.done.push(Done { deed, connection: seen.connection, entry, result });
        }
        Ok(())
    }

    /// Takes note of what has come of a change.
    fn note(
        &mut self,
        seen: &Seen,
        deed: Deed,
        result: &Result<()>,
        by: By<'_>,
        pass: &mut Pass,
        now: Instant,
    ) {
        let lease = by.policy.lease;
        let next = match (deed, result) {
            (Deed::Release, _) => {
                self.memory.forget(seen.cookie);
                return;
            }
            (_, Ok(())) => {
                self.memory.amend_own(seen.cookie, |own| {
                    own.since.get_or_insert(now);
                    own.lost = None;
                });
                if deed == Deed::Reinsert {
                    self.back_off.succeeded();
                }
                if deed == Deed::Extend { unseen_for(by, Some(lease)) } else { SECOND_LOOK }
            }
            (Deed::Reinsert, Err(error)) => {
                let loss = loss(error);
                if loss == Loss::Full && !self.back_off.rests(now) {
                    pass.table_full = self.back_off.failed(now);
                }
                self.note_lost(seen.cookie, loss, pass);
                lease / 4
            }
            (_, Err(_)) => SECOND_LOOK,
        };
        self.memory.set_look(seen.cookie, Some(now + next));
    }
}

fn change(deed: Deed, entry: &Entry, seen: &Seen, lease: Duration) -> Change {
    let key = entry.key();
    let state = seen.socket.map_or(TcpState::Close, |socket| believed(socket.state));
    match deed {
        Deed::Extend => Change::Extend { key, timeout: lease },
        Deed::Revive => Change::Update { key, state, status: None, timeout: lease },
        Deed::Reinsert => {
            let (like, status) = (*entry, Status::ASSURED);
            Change::PutBack(Insert { like, state, status, timeout: lease })
        }
        // As an RST would have left it that both ends take: late packets are translated still.
        Deed::Release => Change::Update { key, state, status: None, timeout: CLOSE_TIMEOUT },
    }
}

fn loss(error: &Error) -> Loss {
    if error.is_already_there() {
        Loss::Taken
    } else if error.is_table_full() {
        Loss::Full
    } else {
        Loss::Refused
    }
}
