//! `ctkeep recount`: shows the limits every open connection of theirs, once.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Exit;
use super::args::{Format, Recount};
use super::output::{self, Rows};
use super::reconcile::{DEVICE, Done, action_json};
use crate::error::Result;
use crate::firewall::Hook;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::{Anew, Lists, Loss};
use crate::host::random;
use crate::reconcile::apply::Outcome;
use crate::reconcile::keeper::{Depth, Keeper, Recounting, Settings};
use crate::reconcile::observe::Tables;
use crate::reconcile::policy::Policy;
use crate::reconcile::pressure::Defence;
use crate::reconcile::uncounted;
use crate::recount::Recounter;

/// What became of the connections of one source that one limit is for.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    open: usize,
    /// A packet of its own has passed the rules.
    sent: usize,
}

/// By the place of the limit and the source.
type Sources = BTreeMap<(String, IpAddr), Shown>;

pub(super) fn run(args: &Recount) -> Result<Exit> {
    let policy = args.scope.policy();
    let mut exit = Exit::Done;
    for namespace in args.scope.namespaces()? {
        let (done, limits, unread) = namespace.run(|| pass(args, &policy))?;
        for what in unread {
            eprintln!("ctkeep: not recounted: {what}");
            exit = Exit::Incomplete;
        }
        print(args, namespace.name(), &done, &limits)?;
        if done.outcomes.iter().any(|outcome| !is_sent(outcome)) {
            exit = Exit::Incomplete;
        }
    }
    Ok(exit)
}

/// First the repairs of `ctkeep reconcile`, which bring connections back that are to be counted;
/// then every other connection that a limit is for.
fn pass(args: &Recount, policy: &Policy) -> Result<(Done, Vec<LimitRule>, Vec<String>)> {
    let now = Instant::now();
    let lists = Lists::read(None)?;
    let of_here = |rule: &&LimitRule| matches!(rule.hook, Hook::Prerouting | Hook::Input);
    let limits: Vec<_> = lists.limits().filter(of_here).cloned().collect();
    let mut done = Done::default();
    if limits.is_empty() {
        return Ok((done, limits, lists.unread().to_vec()));
    }
    let recounter = if args.dry_run { None } else { Recounter::open(args.recount, DEVICE, now)? };
    let settings = Settings {
        policy: policy.clone(),
        sweep_interval: Duration::ZERO,
        deep_interval: Duration::ZERO,
        dry_run: args.dry_run,
    };
    let (tables, recounting) = (Tables::open()?, Recounting::by(recounter));
    let mut keeper = Keeper::new(tables, recounting, settings, Defence::Auto, now, random::bits)?;
    keeper.sweep(Depth::Deep, now, &mut done)?;
    let anew = limits.iter().map(|rule| Anew { rule: rule.clone(), loss: Loss::Unknown });
    keeper.limits_lost(anew.collect(), now, now);
    loop {
        let now = Instant::now();
        if !keeper.recount_is_due(now) {
            break;
        }
        keeper.recount(now, &mut done)?;
    }
    done.outcomes.retain(|outcome| outcome.action.kind.needs_recount());
    done.planned.retain(|action| action.kind.needs_recount());
    done.outcomes.sort_by_key(|outcome| outcome.action.view.flow);
    done.planned.sort_by_key(|action| action.view.flow);
    Ok((done, limits, lists.unread().to_vec()))
}

fn is_sent(outcome: &Outcome) -> bool {
    outcome.result.is_ok() && matches!(outcome.recount, Some(Ok(_)))
}

fn sources(done: &Done, limits: &[LimitRule]) -> Sources {
    let carried_out = done.outcomes.iter().map(|it| (&it.action, is_sent(it)));
    let mut all = Sources::new();
    for (action, is_sent) in done.planned.iter().map(|it| (it, false)).chain(carried_out) {
        for limit in limits
            .iter()
            .filter(|limit| uncounted::is_for(limit, action.view.flow, &action.template))
        {
            let key = (limit.place(), action.view.flow.dst.addr());
            let shown = all.entry(key).or_default();
            shown.open += 1;
            shown.sent += usize::from(is_sent);
        }
    }
    all
}

fn print(args: &Recount, netns: &str, done: &Done, limits: &[LimitRule]) -> Result<()> {
    let sources = sources(done, limits);
    match args.output.format {
        Format::Json => {
            let planned = done.planned.iter().map(|action| action_json(action, None));
            let carried_out =
                done.outcomes.iter().map(|outcome| action_json(&outcome.action, Some(outcome)));
            let sources = sources.iter().map(|((limit, source), shown)| {
                json!({
                    "limit": limit, "source": source, "open": shown.open, "sent": shown.sent,
                    "listed": null,
                })
            });
            output::line(&json!({
                "schema": 1, "netns": netns, "dry_run": args.dry_run,
                "limits": limits.iter().map(LimitRule::place).collect::<Vec<_>>(),
                "sources": sources.collect::<Vec<_>>(),
                "actions": planned.chain(carried_out).collect::<Vec<_>>(),
            }))
        }
        Format::Table => {
            if limits.is_empty() {
                return output::text("no limit in the rules: nothing to recount\n");
            }
            if sources.is_empty() {
                return output::text("no open connection that a limit is for\n");
            }
            let row = |((limit, source), shown): (&(String, IpAddr), &Shown)| {
                let result = match (args.dry_run, shown.open - shown.sent) {
                    (true, _) => "planned".to_owned(),
                    (false, 0) => "sent".to_owned(),
                    (false, failed) => format!("{failed} not sent"),
                };
                vec![
                    source.to_string(),
                    shown.open.to_string(),
                    shown.sent.to_string(),
                    limit.clone(),
                    result,
                ]
            };
            let headings = ["SOURCE", "OPEN", "SENT", "LIMIT", "RESULT"];
            let rows = sources.iter().map(row).collect();
            output::text(&output::table(&headings, rows, Rows::Whole, args.output.no_header))?;
            failures(done)
        }
    }
}

/// Why connections were not shown to their limit, each reason once.
fn failures(done: &Done) -> Result<()> {
    let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
    for outcome in done.outcomes.iter().filter(|outcome| !is_sent(outcome)) {
        let recount = outcome.recount.as_ref().and_then(|it| it.as_ref().err());
        let reason = match outcome.result.as_ref().err().or(recount) {
            Some(error) => error.cause.to_string(),
            None => "recount is off".to_owned(),
        };
        *reasons.entry(reason).or_default() += 1;
    }
    for (reason, count) in reasons {
        output::text(&format!("{count} not sent: {reason}\n"))?;
    }
    Ok(())
}
