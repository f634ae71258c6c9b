//! `ctkeep run`: one worker thread for each namespace, and a runtime for everything else.
//!
//! The workers speak blocking netlink and never wait for the runtime; it serves signals and metrics.

mod aside;
mod control;
mod desk;
mod ends;
mod guard;
mod history;
mod inside;
mod log;
mod members;
mod outgoing;
mod overload;
mod reader;
mod rules;
mod service;
mod settings;
mod survey;
mod threads;
mod worker;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::time::interval;

use self::aside::Aside;
use self::control::{Control, Lead};
use self::guard::Guard;
use self::members::{Finder, Members};
use self::service::Service;
pub use self::settings::{Foundation, Live, OnExit, Settings, ShieldMode};
use crate::error::{Cause, Op, Result};
use crate::history::record::Record;
use crate::host::netns::Namespace;
use crate::host::privileges;
use crate::metrics::history::STEP;
use crate::metrics::{Metrics, OWN, http, textfile};
use crate::shield::Program;

/// From one write of the textfile to the next.
const WRITE: Duration = Duration::from_secs(5);

/// Runs until SIGTERM, SIGINT, or the failure of a worker. SIGHUP takes `reload`'s settings, or
/// keeps the old ones where it fails.
///
/// # Errors
/// The first worker's error.
pub fn run(
    settings: Settings,
    reload: impl Fn() -> Result<Settings> + Send + Sync + 'static,
) -> Result<()> {
    let programs = load_shields(&settings)?;
    let needs_bpf = programs.values().any(Program::needs_bpf_for_good);
    let gives_up_others =
        !settings.live.enters_others() && privileges::lacking(&privileges::ELSEWHERE).is_empty();
    // While this is the only thread: the others inherit what is left.
    if let Err(error) = privileges::keep_only(&settings.privileges(needs_bpf)) {
        tracing::warn!(%error, "could not give up privileges that are not needed");
    }
    // A namespace whose sockets are looked at takes a descriptor; the usual 1 024 are for select(2).
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let op = Op::new("start runtime");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| op.io(error))?;
    let serving = serve(settings, gives_up_others, programs, Arc::new(reload));
    let result = runtime.block_on(serving);
    // A file system that hangs does not keep the process.
    runtime.shutdown_background();
    tracing::info!("stopped");
    result
}

/// The shield of each guard, by its name.
type Programs = HashMap<String, Program>;

/// Loads the shields, as long as there is the privilege to.
fn load_shields(settings: &Settings) -> Result<Programs> {
    let Foundation { shield, shield_mark, dry_run, .. } = &settings.foundation;
    let mut programs = Programs::new();
    if *shield == ShieldMode::Off {
        return Ok(programs);
    }
    if *dry_run {
        tracing::info!("no shield: it would change what conntrack sees");
        return Ok(programs);
    }
    for namespace in settings.guarded() {
        match Program::load(*shield_mark) {
            Ok(program) => drop(programs.insert(guard::name(&namespace), program)),
            Err(error) if *shield == ShieldMode::On => return Err(error),
            Err(error) => tracing::warn!(%error, "no shield, repairs go on without it"),
        }
    }
    Ok(programs)
}

/// A worker's messages to the runtime.
#[derive(Debug)]
enum News {
    /// The first whole sweep of this guard is done, or there is nothing to sweep.
    Ready(String),
    /// Others than before have limits of their own.
    Limited,
    /// This thread has ended.
    Ended(String, Result<()>),
}

/// Reports the end of a worker when it is dropped: a thread that panics ends without a result.
struct Ending {
    name: String,
    news: UnboundedSender<News>,
    result: Option<Result<()>>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let panicked = || Op::new("guard").failed(Cause::Io(io::Error::other("worker panicked")));
        let result = self.result.take().unwrap_or_else(|| Err(panicked()));
        drop(self.news.send(News::Ended(std::mem::take(&mut self.name), result)));
    }
}

/// The threads that are at work, by their names.
struct Team {
    control: Arc<Control>,
    news: UnboundedSender<News>,
    leads: BTreeMap<String, Arc<Lead>>,
}

