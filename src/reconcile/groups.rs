//! Which connections a limit counts together: the SYN of each is played through the rules. Pure.

use std::collections::HashMap;
use std::rc::Rc;

use crate::firewall::limits::LimitRule;
use crate::firewall::lists::Limited;
use crate::firewall::packet::Syn;
use crate::firewall::play::{Certainty, Counts, Hit, LimitAt, Player};

/// So many SYNs are played at most, some microseconds each: of what is more, nothing is known.
const SYNS: usize = 8192;

/// What one list counts together: the list, and its key.
pub type Group = (LimitAt, Vec<u8>);

/// A limit that counts a connection.
#[derive(Clone, Debug)]
pub struct Member<'r> {
    /// The limit.
    pub rule: &'r LimitRule,
    /// What it is counted together with; `None` where that cannot be told.
    pub group: Option<Group>,
    /// How many it allows, the element's own where it has one.
    pub limit: usize,
    /// Whether it counts the connection, but for what a rate lets pass before.
    pub is_sure: bool,
}

/// The limits of connections.
#[derive(Debug)]
pub struct Groups<'r> {
    limits: &'r [LimitRule],
    player: Player<'r>,
    asks_for_interfaces: bool,
    played: HashMap<Syn, Rc<Vec<Member<'r>>>>,
}

impl<'r> Groups<'r> {
    /// By these rules.
    pub fn new(known: &'r Limited) -> Self {
        let player = Player::new(&known.rules);
        let asks_for_interfaces = player.asks_for_interfaces();
        Self { limits: &known.limits, player, asks_for_interfaces, played: HashMap::new() }
    }

    /// Whether it matters by which device a connection comes in.
    pub fn ask_for_interfaces(&self) -> bool {
        self.asks_for_interfaces
    }

    /// The limits that count a connection which was opened by this SYN.
    pub fn of(&mut self, syn: &Syn) -> Rc<Vec<Member<'r>>> {
        if let Some(known) = self.played.get(syn) {
            return known.clone();
        }
        if self.played.len() >= SYNS {
            return Rc::default();
        }
        let hits = self.player.limits(syn).hits;
        let members: Vec<_> = hits.iter().filter_map(|hit| self.member(hit, syn)).collect();
        let members = Rc::new(members);
        self.played.insert(syn.clone(), members.clone());
        members
    }

    /// Whether a connection gets in though it exceeds this limit: that it does shows nothing of its list. One
    /// whose set has no room for the source is exceeded by nobody.
    pub fn is_passed(&self, limit: &LimitRule, syn: &Syn) -> bool {
        let has_room = |hit: &Hit| hit.at == limit.at && hit.counts != Counts::NoRoom;
        self.player.limits(syn).hits.iter().any(has_room)
            && self.player.exceeding(syn, limit.at).admitted() == Some(true)
    }

    fn member(&self, hit: &Hit, syn: &Syn) -> Option<Member<'r>> {
        let rules = || self.limits.iter().filter(|rule| rule.at == hit.at);
        // Each path to a limit that asks for other packets is one of its own.
        let is_for = |rule: &&LimitRule| rule.covers(syn.source, syn.destination.port());
        let rule = rules().find(is_for).or_else(|| rules().next())?;
        Some(Member {
            rule,
            group: hit.group.clone().map(|key| (hit.list, key)),
            limit: usize::try_from(hit.limit.count).unwrap_or(usize::MAX),
            is_sure: hit.certainty > Certainty::Perhaps,
        })
    }
}
