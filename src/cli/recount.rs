//! `ctkeep recount`: shows the limits every open connection of theirs, once.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::thread;
use std::time::Instant;

use serde_json::json;

use super::Exit;
use super::args::{Format, Recount};
use super::output::{self, Rows};
use super::reconcile::{Done, action_json, keeper, make_sure};
use crate::audit::arrivals::arrivals;
use crate::audit::asked::Asker;
use crate::audit::plays::Plays;
use crate::containers;
use crate::error::Result;
use crate::firewall::limits::{LimitRule, Limiter};
use crate::firewall::lists::{Anew, Lists, Loss};
use crate::firewall::{Hook, Key, Ruleset};
use crate::reconcile::apply::Outcome;
use crate::reconcile::keeper::Depth;
use crate::reconcile::policy::Policy;
use crate::reconcile::snapshot::View;
use crate::reconcile::uncounted;
use crate::sockdiag::SockDiag;
use crate::watch::rules::RuleEvents;

/// Sources whose limits are asked at the end, a tenth of a second each.
const SOURCES: usize = 100;

/// What became of the connections of one source that one limit is for.
#[derive(Clone, Copy, Debug, Default)]
struct Shown {
    open: usize,
    /// A packet of its own has passed the rules.
    sent: usize,
    /// How many the list of the limit holds now, and whether it is full.
    listed: Option<(u32, bool)>,
    /// Nothing but this source's connections is counted there.
    is_alone: bool,
}

impl Shown {
    /// How many the limit does not count, though they were sent; `None` where that is not known.
    fn lacking(&self) -> Option<usize> {
        let (listed, is_full) = self.listed?;
        let listed = usize::try_from(listed).unwrap_or(usize::MAX);
        match (is_full, self.is_alone) {
            (true, _) => Some(0),
            (false, true) => Some(self.open.saturating_sub(listed)),
            // Those of others may stand there in their place.
            (false, false) => None,
        }
    }
}

/// By the place of the limit and the source.
type Sources = BTreeMap<(String, IpAddr), Shown>;

pub(super) fn run(args: &Recount) -> Result<Exit> {
    let policy = args.scope.policy();
    let mut exit = Exit::Done;
    for namespace in args.scope.namespaces()? {
        let (sources, done, limits, unread, unasked) = namespace.run(|| {
            let (done, limits, unread) = pass(args, &policy)?;
            let mut sources = sources(&done, &limits);
            let asked = if args.dry_run { Ok(()) } else { ask(&mut sources, &done) };
            Ok((sources, done, limits, unread, asked.err()))
        })?;
        if let Some(error) = unasked {
            eprintln!("ctkeep: limits not asked what they count now: {error}");
            exit = Exit::Incomplete;
        }
        for what in unread {
            eprintln!("ctkeep: not recounted: {what}");
            exit = Exit::Incomplete;
        }
        print(args, namespace.name(), &sources, &done, &limits)?;
        let is_lacking = sources.values().any(|shown| shown.lacking() > Some(0));
        if is_lacking || done.outcomes.iter().any(|outcome| !is_sent(outcome)) {
            exit = Exit::Incomplete;
        }
    }
    Ok(exit)
}

