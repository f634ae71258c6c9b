//! The TOML file: every key is a long flag, every value what would be typed behind it.
//!
//! The file is read into the same parser as the flags, so there is one list of options, one check
//! of their values and one set of messages. A flag on the command line replaces the file's value.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Command, CommandFactory};
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::args::Cli;
use crate::error::Error;

/// Options of the command line alone: a question to a limit is a packet, and a file names no other
/// file.
pub(super) const NEVER_IN_FILE: [&str; 15] = [
    "anonymous",
    "ask",
    "at",
    "config",
    "conntrack",
    "dir",
    "filter",
    "fold",
    "help",
    "interval",
    "once",
    "report",
    "sockets",
    "sort",
    "version",
];

/// Why there are no arguments to work with.
pub(super) enum Failure {
    /// Clap's own message, on the command line's behalf.
    Clap(clap::Error),
    /// Something in the file, with its place.
    File(Error),
}

impl From<clap::Error> for Failure {
    fn from(error: clap::Error) -> Self {
        Self::Clap(error)
    }
}

/// Parses the arguments, and the file that `--config` names, of which `read` gets the text.
pub(super) fn matches(
    args: impl IntoIterator<Item = OsString>,
    read: impl FnOnce(&Path) -> io::Result<String>,
) -> Result<ArgMatches, Failure> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let matches = Cli::command().try_get_matches_from(&args)?;
    let Some((name, typed)) = matches.subcommand() else { return Ok(matches) };
    let Ok(Some(path)) = typed.try_get_one::<PathBuf>("config") else { return Ok(matches) };
    let text = read(path).map_err(|error| {
        let what = match error.kind() {
            io::ErrorKind::InvalidData => "it is no text in UTF-8".to_owned(),
            _ => error.to_string(),
        };
        Failure::File(usage(format!("{}: {what}", path.display())))
    })?;
    let added = flags(&text, path, name, typed).map_err(Failure::File)?;
    args.extend(added.into_iter().map(OsString::from));
    Ok(Cli::command().try_get_matches_from(&args)?)
}

/// The file's options as flags of the subcommand `name`, without those that were typed.
fn flags(text: &str, path: &Path, name: &str, typed: &ArgMatches) -> Result<Vec<String>, Error> {
    let place = |offset: usize| {
        let before = text.get(..offset).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |rest| rest.chars().count()) + 1;
        format!("{}:{line}:{column}", path.display())
    };
    let table = DeTable::parse(text).map_err(|error| {
        let at = place(error.span().map_or(0, |span| span.start));
        usage(format!("{at}: {}", error.message()))
    })?;
    let cli = Cli::command();
    let mut all = Vec::new();
    for (key, value) in table.get_ref() {
        let at = place(key.span().start);
        let key: &str = key.get_ref();
        let Some(command) = owner(&cli, name, key) else {
            let advice = match meant(&cli, name, key) {
                Some(meant) => format!("did you mean '{meant}'?"),
                None => "see ctkeep run --help".to_owned(),
            };
            return Err(usage(format!("{at}: unknown option '{key}'; {advice}")));
        };
        let written = written(&command, key, value.get_ref()).ok_or_else(|| {
            usage(format!("{at}: '{key}' takes {}", what_it_takes(&command, key)))
        })?;
        // Tried alone, so that clap's message gets the place in the file.
        let mut probe = vec!["ctkeep".to_owned(), command.get_name().to_owned()];
        probe.extend(required(&command));
        probe.extend(written.iter().cloned());
        if let Err(error) = Cli::command().try_get_matches_from(probe) {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            return Err(usage(format!("{at}: {}", line.trim_start_matches("error: "))));
        }
        let typed_here = argument(&command, key)
            .and_then(|argument| typed.try_contains_id(argument).ok().map(|_| argument))
            .is_some_and(|argument| typed.value_source(argument) == Some(ValueSource::CommandLine));
        // Options of other commands are checked, and left to them.
        if command.get_name() == name && !typed_here {
            all.extend(written);
        }
    }
    Ok(all)
}

/// The subcommand that has `--key`: `name` if it does, else any.
fn owner(cli: &Command, name: &str, key: &str) -> Option<Command> {
    readers(cli, name).find(|command| argument(command, key).is_some()).cloned()
}

