//! Connections that this host, or a container of it, opened: while their sockets are half-closed, their
//! entries are kept beyond the kernel's time, with their translation, and not a moment longer.
//!
//! Nothing of the scope is touched here, and no limiter is asked or shown anything: the timeout is
//! extended by leases, a lost entry is put back as it was if its tuples are free, and given back when its
//! socket is gone. Every change follows exact look-ups of entry and socket. As the
//! [`keeper`](super::keeper) it opens nothing, has no clock and writes no log.

mod apply;
pub mod memory;
pub mod plan;
mod survey;

use std::time::{Duration, Instant};

pub use memory::{Figures, Own};
use memory::{Known, Memory, Record};
use plan::{Cell, Deed, Found, Loss, NoDeed, Peer, Verdict};
pub use survey::Survey;

use super::apply::change::believed;
use super::backoff::BackOff;
use super::ledger::Ledger;
use super::observe::Tables;
use super::policy::{Policy, Scope};
use super::whole::is_home;
use crate::conntrack::{Change, Entry, TcpState};
use crate::error::Result;
use crate::flow::Connection;
use crate::netlink::Transport;
use crate::sockdiag::{Cookie, Lookup, Opener, Socket, States};

/// Connections that are looked at before events have their turn: some 3 ms.
const LOOKS: usize = 256;

/// Each namespace is listed once in this time, or in a third of the kernel's timeout of CLOSE_WAIT where
/// that is less: what half-closes is to be known before its entry ends.
const ROUND: Duration = Duration::from_secs(20);

/// Other namespaces whose sockets are listed before events have their turn, at least: 0.25 ms each.
const NAMESPACES: usize = 8;

/// A connection whose entry was put right is looked at again so much later: its socket may have died
/// meanwhile.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// What a pass goes by.
#[derive(Clone, Copy)]
pub struct By<'a> {
    /// Sockets of the scope are the keeper's.
    pub scope: &'a Scope,
    /// Lease, and whose connections.
    pub policy: &'a Policy,
    /// What the keeper holds.
    pub ledger: &'a Ledger,
    /// The timeout that the kernel itself gives an entry in CLOSE_WAIT.
    pub close_wait: Option<Duration>,
    /// The same in any state; to ask costs as much as to look at a connection.
    pub timeout: &'a dyn Fn(TcpState) -> Option<Duration>,
    /// Connections are looked at together, this often at most.
    pub interval: Duration,
    /// Plan, and change nothing.
    pub dry_run: bool,
}

/// What a pass has done.
#[derive(Debug, Default)]
pub struct Pass {
    /// Changes, or in a dry run what would have been changed.
    pub done: Vec<Done>,
    /// Connections that have no entry of their own any more, and get none for now; each is reported once.
    pub lost: Vec<(Own, Loss)>,
    /// The table was full, and nothing is put back for so long; only where that should be said.
    pub table_full: Option<Duration>,
}

/// One change.
#[derive(Debug)]
pub struct Done {
    /// What.
    pub deed: Deed,
    /// The connection as its socket sees it.
    pub connection: Connection,
    /// The entry, as it was or is to be.
    pub entry: Entry,
    /// Whether the kernel has taken it.
    pub result: Result<()>,
}

/// Keeps the entries of outgoing connections of one conntrack table.
#[derive(Debug)]
pub struct Outgoing {
    memory: Memory,
    /// The next part of a round of lists: the own namespace, then the others.
    part: Option<usize>,
    next_list: Instant,
    /// Nothing is done sooner.
    soonest: Instant,
    back_off: BackOff,
}

/// One connection, as exact look-ups have just shown it.
struct Seen {
    cookie: Cookie,
    connection: Connection,
    socket: Option<Socket>,
    entry: Option<Entry>,
}

impl Outgoing {
    /// One with an empty memory.
    pub fn new(now: Instant) -> Self {
        let (memory, back_off) = (Memory::default(), BackOff::default());
        Self { memory, part: None, next_list: now, soonest: now, back_off }
    }

