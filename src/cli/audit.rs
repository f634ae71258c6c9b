//! `ctkeep audit`: one look, changes nothing.

pub mod text;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::Exit;
use super::args::{Audit, Format};
use super::output;
use crate::audit::asked::ask_for_sources;
use crate::audit::look::Seen;
use crate::audit::report::{Report, Request};
use crate::audit::saved::{File, Host, Refusal, Saved};
use crate::error::{Error, Result};
use crate::reconcile::policy::Policy;
use crate::report::file;
use crate::sockdiag::State;

const SOCKETS: &str = "--sockets";
const CONNTRACK: &str = "--conntrack";

/// A look that takes longer says so, on a terminal.
const PATIENCE: Duration = Duration::from_secs(1);

pub(super) fn run(args: &Audit) -> Result<Exit> {
    let policy = args.scope.policy();
    #[allow(clippy::disallowed_methods, reason = "a command may read the clock")]
    let now = SystemTime::now();
    let request = Request {
        limit: args.limit.map(|limit| limit.get()),
        mask: args.mask,
        mask6: args.mask6,
        now,
    };
    let saved = match (&args.sockets, &args.conntrack, &args.report) {
        (Some(sockets), Some(entries), _) => {
            Some(read(sockets, entries, args.socket_state, &policy)?)
        }
        (_, _, Some(path)) => Some(read_report(path, &policy)?),
        _ => None,
    };
    if let Some(Host { seen, scope, notes }) = saved {
        for note in &notes {
            eprintln!("ctkeep: {note}");
        }
        return show(args, &Report::of(seen, &scope, &policy, request).of_text(&notes));
    }
    let mut exit = Exit::Done;
    for namespace in args.scope.namespaces()? {
        let look = || {
            namespace.run(|| {
                let (mut seen, scope) = Seen::look(namespace.name(), &policy)?;
                if args.ask {
                    let failed = |error: &Error| eprintln!("ctkeep: {error}");
                    ask_for_sources(&mut seen, Instant::now(), failed)?;
                }
                Ok((seen, scope))
            })
        };
        let (seen, scope) = with_progress(look)?;
        if show(args, &Report::of(seen, &scope, &policy, request))? == Exit::Disagreement {
            exit = Exit::Disagreement;
        }
    }
    Ok(exit)
}

fn show(args: &Audit, report: &Report) -> Result<Exit> {
    match args.output.format {
        Format::Json => output::line(&report.to_json(args.all, args.top))?,
        Format::Table => {
            output::text(&text::text(report, args.all, args.top, args.output.no_header))?;
        }
    }
    Ok(if report.has_disagreements() { Exit::Disagreement } else { Exit::Done })
}

/// Saved tables; what is passed over is said in one line for each file.
fn read(sockets: &Path, entries: &Path, filter: Option<State>, policy: &Policy) -> Result<Host> {
    let bytes = |path: &Path, flag| {
        fs::read(path).map_err(|error| Error::usage(flag, format!("{}: {error}", path.display())))
    };
    let (first, second) = (bytes(sockets, SOCKETS)?, bytes(entries, CONNTRACK)?);
    let refused = |refusal: Refusal| {
        let (flag, path) = match refusal.file {
            File::Sockets => (SOCKETS, sockets),
            File::Entries => (CONNTRACK, entries),
        };
        let line = refusal.line.map_or(String::new(), |line| format!("{line}:"));
        Error::usage(flag, format!("{}:{line} {}", path.display(), refusal.what))
    };
    let saved = Saved::read(&first, &second, filter).map_err(refused)?;
    let parsed = [(sockets, &saved.sockets.parsed), (entries, &saved.entries.parsed)];
    let summaries = parsed.map(|(path, parsed)| parsed.summary(&path.display().to_string()));
    let host = saved.join(policy).map_err(refused)?;
    let notes = summaries.into_iter().flatten().chain(host.notes).collect();
    Ok(Host { notes, ..host })
}

/// What `ctkeep report` has written.
fn read_report(path: &Path, policy: &Policy) -> Result<Host> {
    let refused = |what: String| Error::usage("--report", format!("{}: {what}", path.display()));
    let bytes = fs::read(path).map_err(|error| refused(error.to_string()))?;
    let file = file::File::read(&String::from_utf8_lossy(&bytes)).map_err(refused)?;
    for section in [file::SOCKETS, file::ENTRIES] {
        if let Some(failure) = file.failure(section) {
            return Err(refused(failure));
        }
    }
    crate::report::read(&file, policy).map_err(|refusal| {
        let section = match refusal.file {
            File::Sockets => file::SOCKETS,
            File::Entries => file::ENTRIES,
        };
        let line = refusal.line.map_or(String::new(), |line| format!(" line {line}:"));
        refused(format!("section {section}:{line} {}", refusal.what))
    })
}

/// Does `work`; where it takes long and stderr is a terminal, says on stderr that it goes on.
fn with_progress<T>(work: impl FnOnce() -> T) -> T {
    if !io::stderr().is_terminal() {
        return work();
    }
    let (done, watched) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let start = Instant::now();
            let mut err = io::stderr();
            let mut has_spoken = false;
            while watched.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                has_spoken = true;
                let _ = write!(err, "\rreading the tables, {} s", start.elapsed().as_secs());
            }
            if has_spoken {
                let _ = write!(err, "\r\x1b[K");
            }
        });
        let result = work();
        drop(done);
        result
    })
}
