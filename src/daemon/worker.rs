//! One guarded conntrack table: waits for what is to be done, hands it to the [`Keeper`], publishes
//! what came of it.

use std::collections::HashMap;
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
use super::desk::Desk;
use super::rules::Rules;
use super::survey;
use super::{Guard, OnExit, Publishing, Settings};
use crate::audit::survey::SweepResult;
use crate::conntrack::TcpState;
use crate::error::{Error, Op, Result};
use crate::firewall;
use crate::host::netns::Namespace;
use crate::host::{instance, random, sysctl};
use crate::metrics::{GuardMetrics, instant_of};
use crate::nftables::Hook;
use crate::reconcile::keeper::{Depth, Keeper, Recounting, Sweep};
use crate::reconcile::ledger::Held;
use crate::reconcile::observe::Tables;
use crate::recount::{Mode, Recount, Recounter};
use crate::rtnetlink::route::Routes;
use crate::shield::{self, Program};
use crate::sockdiag::SockDiag;

/// How long to wait for a namespace that has vanished to come back, from look to look.
const COME_BACK: Duration = Duration::from_secs(1);

/// Asking limits may cost this share of a core.
const CHECKS: u32 = 20;

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
    let share = GuardMetrics::new(&control.metrics, number);
    let mut worker = Worker::open(settings, guard, present, share)?;
    worker.claim = claim;
    if alone {
        shield::remove_leftovers(&worker.desk.device);
    }
    if let Some(program) = program {
        worker.desk.raise_shield(program, &worker.keeper.scope().ports)?;
    }
    while !control.is_stopping() {
        control.beat(number);
        match worker.sweep_first() {
            Ok(()) => break,
            Err(error) if error.is_unavailable() => return Err(error),
            // A dump under churn, a moment without memory.
            Err(error) => worker.note_failure(&error),
        }
        sleep(control, COME_BACK)?;
    }
    tracing::info!(
        ports = worker.keeper.scope().ports.len(),
        held = worker.keeper.held().count(),
        dry_run = worker.desk.settings.dry_run,
        "ready"
    );
    ready();
    while !control.is_stopping() {
        control.beat(number);
        let ready = worker.wait(control)?;
        worker.apply_settings(control.settings());
        worker.turn(ready);
        if worker.is_due_to_check_namespaces() {
            worker.desk.publish_shield(alone);
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
    rules: bool,
}

struct Worker<'p> {
    keeper: Keeper,
    desk: Desk<'p>,
    /// The rules whose limits count these sockets, where they are followed.
    rules: Option<Rules>,
    /// Where the audit asks.
    claim: Option<UnixListener>,
    sweep_failing: bool,
    /// When the namespaces were last looked at.
    checked: Instant,
}

