//! The work of one namespace: sweep, listen, repair, look again.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{EventSource, OnExit, Settings, Stop};
use crate::conntrack::{Change, Entry, Event, EventKind, Listener, TcpState};
use crate::error::{Error, Op, Result};
use crate::flow::FourTuple;
use crate::host::netns::Namespace;
use crate::host::{instance, sysctl};
use crate::reconcile::apply::{Outcome, apply};
use crate::reconcile::confirm::confirm;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::plan::{Action, ActionKind, plan};
use crate::reconcile::policy::Scope;
use crate::reconcile::recount::Recounter;
use crate::reconcile::snapshot::Snapshot;
use crate::sockdiag::{Lookup, State, States};

/// The event of a packet can come before TCP has processed it, so a repaired connection is looked
/// at again this much later.
const SECOND_LOOK: Duration = Duration::from_millis(3);

/// Datagrams read before what they tell is repaired.
const DRAIN: usize = 4096;

/// How long inserts rest after the table was found full, at first and at most.
const FULL_TABLE_REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Guards one namespace until told to stop.
pub(super) fn run(namespace: &Namespace, settings: &Settings, stop: &Stop) -> Result<()> {
    namespace.enter()?;
    let _only_one = if settings.dry_run { None } else { Some(instance::claim("ctkeep")?) };
    let _span = tracing::info_span!("namespace", name = namespace.name()).entered();
    let mut worker = Worker::open(settings)?;
    worker.sweep(Depth::Deep)?;
    tracing::info!(
        ports = worker.scope.ports.len(),
        held = worker.ledger.held().count(),
        dry_run = settings.dry_run,
        "ready"
    );
    while !stop.is_wanted() {
        worker.wait(stop)?;
        worker.turn()?;
    }
    worker.finish()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Half-closed sockets.
    Shallow,
    /// Every socket of the scope.
    Deep,
}

/// Why a repair is made, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trigger {
    Event,
    Sweep,
}

struct Worker<'a> {
    settings: &'a Settings,
    tables: Tables,
    recounter: Option<Recounter>,
    listener: Option<Listener>,
    scope: Scope,
    /// Ports that had a listener in this run and may still have connections.
    ports_ever: HashSet<u16>,
    ledger: Ledger,
    next_sweep: Instant,
    next_deep: Instant,
    second_look: Option<(Instant, Vec<Lookup>)>,
    full_table: Option<FullTable>,
    sweep_failing: bool,
}

/// Inserts rest until `until`.
struct FullTable {
    until: Instant,
    rest: Duration,
    last_said: Instant,
}

impl<'a> Worker<'a> {
    fn open(settings: &'a Settings) -> Result<Self> {
        // Before the first dump, so that nothing happens unseen between the two.
        let listener = match settings.events {
            EventSource::Off => None,
            EventSource::Auto | EventSource::Ctnetlink => {
                let listener = Listener::open()?;
                tracing::info!(
                    source = "ctnetlink",
                    receive_buffer = listener.receive_buffer(),
                    "listening"
                );
                Some(listener)
            }
        };
        let tables = Tables::open()?;
        let recounter = if settings.dry_run {
            None
        } else {
            Recounter::open(settings.recount, &settings.device)?
        };
        for shortfall in recounter.iter().flat_map(Recounter::shortfalls) {
            tracing::warn!(reason = shortfall, "recount by less than wanted");
        }
        let routes = recounter.as_ref().map(Recounter::routes).unwrap_or_default();
        tracing::info!(
            recount = ?routes.iter().map(|route| route.name()).collect::<Vec<_>>(),
            seal = recounter.as_ref().is_some_and(Recounter::can_seal),
            tcp_loose = sysctl::conntrack("nf_conntrack_tcp_loose"),
            "opened"
        );
        let now = Instant::now();
        Ok(Self {
            settings,
            tables,
            recounter,
            listener,
            scope: Scope::default(),
            ports_ever: HashSet::new(),
            ledger: Ledger::default(),
            next_sweep: now,
            next_deep: now,
            second_look: None,
            full_table: None,
            sweep_failing: false,
        })
    }

