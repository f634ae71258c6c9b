//! The work of one namespace: sweep, listen, repair, look again.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::time::{ClockId, clock_gettime};
use thread_priority::{
    RealtimeThreadSchedulePolicy, ThreadPriority, ThreadPriorityValue, ThreadSchedulePolicy,
    set_thread_priority_and_policy, thread_native_id,
};

use super::control::Control;
use super::lines::{Lines, line};
use super::{Guard, OnExit, Publishing, Settings, ShieldMode};
use crate::conntrack::{Change, Entry, TcpState};
use crate::error::{Error, Op, Result};
use crate::flow::FourTuple;
use crate::host::netns::Namespace;
use crate::host::{instance, random, sysctl};
use crate::metrics::{EventType, Look, Share, Trigger, instant_of};
use crate::nftables::Hook;
use crate::reconcile::apply::{Outcome, apply};
use crate::reconcile::confirm::{Confirmed, confirm};
use crate::reconcile::ledger::{Held, Ledger};
use crate::reconcile::observe::{Exact, Tables};
use crate::reconcile::plan::{Action, ActionKind, plan_for};
use crate::reconcile::policy::Scope;
use crate::reconcile::snapshot::Snapshot;
use crate::recount::{Mode, Notrack, Recount, Recounter};
use crate::rtnetlink::route::Routes;
use crate::shield::{self, Program};
use crate::sockdiag::{Cookie, Lookup, SockDiag, Socket, State, States};
use crate::watch::{Events, Wanted, nflog};

/// The event of a packet can come before TCP has processed it, so a repaired connection is looked
/// at again this much later.
const SECOND_LOOK: Duration = Duration::from_millis(3);

/// An ordinary RST closes the entry a moment before TCP closes the socket: what an event makes of an
/// open connection is looked at again this much later, and only then acted upon.
const OPEN_LOOK: Duration = Duration::from_micros(500);

/// Connections that are planned for and repaired at once.
const PART: usize = 1024;

/// How long inserts rest after the table was found full, at first and at most.
const FULL_TABLE_REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// How long to wait for a namespace that has vanished to come back, from look to look.
const COME_BACK: Duration = Duration::from_secs(1);

