//! What `explain` says of the limits of a connection.

use crate::audit::asked::Answer;
use crate::audit::loads::loads;
use crate::audit::plays::{Met, Plays};
use crate::audit::sources::Listed;
use crate::audit::whose::Whose;
use crate::firewall::limits::{Key, Limiter};
use crate::reconcile::snapshot::{View, Views};

/// The limits of one connection, in words.
#[derive(Default)]
pub(super) struct Limits {
    pub(super) words: Vec<String>,
    /// The list of one that was asked lacks what it has to count.
    pub(super) is_lacking: bool,
}

/// The limits that count this connection, with what is counted together with it, and with what one of them
/// said when it was asked.
pub(super) fn limits(
    mut plays: Plays<'_>,
    limiter: &Limiter,
    view: &View,
    together: &Views,
    answer: Option<&Answer>,
    is_left_out: bool,
) -> Limits {
    // Also of a connection that is over, or has no entry: as its SYN would meet them.
    let mine = plays.met(view);
    let all = loads(together.iter(), &mut plays);
    let load = |met: &Met| all.iter().find(|load| load.group == met.group);
    let mut is_lacking = false;
    let words = mine
        .iter()
        .filter_map(|met| {
            let (rule, load) = (limiter.rules.get(met.rule)?, load(met));
            let (held, counted) = load.map_or((0, 0), |load| (load.held, load.counted));
            let answer = answer.filter(|answer| answer.group == met.group);
            let sure = load.map_or(0, |load| load.held_for_sure);
            is_lacking |= answer.is_some_and(|answer| answer.lacks(sure));
            let sees = match answer.and_then(Answer::as_listed) {
                Some(Listed { count, is_full, .. }) => {
                    let at_least = if is_full { "at least " } else { "" };
                    format!(
                        "{counted} have an entry that counts, {at_least}{count} are on its list"
                    )
                }
                None => format!("{counted} have an entry that counts"),
            };
            let own = match met.limit {
                limit if limit == rule.limit.count => String::new(),
                limit => format!(", whose element of the set allows {limit},"),
            };
            let perhaps = if met.is_sure { "" } else { "perhaps: " };
            let is_all = rule.limit.key == Key::All;
            let of_none = Whose { net: met.net, to: None, is_all };
            let whose = load.map_or(of_none, |load| Whose::of(rule, load));
            if is_left_out {
                return Some(format!("{perhaps}{rule}: does not count it, which is not tracked"));
            }
            let to = met.port.map_or(String::new(), |port| format!(" to port {port}"));
            Some(format!("{perhaps}{rule}: {whose}{to}{own} holds {held} sockets, {sees}"))
        })
        .collect();
    Limits { words, is_lacking }
}
