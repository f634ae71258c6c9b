//! After a recount limits are asked whether they count.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Keeper, Witness};
use crate::conntrack::{Entry, Zone};
use crate::error::Result;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::{Limited, Loss};
use crate::firewall::packet::{Interface, Syn};
use crate::flow::{Connection, Endpoint};
use crate::netlink::Transport;
use crate::reconcile::apply::Outcome;
use crate::reconcile::checks::{Checked, Counted};
use crate::reconcile::deciding::{limit_of, question};
use crate::reconcile::evidence::Arrival;
use crate::reconcile::groups::{Group, Groups, Member};
use crate::reconcile::snapshot::View;
use crate::reconcile::timers::Timer;
use crate::reconcile::uncounted::net;
use crate::recount::{Asked, Recount};
use crate::sockdiag::{Lookup, Socket};

/// For so long after an event that called for something, or a change of rules, nothing is asked.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// Endpoints of this host that are asked for on behalf of one source.
const ENDPOINTS: usize = 4;

/// Says whether the rules are still those that the limits were found in.
pub type AsRead<'a> = &'a mut dyn FnMut() -> Result<bool>;

/// A limit's answer about one source's connections to one endpoint.
struct Answer<'r> {
    local: Endpoint,
    rule: Option<&'r LimitRule>,
    held: Vec<Socket>,
    counted: Counted,
    why: Option<String>,
    /// Another question would get no other answer.
    is_final: bool,
}

impl Answer<'_> {
    /// Those come first that something is to be done about.
    fn urgency(&self) -> u8 {
        match (self.counted, self.is_final) {
            (Counted::No, _) => 3,
            (Counted::Unknown, false) => 2,
            (Counted::Yes, _) => 1,
            (Counted::Unknown, true) => 0,
        }
    }
}