/// First the repairs of `ctkeep reconcile`, which bring connections back that are to be counted;
/// then every other connection that a limit is for.
fn pass(args: &Recount, policy: &Policy) -> Result<(Done, Vec<LimitRule>, Vec<String>)> {
    let now = Instant::now();
    // Before they are read, so that no change is between the two.
    let mut events = RuleEvents::open()?;
    let lists = Lists::read(None)?;
    let of_here =
        |rule: &&LimitRule| matches!(rule.hook, Hook::Prerouting | Hook::Input | Hook::Forward);
    let limits: Vec<_> = lists.limits().filter(of_here).cloned().collect();
    let mut done = Done::default();
    if limits.is_empty() {
        return Ok((done, limits, lists.unread().to_vec()));
    }
    let mut keeper = keeper(policy, args.recount, args.dry_run, &lists, now)?;
    keeper.sweep(Depth::Deep, now, &mut done)?;
    let anew = limits.iter().map(|rule| Anew { rule: rule.clone(), loss: Loss::Unknown });
    keeper.limits_lost(anew.collect(), now, now);
    while let Some(due) = keeper.next_recount() {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        keeper.recount(Instant::now(), &mut done)?;
    }
    make_sure(&mut keeper, &mut events, &mut done)?;
    done.outcomes.retain(|outcome| outcome.action.kind.needs_recount());
    done.planned.retain(|action| action.kind.needs_recount());
    done.outcomes.sort_by_key(|outcome| outcome.action.view.connection);
    done.planned.sort_by_key(|action| action.view.connection);
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
            .filter(|limit| uncounted::is_for(limit, action.view.connection, &action.template))
        {
            let key = (limit.place(), action.client());
            let shown = all.entry(key).or_default();
            shown.open += 1;
            shown.sent += usize::from(is_sent);
        }
    }
    all
}

/// Has the limits say how many connections of each source they hold now, where they can be asked.
///
/// # Errors
/// None of them can.
fn ask(sources: &mut Sources, done: &Done) -> Result<()> {
    if done.outcomes.is_empty() {
        return Ok(());
    }
    let (rules, now) = (Ruleset::read(), Instant::now());
    let limiter = Limiter::of(&rules);
    let views = done.outcomes.iter().map(|outcome| outcome.action.view);
    let mut sockets = SockDiag::open()?;
    containers::join(&mut sockets)?;
    let all = done.outcomes.iter().map(|outcome| outcome.action.view.connection.local.addr());
    let behind: HashSet<_> = all.filter(|addr| sockets.is_of_member(*addr)).collect();
    let arrivals = arrivals(&rules, views, &behind)?;
    let plays = Plays::new(&limiter, &rules).arriving(&arrivals).behind(&behind);
    let mut asker = Asker::open(&rules, &limiter, plays, now)?;
    let mut asked = HashSet::new();
    for outcome in &done.outcomes {
        let view = outcome.action.view;
        let source = outcome.action.client();
        if asked.len() >= SOURCES || !asked.insert((source, view.connection.local)) {
            continue;
        }
        // By the entry that it has now.
        let view = View { entry: Some(outcome.action.template), ..view };
        let Ok(answer) = asker.ask(&view, now) else { continue };
        let limit = answer.limit.and_then(|(rule, _)| limiter.rules.get(rule));
        let Some((limit, listed)) = limit.zip(answer.listed()) else { continue };
        if let Some(shown) = sources.get_mut(&(limit.place(), source)) {
            shown.listed = Some((listed, answer.is_full()));
            shown.is_alone = matches!(limit.limit.key, Key::Source(32 | 128));
        }
    }
    Ok(())
}

fn print(
    args: &Recount,
    netns: &str,
    sources: &Sources,
    done: &Done,
    limits: &[LimitRule],
) -> Result<()> {
    match args.output.format {
        Format::Json => {
            let planned = done.planned.iter().map(|action| action_json(action, None));
            let carried_out =
                done.outcomes.iter().map(|outcome| action_json(&outcome.action, Some(outcome)));
            let sources = sources.iter().map(|((limit, source), shown)| {
                json!({
                    "limit": limit, "source": source, "open": shown.open, "sent": shown.sent,
                    "listed": shown.listed.map(|(listed, _)| listed),
                    "full": shown.listed.map(|(_, is_full)| is_full),
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
                let failed = shown.open - shown.sent;
                let result = match shown.lacking() {
                    _ if args.dry_run => "planned".to_owned(),
                    _ if failed > 0 => format!("{failed} not sent"),
                    Some(0) => "counted".to_owned(),
                    Some(lacking) => format!("{lacking} not counted"),
                    None => "sent".to_owned(),
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