impl Worker<'_> {
    fn open(
        settings: Arc<Settings>,
        guard: &Guard,
        present: &[Namespace],
        share: GuardMetrics,
    ) -> Result<Self> {
        let device = if guard.is_for_others() {
            // Nothing of another daemon's in the same namespace has this name.
            format!("ctkeep{}", std::process::id())
        } else {
            settings.device.clone()
        };
        let mut is_available = true;
        // A namespace that may have nothing to do with it gets a device only when it needs one.
        let recounting = if guard.is_for_others() {
            let (settings, device) = (settings.clone(), device.clone());
            Recounting::later(Box::new(move |now| open_recounter(&settings, &device, now)))
        } else {
            let recounter = open_recounter(&settings, &device, Instant::now())?;
            is_available = recounter.as_ref().is_none_or(|it| !it.ways().is_empty());
            Recounting::by(recounter)
        };
        let (rules, now) = (settings.keeper(), Instant::now());
        let tables = tables(guard, present)?;
        let mut keeper =
            Keeper::new(tables, recounting, rules, settings.defence, now, random::bits)?;
        keeper.idle_timeout = kernel_timeout(TcpState::Established);
        // Before the first dump, so that nothing happens unseen between the two.
        let hook = if guard.is_for_others() { Hook::Forward } else { Hook::Input };
        let desk = Desk::open(settings, device, hook, &keeper.scope().ports, share)?;
        desk.share.recount_available(is_available);
        let rules = if desk.settings.follow_rules {
            let hook =
                if guard.is_for_others() { firewall::Hook::Forward } else { firewall::Hook::Input };
            Some(Rules::follow(hook, &desk.device, now)?)
        } else {
            None
        };
        Ok(Self { keeper, desk, rules, claim: None, sweep_failing: false, checked: now })
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
        let now = Instant::now();
        let due = self.keeper.next_timeout().into_iter();
        let due = due.chain(self.rules.as_ref().and_then(Rules::next_timeout)).min();
        let due = due.map(|due| due.saturating_duration_since(now));
        // Signs of life and the namespaces want a turn now and then.
        let time = due.unwrap_or(COME_BACK).min(COME_BACK);
        let [events, packets] = self.desk.events.fds();
        let sources = [
            Some(control.wake().as_fd()),
            events,
            packets,
            self.desk.shield.as_ref().map(AsFd::as_fd),
            self.claim.as_ref().map(AsFd::as_fd),
            self.rules.as_ref().map(AsFd::as_fd),
        ];
        let mut fds: Vec<_> = sources
            .iter()
            .flatten()
            .map(|source| PollFd::new(*source, PollFlags::POLLIN))
            .collect();
        wait_for(&mut fds, time)?;
        let mut answers = fds.iter().map(|fd| fd.any() != Some(false));
        let [_, events, packets, devices, question, rules] =
            sources.map(|source| source.is_some() && answers.next() == Some(true));
        Ok(Ready { events: events || packets, devices, question, rules })
    }

    /// One turn of the loop. What fails is tried again, be it refused: the kernel has granted all of
    /// it at the start.
    fn turn(&mut self, ready: Ready) {
        let done = self.try_turn(ready);
        self.desk.sum_up();
        match done {
            Ok(()) => self.sweep_failing = false,
            Err(error) => self.note_failure(&error),
        }
    }

    fn note_failure(&mut self, error: &Error) {
        if !self.sweep_failing {
            tracing::warn!(%error, "sweep failed, will be repeated");
        }
        self.sweep_failing = true;
        self.desk.share.failed(error);
    }

    fn try_turn(&mut self, ready: Ready) -> Result<()> {
        let began = Instant::now();
        // What has failed there is tried again at the next sweep.
        if ready.devices || self.keeper.sweep_is_due(began) {
            self.desk.update_shield(shield::Shield::follow_devices);
        }
        if ready.events {
            self.take_events(began)?;
        }
        if ready.question {
            self.answer();
        }
        self.follow_rules(ready.rules)?;
        let worked = cpu_time();
        let swept = self.keeper.turn(Instant::now(), &mut self.desk)?;
        if let Some(sweep) = swept {
            self.swept(&sweep, worked);
        }
        self.check_limits()
    }

    /// Hears of rules that change, and shows limits that have lost their lists what is open.
    fn follow_rules(&mut self, ready: bool) -> Result<()> {
        let Some(rules) = &mut self.rules else { return Ok(()) };
        if ready {
            rules.hear(Instant::now())?;
        }
        let looks = rules.next_timeout().is_some_and(|due| due <= Instant::now());
        let (anew, since) = rules.look(Instant::now());
        if looks {
            self.keeper.know_limits(rules.limits().cloned());
        }
        self.desk.limits_lost(&anew);
        let now = Instant::now();
        self.keeper.limits_lost(anew, since, rules.free_at().max(now));
        if self.keeper.recount_is_due(now) {
            let worked = cpu_time();
            self.keeper.recount(now, &mut self.desk)?;
            let now = Instant::now();
            rules.spend(cpu_time().saturating_sub(worked), now);
            self.keeper.put_off_recount(rules.free_at().max(now));
            self.desk.uncounted(self.keeper.ledger().uncounted_sockets());
        }
        Ok(())
    }

    /// Asks limits whether they count what was shown to them.
    fn check_limits(&mut self) -> Result<()> {
        let began = Instant::now();
        if !self.keeper.check_is_due(began) {
            return Ok(());
        }
        let worked = cpu_time();
        let checked = self.keeper.check(began, &mut self.desk);
        let cost = cpu_time().saturating_sub(worked);
        self.keeper.put_off_checks(Instant::now() + cost * CHECKS);
        self.desk.uncounted(self.keeper.ledger().uncounted_sockets());
        checked
    }

    /// The deep sweep of the start: what comes before it is not guarded.
    fn sweep_first(&mut self) -> Result<()> {
        let worked = cpu_time();
        let sweep = self.keeper.sweep(Depth::Deep, Instant::now(), &mut self.desk)?;
        self.swept(&sweep, worked);
        if let Some(rules) = self.rules.as_ref().filter(|_| !self.desk.settings.dry_run) {
            self.keeper.know_limits(rules.limits().cloned());
            // A limit that was added while connections were open has none of them on its list.
            self.keeper.doubt_limits(Instant::now())?;
        }
        Ok(())
    }

    /// Tells the audit what is held.
    fn answer(&self) {
        let Some(claim) = &self.claim else { return };
        let now = Instant::now();
        let age = |held: Held| (held.cookie.0, (now - held.since).as_secs());
        let shield = self.desk.shield.as_ref().map(|shield| instance::Shielded {
            ports: self.keeper.scope().ports.clone(),
            is_whole: shield.is_whole(),
        });
        instance::answer(claim, self.keeper.held().map(age), shield.as_ref());
    }

    fn take_events(&mut self, now: Instant) -> Result<()> {
        let own = self.keeper.tables.conntrack.port();
        let mut suspects = HashMap::new();
        let mut since = now;
        let drained = self.desk.events.drain(own, |suspect| {
            since = since.min(suspect.at.map_or(since, instant_of));
            let known = suspects.entry(suspect.flow).or_insert(suspect);
            *known = known.and_then(suspect);
        })?;
        let now = Instant::now();
        if drained.overrun || drained.malformed > 0 {
            self.keeper.events_lost(now);
        }
        if drained.full {
            self.keeper.hasten_deep();
        }
        self.desk.drained(&drained);
        self.keeper.suspects(suspects, since, now, &mut self.desk)
    }

    /// Publishes a sweep that ended well; `worked` is what this thread had cost before it.
    fn swept(&mut self, sweep: &Sweep, worked: Duration) {
        self.desk.reopen_events(&self.keeper.scope().ports);
        if sweep.depth == Depth::Deep {
            self.keeper.idle_timeout = kernel_timeout(TcpState::Established);
            self.survey(sweep);
        }
        self.desk.swept(sweep, self.keeper.ledger());
        self.keeper.took(sweep, Instant::now(), cpu_time().saturating_sub(worked));
    }

    /// Has figures taken of the whole tables, where somebody reads them.
    fn survey(&mut self, sweep: &Sweep) {
        let Publishing { listen, textfile, .. } = &self.desk.settings.publishing;
        if listen.is_none() && textfile.is_none() {
            return;
        }
        let (tables, scope, policy, ledger) = self.keeper.parts();
        let repaired = self.desk.share.repaired();
        let seen = SweepResult { snapshot: &sweep.snapshot, scope, policy, ledger, repaired };
        match survey::survey(tables, seen) {
            Ok(survey) => self.desk.share.surveyed(&survey),
            Err(error) => {
                tracing::warn!(%error, "metrics of the whole tables stay as they were");
            }
        }
    }

    /// Works by these settings from now on.
    fn apply_settings(&mut self, settings: Arc<Settings>) {
        if Arc::ptr_eq(&settings, &self.desk.settings) {
            return;
        }
        self.keeper.apply_settings(settings.keeper());
        self.desk.apply_settings(settings, &self.keeper.scope().ports);
    }

    /// Gives held entries back, if that is wanted; else they live out their lease.
    fn finish(&mut self) -> Result<()> {
        self.desk.say_done();
        if self.desk.settings.on_exit == OnExit::Keep || self.desk.settings.dry_run {
            return Ok(());
        }
        self.keeper.give_back(kernel_timeout)
    }
}

