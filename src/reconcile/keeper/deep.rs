//! Deep sweeps: every connection of the scope. The tables can be read beside everything else, and what
//! was read is worked through part by part, so that events have their turn in between.

use std::collections::HashSet;
use std::ops::Range;
use std::time::Instant;

use super::{Depth, Keeper, Sweep, Trigger, Witness};
use crate::error::Result;
use crate::netlink::Transport;
use crate::reconcile::confirm::confirm;
use crate::reconcile::evidence::Evidence;
use crate::reconcile::ledger::{Idle, Ledger};
use crate::reconcile::plan::{ActionKind, plan_for};
use crate::reconcile::policy::{Policy, Scope};
use crate::reconcile::snapshot::Snapshot;
use crate::reconcile::timers::Timer;
use crate::reconcile::whole::{By, Reading, Whole};
use crate::recount::Recount;
use crate::sockdiag::{Socket, States};

/// Connections that are worked through before events have their turn: planning takes some 0.3 ms,
/// repairing all of them 10 ms.
pub(super) const PART: usize = 256;

/// Other namespaces whose sockets are listed before events have their turn: 0.25 ms each
/// (`sockdiag/members.rs`).
const NAMESPACES: usize = 8;

/// How far a deep sweep has come.
#[derive(Debug, Default)]
pub(super) enum Deep {
    /// None is under way.
    #[default]
    Resting,
    /// Sockets of other namespaces are being listed, up to this one.
    Listing { began: Instant, next: usize, found: Vec<Socket> },
    /// The tables are to be read, or are being read.
    Reading { began: Instant, reading: Option<Box<Reading>> },
    /// The tables that were read are worked through.
    Working(Box<Work>),
}

/// The tables that were read, and how far they have been worked through.
#[derive(Debug)]
pub(super) struct Work {
    began: Instant,
    listening: HashSet<u16>,
    whole: Whole,
    is_beside: bool,
    stage: Stage,
    /// The first connection that this stage has not come to.
    next: usize,
    is_any_lost: bool,
}

/// Extensions come first: repairs are slow, and leases must not expire meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Keep,
    BringBack,
    Show,
}

