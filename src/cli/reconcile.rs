//! `ctkeep reconcile`: one repair pass.

use std::time::Instant;

use serde_json::json;

use super::Exit;
use super::args::{Format, Reconcile};
use super::output::{self, Rows};
use crate::error::Result;
use crate::reconcile::apply::{Outcome, apply};
use crate::reconcile::confirm::{Confirmed, confirm};
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::plan::{Action, Rest, Verdict, plan, verdict};
use crate::reconcile::pressure::Defence;
use crate::recount::{Mode, Recounter};
use crate::sockdiag::{State, States};

/// Beside the daemon's own, which may be there.
const DEVICE: &str = "ctkeep1";

pub(super) fn run(args: &Reconcile) -> Result<Exit> {
    let mut policy = args.scope.policy();
    policy.force = args.force;
    let mut exit = Exit::Done;
    for namespace in args.scope.namespaces()? {
        let (done, untracked, outcomes) = namespace.run(|| {
            let mut tables = Tables::open()?;
            let mode = if args.dry_run { Mode::Off } else { args.recount };
            let mut recounter = Recounter::open(mode, DEVICE, Instant::now())?;
            let scope = tables.scope(&policy)?;
            let open = States::from_iter([State::Established, State::CloseWait]);
            let snapshot = tables.whole(&scope, &policy, open)?;
            let mut ledger = Ledger::new(Defence::Auto, policy.zone);
            ledger.note(&snapshot);
            let untracked = snapshot
                .views
                .iter()
                .filter(|view| {
                    let verdict = verdict(view, &snapshot.evidence, &scope, &policy, &ledger);
                    verdict == Verdict::Leave(Rest::Untracked)
                })
                .count();
            let mut planned = plan(&snapshot, &scope, &policy, &ledger);
            planned.actions.sort_by_key(|action| action.view.flow);
            let confirmed =
                confirm(&mut tables, &planned, &snapshot.evidence, &scope, &policy, &ledger)?;
            let outcomes = if args.dry_run {
                Vec::new()
            } else {
                let now = Instant::now();
                apply(&mut tables, &mut recounter, &confirmed, &policy, &mut ledger, now)?
            };
            Ok((confirmed, untracked, outcomes))
        })?;
        print(args, namespace.name(), &done, &outcomes)?;
        if untracked > 0 {
            eprintln!(
                "ctkeep: left {untracked} open connections without an entry alone: no sign that \
                 they were ever tracked (--force re-inserts them)"
            );
        }
        if args.dry_run && !done.actions().is_empty() {
            exit = Exit::Disagreement;
        }
        if outcomes.iter().any(|outcome| outcome.result.is_err()) {
            exit = Exit::Incomplete;
        }
    }
    Ok(exit)
}

fn print(args: &Reconcile, netns: &str, confirmed: &Confirmed, outcomes: &[Outcome]) -> Result<()> {
    let results: Vec<Option<&Outcome>> = if args.dry_run {
        confirmed.actions().iter().map(|_| None).collect()
    } else {
        outcomes.iter().map(Some).collect()
    };
    let rows = confirmed.actions().iter().zip(results);
    match args.output.format {
        Format::Json => {
            let actions: Vec<_> =
                rows.map(|(action, outcome)| action_json(action, outcome)).collect();
            output::line(&json!({
                "schema": 1, "netns": netns, "dry_run": args.dry_run, "actions": actions,
            }))
        }
        Format::Table => {
            let headings = ["ACTION", "REMOTE", "LOCAL", "REASON", "RESULT"];
            let row = |(action, outcome): (&Action, Option<&Outcome>)| {
                vec![
                    action.kind.to_string(),
                    action.view.flow.dst.to_string(),
                    action.view.flow.src.to_string(),
                    action.reason.to_string(),
                    outcome.map_or("planned".to_owned(), result_text),
                ]
            };
            if confirmed.actions().is_empty() {
                return output::text("nothing to repair\n");
            }
            let rows = rows.map(row).collect();
            output::text(&output::table(&headings, rows, Rows::Whole, args.output.no_header))
        }
    }
}

fn result_text(outcome: &Outcome) -> String {
    match (&outcome.result, &outcome.recount) {
        (Err(error), _) => error.cause.to_string(),
        (Ok(()), Some(Err(error))) => format!("done, not recounted: {}", error.cause),
        (Ok(()), Some(Ok(route))) => format!("done, recounted by {route}"),
        (Ok(()), None) => "done".to_owned(),
    }
}

fn action_json(action: &Action, outcome: Option<&Outcome>) -> serde_json::Value {
    json!({
        "action": action.kind.name(),
        "local": action.view.flow.src.to_string(),
        "remote": action.view.flow.dst.to_string(),
        "reason": action.reason.to_string(),
        "zone": action.template.zone.id(),
        "error": outcome.and_then(|o| o.result.as_ref().err()).map(|e| e.to_string()),
        "recount": outcome
            .and_then(|o| o.recount.as_ref())
            .and_then(|r| r.as_ref().ok())
            .map(|route| route.to_string()),
    })
}