/// Both tables: this namespace's entries, and the sockets of those that are present.
fn tables(guard: &Guard, present: &[Namespace]) -> Result<Tables> {
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
    match sockets {
        Some(sockets) => Tables::with(sockets, homes),
        None => Tables::open(),
    }
}

/// Makes what recount needs, and says what that is.
fn open_recounter(settings: &Settings, device: &str, now: Instant) -> Result<Option<Recounter>> {
    if settings.dry_run || settings.recount == Mode::Off {
        return Ok(None);
    }
    let recounter = Recounter::open(settings.recount, device, now)?;
    for shortfall in recounter.iter().flat_map(Recounter::shortfalls) {
        tracing::warn!(reason = shortfall, "recount by less than wanted");
    }
    let routes = recounter.as_ref().map(Recounter::routes).unwrap_or_default();
    tracing::info!(
        recount = ?routes.iter().map(|route| route.name()).collect::<Vec<_>>(),
        seal = recounter.as_ref().is_some_and(Recount::can_seal),
        tcp_loose = sysctl::conntrack("nf_conntrack_tcp_loose"),
        "opened"
    );
    Ok(recounter)
}

/// What this thread has cost so far: waiting, and being stopped, cost nothing.
pub(super) fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// The timeout that the kernel itself gives an entry in this state.
fn kernel_timeout(state: TcpState) -> Option<Duration> {
    sysctl::conntrack(&state.timeout_setting()?).map(Duration::from_secs)
}
