//! Repairs that need no nudge: nothing has had a limit look at its list since the entry was closed, so
//! the connection is on it still.
//!
//! Two times decide: of the packet that called for the repair, and of the source's last SYN.
//! A list is swept when its rule counts, so this holds for limits by source that see nothing but SYNs,
//! behind the chain that notes them. Of everything else the limit is shown the connection.
//!
//! One way is left: the SYN of a source that is new to a limit of xt sweeps the lists that it passes in their tree
//! (`insert_tree()`), one tree in 256, and anybody can send such SYNs. So of one source no more connections than
//! its limit are repaired so while they are open, and it gets to hold twice its limit at most.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use super::Keeper;
use crate::conntrack::Zone;
use crate::error::Result;
use crate::firewall::Hook;
use crate::firewall::limits::{Key, LimitRule};
use crate::flow::Connection;
use crate::netlink::Transport;
use crate::reconcile::apply::Outcome;
use crate::reconcile::plan::{Action, ActionKind};
use crate::reconcile::uncounted::may_be_for;
use crate::recount::Recount;
use crate::sockdiag::{Cookie, Socket, State};
use crate::watch::Suspect;

/// The chain that notes SYNs stands there in prerouting: what a limit before it drops is not noted.
const NOTED_AT: i32 = -199;

/// Says of each connection whether surely no packet with SYN has come from its
/// source since that time.
pub type Quiet = Box<dyn FnMut(&[(Connection, Instant)]) -> Result<Vec<bool>> + Send>;

/// The times that show whether limits still have a connection on their lists.
#[derive(Default)]
pub(super) struct InPlace {
    quiet: Option<Quiet>,
    /// All limits; `None` where some are not known, or a rule may close entries without a packet that
    /// is noted.
    limits: Option<Vec<LimitRule>>,
    /// The packets that called for a look, by connections of the server: the first of each.
    since: HashMap<Connection, Instant>,
    /// Packets may have come that nothing was heard of; until the end of a deep sweep that has begun
    /// since.
    is_blind: bool,
    /// How often that was so, and how often it was when the deep sweep began.
    missed: [u64; 2],
    /// Open connections, by source, that were repaired without a nudge.
    unproven: HashMap<IpAddr, Vec<Socket>>,
}

