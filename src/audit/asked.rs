//! What the limits say when they are asked: how many connections of a source their lists hold.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use ipnet::IpNet;

use super::loads::{Load, loads};
use super::look::Seen;
use super::plays::{Group, Met, Plays};
use super::sources::Listed;
use super::whose::Whose;
use crate::conntrack::Zone;
use crate::containers;
use crate::error::{Cause, Error, Op, Result};
use crate::firewall::Ruleset;
use crate::firewall::limits::{LimitRule, Limiter};
use crate::reconcile::deciding::{limit_of, question};
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::snapshot::View;
use crate::recount::{Question, Recount, Recounter, Room, Step, Trace};
use crate::sockdiag::Lookup;

/// More room than this is not counted: each probe in it takes a place from an honest SYN for some
/// milliseconds.
const MOST: u32 = 512;
/// Sources asked for at one look, those that are nearest to their limit: each takes a tenth of a
/// second.
const SOURCES: usize = 100;

/// Whom such a limit refuses a probe does not show.
pub const RATED: &str =
    "a rate beside its limit decides who is refused, and a probe would use that up";

/// The name of the helper device and of our tables. A daemon has another.
pub const DEVICE: &str = "ctkeep2";

/// A question about one source, and its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// What the limit counts together.
    pub group: Group,
    /// Whose connections are counted together.
    pub net: IpNet,
    /// To which port, where each is counted on its own.
    pub port: Option<u16>,
    /// So many more connections would be let in; `None` where that cannot be told.
    pub more: Option<u32>,
    /// Or at least so many: no more were tried.
    pub at_least: Option<u32>,
    /// The limit that lets no more in: its index, and how many it allows.
    pub limit: Option<(usize, u32)>,
    /// What decides, in words.
    pub decides: String,
}

impl Answer {
    /// How many connections the list of the limit holds. One that is full shows no more than that:
    /// then it is at least so many.
    pub fn listed(&self) -> Option<u32> {
        let (_, limit) = self.limit?;
        limit.checked_sub(self.more?)
    }

    /// Whether no further connection would be let in.
    pub fn is_full(&self) -> bool {
        self.more == Some(0)
    }

    /// Whether the list has fewer than so many connections, and lets more in.
    pub fn lacks(&self, held: usize) -> bool {
        let listed = self.listed().map(|listed| usize::try_from(listed).unwrap_or(usize::MAX));
        !self.is_full() && listed.is_some_and(|listed| listed < held)
    }

    /// What a report says of it; `None` where it was no limit that answered.
    pub fn as_listed(&self) -> Option<Listed> {
        let (_, limit) = self.limit?;
        Some(Listed { count: self.listed()?, is_full: self.is_full(), limit })
    }
}

/// Asks the limits of one host.
pub struct Asker<'r> {
    rules: &'r Ruleset,
    limiter: &'r Limiter,
    plays: Plays<'r>,
    recounter: Recounter,
    /// Limits that tell of what exceeds them are left alone.
    is_careful: bool,
}

impl<'r> Asker<'r> {
    /// Opens what questions need in the network namespace of the calling thread.
    ///
    /// # Errors
    /// `CAP_NET_RAW`, `CAP_NET_ADMIN` or something of the ingress route is missing.
    pub fn open(
        rules: &'r Ruleset,
        limiter: &'r Limiter,
        plays: Plays<'r>,
        now: Instant,
    ) -> Result<Self> {
        let recounter = Recounter::to_ask(DEVICE, now)?;
        Ok(Self { rules, limiter, plays, recounter, is_careful: true })
    }

    /// Asks limits that tell of what exceeds them, too: one probe may be logged, or have its source
    /// banned.
    pub fn come_what_may(self) -> Self {
        Self { is_careful: false, ..self }
    }