impl Team {
    fn spawn(
        &mut self,
        name: String,
        lead: Arc<Lead>,
        work: impl FnOnce(&Lead, &UnboundedSender<News>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let (news, at_work) = (self.news.clone(), lead.clone());
        self.leads.insert(name.clone(), lead);
        let thread = move || {
            let mut ending = Ending { name, news: news.clone(), result: None };
            ending.result = Some(work(&at_work, &news));
        };
        let thread = thread::Builder::new().name("worker".to_owned()).spawn(thread);
        thread.map(drop).map_err(|error| Op::new("start thread").io(error))
    }

    fn guard(
        &mut self,
        namespace: Namespace,
        program: Option<Program>,
        members: Option<Members>,
        is_found: bool,
    ) -> Result<()> {
        let (name, lead) = (guard::name(&namespace), Arc::new(Lead::new()?));
        self.control.metrics.expect(&name);
        let control = self.control.clone();
        let guard = Guard { namespace, lead: lead.clone(), control, members, is_found };
        self.spawn(name.clone(), lead, move |_, news| {
            let ready = || drop(news.send(News::Ready(name.clone())));
            guard.run(program, &ready)
        })
    }

    /// Guards the own tables of the namespaces that the settings name, and of containers with limits of
    /// their own, and no others; the shields of a start are there for those that were named then.
    fn follow(&mut self, programs: &mut Programs) -> Result<()> {
        let named = self.control.live().namespaces.clone();
        // One that has just ended is still among them.
        let found = self.control.limited().into_iter().filter(|it| it.identity().is_some());
        let found = found.filter(|namespace| !named.contains(namespace));
        let found: Vec<_> = found.collect();
        let names: HashSet<_> = named.iter().chain(&found).map(guard::name).collect();
        for (name, lead) in &self.leads {
            if !names.contains(name) && ![OWN, FINDER].contains(&name.as_str()) {
                lead.stop();
            }
        }
        let named = named.into_iter().map(|namespace| (namespace, false));
        for (namespace, is_found) in named.chain(found.into_iter().map(|it| (it, true))) {
            let name = guard::name(&namespace);
            if !self.leads.contains_key(&name) {
                let program = programs.remove(&name);
                self.guard(namespace, program, None, is_found)?;
            }
        }
        Ok(())
    }

    fn end(&self) {
        service::stopping();
        self.leads.values().for_each(|lead| lead.stop());
    }

    fn beats(&self) -> Vec<(String, u64)> {
        self.leads.iter().map(|(name, lead)| (name.clone(), lead.beats())).collect()
    }
}

/// The thread that looks for namespaces.
const FINDER: &str = "namespaces";

async fn serve<R>(
    settings: Settings,
    gave_up_others: bool,
    mut programs: Programs,
    reload: Arc<R>,
) -> Result<()>
where
    R: Fn() -> Result<Settings> + Send + Sync + 'static,
{
    let op = Op::new("start runtime");
    let listen = |kind| signal(kind).map_err(|error| op.io(error));
    let mut terminate = listen(SignalKind::terminate())?;
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut hangup = listen(SignalKind::hangup())?;

    let mut starting: HashSet<_> = settings.guarded().map(|it| guard::name(&it)).collect();
    let control = Arc::new(Control::new(settings, gave_up_others));
    if let Some(path) = &control.live().metrics_textfile {
        textfile::check(path)?;
    }
    if let Some(address) = control.foundation.metrics_listen {
        tokio::spawn(http::serve(http::bind(address).await?, control.metrics.clone()));
    }
    let (news, mut inbox) = mpsc::unbounded_channel();
    let mut team = Team { control: control.clone(), news, leads: BTreeMap::new() };
    let (finder, members) = Finder::new(control.clone())?;
    team.spawn(FINDER.to_owned(), Arc::new(Lead::new()?), move |lead, news| {
        finder.run(lead, || drop(news.send(News::Limited)))
    })?;
    team.guard(Namespace::Own, programs.remove(OWN), Some(members), false)?;
    team.follow(&mut programs)?;

    let mut service = Service::new();
    let (mut step, mut write) = (interval(STEP), interval(WRITE));
    let mut writing = Writing::default();
    let (mut reading, mut read_again) = (Aside::default(), false);
    let mut first = Ok(());
    while !team.leads.is_empty() {
        tokio::select! {
            _ = terminate.recv() => team.end(),
            _ = interrupt.recv() => team.end(),
            _ = hangup.recv() => {
                service::reloading();
                let reload = reload.clone();
                read_again = !reading.start(move || reload());
            }
            new = reading.ended() => {
                apply_reload(&control, new.and_then(|new| new));
                team.follow(&mut programs)?;
                if read_again {
                    let reload = reload.clone();
                    read_again = !reading.start(move || reload());
                } else {
                    service::ready();
                }
            }
            _ = step.tick() => control.metrics.sample(),
            _ = write.tick() => {
                if let Some(path) = &control.live().metrics_textfile {
                    writing.write(&control.metrics, path);
                }
            }
            result = writing.under_way.ended() => writing.note(result.map_or_else(
                |error| Some(error.to_string()),
                |result| result.err().map(|error| error.to_string()),
            )),
            () = service.is_due() => service.tell_alive(team.beats()),
            message = inbox.recv() => match message {
                Some(News::Ready(name)) => {
                    if starting.remove(&name) && starting.is_empty() {
                        service::ready();
                    }
                }
                Some(News::Limited) => {
                    if team.leads.get(OWN).is_some_and(|own| !own.is_stopping()) {
                        team.follow(&mut programs)?;
                    }
                }
                Some(News::Ended(name, result)) => {
                    let was_told = team.leads.remove(&name).is_some_and(|lead| lead.is_stopping());
                    if was_told && result.is_ok() {
                        control.metrics.forget(&name);
                        // Named again while it was ending.
                        if team.leads.get(OWN).is_some_and(|own| !own.is_stopping()) {
                            team.follow(&mut programs)?;
                        }
                    } else {
                        team.end();
                    }
                    if first.is_ok() {
                        first = result;
                    }
                }
                None => break,
            }
        }
    }
    first
}

/// The write of the textfile that is under way, and how the last one went: a failure is logged once.
#[derive(Debug, Default)]
struct Writing {
    under_way: Aside<io::Result<()>>,
    path: PathBuf,
    failing: bool,
}

impl Writing {
    fn write(&mut self, metrics: &Arc<Metrics>, path: &Path) {
        let (metrics, target) = (metrics.clone(), path.to_owned());
        if self.under_way.start(move || textfile::write(&metrics, &target)) {
            path.clone_into(&mut self.path);
        } else {
            self.note(Some(format!("the last write has not ended after {WRITE:?}")));
        }
    }

