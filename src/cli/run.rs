//! `ctkeep run`.

use std::ffi::OsString;
use std::fs;
use std::time::Duration;

use super::args::{Check, Command, Run};
use super::{Exit, output};
use crate::daemon::{self, Foundation, Live, Settings};
use crate::error::{Error, Result};
use crate::reconcile::policy::Policy;

pub(super) fn run(args: Run) -> Result<Exit> {
    daemon::run(settings(args)?, || match super::arguments()? {
        Command::Run(args) => settings(args),
        _ => Err(Error::usage("reload", "the command line is another one")),
    })?;
    Ok(Exit::Done)
}

/// `ctkeep check`: whether `ctkeep run --config FILE` would take the file.
pub(super) fn check(args: &Check) -> Result<Exit> {
    let typed = ["ctkeep", "run", "--config"].map(OsString::from);
    let typed = typed.into_iter().chain([args.file.clone().into_os_string()]);
    if let Command::Run(run) = super::parse(typed, |path| fs::read_to_string(path))? {
        settings(run)?;
    }
    output::text(&format!("{}: good\n", args.file.display()))?;
    Ok(Exit::Done)
}

fn settings(args: Run) -> Result<Settings> {
    // Renewed when half is left, found at a sweep, by timeouts in whole seconds.
    let least = args.sweep_interval * 2 + Duration::from_secs(1);
    if args.scope.lease < least {
        return Err(Error::usage(
            "--lease",
            format!(
                "{} is too short for a sweep every {}: entries would expire between two sweeps; \
                 at least {} is needed",
                humantime::format_duration(args.scope.lease),
                humantime::format_duration(args.sweep_interval),
                humantime::format_duration(least),
            ),
        ));
    }
    // A port on the loopback address alone has no peers that count.
    let own = args.metrics_listen.0.filter(|listen| listen.ip().is_loopback());
    let own_port = own.map(|listen| listen.port());
    let policy = Policy { reap: args.reap, own_port, ..args.scope.policy() };
    Ok(Settings {
        foundation: Foundation {
            recount: args.recount,
            device: args.device,
            events: args.events,
            follow_rules: args.follow_rules,
            nflog_group: args.nflog_group,
            shield: args.shield,
            shield_mark: args.shield_mark,
            dry_run: args.dry_run,
            defence: args.defence,
            realtime: args.realtime,
            metrics_listen: args.metrics_listen.0,
            history: args.history.dir(),
            history_room: args.history_room,
        },
        live: Live {
            policy,
            sweep_interval: args.sweep_interval,
            deep_interval: args.deep_interval,
            on_exit: args.on_exit,
            namespaces: args.scope.named(),
            containers: args.containers,
            outgoing: args.outgoing,
            overloads: args.overloads,
            metrics_textfile: args.metrics_textfile,
            status_addresses: args.status_addresses,
        },
    })
}