    /// How many more connections like this one would be let in, and what decides.
    ///
    /// # Errors
    /// No limit is for it, or it cannot be asked.
    pub fn ask(&mut self, view: &View, now: Instant) -> Result<Answer> {
        let met = self.plays.met(view);
        let op = Op::on("ask the limit", view.connection.received());
        let cannot = |what: &str| Err(op.failed(Cause::Unavailable(what.to_owned())));
        let Some(tightest) = met.iter().min_by_key(|met| met.limit).cloned() else {
            return cannot("no limit is for it");
        };
        let tells = |met: &Met| self.limiter.rules.get(met.rule).is_some_and(|rule| rule.tells);
        if self.is_careful && met.iter().any(tells) {
            return cannot("its limit logs or bans what exceeds it, and would do so with a probe");
        }
        if view.entry.is_some_and(|entry| entry.orig.src.addr() != view.connection.remote.addr()) {
            return cannot("its source is translated");
        }
        let is_rated = |met: &Met| {
            let rule = self.limiter.rules.get(met.rule);
            rule.is_some_and(|rule| self.plays.is_rated(view, rule.at))
        };
        if met.iter().any(is_rated) {
            return cannot(RATED);
        }
        if self.plays.of(view).is_synproxied {
            return cannot("SYNPROXY answers for it");
        }
        let Some(question) = question_about(view, &self.plays) else {
            return cannot(
                "its entry is gone, and rules may have translated what its client asked for",
            );
        };
        if let Some(socket) = view.socket {
            let (client, server) = (question.client, question.server.addr());
            self.recounter.know_device(client, server, socket.interface);
        }
        let most = tightest.limit.saturating_add(1).min(MOST);
        let room = self.recounter.room(question, most, now)?;
        let answer = |met: Met, more, limit, decides| {
            let Met { group, net, port, .. } = met;
            Answer { group, net, port, more, at_least: None, limit, decides }
        };
        Ok(match room {
            Room::For { more, trace } => {
                let (met, mut decides) = self.deciding(view, &met, &trace);
                let mut limit = met.as_ref().map(|met| (met.rule, met.limit));
                if more > 0 && met.as_ref().is_some_and(|met| met.is_twice) {
                    decides += ", whose list it meets twice: what is on it cannot be told";
                    limit = None;
                }
                answer(met.unwrap_or(tightest), Some(more), limit, decides)
            }
            Room::AtLeast(most) => {
                let decides = "no rule stopped one, and no more were tried".to_owned();
                Answer { at_least: Some(most), ..answer(tightest, None, None, decides) }
            }
            Room::Unsteady => {
                let decides = "another number was let in each time".to_owned();
                answer(tightest, None, None, decides)
            }
        })
    }

    /// The limit that stopped a probe, or what else did.
    fn deciding(&mut self, view: &View, met: &[Met], trace: &Trace) -> (Option<Met>, String) {
        let rule_of = |met: &Met| self.limiter.rules.get(met.rule);
        let rules: Vec<_> = met.iter().filter_map(rule_of).collect();
        // What exceeds such a limit has places behind it, too.
        let decides = |rule: &&LimitRule| !self.plays.is_passed(view, rule.at);
        if let Some(limit) = limit_of(trace, &rules).filter(decides) {
            let is_it = |met: &&Met| rule_of(met).is_some_and(|rule| std::ptr::eq(rule, limit));
            return (met.iter().find(is_it).cloned(), limit.place());
        }
        if let Some(step) = trace.steps.iter().rev().find(|step| step.is_drop) {
            return (None, self.place(step));
        }
        // iptables-legacy reports nothing.
        match met {
            [met]
                if self.plays.only_limits_stop(view)
                    && rule_of(met).as_ref().is_none_or(decides) =>
            {
                (Some(met.clone()), rule_of(met).map_or(String::new(), LimitRule::place))
            }
            _ => (None, "a rule that the kernel does not report (iptables-legacy)".to_owned()),
        }
    }

    /// `ip filter INPUT rule 3`, `ip filter INPUT policy`.
    fn place(&self, step: &Step) -> String {
        let mut chains = self.rules.chains.iter().enumerate();
        let found = chains.find(|(_, chain)| {
            (chain.family.number(), &chain.table, &chain.name)
                == (step.family, &step.table, &step.chain)
        });
        let Some((at, chain)) = found else { return format!("{} {}", step.table, step.chain) };
        let of_handle = |handle| chain.rules.iter().position(|rule| rule.handle == Some(handle));
        let place = step.rule.and_then(of_handle).and_then(|rule| self.rules.place(at, rule));
        let what = if step.rule.is_some() { "a rule" } else { "policy" };
        place.unwrap_or_else(|| format!("{} {} {} {what}", chain.family, chain.table, chain.name))
    }
}

/// Asks about the source of a connection; `None` where nothing shows what its client asked for.
pub fn question_about(view: &View, plays: &Plays<'_>) -> Option<Question> {
    Some(Question { server: plays.asked(view)?, ..question(view, Zone::default()) })
}

