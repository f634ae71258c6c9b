//! `ctkeep top`: the live table, or one look as text or JSON.

use std::env;
use std::io::{self, IsTerminal};
use std::process::Command;
use std::time::SystemTime;

use serde_json::json;

use super::Exit;
use super::args::{Format, Top};
use super::output;
use crate::error::Result;
use crate::flow::FourTuple;
use crate::host::netns::Namespace;
use crate::top::model::Model;
use crate::top::rows::{Seen, Totals};
use crate::top::terminal::{self, Means, Order};
use crate::top::{frame, look};

pub(super) fn run(args: &Top) -> Result<Exit> {
    let namespace = args.scope.namespace()?;
    let policy = args.scope.policy();
    let look = |asks| {
        #[allow(clippy::disallowed_methods, reason = "a command may read the clock")]
        namespace.run(|| look(namespace.name(), &policy, asks, SystemTime::now()))
    };
    if args.once || args.output.format == Format::Json || !io::stdout().is_terminal() {
        print(args, &look(false)?)?;
        return Ok(Exit::Done);
    }
    let model = model(args);
    let orders = |order| look(order == Order::Ask);
    terminal::run(model, means(), Some(args.interval), orders, |flow| explain(&namespace, flow))?;
    Ok(Exit::Done)
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
fn explain(namespace: &Namespace, flow: FourTuple) -> Vec<String> {
    let explained = env::current_exe().and_then(|program| {
        let mut command = Command::new(program);
        command.arg("explain").arg(flow.src.to_string()).arg(flow.dst.to_string());
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
            "fold": args.fold,
            "guarded": seen.is_guarded,
            "defence_level": seen.level,
            "table": {"entries": seen.table.0, "maximum": seen.table.1},
            "totals": totals,
            "rows": rows,
        }));
    }
    output::text(&frame::text(&rows, args.fold.name(), args.output.no_header))
}