/// Guards one conntrack table until told to stop, however often its namespaces come and go.
///
/// `ready` is told after the first whole sweep; `number` is under which signs of life are given.
pub(super) fn run(
    guard: &Guard,
    number: usize,
    mut program: Option<Program>,
    control: &Control,
    ready: &(dyn Fn() + Sync),
) -> Result<()> {
    let names: Vec<_> = guard.sockets.iter().map(Namespace::name).collect();
    let span =
        tracing::info_span!("guard", conntrack = guard.conntrack.name(), sockets = names.join(","));
    let _entered = span.enter();
    while !control.is_stopping() {
        let present: Vec<_> =
            guard.sockets.iter().filter(|name| name.identity().is_some()).cloned().collect();
        if present.is_empty() {
            control.beat(number);
            sleep(control, COME_BACK)?;
            continue;
        }
        let begun_with = guard.identities();
        // On a thread of its own, which would else keep a dead namespace alive.
        let ended = thread::scope(|scope| {
            let span = &span;
            let program = program.as_mut();
            scope
                .spawn(move || {
                    span.in_scope(|| {
                        guard_present(guard, number, program, &present, control, ready)
                    })
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        match ended {
            Ok(Ended::Stopped) => {}
            Err(error) if guard.identities() == begun_with => return Err(error),
            // Whatever failed, failed in a namespace that was on its way.
            Ok(Ended::NamespacesChanged) | Err(_) => {
                tracing::warn!("a namespace has come or gone, starting anew");
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Stopped,
    NamespacesChanged,
}

/// Guards with the namespaces that are there, until one comes or goes.
fn guard_present(
    guard: &Guard,
    number: usize,
    program: Option<&mut Program>,
    present: &[Namespace],
    control: &Control,
    ready: &(dyn Fn() + Sync),
) -> Result<Ended> {
    let settings = control.settings();
    if settings.realtime {
        prefer_realtime();
    }
    let begun_with = guard.identities();
    guard.conntrack.enter()?;
    // Several daemons may serve containers of one host, each with its own share of them.
    let alone = !settings.dry_run && !guard.is_for_others();
    let claim = if alone { instance::claim("ctkeep")? } else { None };
    if alone && claim.is_none() {
        tracing::warn!(
            "the abstract socket \"ctkeep\" belongs to somebody who is no administrator (ss -xlp): \
             guarding all the same; a second instance would not be noticed"
        );
    }
    let share = Share::new(&control.metrics, number);
    let mut worker = Worker::open(settings, guard, present, share)?;
    worker.claim = claim;
    if alone {
        shield::remove_leftovers(&worker.device);
    }
    if let Some(program) = program {
        worker.raise_shield(program)?;
    }
    worker.sweep(Depth::Deep)?;
    tracing::info!(
        ports = worker.scope.ports.len(),
        held = worker.ledger.held().count(),
        dry_run = worker.settings.dry_run,
        "ready"
    );
    ready();
    while !control.is_stopping() {
        control.beat(number);
        let ready = worker.wait(control)?;
        worker.take_up(control.settings())?;
        worker.turn(ready)?;
        if worker.is_due_to_check_namespaces() {
            worker.tell_shield(alone);
            if guard.identities() != begun_with {
                return Ok(Ended::NamespacesChanged);
            }
        }
    }
    worker.finish()?;
    Ok(Ended::Stopped)
}

/// Asks for SCHED_RR: bursts of traffic then do not put a repair off.
fn prefer_realtime() {
    let policy = ThreadSchedulePolicy::Realtime(RealtimeThreadSchedulePolicy::RoundRobin);
    let lowest = ThreadPriorityValue::try_from(1_u8).map(ThreadPriority::Crossplatform);
    let result = lowest.map_err(|error| error.to_string()).and_then(|priority| {
        set_thread_priority_and_policy(thread_native_id(), priority, policy)
            .map_err(|error| format!("{error:?}"))
    });
    match result {
        Ok(()) => tracing::info!("real-time priority"),
        Err(error) => tracing::warn!(error, "no real-time priority; it needs CAP_SYS_NICE"),
    }
}

fn sleep(control: &Control, time: Duration) -> Result<()> {
    let mut fds = [PollFd::new(control.wake().as_fd(), PollFlags::POLLIN)];
    wait_for(&mut fds, time)
}

fn wait_for(fds: &mut [PollFd<'_>], time: Duration) -> Result<()> {
    match ppoll(fds, Some(time.into()), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(Op::new("wait for events").io(errno.into())),
    }
}

/// What there is to read.
#[derive(Clone, Copy, Debug)]
struct Ready {
    events: bool,
    devices: bool,
    question: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Half-closed sockets.
    Shallow,
    /// Every socket of the scope.
    Deep,
}

struct Worker<'p> {
    settings: Arc<Settings>,
    tables: Tables,
    recounter: Option<Recounter>,
    device: String,
    /// Where the audit asks.
    claim: Option<UnixListener>,
    events: Events,
    hook: Hook,
    shield: Option<shield::Shield<'p>>,
    scope: Scope,
    /// Ports that had a listener in this run and may still have connections.
    ports_ever: HashSet<u16>,
    ledger: Ledger,
    next_sweep: Instant,
    next_deep: Instant,
    /// A deep sweep on suspicion comes no sooner.
    soonest_deep: Instant,
    /// Half-closed sockets for which the last deep sweep found no entry either.
    unaccounted: HashSet<Cookie>,
    /// Repaired connections.
    second_look: Option<Later>,
    /// Connections without FIN that conntrack believes closed.
    open_look: Option<Later>,
    full_table: Option<FullTable>,
    sweep_failing: bool,
    /// When the work at hand became known.
    since: Instant,
    share: Share,
    lines: Lines,
    checked: Instant,
}

/// Connections to look at, in a moment.
struct Later {
    at: Instant,
    /// When they became known.
    since: Instant,
    lookups: HashSet<Lookup>,
}

impl Later {
    /// Takes what is due out of `slot`.
    fn due(slot: &mut Option<Self>, now: Instant) -> Option<Self> {
        slot.take_if(|later| later.at <= now)
    }

    /// Adds to what waits in `slot`, which keeps its time.
    fn add(
        slot: &mut Option<Self>,
        delay: Duration,
        since: Instant,
        lookups: impl IntoIterator<Item = Lookup>,
    ) {
        let mut lookups = lookups.into_iter().peekable();
        if lookups.peek().is_some() {
            let at = Instant::now() + delay;
            let later = slot.get_or_insert_with(|| Self { at, since, lookups: HashSet::new() });
            later.lookups.extend(lookups);
        }
    }
}

/// Inserts rest until `until`.
struct FullTable {
    until: Instant,
    rest: Duration,
    last_said: Instant,
}

impl<'p> Worker<'p> {
    fn open(
        settings: Arc<Settings>,
        guard: &Guard,
        present: &[Namespace],
        share: Share,
    ) -> Result<Self> {
        let mut sockets: Option<SockDiag> = None;
        let mut homes = Vec::new();
        for namespace in present {
            let open = || Ok((SockDiag::open()?, Routes::open()?));
            let (part, home) =
                if *namespace == guard.conntrack { open()? } else { namespace.run(open)? };
            homes.push(home);
            sockets = Some(match sockets {
                Some(sockets) => sockets.and(part),
                None => part,
            });
        }
        let mut tables = match sockets {
            Some(sockets) => Tables::with(sockets, homes)?,
            None => Tables::open()?,
        };
        let scope = tables.scope(&settings.policy)?;
        let name = if guard.is_for_others() {
            // Nothing of another daemon's in the same namespace has this name.
            format!("ctkeep{}", std::process::id())
        } else {
            settings.device.clone()
        };
        // Before the first dump, so that nothing happens unseen between the two.
        let hook = if guard.is_for_others() { Hook::Forward } else { Hook::Input };
        let watch = format!("{name}-watch");
        let events = Events::open(wanted(&settings, &watch, hook, &scope.ports))?;
        let now = Instant::now();
        let mut this = Self {
            tables,
            recounter: None,
            device: name,
            claim: None,
            events,
            hook,
            shield: None,
            scope,
            ports_ever: HashSet::new(),
            ledger: Ledger::new(settings.defence, settings.policy.zone),
            next_sweep: now,
            next_deep: now,
            soonest_deep: now,
            unaccounted: HashSet::new(),
            second_look: None,
            open_look: None,
            full_table: None,
            sweep_failing: false,
            since: now,
            share,
            lines: Lines::new(now),
            checked: now,
            settings,
        };
        this.tell_receive_buffer();
        // A namespace that may have nothing to do with it gets a device only when it needs one.
        if !guard.is_for_others() {
            this.open_recounter()?;
        }
        Ok(this)
    }

    /// Makes what recount needs, and says what that is.
    fn open_recounter(&mut self) -> Result<()> {
        if self.settings.dry_run || self.settings.recount == Mode::Off || self.recounter.is_some() {
            return Ok(());
        }
        self.recounter = Recounter::open(self.settings.recount, &self.device, Instant::now())?;
        for shortfall in self.recounter.iter().flat_map(Recounter::shortfalls) {
            tracing::warn!(reason = shortfall, "recount by less than wanted");
        }
        let routes = self.recounter.as_ref().map(Recounter::routes).unwrap_or_default();
        tracing::info!(
            recount = ?routes.iter().map(|route| route.name()).collect::<Vec<_>>(),
            seal = self.recounter.as_ref().is_some_and(Recount::can_seal),
            tcp_loose = sysctl::conntrack("nf_conntrack_tcp_loose"),
            "opened"
        );
        Ok(())
    }

    /// Keeps from conntrack what would fool it, before the first look at what it knows.
    fn raise_shield(&mut self, program: &'p mut Program) -> Result<()> {
        let (mark, ports) = (self.settings.shield_mark, &self.scope.ports);
        match shield::Shield::raise(program, &self.device, mark, ports) {
            Ok(shield) => {
                tracing::info!(devices = shield.devices(), mark, "shield raised");
                self.shield = Some(shield);
            }
            Err(error) if self.settings.shield == ShieldMode::On => return Err(error),
            Err(error) => tracing::warn!(%error, "no shield, repairing alone"),
        }
        Ok(())
    }

    /// What fails about the shield is tried again, and never stands in the way of a repair.
    fn tend_shield(&mut self, tend: impl FnOnce(&mut shield::Shield<'p>) -> Result<()>) {
        if let Some(Err(error)) = self.shield.as_mut().map(tend) {
            line!(self.lines.fits("shield"), warn, %error, "shield does not follow, will be tried again");
        }
    }

    /// Publishes what the shield has decided, and whether it is missing where it can be raised.
    fn tell_shield(&self, can_be_raised: bool) {
        let is_wanted = can_be_raised && self.settings.shield != ShieldMode::Off;
        let is_whole = self.shield.as_ref().is_some_and(|shield| !shield.is_refused());
        self.share.shield_missing(is_wanted && !is_whole);
        match self.shield.as_ref().map(|shield| (shield.devices(), shield.counts())) {
            Some((devices, Ok(counts))) => self.share.shield(devices, counts),
            Some((_, Err(error))) => tracing::debug!(%error, "counters stay as they were"),
            None => {}
        }
    }

    /// Whether a second has passed since the last look at the namespaces.
    fn is_due_to_check_namespaces(&mut self) -> bool {
        let now = Instant::now();
        let due = now - self.checked >= COME_BACK;
        if due {
            self.checked = now;
        }
        due
    }

    /// Sleeps until there is something to do.
    fn wait(&self, control: &Control) -> Result<Ready> {
        let mut deadline = self.next_sweep.min(self.next_deep);
        for later in self.second_look.iter().chain(&self.open_look) {
            deadline = deadline.min(later.at);
        }
        // Signs of life and the namespaces want a turn now and then.
        let time = deadline.saturating_duration_since(Instant::now()).min(COME_BACK);
        let sources = [
            Some(control.wake().as_fd()),
            self.events.fd(),
            self.shield.as_ref().map(AsFd::as_fd),
            self.claim.as_ref().map(AsFd::as_fd),
        ];
        let mut fds: Vec<_> = sources
            .iter()
            .flatten()
            .map(|source| PollFd::new(*source, PollFlags::POLLIN))
            .collect();
        wait_for(&mut fds, time)?;
        let mut answers = fds.iter().map(|fd| fd.any() != Some(false));
        let [_, events, devices, question] =
            sources.map(|source| source.is_some() && answers.next() == Some(true));
        Ok(Ready { events, devices, question })
    }

    /// One turn of the loop. Only what makes further work senseless is an error; a failed sweep
    /// is not: the next one may succeed.
    fn turn(&mut self, ready: Ready) -> Result<()> {
        let mut turn = || -> Result<()> {
            self.since = Instant::now();
            // What has failed there is tried again at the next sweep.
            if ready.devices || self.since >= self.next_sweep {
                self.tend_shield(shield::Shield::follow_devices);
            }
            if ready.events {
                self.take_events()?;
            }
            let now = Instant::now();
            if ready.question
                && let Some(claim) = &self.claim
            {
                let age = |held: Held| (held.cookie.0, (now - held.since).as_secs());
                let shield = self.shield.as_ref().map(|shield| instance::Shielded {
                    ports: self.scope.ports.clone(),
                    is_whole: shield.is_whole(),
                });
                instance::answer(claim, self.ledger.held().map(age), shield.as_ref());
            }
            for later in [&mut self.second_look, &mut self.open_look]
                .map(|slot| Later::due(slot, now))
                .into_iter()
                .flatten()
            {
                self.look_again(later)?;
            }
            if now >= self.next_deep {
                self.sweep(Depth::Deep)?;
            } else if now >= self.next_sweep {
                self.sweep(Depth::Shallow)?;
            }
            Ok(())
        };
        let done = turn();
        self.sum_up();
        match done {
            Ok(()) => {
                self.sweep_failing = false;
                Ok(())
            }
            Err(error) if error.is_unavailable() => Err(error),
            Err(error) => {
                if !self.sweep_failing {
                    tracing::warn!(%error, "sweep failed, will be repeated");
                }
                self.sweep_failing = true;
                self.share.failed(&error);
                self.next_sweep = Instant::now() + self.settings.sweep_interval;
                Ok(())
            }
        }
    }

    fn take_events(&mut self) -> Result<()> {
        let own = self.tables.conntrack.port();
        let (scope, policy) = (&self.scope, &self.settings.policy);
        let mut suspects: HashMap<FourTuple, Option<Entry>> = HashMap::new();
        let mut since = self.since;
        let drained = self.events.drain(own, |suspect| {
            if scope.contains(policy, suspect.flow) {
                since = since.min(suspect.at.map_or(since, instant_of));
                suspects.insert(suspect.flow, suspect.destroyed);
            }
        })?;
        self.since = since;
        self.share.events(EventType::Nflog, drained.logged);
        self.share.events(EventType::Update, drained.updates);
        self.share.events(EventType::Destroy, drained.destroys);
        if drained.overrun || drained.malformed > 0 {
            tracing::warn!(
                overrun = drained.overrun,
                malformed = drained.malformed,
                "events were lost, sweeping at once"
            );
            self.next_deep = Instant::now();
            self.share.lost_events(drained.overrun);
        }
        if drained.full {
            let what = "more connections close at once than are watched: sweeping instead";
            tracing::warn!(at_once = nflog::CLOSING, "{what}");
            self.next_deep = self.next_deep.min(self.soonest_deep);
        }
        if suspects.is_empty() {
            return Ok(());
        }
        let lookups: Vec<_> = suspects
            .keys()
            .map(|flow| Lookup { flow: *flow, interface: self.ledger.interface(*flow) })
            .collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let recent: HashSet<FourTuple> = self
            .second_look
            .iter()
            .flat_map(|later| &later.lookups)
            .map(|lookup| lookup.flow)
            .collect();
        for view in snapshot.views.iter() {
            match (view.socket, suspects.get(&view.flow)) {
                // A destroyed entry is known from its last event alone.
                (Some(socket), Some(Some(entry))) if self.ledger.last_entry(&socket).is_none() => {
                    self.ledger.remember(&socket, *entry);
                }
                // Perhaps it closed the entry in the midst of its repair.
                (Some(socket), Some(None))
                    if recent.contains(&view.flow)
                        && self.ledger.notrack(&socket) != Some(Notrack::FinsAndRsts) =>
                {
                    self.ledger.distrust(&socket);
                }
                _ => {}
            }
        }
        self.hasten_deep_sweep(&snapshot);
        let mut confirmed = self.confirmed(&snapshot);
        let open = |action: &Action| {
            action.view.socket.filter(|socket| socket.state == State::Established)
        };
        let lookups = confirmed.actions().iter().filter_map(open).map(|it| Lookup::from(&it));
        Later::add(&mut self.open_look, OPEN_LOOK, since, lookups);
        confirmed.retain(|action| open(action).is_none());
        self.carry_out(confirmed, Trigger::Event)
    }

    fn sweep(&mut self, depth: Depth) -> Result<()> {
        let began = Instant::now();
        self.since = began;
        let worked = cpu_time();
        self.scope = self.tables.scope(&self.settings.policy)?;
        let listening = self.scope.ports.clone();
        self.ports_ever.extend(&listening);
        // A server may stop listening and keep its connections.
        self.scope.ports.extend(&self.ports_ever);
        let policy = &self.settings.policy;
        let snapshot = match depth {
            Depth::Shallow => self.tables.half_closed(&self.scope, policy, &self.ledger)?,
            Depth::Deep => {
                if let Some(recounter) = &mut self.recounter {
                    recounter.refresh(began);
                }
                let open = States::from_iter([State::Established, State::CloseWait]);
                let snapshot = self.tables.whole(&self.scope, policy, open)?;
                self.note_ghosts(&snapshot, began);
                let alive = snapshot.views.iter().filter_map(|view| view.socket);
                self.ledger.retain_seen(alive.map(|socket| socket.cookie));
                snapshot
            }
        };
        self.ledger.note(&snapshot);
        let half_closed = snapshot
            .views
            .iter()
            .filter(|view| view.socket.is_some_and(|socket| socket.state == State::CloseWait))
            .map(|view| view.flow)
            .collect();
        if let Err(error) = self.events.follow(&self.scope.ports, half_closed) {
            // Somebody took its table away, or a set is full.
            tracing::warn!(%error, "event source fails, opening it anew");
            self.reopen_events()?;
        }
        let ports = self.scope.ports.clone();
        self.tend_shield(|shield| shield.follow(&ports));
        if depth == Depth::Shallow {
            self.ledger.settle(&snapshot);
        }
        // What the sweep before it learned is evidence to this one too: a flush of the table takes
        // all that there is to see at once.
        self.repair(&snapshot)?;
        if depth == Depth::Deep && !self.inserts_rest() {
            self.ledger.set_tracked(snapshot.evidence.tracked.clone());
        }
        if let Some(recounter) = &mut self.recounter
            && let Err(error) =
                recounter.narrow_notrack(self.ledger.held().map(|held| held.orig), Instant::now())
        {
            tracing::warn!(%error, "notrack sets stay as they are for now");
        }
        let now = Instant::now();
        self.weigh(now)?;
        if depth == Depth::Deep {
            self.survey(&snapshot);
        }
        let interval = self.settings.sweep_interval;
        self.next_sweep = now + jittered(self.ledger.pressure().hurry(interval));
        match depth {
            Depth::Deep => {
                self.forget_closed_ports(&snapshot, &listening);
                self.unaccounted = unaccounted(&snapshot).map(|socket| socket.cookie).collect();
                let worked = cpu_time().saturating_sub(worked);
                // On suspicion a tenth of a core.
                self.soonest_deep = now + worked * 9;
                // Under one hundredth of a core, however large the table is.
                let interval = self.ledger.pressure().hurry(self.settings.deep_interval);
                self.next_deep = now + interval.max(worked * 100);
            }
            Depth::Shallow => self.hasten_deep_sweep(&snapshot),
        }
        tracing::debug!(?depth, views = snapshot.views.len(), took = ?(now - began), "swept");
        self.share.swept(&snapshot, &self.ledger, began, interval);
        Ok(())
    }

    /// Has figures taken of the whole tables, where somebody reads them.
    fn survey(&mut self, snapshot: &Snapshot) {
        let Publishing { listen, textfile, .. } = &self.settings.publishing;
        if listen.is_none() && textfile.is_none() {
            return;
        }
        let (scope, policy, ledger) = (&self.scope, &self.settings.policy, &self.ledger);
        let look = Look { snapshot, scope, policy, ledger };
        if let Err(error) = self.share.survey(&mut self.tables, look) {
            tracing::warn!(%error, "metrics of the whole tables stay as they were");
        }
    }

    fn tell_receive_buffer(&self) {
        let (source, bytes) = self.events.receive_buffer();
        self.share.receive_buffer(source, bytes);
    }

    /// Works by these settings from now on.
    fn take_up(&mut self, settings: Arc<Settings>) -> Result<()> {
        let before = std::mem::replace(&mut self.settings, settings);
        // What is remembered of closing connections goes by it.
        if before.sweep_interval != self.settings.sweep_interval {
            self.reopen_events()?;
        }
        Ok(())
    }

    /// Opens the event source anew; repairs never wait for it.
    fn reopen_events(&mut self) -> Result<()> {
        let hook = self.hook;
        // The old one first: a group has one owner.
        self.events = Events::Off;
        let name = format!("{}-watch", self.device);
        match Events::open(wanted(&self.settings, &name, hook, &self.scope.ports)) {
            Ok(events) => self.events = events,
            Err(error) if error.is_unavailable() => return Err(error),
            Err(error) => tracing::warn!(%error, "no events, the sweep alone"),
        }
        self.tell_receive_buffer();
        Ok(())
    }

    /// Takes note of entries whose connection should end here and has no socket.
    fn note_ghosts(&mut self, snapshot: &Snapshot, now: Instant) {
        let Some(grace) = self.settings.policy.reap else { return };
        let ghosts = snapshot.views.iter().filter(|view| view.socket.is_none());
        let keys = ghosts.filter_map(|view| view.entry).map(|entry| entry.key());
        self.ledger.note_ghosts(keys, grace, now);
    }

    /// Weighs how hard entries are fought over, and says when that changes the defence.
    fn weigh(&mut self, now: Instant) -> Result<()> {
        let size = self.tables.conntrack.size()?;
        let maximum = size.maximum.map(u64::from).or_else(|| sysctl::conntrack("nf_conntrack_max"));
        let fill = maximum.filter(|maximum| *maximum > 0).map_or(0.0, |maximum| {
            #[allow(clippy::cast_precision_loss, reason = "a share of at most 2^32 entries")]
            let maximum = maximum as f64;
            f64::from(size.entries) / maximum
        });
        self.share.table(size, maximum);
        if let Some(change) = self.ledger.pressure_mut().tick(fill, now) {
            self.share.defence_changed(&change);
            tracing::warn!(
                from = change.from as u8,
                to = change.to as u8,
                repairs_per_second = change.rate,
                table_fill = change.fill,
                "defence level changed"
            );
        }
        Ok(())
    }

    /// A half-closed socket without an entry in any zone that is known may have one in another
    /// zone, or evidence that only a look at the whole table shows.
    fn hasten_deep_sweep(&mut self, snapshot: &Snapshot) {
        if unaccounted(snapshot).any(|socket| !self.unaccounted.contains(&socket.cookie)) {
            self.next_deep = self.next_deep.min(self.soonest_deep);
        }
    }

    /// A port without listener and without open sockets is out of scope again.
    fn forget_closed_ports(&mut self, snapshot: &Snapshot, listening: &HashSet<u16>) {
        let alive: HashSet<u16> = snapshot
            .views
            .iter()
            .filter(|view| view.socket.is_some())
            .map(|view| view.flow.src.port())
            .collect();
        self.ports_ever.retain(|port| alive.contains(port) || listening.contains(port));
    }

    /// Plans and makes sure, then as [`Worker::carry_out`], part by part: first what only keeps an
    /// entry, then what brings one back, or much of that would let more of them expire.
    fn repair(&mut self, snapshot: &Snapshot) -> Result<()> {
        let mut is_any_lost = false;
        for bring_back in [false, true] {
            let mut views = snapshot.views.iter();
            while views.len() > 0 && (is_any_lost || !bring_back) {
                let (part, policy) = (views.by_ref().take(PART), &self.settings.policy);
                let (evidence, ledger) = (&snapshot.evidence, &self.ledger);
                let mut planned = plan_for(part, evidence, &self.scope, policy, ledger);
                if self.may_not_insert() {
                    planned.actions.retain(|action| action.kind != ActionKind::Reinsert);
                }
                let before = planned.actions.len();
                planned.actions.retain(|action| action.kind.needs_recount() == bring_back);
                is_any_lost |= planned.actions.len() < before;
                let confirmed =
                    confirm(&mut self.tables, &planned, evidence, &self.scope, policy, ledger)?;
                self.carry_out(confirmed, Trigger::Sweep)?;
            }
        }
        Ok(())
    }

    /// What exact look-ups call for.
    fn confirmed(&self, snapshot: &Exact) -> Confirmed {
        Confirmed::new(snapshot, &self.scope, &self.settings.policy, &self.ledger)
    }

    /// Carries a plan out and arranges the second look.
    fn carry_out(&mut self, mut confirmed: Confirmed, trigger: Trigger) -> Result<()> {
        if self.may_not_insert() {
            confirmed.retain(|action| action.kind != ActionKind::Reinsert);
        }
        if confirmed.actions().is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let settings = self.settings.clone();
        let policy = &settings.policy;
        if self.settings.dry_run {
            for action in confirmed.actions() {
                self.log_action(action, trigger, "would act");
            }
            return Ok(());
        }
        if confirmed.actions().iter().any(|action| action.kind.needs_recount()) {
            self.open_recounter()?;
        }
        let outcomes = apply(
            &mut self.tables,
            &mut self.recounter,
            &confirmed,
            policy,
            &mut self.ledger,
            began,
        )?;
        let took = began.elapsed();
        self.share.acted(&outcomes, trigger, self.since);
        let mut again = Vec::new();
        let mut fooled_open = false;
        for outcome in &outcomes {
            self.log_outcome(outcome, trigger, took);
            if outcome.action.kind.needs_recount()
                && let Some(socket) = outcome.action.view.socket
            {
                // Nothing but a sample tells of connections that are fooled before their FIN.
                fooled_open |= socket.state == State::Established;
                self.ledger.pressure_mut().repaired(socket.remote.addr(), began);
                again.push(Lookup::from(&socket));
            }
        }
        if fooled_open && trigger == Trigger::Event {
            self.next_deep = self.next_deep.min(self.soonest_deep);
        }
        Later::add(&mut self.second_look, SECOND_LOOK, Instant::now(), again);
        Ok(())
    }

    /// Looks again at what was just repaired or seemed to need it: the socket may be gone by now.
    fn look_again(&mut self, later: Later) -> Result<()> {
        self.since = later.since;
        let lookups: Vec<_> = later.lookups.into_iter().collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        self.ledger.settle(&snapshot);
        self.carry_out(self.confirmed(&snapshot), Trigger::Event)
    }

    fn may_not_insert(&self) -> bool {
        self.inserts_rest() || !self.ledger.pressure().allows_inserts()
    }

    fn inserts_rest(&self) -> bool {
        self.full_table.as_ref().is_some_and(|full| Instant::now() < full.until)
    }

    fn log_outcome(&mut self, outcome: &Outcome, trigger: Trigger, took: Duration) {
        let action = &outcome.action;
        let flow = action.view.flow.inverse();
        match &outcome.result {
            // Routine: a sealed connection with traffic has it at every sweep.
            Ok(()) if action.kind == ActionKind::Extend => tracing::debug!(%flow, "extended"),
            Ok(()) => {
                if action.kind == ActionKind::Reinsert {
                    self.full_table = None;
                }
                self.log_action(action, trigger, "acted");
            }
            Err(error) if error.is_table_full() => self.rest_inserts(error),
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
        tracing::trace!(?took, "repaired");
    }

    fn log_action(&mut self, action: &Action, trigger: Trigger, message: &'static str) {
        line!(
            self.lines.fits(action.kind.name()),
            info,
            action = action.kind.name(),
            flow = %action.view.flow.inverse(),
            reason = %action.reason,
            trigger = ?trigger,
            zone = action.template.zone.id(),
            // What was never seen is put back as a plain entry, without mark, labels and the like.
            seen = action.template.tcp.is_some(),
            "{message}"
        );
    }

    /// Once a second, what its log lines were too many to tell one by one.
    fn sum_up(&mut self) {
        let withheld = self.lines.withheld(Instant::now());
        if !withheld.is_empty() {
            tracing::info!(?withheld, "and more of the same in the last second");
        }
    }

    /// The table is full: an insert storm would only make it worse.
    fn rest_inserts(&mut self, error: &Error) {
        let now = Instant::now();
        let (first, most) = FULL_TABLE_REST;
        let rest = self.full_table.as_ref().map_or(first, |full| (full.rest * 2).min(most));
        let say = self.full_table.as_ref().is_none_or(|full| now - full.last_said >= most);
        if say {
            tracing::warn!(%error, retry_in = ?rest, "conntrack table full");
        }
        let last_said =
            if say { now } else { self.full_table.as_ref().map_or(now, |f| f.last_said) };
        self.full_table = Some(FullTable { until: now + rest, rest, last_said });
    }

    /// Gives held entries back, if that is wanted; else they live out their lease.
    fn finish(&mut self) -> Result<()> {
        let done = self.share.done();
        tracing::info!(
            actions = ?done.actions,
            errors = ?done.errors,
            recounts = ?done.recounts,
            late_repairs = done.late_repairs,
            sweeps = done.sweeps,
            sweep_errors = done.sweep_errors,
            event_overruns = done.event_overruns,
            "done so far"
        );
        if self.settings.on_exit == OnExit::Keep || self.settings.dry_run {
            return Ok(());
        }
        let lookups: Vec<_> = self.ledger.held().map(|held| held.lookup).collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let changes: Vec<_> = snapshot
            .views
            .iter()
            .filter_map(|view| {
                let entry = view.entry?;
                // Not the entry's own state: a sealed one is held as ESTABLISHED, and would live
                // for days.
                let state = match view.socket.map(|socket| socket.state) {
                    Some(State::CloseWait) => TcpState::CloseWait,
                    Some(_) => entry.state()?,
                    None => TcpState::Close,
                };
                let timeout = kernel_timeout(state)?;
                Some(Change::Update { key: entry.key(), state, status: None, timeout })
            })
            .collect();
        self.tables.conntrack.change(&changes)?;
        Ok(())
    }
}

fn wanted<'a>(
    settings: &Settings,
    name: &'a str,
    hook: Hook,
    ports: &'a HashSet<u16>,
) -> Wanted<'a> {
    Wanted {
        source: settings.events,
        name,
        group: settings.nflog_group,
        hook,
        ports,
        memory: settings.sweep_interval,
    }
}

/// Half-closed sockets without an entry.
fn unaccounted(snapshot: &Snapshot) -> impl Iterator<Item = Socket> {
    let lacking = snapshot.views.iter().filter(|view| view.entry.is_none());
    lacking.filter_map(|view| view.socket).filter(|socket| socket.state == State::CloseWait)
}

/// A twentieth to a fifth sooner: nobody can time packets by the sweeps, and what the event source
/// remembers for one interval ([`Events::open`]) is seen by a sweep before it is forgotten.
fn jittered(interval: Duration) -> Duration {
    let random = u8::try_from(random::bits() % 151).unwrap_or(75);
    interval.mul_f64(0.8 + f64::from(random) / 1000.0)
}

/// What this thread has cost so far: waiting, and being stopped, cost nothing.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The timeout that the kernel itself gives an entry in this state.
fn kernel_timeout(state: TcpState) -> Option<Duration> {
    sysctl::conntrack(&state.timeout_setting()?).map(Duration::from_secs)
}