/// Connections of a deep sweep, after its repairs.
#[derive(Clone, Debug)]
pub struct Shown<'a> {
    /// Everything that was read, before the repairs.
    pub whole: &'a Whole,
    /// Which of its connections these are. The first ones come first.
    pub part: Range<usize>,
    /// The scope then.
    pub scope: &'a Scope,
    /// The administrator's wishes.
    pub policy: &'a Policy,
    /// The connections that are held now.
    pub ledger: &'a Ledger,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// Another thread reads the tables of deep sweeps from now on: it asks for [`Self::reading`] and hands
    /// its result to [`Self::has_read`].
    pub fn read_beside(&mut self) {
        self.is_read_beside = true;
    }

    /// Has sockets in these states listed at each deep sweep besides, for the witness.
    pub fn list_besides(&mut self, states: States) {
        self.aside = states;
    }

    /// The reading that is due now, once.
    pub fn reading(&mut self) -> Option<Reading> {
        match &mut self.deep {
            Deep::Reading { reading, .. } => reading.take().map(|it| *it),
            _ => None,
        }
    }

    /// Whether a deep sweep has begun that has not ended.
    pub fn is_sweeping_deep(&self) -> bool {
        !matches!(self.deep, Deep::Resting)
    }

    /// What [`Self::reading`] asked for has been read.
    ///
    /// # Errors
    /// It could not be, or a conversation broke: the sweep is due again by the rule of its timer.
    pub fn has_read(
        &mut self,
        whole: Result<Whole>,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let Deep::Reading { began, .. } = self.deep else { return Ok(()) };
        let taken = whole.and_then(|whole| self.take_up(whole, began, true, now, witness));
        self.or_fail(taken, now)
    }

    /// Begins a deep sweep that is due: the tables are read next.
    pub(super) fn begin_deep(&mut self, now: Instant) -> Result<()> {
        self.timers.clear(Timer::Deep);
        self.begin_to_see();
        if let Some(recounter) = &mut self.recounter {
            recounter.refresh(now);
        }
        let followed = self.follow_listeners().map(drop);
        self.or_fail(followed, now)?;
        self.deep = Deep::Listing { began: now, next: 0, found: Vec::new() };
        self.timers.set(Timer::Part, now);
        Ok(())
    }

    /// Goes on with the deep sweep under way by one part; the sweep, where that was the last.
    pub(super) fn go_on_deep(
        &mut self,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<Option<Sweep>> {
        match std::mem::take(&mut self.deep) {
            Deep::Resting => {
                self.timers.clear(Timer::Part);
                Ok(None)
            }
            Deep::Listing { began, next, found } => {
                let listed = self.list_members(began, next, found, now);
                self.or_fail(listed, now).map(|()| None)
            }
            reading @ Deep::Reading { .. } => {
                self.timers.clear(Timer::Part);
                self.deep = reading;
                Ok(None)
            }
            Deep::Working(mut work) => {
                let worked = self.work_on(&mut work, now, witness);
                match self.or_fail(worked, now)? {
                    true => {
                        self.timers.set(Timer::Part, now);
                        self.deep = Deep::Working(work);
                        Ok(None)
                    }
                    false => {
                        self.timers.clear(Timer::Part);
                        let ended = self.end_deep(*work, now);
                        self.or_fail(ended, now).map(Some)
                    }
                }
            }
        }
    }

    /// All of a deep sweep, at once.
    pub(super) fn sweep_deep(&mut self, now: Instant, witness: &mut impl Witness) -> Result<Sweep> {
        self.begin_deep(now)?;
        let reading = self.to_be_read(By::Dump, Vec::new());
        let whole = self.tables.read(reading);
        let taken = whole.and_then(|whole| self.take_up(whole, now, false, now, witness));
        self.or_fail(taken, now)?;
        loop {
            if let Some(sweep) = self.go_on_deep(now, witness)? {
                return Ok(sweep);
            }
        }
    }

    /// Ends the deep sweep under way where something failed.
    fn or_fail<V>(&mut self, result: Result<V>, now: Instant) -> Result<V> {
        if result.is_err() {
            self.deep = Deep::Resting;
            self.timers.clear(Timer::Part);
            let (first, most) = (self.settings.sweep_interval, self.settings.deep_interval);
            self.timers.failed(Timer::Deep, now, first, most);
        }
        result
    }

    fn list_members(
        &mut self,
        began: Instant,
        next: usize,
        mut found: Vec<Socket>,
        now: Instant,
    ) -> Result<()> {
        let part = next..next + NAMESPACES;
        found.extend(self.tables.sockets.sockets_of_members(States::open(), part.clone())?);
        if part.end < self.tables.sockets.members().len() {
            self.deep = Deep::Listing { began, next: part.end, found };
            self.timers.set(Timer::Part, now);
        } else {
            let by = match now < self.soonest_dump {
                true => By::LookUps(self.ledger.zones().collect()),
                false => By::Dump,
            };
            let reading = self.to_be_read(by, found);
            self.deep = Deep::Reading { began, reading: Some(Box::new(reading)) };
            self.timers.clear(Timer::Part);
        }
        Ok(())
    }

    fn to_be_read(&self, by: By, of_members: Vec<Socket>) -> Reading {
        Reading {
            by,
            scope: self.scope.clone(),
            policy: self.settings.policy.clone(),
            aside: self.aside,
            of_members,
            theirs: self.tables.sockets.addresses_of_members(),
            tracking: self.tables.tracking.clone(),
        }
    }

    /// Takes note of what was read; the work on it is due.
    fn take_up(
        &mut self,
        mut whole: Whole,
        began: Instant,
        is_beside: bool,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<()> {
        let listening = self.follow_listeners()?;
        self.scope.published.clone_from(&whole.published);
        // A dump does not prove absence, and what waits to be counted must not be forgotten.
        let skipped = self.ledger.uncounted_but(&whole.cookies);
        if !skipped.is_empty() {
            let found = self.tables.exactly(&skipped, &self.ledger)?.into_snapshot().views;
            // The tuple of one that has ended may be another's, which the dump has.
            let is_skipped = |socket: Socket| !whole.cookies.contains(&socket.cookie);
            let found: Vec<_> =
                found.iter().filter(|view| view.socket.is_some_and(is_skipped)).collect();
            let flows: HashSet<_> = found.iter().map(|view| view.connection).collect();
            let views = &mut whole.snapshot.views;
            views.retain(|view| view.socket.is_some() || !flows.contains(&view.connection));
            let sockets = found.iter().filter_map(|view| view.socket);
            whole.cookies.extend(sockets.map(|socket| socket.cookie));
            views.extend(found);
        }
        if let Some(grace) = self.settings.policy.reap.filter(|_| !whole.lacks_orphans) {
            let orphans = whole.snapshot.views.iter().filter(|view| view.socket.is_none());
            let keys = orphans.filter_map(|view| view.entry).map(|entry| entry.key());
            self.ledger.note_orphans(keys, grace, now);
        }
        self.ledger.retain_seen(&whole.cookies, now);
        self.ledger.set_idle(self.idle(now));
        self.last_deep = Some(began);
        self.tables.play(&mut whole.snapshot, &self.ledger);
        self.ledger.note_zones(&whole.snapshot.evidence);
        witness.seen(&self.scope.ports, Some(&whole.half_closed));
        let (stage, next, is_any_lost) = (Stage::Keep, 0, false);
        let work = Work { began, listening, whole, is_beside, stage, next, is_any_lost };
        self.deep = Deep::Working(Box::new(work));
        self.timers.set(Timer::Part, now);
        Ok(())
    }

    /// An idle entry must outlive the time to the next deep sweep, which can come late, and to the
    /// one behind it, if that fails.
    fn idle(&self, now: Instant) -> Option<Idle> {
        let timeout = self.idle_timeout?;
        let last = self.last_deep.map(|last| now.saturating_duration_since(last));
        let interval = self.settings.deep_interval.max(last.unwrap_or_default());
        let below = self.settings.policy.lease.max(interval * 2);
        Some(Idle { below, timeout: timeout.max(below * 2) })
    }

    /// Works on the next part; whether something is left.
    fn work_on(
        &mut self,
        work: &mut Work,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<bool> {
        let part = work.next..work.next + PART;
        let snapshot = &work.whole.snapshot;
        match work.stage {
            Stage::Keep => {
                self.ledger.note_views(snapshot.views.part(part.clone()), &snapshot.evidence);
                self.attend(snapshot.views.part(part.clone()), now);
                work.is_any_lost |= self.repair(snapshot, part.clone(), false, now, witness)?;
            }
            Stage::BringBack => {
                self.repair(snapshot, part.clone(), true, now, witness)?;
            }
            Stage::Show => witness.shown(Shown {
                whole: &work.whole,
                part: part.clone(),
                scope: &self.scope,
                policy: &self.settings.policy,
                ledger: &self.ledger,
            }),
        }
        work.next = part.end;
        if work.next >= snapshot.views.len() {
            work.next = 0;
            work.stage = match work.stage {
                Stage::Keep if work.is_any_lost => Stage::BringBack,
                // Figures of the whole tables stay as the last dump had them.
                Stage::Keep | Stage::BringBack if work.whole.lacks_orphans => return Ok(false),
                Stage::Keep | Stage::BringBack => Stage::Show,
                Stage::Show => return Ok(false),
            };
        }
        Ok(true)
    }

    /// Plans for a part, makes sure and carries out: what keeps entries, or what brings them back.
    /// Whether there is anything of the other kind.
    fn repair(
        &mut self,
        snapshot: &Snapshot,
        part: Range<usize>,
        brings_back: bool,
        now: Instant,
        witness: &mut impl Witness,
    ) -> Result<bool> {
        let settings = self.settings.clone();
        let (policy, evidence): (_, &Evidence) = (&settings.policy, &snapshot.evidence);
        let views = snapshot.views.part(part);
        let mut planned = plan_for(views, evidence, &self.scope, policy, &self.ledger);
        if self.may_not_insert(now) {
            planned.actions.retain(|action| action.kind != ActionKind::Reinsert);
        }
        let all = planned.actions.len();
        planned.actions.retain(|action| action.kind.needs_recount() == brings_back);
        let is_more = planned.actions.len() < all;
        let (tables, scope, ledger) = (&mut self.tables, &self.scope, &self.ledger);
        let confirmed = confirm(tables, &planned, evidence, scope, policy, ledger)?;
        self.carry_out(confirmed, Trigger::Sweep, now, now, witness)?;
        Ok(is_more)
    }

    fn end_deep(&mut self, work: Work, now: Instant) -> Result<Sweep> {
        let Work { began, listening, whole, is_beside, .. } = work;
        self.was_dumped = !whole.lacks_orphans;
        // What the sweep before it learned is evidence to this one too: after a flush of the table
        // this one sees no entry.
        if !self.back_off.rests(now) {
            self.ledger.set_tracked(whole.snapshot.evidence.tracked.clone());
            self.ledger.set_arrivals(whole.snapshot.evidence.arrivals.clone());
        }
        self.has_seen();
        // For a reason that has come up since it was read.
        self.is_deep_owed = is_beside && self.timers.due(Timer::Deep).is_some();
        let sweep = self.end(Depth::Deep, began, whole.snapshot, &listening, is_beside, now)?;
        self.timers.succeeded(Timer::Deep);
        Ok(sweep)
    }
}
