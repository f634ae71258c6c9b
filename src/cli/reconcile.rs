//! `ctkeep reconcile`: one repair pass.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Exit;
use super::args::{Format, Reconcile};
use super::output::{self, Rows};
use crate::containers;
use crate::error::Result;
use crate::firewall::Hook;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::Lists;
use crate::flow::Connection;
use crate::host::random;
use crate::reconcile::apply::Outcome;
use crate::reconcile::checks::{Checked, Counted};
use crate::reconcile::keeper::{Acted, Depth, Keeper, Settings, Trigger, Witness};
use crate::reconcile::observe::Tables;
use crate::reconcile::plan::{Action, NoAction, Verdict, verdict};
use crate::reconcile::policy::Policy;
use crate::reconcile::pressure::Defence;
use crate::reconcile::snapshot::View;
use crate::recount::{Mode, Recounter};
use crate::sockdiag::Socket;
use crate::watch::rules::{Heard, RuleEvents};

/// Beside the daemon's own, which may be there.
pub(super) const DEVICE: &str = "ctkeep1";

/// For so long what a limit does not count is shown to it again.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the pass did, or in a dry run would do.
#[derive(Default)]
pub(super) struct Done {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) planned: Vec<Action>,
    /// What limits said of what was shown to them, the newest last.
    pub(super) checked: Vec<Checked>,
}

impl Done {
    /// What limits said at last of this connection's source, at this endpoint.
    fn counted(&self, of: Connection) -> Counted {
        let is_it = |one: &&Checked| (one.source, one.local) == (of.remote.addr(), of.local);
        self.checked.iter().rev().find(is_it).map_or(Counted::Unknown, |one| one.counted)
    }
}

impl Witness for Done {
    fn seen(&mut self, _ports: &HashSet<u16>, _half_closed: Option<&[Socket]>) {}

    fn acted(&mut self, acted: Acted) {
        self.outcomes.extend(acted.outcomes);
    }

    fn planned(&mut self, actions: &[Action], _trigger: Trigger) {
        self.planned.extend(actions);
    }

    fn checked(&mut self, checked: Checked) {
        self.checked.push(checked);
    }
}

pub(super) fn run(args: &Reconcile) -> Result<Exit> {
    let mut policy = args.scope.policy();
    policy.force = args.force;
    let mut exit = Exit::Done;
    for namespace in args.scope.namespaces()? {
        let (done, untracked) = namespace.run(|| pass(args, &policy))?;
        print(args, namespace.name(), &done)?;
        if untracked > 0 {
            eprintln!(
                "ctkeep: left {untracked} open connections without an entry alone: no sign that \
                 they were ever tracked (--force re-inserts them)"
            );
        }
        if !done.planned.is_empty() {
            exit = Exit::Disagreement;
        }
        if done.outcomes.iter().any(|outcome| outcome.result.is_err()) {
            exit = Exit::Incomplete;
        }
    }
    Ok(exit)
}

/// One deep sweep, and how many open connections it left alone for want of evidence.
fn pass(args: &Reconcile, policy: &Policy) -> Result<(Done, usize)> {
    let now = Instant::now();
    // Before they are read, so that no change is between the two.
    let mut events = RuleEvents::open()?;
    let lists = Lists::read(None).unwrap_or_default();
    let mut keeper = keeper(policy, args.recount, args.dry_run, &lists, now)?;
    let mut done = Done::default();
    let sweep = keeper.sweep(Depth::Deep, now, &mut done)?;
    make_sure(&mut keeper, &mut events, &mut done)?;
    done.outcomes.sort_by_key(|outcome| outcome.action.view.connection);
    done.planned.sort_by_key(|action| action.view.connection);
    let (_, scope, policy, ledger) = keeper.parts();
    let evidence = &sweep.snapshot.evidence;
    let is_untracked = |view: &View| {
        let verdict = verdict(view, evidence, scope, policy, ledger);
        let is_alone = matches!(verdict, Verdict::Leave(NoAction::Untracked | NoAction::LeftOut));
        is_alone && view.entry.is_none()
    };
    Ok((done, sweep.snapshot.views.iter().filter(is_untracked).count()))
}