    /// A write has ended so, or does not end.
    fn note(&mut self, error: Option<String>) {
        if let Some(error) = error.as_ref().filter(|_| !self.failing) {
            tracing::warn!(path = %self.path.display(), error, "metrics file not written");
        }
        self.failing = error.is_some();
    }
}

/// Puts new settings in force where they can be without starting anew.
fn apply_reload(control: &Control, new: Result<Settings>) {
    let new = match new {
        Err(error) => {
            control.metrics.reloaded(false);
            control.history.keep(|at| Record::Reload { at, well: false });
            tracing::error!(%error, "reload failed, keeping the old configuration");
            return;
        }
        Ok(new) => new,
    };
    let mut changed = control.foundation.changed(&new.foundation);
    if control.gave_up_others && new.live.enters_others() {
        changed.push(if new.live.containers { "containers" } else { "netns" });
    }
    control.metrics.reloaded(changed.is_empty());
    let well = changed.is_empty();
    control.history.keep(|at| Record::Reload { at, well });
    if changed.is_empty() {
        control.replace(new.live);
        tracing::info!("configuration reloaded");
    } else {
        tracing::error!(
            "reload refused, keeping the old configuration: a change of {} takes a restart",
            changed.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_panics_is_reported_as_one_that_failed() {
        let (news, mut inbox) = mpsc::unbounded_channel();
        let worker = thread::spawn(move || {
            let _ending = Ending { name: "web".to_owned(), news, result: None };
            panic!("as a test");
        });
        assert!(worker.join().is_err());
        let Ok(News::Ended(_, Err(error))) = inbox.try_recv() else { panic!("no report") };
        assert_eq!(error.to_string(), "guard: worker panicked");
    }
}