/// A limit that is reached, and what it counts.
struct Reached<'r> {
    rule: &'r LimitRule,
    limit: usize,
    held: Vec<Socket>,
    /// So many of them count for sure.
    sure: usize,
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// These limits count what is guarded here.
    pub fn know_limits(&mut self, known: Limited) {
        self.checks.know(known);
        if let Some(recounter) = &mut self.recounter {
            recounter.expect_queues(self.checks.held_up());
        }
    }

    /// Whether there is something to ask.
    pub fn check_is_due(&mut self, now: Instant) -> bool {
        if let Some(due) = self.timers.due(Timer::Check) {
            let shown = self.timers.due(Timer::Recount);
            self.timers.set(Timer::Check, due.max(self.quiet).max(shown.unwrap_or(due)));
            // What still waits to be shown would be taken for what is not counted.
            return shown.is_none() && self.timers.is_due(Timer::Check, now);
        }
        false
    }

    /// Questions take milliseconds in which no event is read: nothing is asked while there are any,
    /// nor while rules change, nor beyond what questions may cost.
    pub fn no_questions_before(&mut self, at: Instant) {
        self.quiet = self.quiet.max(at);
    }

    /// When there is something to ask next.
    pub fn next_check(&self) -> Option<Instant> {
        self.timers.due(Timer::Check)
    }

    /// Asks for some of the sources whose connections were shown to limits. What is not counted is
    /// shown again.
    ///
    /// # Errors
    /// A conversation broke: what was to be asked stays unknown.
    pub fn check(
        &mut self,
        now: Instant,
        as_read: AsRead<'_>,
        witness: &mut impl Witness,
    ) -> Result<()> {
        self.timers.take(Timer::Check, now);
        let checked = self.try_check(now, as_read, witness);
        if self.checks.has_samples() {
            self.timers.hasten(Timer::Check, now);
        } else if let Some(next) = self.checks.next() {
            self.timers.hasten(Timer::Check, next);
        }
        checked
    }

    fn try_check(
        &mut self,
        now: Instant,
        as_read: AsRead<'_>,
        witness: &mut impl Witness,
    ) -> Result<()> {
        if let Some((rule, socket)) = self.checks.next_sample() {
            return self.try_sample(&rule, &socket, now, as_read);
        }
        let sources = self.checks.take_due(now);
        if sources.is_empty() {
            return Ok(());
        }
        let known = self.checks.known();
        let mut groups = Groups::new(&known);
        let sockets = self.guarded()?;
        for source in sources {
            let answers = self.ask_for(source, &sockets, &mut groups, now, as_read)?;
            let Some(first) = answers.iter().max_by_key(|it| it.urgency()) else { continue };
            let mut again = None;
            if first.is_final {
                self.checks.give_up(source);
            } else {
                let (pause, places) =
                    self.checks.answered(source, first.counted, first.held.len(), now);
                again = pause;
                let shown = places.iter().filter_map(|place| first.held.get(*place)).copied();
                if let Some(rule) = first.rule {
                    self.show_again(rule, shown.collect(), now);
                }
            }
            for Answer { local, rule, held, counted, why, is_final } in answers {
                let (limit, held) = (rule.map(LimitRule::to_string), held.len());
                let again = again.filter(|_| counted != Counted::Yes && !is_final);
                witness.checked(Checked { source, local, limit, held, counted, why, again });
            }
        }
        Ok(())
    }

    /// Sources of connections that were shown to limits are to be asked for.
    pub(super) fn note_shown(&mut self, outcomes: &[Outcome], now: Instant) {
        for outcome in outcomes.iter().filter(|outcome| matches!(outcome.recount, Some(Ok(_)))) {
            self.checks.shown(outcome.action.view.connection.remote.addr(), now);
        }
        if let Some(next) = self.checks.next() {
            self.timers.hasten(Timer::Check, next);
        }
    }

    /// What the limits say that this source has reached, for each endpoint that it has connections to.
    fn ask_for<'r>(
        &mut self,
        source: IpAddr,
        sockets: &[Socket],
        groups: &mut Groups<'r>,
        now: Instant,
        as_read: AsRead<'_>,
    ) -> Result<Vec<Answer<'r>>> {
        let own = sockets.iter().filter(|socket| socket.remote.addr() == source);
        let one_each: BTreeMap<_, _> = own.map(|it| (it.local, Lookup::from(it))).collect();
        let lookups: Vec<_> = one_each.into_values().take(ENDPOINTS).collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        let mut answers = Vec::new();
        for view in snapshot.views.iter().filter(|view| view.socket.is_some()) {
            let entry = view.entry.filter(|entry| entry.reply == view.connection.sent());
            let syn = self.syn(view.connection, entry.as_ref(), groups)?;
            let members = groups.of(&syn);
            let Some(member) = members.first() else { continue };
            let unknown = |rule: &'r LimitRule, why: &str| Answer {
                local: view.connection.local,
                rule: Some(rule),
                held: Vec::new(),
                counted: Counted::Unknown,
                why: Some(why.to_owned()),
                is_final: true,
            };
            if let Some(member) = members.iter().find(|member| member.rule.tells) {
                let why = "it logs or bans what exceeds it, and would do so with a question";
                answers.push(unknown(member.rule, why));
                continue;
            }
            if entry.is_some_and(|entry| entry.orig.src.addr() != source) {
                answers.push(unknown(member.rule, "the source is translated"));
                continue;
            }
            let mut reached = Vec::new();
            for member in members.iter() {
                let Some(group) = &member.group else {
                    let why = "what it counts together cannot be told";
                    answers.push(unknown(member.rule, why));
                    continue;
                };
                let (held, sure) = self.together(member.rule, group, source, sockets, groups)?;
                if held.len() >= member.limit {
                    let Member { rule, limit, .. } = *member;
                    if groups.is_passed(rule, &syn) {
                        answers.push(unknown(rule, "other rules let in what exceeds it"));
                        continue;
                    }
                    reached.push(Reached { rule, limit, held, sure });
                }
            }
            reached.sort_by_key(|one| one.limit);
            if !reached.is_empty() {
                answers.push(self.ask(&view, reached, now, as_read)?);
            }
        }
        Ok(answers)
    }

    /// Whether limits that are reached let one more in.
    fn ask<'r>(
        &mut self,
        view: &View,
        mut reached: Vec<Reached<'r>>,
        now: Instant,
        as_read: AsRead<'_>,
    ) -> Result<Answer<'r>> {
        let (at, counted, why, is_final) = self.try_ask(view, &reached, now, as_read)?;
        let one = (at < reached.len()).then(|| reached.swap_remove(at));
        let rule = one.as_ref().map(|one| one.rule);
        let held = one.map(|one| one.held).unwrap_or_default();
        Ok(Answer { local: view.connection.local, rule, held, counted, why, is_final })
    }

    /// Which of these limits answers, what, why that is not known, and whether it stays so.
    fn try_ask(
        &mut self,
        view: &View,
        reached: &[Reached<'_>],
        now: Instant,
        as_read: AsRead<'_>,
    ) -> Result<(usize, Counted, Option<String>, bool)> {
        let unknown = |why: &str, is_final| (0, Counted::Unknown, Some(why.to_owned()), is_final);
        let Some(recounter) = &mut self.recounter else {
            return Ok(unknown("nothing is sent here", true));
        };
        let asked = recounter.ask(question(view, Zone::both(self.settings.policy.zone)), now);
        // A limit that has just been taken away lets everything in.
        if !as_read()? {
            return Ok(unknown("the rules have changed meanwhile, or may have", false));
        }
        let rules: Vec<_> = reached.iter().map(|one| one.rule).collect();
        Ok(match asked {
            Ok(Asked::Stopped(trace)) => match limit_of(&trace, &rules) {
                Some(limit) => {
                    let at = rules.iter().position(|rule| std::ptr::eq(*rule, limit));
                    (at.unwrap_or(0), Counted::Yes, None, false)
                }
                None => {
                    let why = "it is not reported which rule refuses one more";
                    unknown(trace.lacks.as_deref().unwrap_or(why), trace.lacks.is_some())
                }
            },
            Ok(Asked::LetIn) => {
                let is_sure = |one: &&Reached<'_>| one.sure >= one.limit;
                let Some(one) = reached.iter().find(is_sure) else {
                    return Ok(unknown("it may not be for all of these", true));
                };
                let open: HashSet<_> = self.guarded()?.iter().map(|it| it.cookie).collect();
                let still = one.held.iter().filter(|it| open.contains(&it.cookie)).count();
                if still < one.limit {
                    return Ok(unknown("connections have ended meanwhile", false));
                }
                let at = reached.iter().position(|other| std::ptr::eq(other, one));
                (at.unwrap_or(0), Counted::No, None, false)
            }
            Err(error) if error.is_unavailable() => unknown(&error.cause.to_string(), true),
            Err(error) => return Err(error),
        })
    }

    /// The sockets that a limit counts together with those of a source, and how many of them for sure.
    pub(super) fn together<'r>(
        &mut self,
        rule: &LimitRule,
        group: &Group,
        source: IpAddr,
        sockets: &[Socket],
        groups: &mut Groups<'r>,
    ) -> Result<(Vec<Socket>, usize)> {
        let near = net(rule, source);
        let (mut held, mut sure) = (Vec::new(), 0);
        for socket in sockets {
            if near.is_some_and(|near| !near.contains(&socket.remote.addr())) {
                continue;
            }
            let syn = self.syn(socket.connection(), None, groups)?;
            let members = groups.of(&syn);
            let found = members.iter().find(|member| member.group.as_ref() == Some(group));
            if let Some(member) = found {
                held.push(*socket);
                sure += usize::from(member.is_sure);
            }
        }
        Ok((held, sure))
    }

    /// The SYN that opened a connection; where it is not known what it asked for,
    /// as its siblings did.
    pub(super) fn syn(
        &mut self,
        connection: Connection,
        entry: Option<&Entry>,
        groups: &Groups<'_>,
    ) -> Result<Syn> {
        let Connection { local, remote: peer } = connection;
        let asked = entry.map(|entry| entry.orig.dst);
        let asked = asked.unwrap_or_else(|| match self.ledger.arrivals().get(&local) {
            Some(Arrival::Translated(first, _)) => *first,
            _ => local,
        });
        let is_forwarded = self.tables.sockets.is_of_member(local.addr());
        let mut syn = Syn { asked: Some(asked), is_forwarded, ..Syn::new(peer.addr(), local) };
        if groups.ask_for_interfaces()
            && let Some(recounter) = &mut self.recounter
        {
            if let Some(entry) = entry {
                recounter.know_mark(entry);
            }
            if let Some(device) = self.ledger.interface(connection).filter(|_| !is_forwarded) {
                recounter.know_device(peer.addr(), asked.addr(), device);
            }
            if let Some((name, index)) = recounter.interface(peer.addr(), asked.addr())? {
                syn.interface = Interface::Known(name, index);
            }
        }
        Ok(syn)
    }

    fn show_again(&mut self, rule: &LimitRule, sockets: Vec<Socket>, now: Instant) {
        if sockets.is_empty() {
            return;
        }
        for socket in &sockets {
            self.ledger.set_uncounted(socket, Loss::Unknown);
        }
        self.uncounted.again(rule, &sockets);
        self.timers.hasten(Timer::Recount, now);
    }
}