    /// Sleeps until there is something to do.
    fn wait(&self, stop: &Stop) -> Result<()> {
        let mut deadline = self.next_sweep.min(self.next_deep);
        if let Some((at, _)) = &self.second_look {
            deadline = deadline.min(*at);
        }
        // Rounded up: waking before the deadline would spin.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut fds = vec![PollFd::new(stop.wake().as_fd(), PollFlags::POLLIN)];
        if let Some(listener) = &self.listener {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Op::new("wait for events").io(errno.into())),
        }
    }

    /// One turn of the loop. Only what makes further work senseless is an error; a failed sweep
    /// is not: the next one may succeed.
    fn turn(&mut self) -> Result<()> {
        let mut turn = || -> Result<()> {
            self.take_events()?;
            let now = Instant::now();
            if self.second_look.as_ref().is_some_and(|(at, _)| *at <= now)
                && let Some((_, lookups)) = self.second_look.take()
            {
                self.look_again(&lookups)?;
            }
            if now >= self.next_deep {
                self.sweep(Depth::Deep)?;
            } else if now >= self.next_sweep {
                self.sweep(Depth::Shallow)?;
            }
            Ok(())
        };
        match turn() {
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
                self.next_sweep = Instant::now() + self.settings.sweep_interval;
                Ok(())
            }
        }
    }

    fn take_events(&mut self) -> Result<()> {
        let Some(listener) = &mut self.listener else { return Ok(()) };
        let own = self.tables.conntrack.port();
        let (scope, ports_ever, policy) = (&self.scope, &self.ports_ever, &self.settings.policy);
        let mut suspects: HashMap<FourTuple, Option<Entry>> = HashMap::new();
        let drained = listener.drain(DRAIN, |event| {
            if event.port == own || !is_suspicious(&event) {
                return;
            }
            for flow in [event.entry.reply, event.entry.orig] {
                let in_scope = scope.contains(policy, flow)
                    || ports_ever.contains(&flow.src.port()) && policy.admits(flow.dst.addr());
                if in_scope {
                    let last = (event.kind == EventKind::Destroy).then_some(event.entry);
                    suspects.insert(flow, last);
                }
            }
        })?;
        if drained.overrun || drained.malformed > 0 {
            tracing::warn!(
                overrun = drained.overrun,
                malformed = drained.malformed,
                "events were lost, sweeping at once"
            );
            self.next_deep = Instant::now();
        }
        if suspects.is_empty() {
            return Ok(());
        }
        let lookups: Vec<_> = suspects
            .keys()
            .map(|flow| Lookup { flow: *flow, interface: self.ledger.interface(*flow) })
            .collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        for view in &snapshot.views {
            // A destroyed entry is known from its last event alone.
            if let (Some(socket), Some(Some(entry))) = (view.socket, suspects.get(&view.flow))
                && self.ledger.last_entry(&socket).is_none()
            {
                self.ledger.remember(&socket, *entry);
            }
        }
        self.repair(&snapshot, Trigger::Event)
    }

    fn sweep(&mut self, depth: Depth) -> Result<()> {
        let began = Instant::now();
        self.scope = self.tables.scope(&self.settings.policy)?;
        self.ports_ever.extend(&self.scope.ports);
        // A server may stop listening and keep its connections.
        self.scope.ports.extend(&self.ports_ever);
        let policy = &self.settings.policy;
        let snapshot = match depth {
            Depth::Shallow => self.tables.half_closed(&self.scope, policy, &self.ledger)?,
            Depth::Deep => {
                if let Some(recounter) = &mut self.recounter {
                    recounter.refresh();
                }
                let open = States::from_iter([State::Established, State::CloseWait]);
                let snapshot = self.tables.whole(&self.scope, policy, open)?;
                self.ledger.set_tracked(snapshot.tracked.clone());
                let alive = snapshot.views.iter().filter_map(|view| view.socket);
                self.ledger.retain_seen(alive.map(|socket| socket.cookie));
                snapshot
            }
        };
        self.ledger.note(&snapshot);
        if depth == Depth::Shallow {
            self.ledger.settle(&snapshot);
        }
        self.repair(&snapshot, Trigger::Sweep)?;
        let now = Instant::now();
        self.next_sweep = now + self.settings.sweep_interval;
        if depth == Depth::Deep {
            self.forget_closed_ports(&snapshot);
            // Under one hundredth of a core, however large the table is.
            self.next_deep = now + self.settings.deep_interval.max((now - began) * 100);
        }
        tracing::debug!(?depth, views = snapshot.views.len(), took = ?(now - began), "swept");
        Ok(())
    }

    /// A port without listener and without open sockets is out of scope again.
    fn forget_closed_ports(&mut self, snapshot: &Snapshot) {
        let alive: HashSet<u16> = snapshot
            .views
            .iter()
            .filter(|view| view.socket.is_some())
            .map(|view| view.flow.src.port())
            .collect();
        self.ports_ever.retain(|port| alive.contains(port));
    }

    /// Plans, makes sure, carries out, and arranges the second look.
    fn repair(&mut self, snapshot: &Snapshot, trigger: Trigger) -> Result<()> {
        let policy = &self.settings.policy;
        let mut planned = plan(snapshot, &self.scope, policy, &self.ledger);
        if self.inserts_rest() {
            planned.actions.retain(|action| action.kind != ActionKind::Reinsert);
        }
        if planned.actions.is_empty() {
            return Ok(());
        }
        if self.settings.dry_run {
            for action in &planned.actions {
                log_action(action, trigger, "would act");
            }
            return Ok(());
        }
        let began = Instant::now();
        let confirmed = confirm(&mut self.tables, &planned, &self.scope, policy, &self.ledger)?;
        let outcomes = apply(
            &mut self.tables,
            &mut self.recounter,
            &confirmed,
            policy,
            &mut self.ledger,
            began,
        )?;
        let took = began.elapsed();
        let mut again = Vec::new();
        for outcome in &outcomes {
            self.log_outcome(outcome, trigger, took);
            if outcome.action.kind.needs_recount()
                && let Some(socket) = outcome.action.view.socket
            {
                again.push(Lookup::from(&socket));
            }
        }
        if !again.is_empty() {
            let at = Instant::now() + SECOND_LOOK;
            self.second_look.get_or_insert((at, Vec::new())).1.extend(again);
        }
        Ok(())
    }

    /// Looks again at what was just repaired: the socket may have died meanwhile.
    fn look_again(&mut self, lookups: &[Lookup]) -> Result<()> {
        let snapshot = self.tables.exactly(lookups, &self.ledger)?;
        self.ledger.settle(&snapshot);
        self.repair(&snapshot, Trigger::Event)
    }

    fn inserts_rest(&self) -> bool {
        self.full_table.as_ref().is_some_and(|full| Instant::now() < full.until)
    }

    fn log_outcome(&mut self, outcome: &Outcome, trigger: Trigger, took: Duration) {
        let action = &outcome.action;
        match &outcome.result {
            Ok(()) if action.kind == ActionKind::Reinsert => {
                self.full_table = None;
                log_action(action, trigger, "acted");
            }
            Ok(()) => log_action(action, trigger, "acted"),
            Err(error) if error.is_table_full() => self.rest_inserts(error),
            Err(error) => tracing::warn!(
                action = action.kind.name(),
                flow = %action.view.flow.inverse(),
                %error,
                "action failed, will be planned again"
            ),
        }
        if let Some(Err(error)) = &outcome.recount {
            tracing::warn!(flow = %action.view.flow.inverse(), %error, "recount failed");
        }
        if let Some(Err(error)) = &outcome.seal {
            tracing::warn!(flow = %action.view.flow.inverse(), %error, "seal failed");
        }
        tracing::trace!(?took, "repaired");
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
        if self.settings.on_exit == OnExit::Keep || self.settings.dry_run {
            return Ok(());
        }
        let lookups: Vec<_> = self.ledger.held().map(|held| Lookup::from(&held.socket)).collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let changes: Vec<_> = snapshot
            .views
            .iter()
            .filter_map(|view| view.entry)
            .filter_map(|entry| {
                let timeout = kernel_timeout(entry.state()?)?;
                Some(Change::Extend { key: entry.key(), timeout })
            })
            .collect();
        self.tables.conntrack.change(&changes)?;
        Ok(())
    }
}

/// The timeout that the kernel itself gives an entry in this state.
fn kernel_timeout(state: TcpState) -> Option<Duration> {
    let name = match state {
        TcpState::SynSent | TcpState::SynSent2 => "syn_sent",
        TcpState::SynRecv => "syn_recv",
        TcpState::Established => "established",
        TcpState::FinWait => "fin_wait",
        TcpState::CloseWait => "close_wait",
        TcpState::LastAck => "last_ack",
        TcpState::TimeWait => "time_wait",
        TcpState::Close => "close",
        TcpState::None => return None,
    };
    sysctl::conntrack(&format!("nf_conntrack_tcp_timeout_{name}")).map(Duration::from_secs)
}

/// Whether an event can mean that conntrack has been fooled.
fn is_suspicious(event: &Event) -> bool {
    event.kind == EventKind::Destroy || event.entry.state().is_some_and(TcpState::is_closing)
}

fn log_action(action: &Action, trigger: Trigger, message: &'static str) {
    tracing::info!(
        action = action.kind.name(),
        flow = %action.view.flow.inverse(),
        reason = %action.reason,
        trigger = ?trigger,
        "{message}"
    );
}
