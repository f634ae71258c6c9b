//! The commands: what was typed becomes what it means, and an outcome becomes an exit code.

mod args;
pub mod audit;
mod config;
mod doctor;
mod explain;
mod history;
mod kill;
mod log;
mod manual;
pub mod output;
mod reconcile;
mod recount;
mod report;
mod run;
mod top;

use std::ffi::OsString;
use std::fmt::Debug;
use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::FromArgMatches;

use crate::error::{Cause, Error, Result};
use crate::host::modules;
use args::{Cli, Command};

/// How a command ended; the numbers are the program's contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The tables agree, or the work is done.
    Done = 0,
    /// Disagreements were found.
    Disagreement = 1,
    /// Usage or configuration.
    Usage = 2,
    /// A privilege or kernel feature is missing.
    Unavailable = 3,
    /// Some repairs failed.
    Incomplete = 4,
    /// Anything else.
    Internal = 70,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let matches = match config::matches(std::env::args_os(), |path| fs::read_to_string(path)) {
        Ok(matches) => matches,
        Err(config::Failure::Clap(error)) => error.exit(),
        Err(config::Failure::File(error)) => return fail(&error),
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match log::start(&cli).and_then(|()| dispatch(cli.command)) {
        Ok(exit) => exit.into(),
        Err(error) => fail(&error),
    }
}

/// What these arguments mean, the program's name first; `read` gets the file that they name.
///
/// # Errors
/// The fault of the arguments, or of the file.
pub fn check(
    args: impl IntoIterator<Item = OsString>,
    read: impl FnOnce(&Path) -> io::Result<String>,
) -> Result<impl Debug> {
    parse(args, read)
}

/// The command line again, with the file that it names as that is now.
fn arguments() -> Result<Command> {
    parse(std::env::args_os(), |path| fs::read_to_string(path))
}

fn parse(
    args: impl IntoIterator<Item = OsString>,
    read: impl FnOnce(&Path) -> io::Result<String>,
) -> Result<Command> {
    let matches = config::matches(args, read).map_err(|failure| match failure {
        config::Failure::Clap(error) => Error::usage("configuration", error.to_string()),
        config::Failure::File(error) => error,
    })?;
    let cli = Cli::from_arg_matches(&matches);
    cli.map(|cli| cli.command).map_err(|error| Error::usage("configuration", error.to_string()))
}

fn dispatch(command: Command) -> Result<Exit> {
    match command {
        Command::Audit(args) => audit::run(&args),
        Command::Reconcile(args) => reconcile::run(&args),
        Command::Recount(args) => recount::run(&args),
        Command::Run(args) => run::run(args),
        Command::Explain(args) => explain::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Top(args) => top::run(&args),
        Command::History(args) => history::run(&args),
        Command::Kill(args) => kill::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Check(args) => run::check(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    }
}

/// Prints the error and what to do about it.
fn fail(error: &Error) -> ExitCode {
    if is_broken_pipe(error) {
        return Exit::Done.into();
    }
    eprintln!("ctkeep: {error}");
    if error.is_missing_privilege() {
        eprintln!(
            "ctkeep needs CAP_NET_ADMIN to read and change conntrack, and CAP_NET_RAW for recount.\n\
             Run it as root, by its systemd unit (AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW),\n\
             or grant both: setcap cap_net_admin,cap_net_raw+ep /path/to/ctkeep"
        );
    } else if error.to_string().contains("modprobe") {
        eprintln!("{}", modules::advice());
    }
    exit_of(error).into()
}

fn exit_of(error: &Error) -> Exit {
    if error.is_usage() {
        Exit::Usage
    } else if error.is_unavailable() {
        Exit::Unavailable
    } else {
        Exit::Internal
    }
}

fn is_broken_pipe(error: &Error) -> bool {
    matches!(&*error.cause, Cause::Io(io) if io.kind() == io::ErrorKind::BrokenPipe)
}