    /// When there is something to do next.
    pub fn next_timeout(&self) -> Instant {
        let look = self.memory.next_look().unwrap_or(self.next_list);
        self.next_list.min(look).max(self.soonest)
    }

    /// The sockets whose entries are held, and since when.
    pub fn held(&self) -> impl Iterator<Item = (Cookie, Instant)> + '_ {
        self.memory.held().map(|(cookie, _, since)| (cookie, since))
    }

    /// How many connections there are of each kind.
    pub fn figures(&self) -> Figures {
        self.memory.figures()
    }

    /// Does what is due, as far as events can wait for it.
    ///
    /// # Errors
    /// A conversation broke; nothing of this turn is reported, and it is tried again.
    pub fn turn<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        by: By<'_>,
        now: Instant,
    ) -> Result<Pass> {
        if now < self.next_timeout() {
            return Ok(Pass::default());
        }
        // Where something fails, too.
        self.soonest = now + by.interval;
        if now >= self.next_list {
            self.list(tables, by, now)?;
        }
        let due = self.memory.take_due(now, LOOKS);
        let looked = self.look(tables, by, &due, now);
        if looked.is_err() {
            due.iter().for_each(|(cookie, _)| self.memory.set_look(*cookie, Some(self.soonest)));
        }
        if self.memory.next_look().is_some_and(|look| look <= now) {
            self.soonest = now;
        }
        looked
    }

    /// Gives what is held the timeouts that the kernel itself would give it.
    ///
    /// # Errors
    /// A conversation broke: what was not given back lives out its lease.
    pub fn give_back<T: Transport>(&mut self, tables: &mut Tables<T>, by: By<'_>) -> Result<()> {
        let held = self.memory.held().map(|(cookie, lookup, _)| (cookie, lookup));
        let held: Vec<_> = held.collect();
        for part in held.chunks(LOOKS) {
            let seen = self.exactly(tables, by.ledger, part)?;
            let changes = seen.iter().filter_map(|seen| {
                let own = self.memory.get(seen.cookie)?.known.own()?;
                let entry = seen.entry.filter(|entry| is_held_entry(entry, own))?;
                let state = seen.socket.map_or(TcpState::Close, |socket| believed(socket.state));
                Some(Change::Extend { key: entry.key(), timeout: (by.timeout)(state)? })
            });
            let changes: Vec<_> = changes.collect();
            tables.conntrack.change(&changes)?;
        }
        Ok(())
    }

    /// Lists one part of the namespaces.
    fn list<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        by: By<'_>,
        now: Instant,
    ) -> Result<()> {
        let third = by.close_wait.map_or(ROUND, |timeout| timeout / 3);
        let round = third.min(ROUND).max(by.interval);
        let count = tables.sockets.members().len();
        let turns = usize::try_from(round.as_millis() / by.interval.as_millis().max(1));
        let size = count.div_ceil(turns.unwrap_or(1).max(1)).max(NAMESPACES);
        let parts = 1 + count.div_ceil(size);
        self.next_list = now + round / u32::try_from(parts).unwrap_or(u32::MAX);

        let states: States = plan::HALF_CLOSED.into_iter().collect();
        let (mut found, is_of_member) = match self.part {
            None => (tables.sockets.own_sockets(states)?, false),
            Some(part) => {
                let some = part * size..(part + 1) * size;
                (tables.sockets.sockets_of_members(states, some)?, true)
            }
        };
        found.retain(|socket| {
            by.policy.admits(socket.remote.addr())
                && !by.scope.contains(by.policy, socket.connection())
                && !by.ledger.holds(socket)
        });
        self.memory.list(found, is_of_member, now);
        let next = self.part.map_or(0, |part| part + 1);
        self.part = (next * size < count).then_some(next);
        if self.part.is_none() {
            self.memory.end_round(now);
        }
        Ok(())
    }

    /// These sockets and their entries, exactly: each entry first, so that one that closes because its
    /// socket does is never taken for one that was fooled.
    fn exactly<T: Transport>(
        &self,
        tables: &mut Tables<T>,
        ledger: &Ledger,
        sockets: &[(Cookie, Lookup)],
    ) -> Result<Vec<Seen>> {
        let lookups: Vec<_> = sockets.iter().map(|(_, lookup)| *lookup).collect();
        let entries = tables.entries_of(&lookups, ledger.zones())?;
        let found = tables.open_sockets(&lookups)?;
        let all = sockets.iter().zip(entries).zip(found);
        Ok(all
            .map(|(((cookie, lookup), entry), socket)| Seen {
                cookie: *cookie,
                connection: lookup.connection,
                socket,
                entry,
            })
            .collect())
    }

    fn look<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        by: By<'_>,
        due: &[(Cookie, Lookup)],
        now: Instant,
    ) -> Result<Pass> {
        if due.is_empty() {
            return Ok(Pass::default());
        }
        let seen = self.exactly(tables, by.ledger, due)?;
        self.find_out(tables, due, &seen)?;
        let mut pass = Pass::default();
        let mut deeds: Vec<(Seen, Deed)> = Vec::new();
        // Where the table was full the first one shows whether it is so still.
        let mut may_insert = !self.back_off.rests(now) && by.ledger.pressure().allows_inserts();
        let is_tried = matches!(self.back_off, BackOff::Resting { .. });
        for seen in seen {
            if let Some(deed) = self.decide(tables, by, &seen, may_insert, &mut pass, now)? {
                may_insert &= !(is_tried && deed == Deed::Reinsert);
                deeds.push((seen, deed));
            }
        }
        self.carry_out(tables, by, deeds, &mut pass, now)?;
        Ok(pass)
    }

    /// Who opened those of these connections of which that is not known.
    fn find_out<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        due: &[(Cookie, Lookup)],
        seen: &[Seen],
    ) -> Result<()> {
        let mut dark = Vec::new();
        for (seen, (_, lookup)) in seen.iter().zip(due) {
            let is_unknown = |record: &Record| matches!(record.known, Known::Nothing);
            if !self.memory.get(seen.cookie).is_some_and(is_unknown) {
                continue;
            }
            let Some(entry) = seen.entry.filter(|_| is_there(seen)) else { continue };
            match plan::opener(&entry, seen.connection) {
                Some(opener) => {
                    let found = Known::of(opener, &entry, seen.connection);
                    self.memory.amend(seen.cookie, |known| *known = found);
                }
                None => dark.push((seen.cookie, entry, *lookup)),
            }
        }
        if dark.is_empty() {
            return Ok(());
        }
        let lookups: Vec<_> = dark.iter().map(|(.., lookup)| *lookup).collect();
        for ((cookie, entry, lookup), opener) in dark.iter().zip(tables.sockets.openers(&lookups)?)
        {
            if let Some(opener) = opener {
                let found = Known::of(opener, entry, lookup.connection);
                self.memory.amend(*cookie, |known| *known = found);
            }
        }
        Ok(())
    }

    /// What is to be done for a connection; says when it is looked at next where that is nothing.
    fn decide<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        by: By<'_>,
        seen: &Seen,
        may_insert: bool,
        pass: &mut Pass,
        now: Instant,
    ) -> Result<Option<Deed>> {
        let Some(record) = self.memory.get(seen.cookie) else { return Ok(None) };
        // A tuple that is used again is another connection's, whose entry this may be.
        let is_taken = seen.socket.is_some() && !is_there(seen);
        // Of a namespace that has gone nothing is known.
        let is_out_of_sight = record.is_of_member
            && seen.socket.is_none()
            && !tables.sockets.is_of_member(seen.connection.local.addr());
        let is_of_scope = by.scope.contains(by.policy, seen.connection)
            || !by.policy.admits(seen.connection.remote.addr());
        if is_taken || is_out_of_sight || is_of_scope {
            self.memory.forget(seen.cookie);
            return Ok(None);
        }
        let own = record.known.own().copied();
        let Some(own) = own else {
            // Those that have no entry may get one: the kernel picks connections up.
            let is_unknown = matches!(record.known, Known::Nothing);
            match seen.socket {
                Some(_) if is_unknown => {
                    self.memory.set_look(seen.cookie, Some(now + by.policy.lease));
                }
                Some(_) => {}
                None => self.memory.forget(seen.cookie),
            }
            return Ok(None);
        };
        let cell = cell(tables, by, seen, &own)?;
        let verdict = plan::decide(cell);
        if let (Some(entry), Some(Found::Same(_))) = (seen.entry, cell.entry) {
            self.memory.amend_own(seen.cookie, |own| {
                // As it is now: marks and labels change.
                own.entry = plan::as_opened(&entry, seen.connection).unwrap_or(own.entry);
                own.lost = None;
            });
        }
        let next = match verdict {
            Verdict::Act(Deed::Reinsert) if !may_insert => {
                self.note_lost(seen.cookie, Loss::Full, pass);
                now + by.policy.lease / 4
            }
            Verdict::Act(deed) => return Ok(Some(deed)),
            Verdict::Lost(loss) => {
                self.note_lost(seen.cookie, loss, pass);
                now + by.policy.renew_below()
            }
            Verdict::Leave(NoDeed::Over) => {
                self.memory.forget(seen.cookie);
                return Ok(None);
            }
            // Its end shows in the lists.
            Verdict::Leave(NoDeed::NotHalfClosed) => return Ok(None),
            Verdict::Leave(_) => now + unseen_for(by, seen.entry.and_then(|entry| entry.timeout)),
        };
        self.memory.set_look(seen.cookie, Some(next));
        Ok(None)
    }

    fn note_lost(&mut self, cookie: Cookie, loss: Loss, pass: &mut Pass) {
        self.memory.amend_own(cookie, |own| {
            if own.lost.replace(loss) != Some(loss) {
                pass.lost.push((*own, loss));
            }
        });
    }
}

