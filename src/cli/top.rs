//! `ctkeep top`: the live table, or one look as text or JSON.

use std::env;
use std::io::{self, IsTerminal};
use std::process::Command;
use std::time::SystemTime;

use serde_json::json;

use super::args::{Format, Moment, Top};
use super::{Exit, history, output};
use crate::error::{Error, Result};
use crate::flow::Connection;
use crate::history::now;
use crate::history::record::Record;
use crate::host::netns::Namespace;
use crate::top::model::Model;
use crate::top::rows::{Seen, Totals};
use crate::top::terminal::{self, Means, Order};
use crate::top::{frame, look};

pub(super) fn run(args: &Top) -> Result<Exit> {
    if let Some(moment) = args.at {
        return past(args, moment);
    }
    let namespace = args.scope.namespace()?;
    let policy = args.scope.policy();
    let look = |asks| {
        #[allow(clippy::disallowed_methods, reason = "a command may read the clock")]
        namespace.run(|| look(namespace.name(), &policy, asks, SystemTime::now()))
    };
    if is_printed(args) {
        print(args, &look(false)?)?;
        return Ok(Exit::Done);
    }
    let orders = |order| look(order == Order::Ask);
    terminal::run(model(args), means(), Some(args.interval), orders, |flow| {
        explain(&namespace, flow)
    })?;
    Ok(Exit::Done)
}

/// The minutes of the past, one at a time.
fn past(args: &Top, moment: Moment) -> Result<Exit> {
    let (records, _) = history::read(&args.dir)?;
    let minutes: Vec<_> = records
        .into_iter()
        .filter_map(|record| match record {
            Record::Minute { at, netns, sources, .. } => Some((at, netns, sources)),
            _ => None,
        })
        .collect();
    let at = match moment {
        Moment::Time(at) => at,
        Moment::Clock(clock) => {
            let (now, day) = (now(), 86_400);
            let today = now - now % day + clock;
            if today > now { today.saturating_sub(day) } else { today }
        }
    };
    // The last one before it, else the first of all.
    let place = minutes.iter().rposition(|(of, ..)| *of <= at).unwrap_or(0);
    let seen = |place: usize| {
        let (at, netns, sources) = minutes.get(place).ok_or_else(|| {
            Error::usage("--at", format!("no minute is kept in {}", args.dir.display()))
        })?;
        let (netns, past) = (netns.clone(), sources.clone());
        Ok(Seen { at: history::time(*at), netns, past, ..Seen::default() })
    };
    if is_printed(args) {
        print(args, &seen(place)?)?;
        return Ok(Exit::Done);
    }
    let model = Model { is_past: true, ..model(args) };
    let mut place = place;
    let steps = |order| {
        if let Order::Step(by) = order {
            let by = isize::try_from(by).unwrap_or(0);
            place = place.saturating_add_signed(by).min(minutes.len().saturating_sub(1));
        }
        seen(place)
    };
    terminal::run(model, means(), None, steps, |_| Vec::new())?;
    Ok(Exit::Done)
}

/// Whether one look is printed, and no live table is shown.
fn is_printed(args: &Top) -> bool {
    args.once || args.output.format == Format::Json || !io::stdout().is_terminal()
}

fn model(args: &Top) -> Model {
    Model { fold: args.fold, sort: args.sort, filter: args.filter.clone(), ..Model::default() }
}

fn means() -> Means {
    let named = |name| env::var(name).ok().filter(|value: &String| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(named).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    Means {
        has_utf8: locale.contains("utf-8") || locale.contains("utf8"),
        has_colour: named("NO_COLOR").is_none() && named("TERM").as_deref() != Some("dumb"),
    }
}

/// The very command, as text.
fn explain(namespace: &Namespace, connection: Connection) -> Vec<String> {
    let explained = env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command.arg("explain").arg(connection.local.to_string()).arg(connection.remote.to_string());
        if !namespace.name().is_empty() {
            command.args(["--netns", namespace.name()]);
        }
        command.output()
    });
    match explained {
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            String::from_utf8_lossy(&text).lines().map(str::to_owned).collect()
        }
        Err(error) => vec![format!("ctkeep explain: {error}")],
    }
}

fn print(args: &Top, seen: &Seen) -> Result<()> {
    let mut rows = seen.rows(args.fold, &args.filter.1, args.sort, false);
    let totals = Totals::of(&rows);
    rows.truncate(args.top.unwrap_or(usize::MAX));
    if args.output.format == Format::Json {
        return output::line(&json!({
            "schema": 1,
            "generated_at": seen.at,
            "netns": seen.netns,
            "fold": args.fold.name(),
            "guarded": seen.is_guarded,
            "defence_level": seen.level,
            "table": {"entries": seen.table.0, "maximum": seen.table.1},
            "totals": totals,
            "rows": rows,
        }));
    }
    output::text(&frame::text(&rows, args.fold.name(), args.output.no_header))
}