/// Asks for each source that a limit has to bear, at most `SOURCES`, those first that are nearest
/// to their limit. A question that failed is handed to `failed`.
///
/// # Errors
/// As [`Asker::open`]; a broken conversation.
pub fn ask_for_sources(
    seen: &mut Seen,
    now: Instant,
    mut failed: impl FnMut(&Error),
) -> Result<()> {
    let mut plays = seen.plays();
    let views = || seen.snapshot.views.iter().filter(|view| !view.is_outgoing());
    let mut loads = loads(views(), &mut plays);
    loads.retain(|load| load.held > 0);
    loads.sort_by_key(|load| i64::from(load.limit) - i64::try_from(load.held).unwrap_or(i64::MAX));
    let mut of_load: HashMap<Group, Vec<View>> = HashMap::new();
    for view in views().filter(|view| view.socket.is_some_and(|socket| socket.takes_a_slot())) {
        for met in plays.met(&view) {
            of_load.entry(met.group).or_default().push(view);
        }
    }
    let mut answers: Vec<Answered> = Vec::new();
    let mut asker = Asker::open(&seen.rules, &seen.limiter, seen.plays(), now)?;
    let mut tables = Tables::open()?;
    // Those whose sockets the look had.
    containers::join(&mut tables.sockets)?;
    for load in loads.iter().take(SOURCES) {
        let Some(views) = of_load.get(&load.group) else { continue };
        if answers.iter().any(|one| one.answer.group == load.group) {
            continue;
        }
        let Some(view) = views.first() else { continue };
        let answer = asker.ask(view, now).unwrap_or_else(|error| {
            failed(&error);
            let Load { group, net, port, .. } = load.clone();
            let decides = error.cause.to_string();
            Answer { group, net, port, more: None, at_least: None, limit: None, decides }
        });
        let rule = answer.limit.map_or(load.rule, |(rule, _)| rule);
        // Another limit than the one that was asked for may decide, with a list of its own.
        let met = plays.met(view).into_iter().find(|met| met.rule == rule);
        let deciding = met.and_then(|met| {
            let load = loads.iter().find(|load| load.group == met.group)?;
            Some((load, of_load.get(&met.group)?))
        });
        let held = match deciding {
            Some((load, views)) => Some(still_held(&mut tables, load, views)?),
            None => None,
        };
        let (of, counted) = deciding.unwrap_or((load, views));
        let whose =
            seen.limiter.rules.get(of.rule).map_or(of.net.into(), |rule| Whose::of(rule, of));
        let clients = counted.iter().map(|view| view.client().addr()).collect();
        let is_at_limit = load.is_full();
        answers.push(Answered { rule, whose, clients, held, is_at_limit, answer });
    }
    seen.asked = Some(answers);
    Ok(())
}

/// What the question about a source came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// The list has all that the source holds, or lets no more in.
    Yes,
    /// It lacks some.
    No,
    /// It lacks some that it may not have to count.
    Perhaps,
    /// There was no answer.
    Unanswered,
}

/// An answer, and what it is measured by.
#[derive(Clone, Debug)]
pub struct Answered {
    /// Index of the limit that decides; where none does, of the one that was asked for.
    pub rule: usize,
    /// Whose connections it counts together, as well as that can be named.
    pub whose: Whose,
    /// The clients whose open connections it counts together.
    pub clients: HashSet<IpAddr>,
    /// Sockets that this limit counts, for sure and at most, before and after the question; `None` where
    /// that is not known.
    pub held: Option<(usize, usize)>,
    /// Whether as many are held as the limit that was asked for allows.
    pub is_at_limit: bool,
    /// The answer.
    pub answer: Answer,
}

impl Answered {
    /// Whether the limit holds for this source.
    pub fn holds(&self) -> Holds {
        match self.held {
            _ if self.answer.listed().is_none() => Holds::Unanswered,
            _ if self.answer.is_full() => Holds::Yes,
            Some((sure, _)) if self.answer.lacks(sure) => Holds::No,
            Some((_, most)) if !self.answer.lacks(most) => Holds::Yes,
            _ => Holds::Perhaps,
        }
    }
}

/// What the limit that lets in least of this source said.
pub fn listed(source: IpNet, asked: &[Answered]) -> Option<Listed> {
    // The rule's networks and the report's may be of different size.
    let touches = |net: &IpNet| net.contains(&source) || source.contains(net);
    // A list by something else than the source may be that of others.
    let is_its = |one: &&Answered| match one.answer.net.prefix_len() {
        0 => one.clients.iter().any(|client| source.contains(client)),
        _ => touches(&one.answer.net),
    };
    let answers = asked.iter().filter(is_its).map(|answered| &answered.answer);
    answers.min_by_key(|answer| answer.more)?.as_listed()
}

/// Connections come and go while a limit is asked: so many are held both before and after.
fn still_held(tables: &mut Tables, load: &Load, views: &[View]) -> Result<(usize, usize)> {
    let lookups: Vec<_> =
        views.iter().filter_map(|view| view.socket.as_ref().map(Lookup::from)).collect();
    let after = tables.exactly(&lookups, &Ledger::default())?;
    let cookies = |views: &mut dyn Iterator<Item = View>| {
        views
            .filter_map(|view| view.socket)
            .filter(|socket| socket.takes_a_slot())
            .map(|socket| socket.cookie)
            .collect::<HashSet<_>>()
    };
    let (before, after) = (cookies(&mut views.iter().copied()), cookies(&mut after.views.iter()));
    let still = before.intersection(&after).count();
    Ok((still.min(load.held_for_sure), still.min(load.held)))
}
