//! One guarded conntrack table, as long as its namespace is there: opens a worker, gives it its turns,
//! waits where there is no such namespace.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Foundation;
use super::control::{Control, Lead};
use super::members::Members;
use super::threads::{prefer_realtime, sleep};
use super::worker::Worker;
use crate::error::Result;
use crate::host::netns::Namespace;
use crate::host::{instance, sysctl};
use crate::metrics::{GuardMetrics, OWN};
use crate::recount::{Mode, Recount, Recounter};
use crate::shield::{self, Program};

/// How long to wait for a namespace that has vanished to come back, from look to look.
const COME_BACK: Duration = Duration::from_secs(1);

/// Guards one conntrack table until told to stop. That of a namespace which is named is waited for,
/// however often it comes and goes, and what fails there fails there alone.
pub(super) struct Guard {
    /// Where the table and the limiting rules are.
    pub(super) namespace: Namespace,
    /// Stops it, and hears that it is alive.
    pub(super) lead: Arc<Lead>,
    pub(super) control: Arc<Control>,
    /// For the own table: other namespaces whose connections are in it.
    pub(super) members: Option<Members>,
    /// It was not named: it ends with its namespace.
    pub(super) is_found: bool,
}

/// From try to try at a namespace in which guarding fails, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

impl Guard {
    /// `ready` is told after the first whole sweep, or where there is nothing to sweep.
    pub(super) fn run(
        &self,
        mut program: Option<Program>,
        ready: &(dyn Fn() + Sync),
    ) -> Result<()> {
        let Self { namespace, lead, .. } = self;
        let span = tracing::info_span!("guard", netns = namespace.name());
        let _entered = span.enter();
        let (mut retry, mut is_missing) = (RETRY.0, false);
        while !lead.is_stopping() {
            let begun_with = namespace.identity();
            let is_elsewhere = begun_with.is_none() || self.is_guarded_by_another();
            if is_elsewhere && self.is_found {
                lead.stop();
                break;
            }
            if is_elsewhere {
                if !std::mem::replace(&mut is_missing, true) {
                    self.say_missing(begun_with.is_some());
                    ready();
                }
                lead.beat();
                sleep(lead, COME_BACK)?;
                continue;
            }
            is_missing = false;
            let began = Instant::now();
            // On a thread of its own, which would else keep a dead namespace alive.
            let ended = thread::scope(|scope| {
                let (span, program) = (&span, program.as_mut());
                scope
                    .spawn(move || span.in_scope(|| self.guard_present(program, ready)))
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            match ended {
                Ok(Ended::Stopped) => {}
                Err(error) if *namespace == Namespace::Own => return Err(error),
                Err(error) if namespace.identity() == begun_with => {
                    ready();
                    retry = if began.elapsed() > RETRY.1 { RETRY.0 } else { retry };
                    tracing::error!(%error, ?retry, "this namespace is not guarded");
                    self.rest(retry)?;
                    retry = (retry * 2).min(RETRY.1);
                }
                // Whatever failed, failed in a namespace that was on its way.
                Ok(Ended::NamespaceChanged) | Err(_) if self.is_found => {}
                Ok(Ended::NamespaceChanged) | Err(_) => {
                    tracing::warn!("a namespace has come or gone, starting anew");
                }
            }
        }
        Ok(())
    }

    fn say_missing(&self, is_double: bool) {
        let name = self.name();
        if is_double {
            self.control.metrics.forget(&name);
            tracing::info!("another name of a namespace that is guarded already");
        } else {
            self.control.metrics.expect(&name);
            self.control.metrics.absent(&name);
            tracing::warn!("no such namespace, waiting for it");
        }
    }

    /// Waits, with signs of life.
    fn rest(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while !self.lead.is_stopping() && Instant::now() < until {
            self.lead.beat();
            sleep(&self.lead, COME_BACK)?;
        }
        Ok(())
    }

    /// Whether its name is one more for the own namespace, or for one that is named before it.
    fn is_guarded_by_another(&self) -> bool {
        if self.namespace == Namespace::Own {
            return false;
        }
        let identity = self.namespace.identity();
        let live = self.control.live();
        let mut before = live.namespaces.iter().take_while(|other| **other != self.namespace);
        identity == self.control.own || before.any(|other| other.identity() == identity)
    }

    /// How metrics call it.
    pub(super) fn name(&self) -> String {
        name(&self.namespace)
    }

    /// Guards until the namespace goes.
    fn guard_present(
        &self,
        program: Option<&mut Program>,
        ready: &(dyn Fn() + Sync),
    ) -> Result<Ended> {
        let Self { namespace, lead, control, members, .. } = self;
        if control.foundation.realtime {
            prefer_realtime();
        }
        let begun_with = namespace.identity();
        namespace.enter()?;
        let enforces = !control.foundation.dry_run;
        let claim = if enforces { instance::claim("ctkeep")? } else { None };
        if enforces && claim.is_none() {
            tracing::warn!(
                "the abstract socket \"ctkeep\" belongs to somebody who is no administrator \
                 (ss -xlp): guarding all the same; a second instance would not be noticed"
            );
        }
        let share = GuardMetrics::new(&control.metrics, &self.name());
        let mut worker = Worker::open(control, members.as_ref(), share)?;
        worker.claim = claim;
        // A sweep of millions takes longer than the watchdog waits.
        let alive = lead.clone();
        worker.keeper.tables.conntrack.on_answer(move || alive.beat());
        if enforces {
            shield::remove_leftovers(&control.foundation.device);
        }
        if let Some(program) = program {
            let level = worker.keeper.ledger().pressure().level();
            worker.desk.open_shield(program, &worker.keeper.scope().ports, level)?;
        }
        while !lead.is_stopping() {
            lead.beat();
            match worker.sweep_first() {
                Ok(()) => break,
                Err(error) if error.is_unavailable() => return Err(error),
                // A dump under churn, a moment without memory.
                Err(error) => worker.note_failure(&error),
            }
            sleep(lead, COME_BACK)?;
        }
        worker.say_unheard();
        tracing::info!(
            ports = worker.keeper.scope().ports.len(),
            held = worker.keeper.held().count(),
            namespaces = worker.keeper.tables.sockets.members().len(),
            dry_run = !enforces,
            "ready"
        );
        ready();
        let mut checked = Instant::now();
        while !lead.is_stopping() {
            lead.beat();
            let ready = worker.wait(lead)?;
            worker.apply_settings(control.live());
            worker.turn(ready);
            if checked.elapsed() >= COME_BACK {
                checked = Instant::now();
                worker.desk.publish_shield(enforces);
                let namespaces = worker.keeper.tables.sockets.members().len();
                worker.desk.share.containers(namespaces);
                if namespace.identity() != begun_with || self.is_guarded_by_another() {
                    return Ok(Ended::NamespaceChanged);
                }
            }
        }
        worker.finish()?;
        Ok(Ended::Stopped)
    }
}

/// How metrics call the guard of a namespace.
pub(super) fn name(namespace: &Namespace) -> String {
    match namespace {
        Namespace::Own => OWN.to_owned(),
        Namespace::Named(name) | Namespace::Found { path: name, .. } => name.clone(),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Stopped,
    NamespaceChanged,
}

/// Makes what recount needs, and says what that is.
pub(super) fn open_recounter(foundation: &Foundation, now: Instant) -> Result<Option<Recounter>> {
    let Foundation { recount, device, dry_run, .. } = foundation;
    if *dry_run || *recount == Mode::Off {
        return Ok(None);
    }
    let recounter = Recounter::open(*recount, device, now)?;
    for shortfall in recounter.iter().flat_map(Recounter::shortfalls) {
        tracing::warn!(reason = shortfall, "recount by fewer routes than wanted");
    }
    if recounter.as_ref().and_then(Recounter::hides) == Some(false) {
        tracing::warn!(
            reason = "nf_tables of this kernel does not write TCP's flags",
            "no packet is hidden from conntrack: what fools it again is repaired afterwards"
        );
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
