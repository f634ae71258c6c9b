//! Rules that count, remember or log SYNs, and so what ctkeep sends in their clients' names. Pure.

use super::LimitRule;
use super::unjudged::reached;
use crate::firewall::play::Player;
use crate::firewall::{Hook, Match, Outcome, Rule, Step};

/// A rule that counts, remembers or logs SYNs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Witness {
    /// `ip filter INPUT rule 3`.
    pub place: String,
    /// What it does.
    pub sight: Sight,
    /// The place of the first limit behind it, which it may keep SYNs from.
    pub before: Option<String>,
    /// It stands among rules that translate, and that limit does not.
    pub is_of_nat: bool,
    /// Hook and priority of its base chain.
    pub(super) base: (Hook, i32),
    /// Each packet goes on behind its base chain, whatever the rules there decide.
    pub(super) lets_go_on: bool,
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
            (self.base.0, rule.hook),
            (Hook::Input, Hook::Forward) | (Hook::Forward, Hook::Input)
        );
        !is_elsewhere && !self.matches.and(&rule.matches).never
    }

    /// Whether it may keep a SYN from this limit, which is behind it.
    pub(super) fn keeps_from(&self, rule: &LimitRule) -> bool {
        !self.lets_go_on || self.is_beside(rule)
    }

    /// Whether this limit stands in the same base chain, or in one of its place.
    pub(super) fn is_beside(&self, rule: &LimitRule) -> bool {
        self.base == (rule.hook, rule.priority)
    }

    /// Whether it is no more than a choice of where a packet is led to, one of several: kube-proxy's of a pod.
    pub(super) fn is_choice(&self) -> bool {
        let is_statistic = |what: &str| what == "statistic";
        let chooses = match &self.sight {
            Sight::Rate(what) | Sight::Accepts(what) => is_statistic(what),
            Sight::Memory(_) | Sight::Log => false,
        };
        chooses && self.lets_go_on && self.before.is_none()
    }
}

/// Whether a rule of a base chain, or of a chain that it leads to, or its policy may stop a packet.
pub(super) fn stops(player: &Player<'_>, base: usize) -> bool {
    let may_stop = |outcome: &Outcome| {
        let goes_on = matches!(outcome, Outcome::Accept | Outcome::Return | Outcome::Continue);
        !goes_on && !matches!(outcome, Outcome::Jump(_) | Outcome::Goto(_))
    };
    let is_stop = |step: &Step| match step {
        Step::Verdict(outcome) => may_stop(outcome),
        Step::Map(_, set) => {
            let mut verdicts = set.elements().iter().filter_map(|it| it.verdict.as_ref());
            set.unread.is_some() || verdicts.any(may_stop)
        }
        _ => false,
    };
    let chains = &player.ruleset().chains;
    reached(player, &[base]).into_iter().filter_map(|at| chains.get(at)).any(|chain| {
        chain.base.as_ref().is_some_and(|base| base.drops)
            || chain.rules.iter().flat_map(|rule| &rule.steps).any(is_stop)
    })
}

/// What a rate in a rule does with SYNs: one without a verdict lets them all go on.
pub(super) fn rate(rule: &Rule, what: String) -> Sight {
    match rule.outcome() {
        Outcome::Accept | Outcome::Queue => Sight::Accepts(what),
        Outcome::Continue => Sight::Memory(what),
        _ => Sight::Rate(what),
    }
}
