//! `ctkeep man` and `ctkeep completions`: written from the very parser, so they cannot drift.

use std::io::{self, Write};

use clap::{Arg, ArgAction, Command, CommandFactory};

use super::Exit;
use super::args::{Cli, Completions, Man, Page};
use super::config::NEVER_IN_FILE;
use super::output;
use crate::error::{Op, Result};

/// A list of tables: in the example they stand behind all keys.
const OVERLOAD: &str = "overload";

pub(super) fn completions(args: &Completions) -> Result<Exit> {
    let mut out = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ctkeep", &mut out);
    output::text(&String::from_utf8_lossy(&out))?;
    Ok(Exit::Done)
}

pub(super) fn man(args: &Man) -> Result<Exit> {
    let text = page(args.page).map_err(|error| Op::new("write the manual page").io(error))?;
    output::text(&text)?;
    Ok(Exit::Done)
}

fn page(page: Page) -> io::Result<String> {
    let mut out = Vec::new();
    match page {
        Page::Ctkeep => ctkeep(&mut out)?,
        Page::Configuration => configuration(&mut out)?,
        Page::Example => example(&mut out)?,
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// ctkeep(8): the command itself, then each subcommand's options.
fn ctkeep(out: &mut Vec<u8>) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let page = clap_mangen::Man::new(command.clone()).section("8").manual("System administration");
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    for subcommand in command.get_subcommands().filter(|command| command.get_name() != "help") {
        writeln!(out, ".SH \"{}\"", subcommand.get_name().to_uppercase())?;
        let page = clap_mangen::Man::new(subcommand.clone());
        let mut part = Vec::new();
        page.render_synopsis_section(&mut part)?;
        page.render_description_section(&mut part)?;
        page.render_options_section(&mut part)?;
        // Their headings become headings of the second rank.
        out.extend(String::from_utf8_lossy(&part).replace(".SH ", ".SS ").bytes());
    }
    out.extend(include_str!("manual.roff").bytes());
    Ok(())
}

/// ctkeep.toml(5): every key, with its default.
fn configuration(out: &mut Vec<u8>) -> io::Result<()> {
    out.extend(include_str!("configuration.roff").bytes());
    for (commands, option) in options() {
        let key = option.get_long().unwrap_or_default();
        writeln!(out, ".TP\n.B {}", roff(key))?;
        writeln!(out, "{}.", roff(&help(&option)))?;
        match default(&option) {
            Some(value) => writeln!(out, "Default: {}.", roff(&value))?,
            None if is_list(&option) => writeln!(out, "A list.")?,
            None => {}
        }
        if let Some(commands) = elsewhere(&commands) {
            writeln!(out, "For {commands}.")?;
        }
    }
    out.extend(b".SH \"SEE ALSO\"\n.BR ctkeep (8)\n");
    Ok(())
}

/// The example: every key with its default, commented out.
fn example(out: &mut Vec<u8>) -> io::Result<()> {
    out.extend(include_str!("example.toml").bytes());
    for (commands, option) in options() {
        let key = option.get_long().unwrap_or_default();
        if key == OVERLOAD {
            continue;
        }
        writeln!(out, "\n# {}", help(&option))?;
        if let Some(commands) = elsewhere(&commands) {
            writeln!(out, "# For {commands}.")?;
        }
        match default(&option) {
            Some(value) => writeln!(out, "#{key} = {value}")?,
            None if is_list(&option) => writeln!(out, "#{key} = []")?,
            None => {
                let name = option.get_value_names().and_then(<[_]>::first);
                writeln!(out, "# {key} = {}", name.map_or("VALUE", |name| name.as_str()))?;
            }
        }
    }
    out.extend(include_str!("overload.toml").bytes());
    Ok(())
}

/// Every option that a file may hold, once, with the commands that have it; those of the daemon
/// first.
fn options() -> Vec<(Vec<String>, Arg)> {
    let mut command = Cli::command();
    command.build();
    let mut commands: Vec<&Command> = command.get_subcommands().filter(reads_file).collect();
    commands.sort_by_key(|command| command.get_name() != "run");
    let mut all: Vec<(Vec<String>, Arg)> = Vec::new();
    for command in commands {
        for option in command.get_arguments().filter(|option| !option.is_global_set()) {
            let name = command.get_name().to_owned();
            let Some(long) = option.get_long().filter(|long| !NEVER_IN_FILE.contains(long)) else {
                continue;
            };
            match all.iter_mut().find(|(_, known)| known.get_long() == Some(long)) {
                Some((commands, _)) => commands.push(name),
                None => all.push((vec![name], option.clone())),
            }
        }
    }
    all
}

/// Whether a command has its options from a file, too.
fn reads_file(command: &&Command) -> bool {
    command.get_arguments().any(|option| option.get_id() == "config")
}

/// `audit, explain`, where the daemon does not have it.
fn elsewhere(commands: &[String]) -> Option<String> {
    commands.iter().all(|name| name != "run").then(|| commands.join(", "))
}

fn help(option: &Arg) -> String {
    option.get_help().map(|help| help.to_string()).unwrap_or_default()
}

fn is_list(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Append) || option.get_value_delimiter().is_some()
}

