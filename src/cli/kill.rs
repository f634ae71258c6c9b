//! `ctkeep kill`: closes sockets, or prints which it would.

use serde_json::{Value, json};

use super::Exit;
use super::args::{Format, Kill};
use super::output::{self, Rows};
use crate::error::Result;
use crate::kill::choose::{Age, Candidate};
use crate::kill::{Fate, Found, Killer, peer_gets_reset};

pub(super) fn run(args: &Kill) -> Result<Exit> {
    let policy = args.policy();
    let mut exit = Exit::Done;
    for namespace in args.namespaces()? {
        let (found, fates) = namespace.run(|| {
            let mut killer = Killer::open(args.which())?;
            let found = killer.find(&policy)?;
            let mut fates = Vec::new();
            if args.yes {
                for candidate in &found.choice.chosen {
                    fates.push(killer.close(&candidate.socket)?);
                }
            }
            Ok((found, fates))
        })?;
        if fates.iter().any(|fate| matches!(fate, Fate::Refused(_))) {
            exit = Exit::Incomplete;
        }
        print(args, namespace.name(), &found, &fates)?;
    }
    Ok(exit)
}

fn print(args: &Kill, netns: &str, found: &Found, fates: &[Fate]) -> Result<()> {
    let Found { choice, unseen, unread } = found;
    if *unseen > 0 {
        eprintln!("ctkeep: left {unseen} sockets alone whose process cannot be seen");
    }
    if *unread > 0 {
        eprintln!("ctkeep: {unread} processes and namespaces could not be looked into");
    }
    let rows = choice.chosen.iter().enumerate().map(|(index, it)| (it, fates.get(index)));
    if args.output.format == Format::Json {
        return output::line(&json!({
            "schema": 1,
            "netns": netns,
            "dry_run": !args.yes,
            "max": args.max,
            "left_out": choice.left_out,
            "unseen": unseen,
            "sockets": rows.map(|(candidate, fate)| row_json(candidate, fate)).collect::<Vec<_>>(),
        }));
    }
    if choice.chosen.is_empty() {
        return output::text("no such socket\n");
    }
    let headings = ["STATE", "REMOTE", "LOCAL", "AGE", "PROCESS", "PEER GETS", "RESULT"];
    let rows = rows.map(|(candidate, fate)| row(candidate, fate)).collect();
    let mut text = output::table(&headings, rows, Rows::Whole, args.output.no_header);
    if choice.left_out > 0 {
        text.push_str(&format!("and {} more (--max {})\n", choice.left_out, args.max));
    }
    if !args.yes {
        text.push_str("nothing was closed: --yes closes these\n");
    }
    output::text(&text)
}

fn row(candidate: &Candidate, fate: Option<&Fate>) -> Vec<String> {
    let socket = &candidate.socket;
    let holder = candidate.holder.as_ref();
    let process = holder.map_or("-".to_owned(), ToString::to_string);
    vec![
        socket.state.to_string(),
        socket.remote.to_string(),
        socket.local.to_string(),
        candidate.age.map_or("-".to_owned(), age_text),
        process,
        if peer_gets_reset(socket) { "RST" } else { "nothing" }.to_owned(),
        result_text(fate),
    ]
}

/// `10m 3s` as the daemon has it, `at least 3s` as the socket proves it.
fn age_text(age: Age) -> String {
    let time = humantime::format_duration(std::time::Duration::from_secs(age.time.as_secs()));
    if age.is_of_daemon { time.to_string() } else { format!("at least {time}") }
}

fn result_text(fate: Option<&Fate>) -> String {
    match fate {
        None => "would be closed".to_owned(),
        Some(Fate::Closed) => "closed".to_owned(),
        Some(Fate::Gone) => "gone already".to_owned(),
        Some(Fate::Changed(state)) => format!("left alone: {state}, and not as asked for any more"),
        Some(Fate::Refused(error)) => format!("refused: {}", error.cause),
    }
}

fn row_json(candidate: &Candidate, fate: Option<&Fate>) -> Value {
    let Candidate { socket, age, holder } = candidate;
    let holder = holder.as_ref();
    json!({
        "local": socket.local.to_string(),
        "remote": socket.remote.to_string(),
        "state": socket.state.name(),
        "age_seconds": age.map(|age| age.time.as_secs()),
        "age_from": age.map(|age| if age.is_of_daemon { "daemon" } else { "socket" }),
        "pid": holder.map(|holder| holder.pid),
        "command": holder.map(|holder| &holder.command),
        "container": holder.and_then(|holder| holder.container.as_ref()),
        "peer_gets": if peer_gets_reset(socket) { "rst" } else { "nothing" },
        "result": fate.map(|fate| match fate {
            Fate::Closed => "closed",
            Fate::Gone => "gone",
            Fate::Changed(_) => "changed",
            Fate::Refused(_) => "refused",
        }),
        "error": fate.and_then(|fate| match fate {
            Fate::Refused(error) => Some(error.to_string()),
            _ => None,
        }),
    })
}
