//! Rules that count, remember or log SYNs, and so what ctkeep sends in their clients' names. Pure.

use super::LimitRule;
use crate::firewall::{Hook, Match, Outcome, Rule};

/// A rule that counts, remembers or logs SYNs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness {
    /// `ip filter INPUT rule 3`.
    pub place: String,
    /// What it does.
    pub sight: Sight,
    /// The place of the first limit behind it.
    pub before: Option<String>,
    /// The hook of its base chain.
    pub(super) hook: Hook,
    pub(super) matches: Match,
    /// So many limits come before it.
    pub(super) limits: usize,
}

/// What a rule does with the SYNs that it sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Lets so many in a time on to what stands behind, by this match.
    Rate(String),
    /// Accepts so many in a time, by this match, which what stands behind does not see.
    Accepts(String),
    /// Remembers their sources, in this.
    Memory(String),
    /// Logs them.
    Log,
}

impl Witness {
    pub(super) fn sees(&self, rule: &LimitRule) -> bool {
        // A packet is for this host or is forwarded, and meets the rules of one of the two.
        let is_elsewhere = matches!(
            (self.hook, rule.hook),
            (Hook::Input, Hook::Forward) | (Hook::Forward, Hook::Input)
        );
        !is_elsewhere && !self.matches.and(&rule.matches).never
    }
}

/// What a rate in a rule does with SYNs: one without a verdict lets them all go on.
pub(super) fn rate(rule: &Rule, what: String) -> Sight {
    match rule.outcome() {
        Outcome::Accept | Outcome::Queue => Sight::Accepts(what),
        Outcome::Continue => Sight::Memory(what),
        _ => Sight::Rate(what),
    }
}