impl InPlace {
    /// Nothing has been seen before.
    pub(super) fn blind() -> Self {
        Self { is_blind: true, ..Self::default() }
    }
}

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// What says when SYNs came last, where anything does.
    pub fn rely_on_syns(&mut self, quiet: Option<Quiet>) {
        self.in_place.quiet = quiet;
        self.miss_packets();
    }

    /// All limits, where they are known, and no rule closes entries by itself.
    pub fn know_all_limits(&mut self, limits: Option<Vec<LimitRule>>) {
        self.in_place.limits = limits;
    }

    /// Packets may have come that nothing was heard of.
    pub fn miss_packets(&mut self) {
        let [missed, _] = &mut self.in_place.missed;
        *missed += 1;
        self.in_place.is_blind = true;
    }

    /// A deep sweep begins.
    pub(super) fn begin_to_see(&mut self) {
        let [missed, before] = &mut self.in_place.missed;
        *before = *missed;
    }

    /// Everything has been looked at since then.
    pub(super) fn has_seen(&mut self) {
        let [missed, before] = self.in_place.missed;
        self.in_place.is_blind &= missed != before;
        self.in_place.unproven.retain(|_, sockets| {
            sockets.retain(|socket| self.ledger.holds(socket));
            !sockets.is_empty()
        });
    }

    /// Packets that call for a look. An entry was not closed before the first of its connection's.
    pub(super) fn note_packets<'a>(&mut self, suspects: impl Iterator<Item = &'a Suspect>) {
        if self.in_place.quiet.is_none() {
            return;
        }
        for suspect in suspects.filter(|it| !it.is_translated && it.destroyed.is_none()) {
            if let Some(at) = suspect.at.and_then(crate::watch::exact_instant_of) {
                self.in_place.since.entry(suspect.connection).or_insert(at);
            }
        }
    }

    /// The suspects have been looked at, but for those that are looked at again in a moment.
    pub(super) fn forget_packets(&mut self) {
        let waiting: HashSet<_> = self.open_look.lookups.iter().map(|it| it.connection).collect();
        self.in_place.since.retain(|flow, _| waiting.contains(flow));
    }

    /// The sockets of those repairs that need no nudge.
    pub(super) fn on_their_lists(&mut self, actions: &[Action]) -> Result<HashSet<Cookie>> {
        if self.in_place.is_blind || self.in_place.since.is_empty() {
            return Ok(HashSet::new());
        }
        let candidates = actions.iter().filter(|action| self.may_be_on_its_list(action));
        let sockets: Vec<_> = candidates.filter_map(|action| action.view.socket).collect();
        let quiet = self.quiet(&sockets)?;
        let quiet = sockets.into_iter().zip(quiet).filter(|(_, is_quiet)| *is_quiet);
        Ok(self.few_of_each(quiet.map(|(socket, _)| socket).collect()))
    }

    /// Those of them with which their sources have no more connections that were repaired so than a limit
    /// of theirs allows.
    fn few_of_each(&mut self, sockets: Vec<Socket>) -> HashSet<Cookie> {
        let (ledger, InPlace { limits, unproven, .. }) = (&self.ledger, &mut self.in_place);
        for socket in &sockets {
            if let Some(known) = unproven.get_mut(&socket.remote.addr()) {
                known.retain(|it| it.cookie != socket.cookie && ledger.holds(it));
            }
        }
        let mut few = HashSet::new();
        for socket in sockets {
            let limits = limits.iter().flatten().filter(|rule| may_be_for(rule, &socket));
            let least = limits.map(|rule| rule.limit.count).min().unwrap_or(u32::MAX);
            let known = unproven.entry(socket.remote.addr()).or_default();
            if known.len() < usize::try_from(least).unwrap_or(usize::MAX) {
                known.push(socket);
                few.insert(socket.cookie);
            }
        }
        few
    }

    /// Repairs without a nudge in whose midst a SYN came: the limit is to be shown these after all.
    pub(super) fn have_lost_their_lists(&mut self, outcomes: &[Outcome]) -> Result<Vec<Action>> {
        let in_place = outcomes.iter().filter(|it| it.is_in_place && it.result.is_ok());
        let actions: Vec<_> = in_place.map(|outcome| outcome.action).collect();
        let sockets: Vec<_> = actions.iter().filter_map(|action| action.view.socket).collect();
        let quiet = self.quiet(&sockets)?;
        let both = actions.into_iter().zip(quiet);
        Ok(both.filter(|(_, is_quiet)| !is_quiet).map(|(action, _)| action).collect())
    }

    fn quiet(&mut self, sockets: &[Socket]) -> Result<Vec<bool>> {
        let InPlace { quiet, since, .. } = &mut self.in_place;
        let Some(quiet) = quiet.as_mut().filter(|_| !sockets.is_empty()) else {
            return Ok(vec![false; sockets.len()]);
        };
        let asked = |socket: &Socket| {
            since.get(&socket.connection()).map(|since| (socket.connection(), *since))
        };
        let Some(asked) = sockets.iter().map(asked).collect::<Option<Vec<_>>>() else {
            return Ok(vec![false; sockets.len()]);
        };
        quiet(&asked)
    }

    fn may_be_on_its_list(&self, action: &Action) -> bool {
        let Some(socket) = action.view.socket else { return false };
        let InPlace { limits: Some(limits), since, .. } = &self.in_place else { return false };
        let ledger = &self.ledger;
        // A repair before may have failed to show it.
        let is_repaired = ledger.holds(&socket)
            && (socket.state == State::Established || ledger.hidden(&socket).is_some());
        let is_plain = |entry: &crate::conntrack::Entry| {
            !entry.is_translated()
                && !entry.is_ours()
                && entry.reply == action.view.connection.sent()
        };
        action.kind == ActionKind::Revive
            && since.contains_key(&action.view.connection)
            && action.view.entry.as_ref().is_some_and(is_plain)
            && action.template.zone == Zone::default()
            && !is_repaired
            && ledger.uncounted(&socket).is_none()
            && !ledger.distrusts(&socket)
            && !self.tables.sockets.is_of_member(socket.local.addr())
            && limits.iter().filter(|rule| may_be_for(rule, &socket)).all(is_swept_by_syns_alone)
    }
}

/// Whether nothing but a SYN of the very source has the limit look at that source's list.
fn is_swept_by_syns_alone(rule: &LimitRule) -> bool {
    let is_behind = match rule.hook {
        Hook::Prerouting => rule.priority > NOTED_AT,
        Hook::Input => true,
        Hook::Ingress | Hook::Forward | Hook::Output | Hook::Postrouting => false,
    };
    is_behind
        && rule.matches.syn
        && !rule.limit.dynamic
        && matches!(rule.limit.key, Key::Source(32 | 128))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::limits::Limiter;
    use crate::firewall::{Family, Ruleset, parse_saved};

    #[test]
    fn limits_that_other_packets_have_look_at_their_lists_are_shown_what_was_closed() {
        let is = |table: &str, chain: &str, what: &str| {
            let text = format!(
                "*{table}\n:{chain} ACCEPT [0:0]\n-A {chain} -p tcp -m tcp --dport 80 {what} -j DROP\n\
                 COMMIT\n"
            );
            let chains = parse_saved(&text, Family::Ip);
            let found = Limiter::of(&Ruleset { chains, ..Ruleset::default() }).rules;
            is_swept_by_syns_alone(found.first().expect("a limit"))
        };
        let syn = "--tcp-flags FIN,SYN,RST,ACK SYN";
        let count = "-m connlimit --connlimit-above 3 --connlimit-mask";
        assert!(is("filter", "INPUT", &format!("{syn} {count} 32")));
        assert!(is("mangle", "PREROUTING", &format!("{syn} {count} 32")));
        for (table, chain, what) in [
            ("raw", "PREROUTING", format!("{syn} {count} 32")),
            ("filter", "FORWARD", format!("{syn} {count} 32")),
            ("filter", "INPUT", format!("{syn} {count} 24")),
            ("filter", "INPUT", format!("{syn} {count} 32 --connlimit-daddr")),
            ("filter", "INPUT", format!("{count} 32")),
            ("filter", "INPUT", format!("-m conntrack --ctstate NEW {count} 32")),
            ("filter", "INPUT", format!("--tcp-flags ACK NONE {count} 32")),
        ] {
            assert!(!is(table, chain, &what), "{table} {chain} {what}");
        }
    }
}
