//! The log on stderr: for whom it is written, and how much of it.

use std::io::{self, IsTerminal};
use std::{env, fmt};

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use super::args::{Cli, Command, LogFormat};
use crate::error::{Error, Result};

/// Starts it: in the daemon's form as asked for or as fits its reader, as text for the other
/// commands.
///
/// # Errors
/// `CTKEEP_LOG` is no filter: a usage error.
pub(super) fn start(cli: &Cli) -> Result<()> {
    let registry = tracing_subscriber::registry().with(filter(cli)?);
    let log = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none())
        .with_target(false);
    let form = match &cli.command {
        Command::Run(args) => args.log_format.unwrap_or_else(fitting),
        _ => LogFormat::Text,
    };
    match form {
        LogFormat::Text => registry.with(log).init(),
        LogFormat::Json => registry.with(log.json().with_span_list(false)).init(),
        LogFormat::Journald => registry.with(log.event_format(Journal::new())).init(),
    }
    Ok(())
}

fn filter(cli: &Cli) -> Result<Targets> {
    let level = match (cli.verbose, &cli.command) {
        (0, Command::Run(_)) => "info",
        (0, _) => "warn",
        (1, _) => "debug",
        _ => "trace",
    };
    let wanted = env::var("CTKEEP_LOG").ok().filter(|wanted| !wanted.is_empty());
    let wanted = wanted.as_deref().unwrap_or(level);
    wanted
        .parse()
        .map_err(|error| Error::usage("CTKEEP_LOG", format!("'{wanted}' is no filter: {error}")))
}

/// The form by what stderr is.
fn fitting() -> LogFormat {
    if io::stderr().is_terminal() {
        LogFormat::Text
    } else if is_journal(env::var("JOURNAL_STREAM").ok().as_deref()) {
        LogFormat::Journald
    } else {
        LogFormat::Json
    }
}

/// Whether stderr is the very stream that systemd named, as device and inode, and not one that
/// somebody put in its place (systemd.exec(5)).
fn is_journal(named: Option<&str>) -> bool {
    let stream = fstat(io::stderr()).map(|file| format!("{}:{}", file.st_dev, file.st_ino));
    stream.is_ok_and(|stream| named == Some(stream.as_str()))
}

/// One line of text for each event, with the priority before it that the journal takes off again
/// (sd-daemon(3)); time and unit are the journal's own to note. Its native protocol would hide the
/// fields from everybody who does not ask for them.
struct Journal(Format<Full, ()>);

impl Journal {
    fn new() -> Self {
        Self(Format::default().without_time().with_level(false).with_target(false).with_ansi(false))
    }
}

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}