impl Known {
    fn of(opener: Opener, entry: &Entry, connection: Connection) -> Self {
        match (opener, plan::as_opened(entry, connection)) {
            (Opener::Peer, _) => Self::Incoming,
            (Opener::Here, Some(entry)) => {
                Self::Outgoing(Box::new(Own { entry, since: None, lost: None }))
            }
            (Opener::Here, None) => Self::Nothing,
        }
    }
}

/// Whether the very socket was found.
fn is_there(seen: &Seen) -> bool {
    seen.socket.is_some_and(|socket| socket.cookie == seen.cookie)
}

fn is_held_entry(entry: &Entry, own: &Own) -> bool {
    let is_live = |state: TcpState| !state.is_closing() && !state.is_opening();
    matches!(Found::of(entry, &own.entry), Found::Same(state) if is_live(state))
}

fn cell<T: Transport>(tables: &mut Tables<T>, by: By<'_>, seen: &Seen, own: &Own) -> Result<Cell> {
    let entry = seen.entry.map(|entry| Found::of(&entry, &own.entry));
    // The other end, where that is a connection of this host as well.
    let peer = Connection::of_sender(own.entry.reply);
    let peer = if by.ledger.holds_connection(peer) {
        Peer::Held
    } else if seen.socket.is_none() && by.scope.contains(by.policy, peer) {
        let addr = peer.local.addr();
        let is_here = tables.sockets.is_of_member(addr) || is_home(&mut tables.homes, addr)?;
        if is_here { Peer::InScope } else { Peer::Elsewhere }
    } else {
        Peer::Elsewhere
    };
    let left = seen.entry.and_then(|entry| entry.timeout);
    Ok(Cell {
        socket: seen.socket.map(|socket| (socket.state, socket.inode != 0)),
        entry,
        is_due: left.is_some_and(|left| left < by.policy.renew_below()),
        is_held: own.since.is_some(),
        peer,
    })
}

/// How long a connection goes without a look: until a third of its lease is left, and at most for two
/// thirds of the time that a packet would leave it. Of a lease less than half is left by then, so it is extended.
fn unseen_for(by: By<'_>, left: Option<Duration>) -> Duration {
    let lease = by.policy.lease;
    let wanted = left.unwrap_or(lease).saturating_sub(lease / 3);
    by.close_wait.map_or(wanted, |timeout| wanted.min(timeout * 2 / 3))
}