/// The default as TOML has it.
fn default(option: &Arg) -> Option<String> {
    if matches!(option.get_action(), ArgAction::SetTrue) {
        return Some("false".to_owned());
    }
    let values: Vec<String> =
        option.get_default_values().iter().map(|value| value.to_string_lossy().into()).collect();
    let scalar = |value: &str| match value.parse::<u64>() {
        Ok(number) => number.to_string(),
        Err(_) => format!("\"{value}\""),
    };
    match values.as_slice() {
        [] => None,
        [one] if is_list(option) => {
            let items: Vec<_> = one.split(',').map(scalar).collect();
            Some(format!("[{}]", items.join(", ")))
        }
        [one] => Some(scalar(one)),
        many => {
            Some(format!("[{}]", many.iter().map(|one| scalar(one)).collect::<Vec<_>>().join(", ")))
        }
    }
}

fn roff(text: &str) -> String {
    text.replace('\\', "\\\\").replace('-', "\\-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_on_disk_is_the_one_that_the_parser_gives() {
        let written = include_str!("../../etc/ctkeep.toml.example");
        assert!(
            page(Page::Example).unwrap() == written,
            "write it anew: ctkeep man ctkeep.toml.example > etc/ctkeep.toml.example"
        );
    }

    #[test]
    fn every_option_of_every_command_is_in_its_page() {
        let manual = page(Page::Ctkeep).unwrap().replace("\\-", "-");
        let file = page(Page::Configuration).unwrap().replace("\\-", "-");
        let mut command = Cli::command();
        command.build();
        for subcommand in command.get_subcommands().filter(|command| command.get_name() != "help") {
            assert!(manual.contains(&subcommand.get_name().to_uppercase()));
            for long in subcommand.get_arguments().filter_map(Arg::get_long) {
                assert!(manual.contains(&format!("--{long}")), "--{long} is not in ctkeep(8)");
                if !reads_file(&subcommand) {
                    continue;
                }
                let of_file = !NEVER_IN_FILE.contains(&long) && long != "verbose";
                assert_eq!(
                    file.contains(&format!(".B {long}\n")),
                    of_file,
                    "{long} in ctkeep.toml(5)"
                );
            }
        }
    }

    #[test]
    fn the_example_is_accepted_with_every_line_in_force() {
        let example = page(Page::Example).unwrap();
        let is_key =
            |line: &str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
        let live: String = example
            .lines()
            .map(|line| if is_key(line) { line.trim_start_matches('#') } else { line })
            .map(|line| format!("{line}\n"))
            .collect();
        for command in ["run", "audit", "reconcile"] {
            let args = ["ctkeep", command, "--config", "ctkeep.toml"];
            let matches = super::super::config::matches(args.map(Into::into), |_| Ok(live.clone()));
            assert!(matches.is_ok(), "{command}");
        }
    }
}