/// The subcommands that read the file, `name` first.
fn readers<'a>(cli: &'a Command, name: &str) -> impl Iterator<Item = &'a Command> {
    let reads_file = |command: &&Command| command.get_arguments().any(|it| it.get_id() == "config");
    let mut commands: Vec<_> = cli.get_subcommands().filter(reads_file).collect();
    commands.sort_by_key(|command| command.get_name() != name);
    commands.into_iter()
}

/// The option that was meant by `key`: `ports`, `follow_rules`.
fn meant<'a>(cli: &'a Command, name: &str, key: &str) -> Option<&'a str> {
    let key = key.replace('_', "-").to_lowercase();
    let mut all = readers(cli, name)
        .flat_map(Command::get_arguments)
        .filter_map(clap::Arg::get_long)
        .filter(|long| !NEVER_IN_FILE.contains(long));
    all.find(|long| key.len() > 2 && (long.starts_with(&key) || key.starts_with(long)))
}

/// The identifier of the argument `--key`, where a file may have it.
fn argument<'a>(command: &'a Command, key: &str) -> Option<&'a str> {
    flag(command, key)
        .filter(|_| !NEVER_IN_FILE.contains(&key))
        .map(|argument| argument.get_id().as_str())
}

/// Stand-ins for the positional arguments that a subcommand insists on.
fn required(command: &Command) -> impl Iterator<Item = String> + '_ {
    command.get_positionals().map(|_| "192.0.2.1:1".to_owned())
}

/// The argument `--key`.
fn flag<'a>(command: &'a Command, key: &str) -> Option<&'a clap::Arg> {
    command.get_arguments().find(|argument| argument.get_long() == Some(key))
}

fn is_switch(command: &Command, key: &str) -> bool {
    flag(command, key).is_some_and(|it| matches!(it.get_action(), ArgAction::SetTrue))
}

/// What a value of `--key` can be, in words.
fn what_it_takes(command: &Command, key: &str) -> String {
    if is_switch(command, key) {
        return "true or false".to_owned();
    }
    let values = flag(command, key).map(clap::Arg::get_possible_values).unwrap_or_default();
    match values.iter().map(|value| format!("\"{}\"", value.get_name())).collect::<Vec<_>>() {
        values if values.is_empty() => "a text, a number or a list".to_owned(),
        values => values.join(" or "),
    }
}

/// A value as it would be typed.
fn written(command: &Command, key: &str, value: &DeValue<'_>) -> Option<Vec<String>> {
    if is_switch(command, key) {
        return match value {
            DeValue::Boolean(true) => Some(vec![format!("--{key}")]),
            DeValue::Boolean(false) => Some(Vec::new()),
            _ => None,
        };
    }
    match value {
        DeValue::Array(values) if values.iter().any(|it| it.get_ref().is_table()) => {
            let values: Option<Vec<_>> = values.iter().map(|it| pairs(it.get_ref())).collect();
            Some(values?.into_iter().map(|value| format!("--{key}={value}")).collect())
        }
        DeValue::Array(values) => {
            let values: Option<Vec<_>> =
                values.iter().map(|value| scalar(value.get_ref())).collect();
            Some(values?.into_iter().map(|value| format!("--{key}={value}")).collect())
        }
        value => Some(vec![format!("--{key}={}", scalar(value)?)]),
    }
}

/// A table of `[[key]]` as one value: its pairs.
fn pairs(value: &DeValue<'_>) -> Option<String> {
    let pair = |(key, value): (&Spanned<DeString<'_>>, &Spanned<DeValue<'_>>)| {
        let value = match value.get_ref() {
            DeValue::Array(values) => {
                let values: Option<Vec<_>> = values.iter().map(|it| scalar(it.get_ref())).collect();
                values?.join(",")
            }
            value => scalar(value)?,
        };
        Some(format!("{}={value}", key.get_ref()))
    };
    value.as_table()?.iter().map(pair).collect::<Option<Vec<_>>>().map(|pairs| pairs.join(" "))
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.to_string()),
        _ => None,
    }
}

fn usage(what: String) -> Error {
    Error::usage("configuration", what)
}
