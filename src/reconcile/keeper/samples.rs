//! Whether limits have all that is open is tried at the start: their lists may be younger than that.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::Keeper;
use super::checks::AsRead;
use crate::conntrack::Zone;
use crate::error::Result;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::{Anew, Loss};
use crate::netlink::Transport;
use crate::reconcile::deciding::question;
use crate::reconcile::groups::{Group, Groups, Member};
use crate::reconcile::timers::Timer;
use crate::recount::{Recount, Room};
use crate::sockdiag::{Lookup, Socket};

/// Groups of connections that are asked for at the start, for each limit.
const SAMPLES: usize = 4;

/// What happens at the start shows itself by then.
const AT_START: Duration = Duration::from_millis(500);

/// Room of a sample that is counted at most: each probe in it takes a place for some milliseconds.
const MOST: u32 = 64;

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// Has the lists of all limits tried: they may be younger than what is open. Nothing is changed
    /// where they are not.
    ///
    /// # Errors
    /// The kernel refused to list its sockets.
    pub fn doubt_limits(&mut self, now: Instant) -> Result<()> {
        let known = self.checks.known();
        let mut groups = Groups::new(&known);
        let sockets = self.guarded()?;
        let mut held: HashMap<Group, (usize, &LimitRule, Socket)> = HashMap::new();
        for socket in &sockets {
            let syn = self.syn(socket.connection(), None, &groups)?;
            for member in groups.of(&syn).iter() {
                if let Some(group) = &member.group {
                    held.entry(group.clone()).or_insert((0, member.rule, *socket)).0 += 1;
                }
            }
        }
        let mut all: Vec<_> = held.into_values().collect();
        all.sort_unstable_by_key(|(held, _, socket)| (usize::MAX - held, socket.cookie));
        let mut taken: HashMap<String, usize> = HashMap::new();
        all.retain(|(_, rule, _)| {
            let taken = taken.entry(rule.place()).or_default();
            *taken += 1;
            *taken <= SAMPLES
        });
        self.checks.sample(all.into_iter().map(|(_, rule, socket)| (rule.clone(), socket)));
        self.no_questions_before(now + AT_START);
        self.timers.hasten(Timer::Check, now);
        Ok(())
    }

    /// Whether the list of a limit has all that is open of a group; if not, all that is open is shown
    /// to it.
    pub(super) fn try_sample(
        &mut self,
        rule: &LimitRule,
        socket: &Socket,
        now: Instant,
        as_read: AsRead<'_>,
    ) -> Result<()> {
        let known = self.checks.known();
        let mut groups = Groups::new(&known);
        let snapshot = self.tables.exactly(&[Lookup::from(socket)], &self.ledger)?;
        let Some(view) = snapshot.views.iter().find(|view| view.socket.is_some()) else {
            return Ok(());
        };
        let entry = view.entry.filter(|entry| entry.reply == view.connection.sent());
        let source = view.connection.remote.addr();
        let syn = self.syn(view.connection, entry.as_ref(), &groups)?;
        let members = groups.of(&syn);
        let is_it = |member: &&Member<'_>| member.rule.place() == rule.place();
        let (Some(Member { group: Some(group), limit, .. }), false) = (
            members.iter().find(is_it),
            // The limit may know it by the address before its translation.
            members.iter().any(|member| member.rule.tells)
                || groups.is_passed(rule, &syn)
                || entry.is_some_and(|entry| entry.orig.src.addr() != source),
        ) else {
            return Ok(());
        };
        let sockets = self.guarded()?;
        let (before, _) = self.together(rule, group, source, &sockets, &mut groups)?;
        let room = u32::try_from(limit.saturating_sub(before.len())).unwrap_or(u32::MAX);
        if before.is_empty() || room > MOST {
            return Ok(());
        }
        let Some(recounter) = &mut self.recounter else { return Ok(()) };
        // One more than there should be is enough to know.
        let question = question(&view, Zone::both(self.settings.policy.zone));
        let asked = match recounter.room(question, room.saturating_add(1), now) {
            Err(error) if error.is_unavailable() => return Ok(()),
            asked => asked?,
        };
        if !matches!(asked, Room::AtLeast(_)) || !as_read()? {
            return Ok(());
        }
        // Connections end meanwhile.
        let sockets = self.guarded()?;
        let (after, _) = self.together(rule, group, source, &sockets, &mut groups)?;
        if after.len() >= before.len() {
            self.checks.drop_samples(rule);
            let anew = Anew { rule: rule.clone(), loss: Loss::New };
            self.limits_lost(vec![anew], now, now);
        }
        Ok(())
    }
}
