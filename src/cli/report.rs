//! `ctkeep report`: one file for a bug report.

use std::hash::RandomState;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use super::args::Report;
use super::audit::text;
use super::{Exit, history, output};
use crate::audit::look::Seen;
use crate::audit::report::{self, Request};
use crate::doctor::examine;
use crate::error::{Error, Result};
use crate::firewall::Family;
use crate::history::{now, store};
use crate::host::instance;
use crate::reconcile::policy::Policy;
use crate::report::anonymous::Anonymous;
use crate::report::file::{ARRIVALS, BESIDE, ENTRIES, File, RULES, SOCKETS};
use crate::report::host::{self, CONNECTIONS, Tables};
use crate::report::rules;
use crate::report::tables::{self, Beside};

/// The file of the service.
const SETTINGS: &str = "/etc/ctkeep/ctkeep.toml";
/// Seconds of the history.
const HOUR: u64 = 3600;

pub(super) fn run(args: &Report) -> Result<Exit> {
    let policy = args.scope.policy();
    let namespace = args.scope.namespace()?;
    let (file, exit) = namespace.run(|| Ok(collect(args, namespace.name(), &policy)))?;
    let text = file.text();
    let text = if args.anonymous { Anonymous::text(RandomState::new(), &text) } else { text };
    output::text(&text)?;
    Ok(exit)
}

/// What cannot be had says why in its place: the rest is wanted all the more.
fn collect(args: &Report, netns: &str, policy: &Policy) -> (File, Exit) {
    #[allow(clippy::disallowed_methods, reason = "a command may read the clock")]
    let clock = SystemTime::now();
    let mut exit = Exit::Done;
    let mut failed = |error: &Error| {
        exit = super::exit_of(error);
        error.to_string()
    };
    let mut file = File::default();
    file.say("made", humantime::format_rfc3339_seconds(clock).to_string());
    file.say("ctkeep", env!("CARGO_PKG_VERSION"));
    if let Ok(name) = nix::sys::utsname::uname() {
        file.say("kernel", name.release().to_string_lossy());
        file.say("machine", name.machine().to_string_lossy());
    }
    file.say("addresses", if args.anonymous { "replaced one for one" } else { "as they are" });
    let tables = Tables::read(CONNECTIONS).map_err(|error| failed(&error));
    if let Ok(tables) = &tables
        && tables.one_of > 1
    {
        file.note(format!(
            "the tables are too large for a report: one of {} connections is in it, and sources \
             hold so many times more",
            tables.one_of
        ));
    }
    let looked = Seen::look(netns, policy).map_err(|error| failed(&error));
    file.add("settings", Ok(settings(args.scope.config.as_deref())));
    file.add("daemon", Ok(daemon()));
    file.add(
        "doctor",
        Ok(plain(&output::findings(
            &examine(policy, false, Instant::now(), clock).findings,
            false,
        ))),
    );
    let arrivals = looked
        .as_ref()
        .map(|(seen, _)| seen.arrivals.iter().filter_map(tables::arrival_line).collect::<String>());
    file.add(ARRIVALS, Ok(arrivals.unwrap_or_default()));
    let read = looked.as_ref().map(|(seen, _)| rules::lines(&seen.rules)).map_err(Clone::clone);
    let beside: String = looked.iter().map(|(seen, _)| beside(seen)).collect();
    file.add(
        "audit",
        looked.map(|(seen, scope)| {
            let request = Request { limit: None, mask: None, mask6: None, now: clock };
            plain(&text::text(
                &report::Report::of(seen, &scope, policy, request),
                false,
                None,
                false,
            ))
        }),
    );
    file.add("history", last_hour(&args.dir));
    file.add(RULES, read);
    file.add("nft list ruleset", host::printed("nft", &["list", "ruleset"]));
    for program in ["iptables-nft-save", "ip6tables-nft-save"] {
        file.add(program, host::printed(program, &[]));
    }
    for family in [Family::Ip, Family::Ip6] {
        let section = if family == Family::Ip { "iptables" } else { "ip6tables" };
        file.add(&format!("{section}-legacy-save"), host::legacy(family));
    }
    let of = |part: fn(&Tables) -> String| tables.as_ref().map(part).map_err(Clone::clone);
    file.add(SOCKETS, of(|tables| tables.sockets.clone()));
    file.add(ENTRIES, of(|tables| tables.entries.clone()));
    file.add(BESIDE, of(|tables| tables.beside.clone()).map(|of_tables| of_tables + &beside));
    (file, exit)
}

/// Connections of which no entry shows that this host has opened them; addresses of containers.
fn beside(seen: &Seen) -> String {
    let opened = seen.snapshot.evidence.opened_here.iter().copied().map(Beside::OpenedHere);
    let all = opened.chain(seen.behind.iter().copied().map(Beside::Behind));
    let all = all.chain(seen.links.iter().cloned().map(Beside::Device));
    all.map(|it| format!("{}\n", tables::beside_line(&it))).collect()
}

fn settings(named: Option<&Path>) -> String {
    let path = named.map_or_else(|| PathBuf::from(SETTINGS), Path::to_owned);
    let text = host::without_comments(&path).unwrap_or_else(|error| format!("{error}\n"));
    text + &host::sysctls()
}

fn daemon() -> String {
    let told = instance::ask("ctkeep");
    let answer = match told.level {
        Some(level) => format!(
            "answers: level {level}, holds {} sockets, {} half-closed, repaired {} in the last minute, \
             shield {}, containers {}\n",
            told.ages.len(),
            told.half_closed.len(),
            told.repairs.values().sum::<u64>(),
            if told.shield.is_some() { "up" } else { "not up" },
            told.containers.map_or("unknown", |are| if are { "yes" } else { "no" }),
        ),
        None => "none answers in this namespace\n".to_owned(),
    };
    host::daemons() + &answer
}

fn last_hour(dir: &Path) -> std::result::Result<String, String> {
    let (records, _) = store::read(dir).map_err(|error| history::none(dir, &error))?;
    let rows =
        history::rows(history::since(&records, now().saturating_sub(HOUR)), usize::MAX, |_| true);
    Ok(history::table(rows, false))
}

/// Without what a terminal makes colours of.
fn plain(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
}
