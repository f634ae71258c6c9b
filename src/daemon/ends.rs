//! Ends of sockets as the kernel reports them: what was held for them is given back at once.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::reconcile::keeper::{Keeper, Witness};
use crate::sockdiag::ends::Ends;

/// They are read together: each socket of the namespace that ends is told, and a busy server would
/// wake us for every connection.
const REST: Duration = Duration::from_millis(20);

/// Beyond so many a second they are not listened to for a while, and sweeps look for what has ended:
/// the kernel makes and sends a message for each socket of the namespace, held or not, some 2 us.
const MOST: usize = 1000;
const SECOND: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_secs(60);

/// Listens while entries are held.
pub(super) struct SocketEnds {
    source: Source,
    /// They are read no sooner.
    rest: Instant,
    /// How many were told since then.
    told: (Instant, usize),
}

enum Source {
    /// No entry is held.
    Idle,
    Open(Ends),
    /// There are too many to listen to before then.
    Paused(Instant),
    /// This kernel does not tell them.
    Untold,
}

impl SocketEnds {
    pub(super) fn new(now: Instant) -> Self {
        Self { source: Source::Idle, rest: now, told: (now, 0) }
    }

    /// When there is something to read again.
    pub(super) fn next_timeout(&self, now: Instant) -> Option<Instant> {
        let rest = matches!(self.source, Source::Open(_)).then_some(self.rest);
        rest.filter(|rest| *rest > now)
    }

    /// What to wait for, unless they rest.
    pub(super) fn fd(&self, now: Instant) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::Open(ends) if self.rest <= now => Some(ends.as_fd()),
            _ => None,
        }
    }

    /// Sockets have ended: the entries that were held for them are given back.
    pub(super) fn take(&mut self, keeper: &mut Keeper, witness: &mut impl Witness) -> Result<()> {
        let Source::Open(ends) = &mut self.source else { return Ok(()) };
        let mut ended = Vec::new();
        let lost = ends.drain(|cookie| ended.push(cookie))?;
        if lost.overrun || lost.malformed > 0 {
            keeper.suspect_all();
        }
        let now = Instant::now();
        self.rest = now + REST;
        let (since, told) = &mut self.told;
        if now.saturating_duration_since(*since) >= SECOND {
            (*since, *told) = (now, 0);
        }
        *told += ended.len();
        if *told > MOST {
            self.source = Source::Paused(now + PAUSE);
        }
        keeper.ended(&ended, now, witness)
    }

    /// Listens as long as entries are held, where they are told.
    pub(super) fn follow(&mut self, keeper: &mut Keeper) {
        let holds_any = keeper.ledger().holds_any();
        match self.source {
            Source::Paused(until) if Instant::now() >= until => self.source = Source::Idle,
            Source::Open(_) if !holds_any => self.source = Source::Idle,
            _ => {}
        }
        if holds_any && matches!(self.source, Source::Idle) {
            match Ends::open() {
                Ok(ends) => {
                    self.source = Source::Open(ends);
                    keeper.suspect_all();
                }
                Err(error) => {
                    tracing::info!(%error, "no notification when sockets end, sweeps find out");
                    self.source = Source::Untold;
                }
            }
        }
        let are_told = matches!(self.source, Source::Idle | Source::Open(_));
        let is_alone = keeper.tables.sockets.members().len() == 0;
        keeper.rely_on_ends(is_alone && are_told);
    }
}