/// What makes one pass in the namespace of the calling thread: it knows its containers, and the limits
/// that count its own sockets.
pub(super) fn keeper(
    policy: &Policy,
    recount: Mode,
    dry_run: bool,
    lists: &Lists,
    now: Instant,
) -> Result<Keeper> {
    let mode = if dry_run { Mode::Off } else { recount };
    let recounter = Recounter::open(mode, DEVICE, now)?;
    let settings = Settings {
        policy: policy.clone(),
        sweep_interval: Duration::ZERO,
        deep_interval: Duration::ZERO,
        dry_run,
    };
    let mut tables = Tables::open()?;
    containers::join(&mut tables.sockets)?;
    tables.tracking = lists.tracking().map(Arc::new);
    let defence = Defence::Auto;
    let mut keeper = Keeper::new(tables, recounter, settings, defence, now, random::bits)?;
    let is_of_here = |rule: &LimitRule| matches!(rule.hook, Hook::Prerouting | Hook::Input);
    keeper.know_limits(lists.limited(is_of_here));
    Ok(keeper)
}

/// Asks the limits that are reached whether they count what was shown to them, and shows them again
/// what they do not, for a while.
pub(super) fn make_sure(
    keeper: &mut Keeper,
    events: &mut RuleEvents,
    done: &mut Done,
) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut heard = Heard::default();
    let mut as_read = || {
        heard.add(events.drain("ctkeep")?);
        Ok(events.hears_nft() && heard.leaves_rules())
    };
    let mut again = Done::default();
    while let Some(due) = keeper.next_check().filter(|due| *due < end) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        keeper.check(Instant::now(), &mut as_read, &mut again)?;
        while let Some(due) = keeper.next_recount() {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            keeper.recount(Instant::now(), &mut again)?;
        }
    }
    done.checked.append(&mut again.checked);
    Ok(())
}

fn print(args: &Reconcile, netns: &str, done: &Done) -> Result<()> {
    let carried_out = done.outcomes.iter().map(|outcome| (&outcome.action, Some(outcome)));
    let rows: Vec<_> =
        done.planned.iter().map(|action| (action, None)).chain(carried_out).collect();
    match args.output.format {
        Format::Json => {
            let actions: Vec<_> =
                rows.into_iter().map(|(action, outcome)| action_json(action, outcome)).collect();
            output::line(&json!({
                "schema": 1, "netns": netns, "dry_run": args.dry_run, "actions": actions,
            }))
        }
        Format::Table => {
            let headings = ["ACTION", "REMOTE", "LOCAL", "REASON", "RESULT"];
            let row = |(action, outcome): (&Action, Option<&Outcome>)| {
                vec![
                    action.kind.to_string(),
                    action.view.connection.remote.to_string(),
                    action.view.connection.local.to_string(),
                    action.reason.to_string(),
                    outcome.map_or("planned".to_owned(), |it| result_text(it, done)),
                ]
            };
            if rows.is_empty() {
                return output::text("nothing to repair\n");
            }
            let rows = rows.into_iter().map(row).collect();
            output::text(&output::table(&headings, rows, Rows::Whole, args.output.no_header))
        }
    }
}

fn result_text(outcome: &Outcome, done: &Done) -> String {
    let counted = done.counted(outcome.action.view.connection);
    match (&outcome.result, &outcome.recount) {
        (Err(error), _) => error.cause.to_string(),
        (Ok(()), Some(Err(error))) => format!("done, not recounted: {}", error.cause),
        (Ok(()), Some(Ok(route))) => match counted {
            Counted::Yes => format!("done, recounted by {route}"),
            Counted::No => format!("done, sent by {route}, not counted"),
            Counted::Unknown => format!("done, sent by {route}"),
        },
        (Ok(()), None) => "done".to_owned(),
    }
}

pub(super) fn action_json(action: &Action, outcome: Option<&Outcome>) -> serde_json::Value {
    json!({
        "action": action.kind.name(),
        "local": action.view.connection.local.to_string(),
        "remote": action.view.connection.remote.to_string(),
        "reason": action.reason.to_string(),
        "zone": action.template.zone.id(),
        "error": outcome.and_then(|o| o.result.as_ref().err()).map(|e| e.to_string()),
        "recount": outcome
            .and_then(|o| o.recount.as_ref())
            .and_then(|r| r.as_ref().ok())
            .map(|route| route.to_string()),
    })
}
