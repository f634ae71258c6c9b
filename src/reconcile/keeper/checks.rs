//! Limits are asked whether they count: after a recount, and at the start.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use super::{Keeper, Witness};
use crate::conntrack::Zone;
use crate::error::Result;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::{Anew, Loss};
use crate::netlink::Transport;
use crate::reconcile::apply::Outcome;
use crate::reconcile::checks::{Checked, Counted, net};
use crate::reconcile::deciding::{limit_of, question};
use crate::reconcile::plan::Action;
use crate::reconcile::timers::Timer;
use crate::recount::{Asked, Question, Recount, Room};
use crate::sockdiag::{Cookie, Lookup, Socket};

/// Sources that are asked for at the start, for each limit.
const SAMPLES: usize = 4;
/// What happens at the start shows itself by then.
const AT_START: Duration = Duration::from_millis(500);
/// For so long after an event that called for something, or a change of rules, nothing is asked.
pub(super) const QUIET: Duration = Duration::from_secs(1);
/// Room of a sample that is counted at most: each probe in it takes a place for some milliseconds.
const MOST: u32 = 64;

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// These limits count what is guarded here, and can be asked.
    pub fn know_limits(&mut self, limits: impl Iterator<Item = LimitRule>) {
        self.checks.know(limits);
    }

    /// Has the lists of all limits tried: they may be younger than what is open. Nothing is changed
    /// where they are not.
    ///
    /// # Errors
    /// The kernel refused to list its sockets.
    pub fn doubt_limits(&mut self, now: Instant) -> Result<()> {
        let sockets = self.guarded()?;
        for rule in self.checks.limits().to_vec() {
            let mut held: HashMap<IpNet, (usize, IpAddr)> = HashMap::new();
            for socket in sockets.iter().filter(|socket| is_for(&rule, socket)) {
                if let Some(net) = net(&rule, socket.remote.addr()) {
                    held.entry(net).or_insert((0, socket.remote.addr())).0 += 1;
                }
            }
            let mut all: Vec<_> = held.into_values().collect();
            all.sort_unstable_by(|one, other| other.cmp(one));
            let samples = all.into_iter().take(SAMPLES);
            self.checks.sample(samples.map(|(_, source)| (rule.clone(), source)));
        }
        self.no_questions_before(now + AT_START);
        self.timers.hasten(Timer::Check, now);
        Ok(())
    }

    /// Whether there is something to ask.
    pub fn check_is_due(&mut self, now: Instant) -> bool {
        if let Some(due) = self.timers.due(Timer::Check) {
            self.timers.set(Timer::Check, due.max(self.quiet));
        }
        self.timers.is_due(Timer::Check, now)
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
    pub fn check(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        self.timers.take(Timer::Check, now);
        let checked = self.try_check(now, witness);
        if self.checks.has_samples() {
            self.timers.hasten(Timer::Check, now);
        } else if let Some(next) = self.checks.next() {
            self.timers.hasten(Timer::Check, next);
        }
        checked
    }

    fn try_check(&mut self, now: Instant, witness: &mut impl Witness) -> Result<()> {
        if let Some((rule, source)) = self.checks.next_sample() {
            return self.try_sample(&rule, source, now);
        }
        let sources = self.checks.take_due(now);
        if sources.is_empty() {
            return Ok(());
        }
        let sockets = self.guarded()?;
        for source in sources {
            let Some((rule, net, held)) = self.tightest(source, &sockets) else { continue };
            let counted = self.ask(source, &rule, &held, now)?;
            let (again, places) = self.checks.answered(source, counted, held.len(), now);
            let shown = places.iter().filter_map(|place| held.get(*place)).copied();
            self.show_again(&rule, shown.collect(), now);
            let limit = rule.to_string();
            witness.checked(Checked { net, limit, held: held.len(), counted, again });
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

    /// Connections that may not be shown to a limit, since they would exceed it and it tells of what
    /// does: beyond what its source holds already. They wait until others end.
    pub(super) fn withheld(&mut self, actions: &[Action]) -> Result<HashSet<Cookie>> {
        let mut withheld = HashSet::new();
        if self.checks.telling().is_empty() {
            return Ok(withheld);
        }
        let wanted: Vec<_> = actions
            .iter()
            .filter(|action| action.kind.needs_recount())
            .filter_map(|action| action.view.socket)
            .collect();
        if wanted.is_empty() {
            return Ok(withheld);
        }
        let shown: HashSet<_> = wanted.iter().map(|socket| socket.cookie).collect();
        let sockets = self.guarded()?;
        // A list has what is ending until its entry is given back.
        let open: HashSet<_> = sockets.iter().map(|socket| socket.cookie).collect();
        let held = self.ledger.held().filter(|held| !open.contains(&held.cookie));
        let ending: Vec<_> = held.map(|held| held.lookup.connection).collect();
        for rule in self.checks.telling() {
            let limit = usize::try_from(rule.limit.count).unwrap_or(usize::MAX);
            let mut places: HashMap<IpNet, usize> = HashMap::new();
            let of_rule = |socket: &&Socket| is_for(rule, socket);
            for socket in sockets.iter().filter(of_rule) {
                let is_counted =
                    !shown.contains(&socket.cookie) && self.ledger.uncounted(socket).is_none();
                if let Some(net) = net(rule, socket.remote.addr()) {
                    *places.entry(net).or_default() += usize::from(is_counted);
                }
            }
            for it in ending.iter().filter(|it| rule.covers(it.remote.addr(), it.local.port())) {
                if let Some(net) = net(rule, it.remote.addr()) {
                    *places.entry(net).or_default() += 1;
                }
            }
            for socket in wanted.iter().filter(of_rule) {
                let Some(net) = net(rule, socket.remote.addr()) else { continue };
                let taken = places.entry(net).or_default();
                if *taken < limit {
                    *taken += 1;
                } else {
                    withheld.insert(socket.cookie);
                }
            }
        }
        Ok(withheld)
    }

    /// The limit that this source has reached, with what it counts; `None` where there is none.
    fn tightest(
        &self,
        source: IpAddr,
        sockets: &[Socket],
    ) -> Option<(LimitRule, IpNet, Vec<Socket>)> {
        let reached = self.checks.limits().iter().filter_map(|rule| {
            let net = net(rule, source)?;
            let counted = sockets
                .iter()
                .filter(|socket| net.contains(&socket.remote.addr()) && is_for(rule, socket));
            let held: Vec<_> = counted.copied().collect();
            let is_reached = held.len() >= usize::try_from(rule.limit.count).unwrap_or(usize::MAX);
            is_reached.then(|| (rule.clone(), net, held))
        });
        reached.min_by_key(|(rule, ..)| rule.limit.count)
    }

    /// Whether a limit that is reached lets one more in.
    fn ask(
        &mut self,
        source: IpAddr,
        rule: &LimitRule,
        held: &[Socket],
        now: Instant,
    ) -> Result<Counted> {
        let Some(question) = self.question(source, held)? else { return Ok(Counted::Unknown) };
        let Some(recounter) = &mut self.recounter else { return Ok(Counted::Unknown) };
        Ok(match recounter.ask(question, now)? {
            Some(Asked::LetIn) => Counted::No,
            Some(Asked::Stopped(trace)) if limit_of(&trace, &[rule]).is_some() => Counted::Yes,
            Some(Asked::Stopped(_)) | None => Counted::Unknown,
        })
    }

    /// What is asked for the sake of this source's connections.
    fn question(&mut self, source: IpAddr, held: &[Socket]) -> Result<Option<Question>> {
        let own: Vec<_> = held.iter().filter(|socket| socket.remote.addr() == source).collect();
        let lookups: Vec<_> = own.iter().take(1).map(|socket| Lookup::from(*socket)).collect();
        let snapshot = self.tables.exactly(&lookups, &self.ledger)?;
        Ok(snapshot.views.iter().next().and_then(|view| {
            let entry = view.entry.filter(|entry| entry.reply == view.connection.sent());
            // The limit may know it by the address before its translation.
            let is_translated = entry.is_some_and(|entry| entry.orig.src.addr() != source);
            (!is_translated).then(|| question(&view, Zone::both(self.settings.policy.zone)))
        }))
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

    /// Whether the list of a limit has what a source holds; if not, all that is open is shown to it.
    fn try_sample(&mut self, rule: &LimitRule, source: IpAddr, now: Instant) -> Result<()> {
        let held = |sockets: Vec<Socket>| -> Vec<Socket> {
            let of_net = |socket: &Socket| {
                net(rule, source).is_some_and(|net| net.contains(&socket.remote.addr()))
            };
            sockets.into_iter().filter(|it| of_net(it) && is_for(rule, it)).collect()
        };
        let before = held(self.guarded()?);
        let limit = rule.limit.count;
        let room = limit.saturating_sub(u32::try_from(before.len()).unwrap_or(u32::MAX));
        if before.is_empty() || room > MOST {
            return Ok(());
        }
        let Some(question) = self.question(source, &before)? else { return Ok(()) };
        let Some(recounter) = &mut self.recounter else { return Ok(()) };
        // One more than there should be is enough to know.
        let asked = recounter.room(question, room.saturating_add(1), now)?;
        let lacks = matches!(asked, Some(Room::AtLeast(_)));
        // Connections end meanwhile.
        if lacks && held(self.guarded()?).len() >= before.len() {
            self.checks.drop_samples(rule);
            let anew = Anew { rule: rule.clone(), loss: Loss::New };
            self.limits_lost(vec![anew], now, now);
        }
        Ok(())
    }
}

fn is_for(rule: &LimitRule, socket: &Socket) -> bool {
    rule.covers(socket.remote.addr(), socket.local.port())
}
