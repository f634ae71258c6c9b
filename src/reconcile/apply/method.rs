//! How a repair is done: in place, or by a new entry that is shown to its limits.

use std::time::Instant;

use super::change::is_held_as_established;
use crate::error::{Cause, Error, Op};
use crate::firewall::limits::LimitRule;
use crate::reconcile::plan::{Action, ActionKind};
use crate::recount::{self, Hidden, Recipe, Recount, Route};

/// How a repair is done.
#[derive(Debug)]
pub(super) enum Method<'l> {
    /// By changing the entry where it is, to one that stale RSTs leave alone: conntrack has seen the
    /// server's packets. The limiter has it on its list.
    OnList,
    /// By changing the entry where it is; the limiter counts it if it still has it.
    InPlace {
        /// A recount was wanted, and this is why there is none.
        instead_of_recount: Option<Error>,
    },
    /// By a new entry and a nudge that takes it past the limiter.
    Recount {
        /// The recipe of the recount.
        way: recount::Way,
        /// And that the entry is made immune to stale RSTs: a peer that has sent one will send
        /// more.
        seal: bool,
        /// Limits before the one that lacks it that may refuse it.
        before: &'l [LimitRule],
    },
}

impl Method<'_> {
    /// Whether the nudge must meet no entry: then no other one of the batch may wait for it.
    pub(super) fn is_fresh(&self) -> bool {
        matches!(self, Self::Recount { way, .. } if way.recipe == Recipe::Fresh)
    }

    /// Where the list is long and has none of them: the kernel walks all of it at each nudge that meets an
    /// entry, and once a jiffy, or every 64, at those that meet none. One by one even so: what lacks its entry
    /// at such a walk is thrown off the list.
    pub(super) fn for_list(mut self, is_long: bool) -> Self {
        if let Self::Recount { way, before: [], .. } = &mut self
            && is_long
            && way.route == Route::Ingress
        {
            way.recipe = Recipe::Fresh;
        }
        self
    }

    /// Whether its nudge meets an entry, and can be seen to pass.
    pub(super) fn is_replaced_by_ingress(&self) -> bool {
        let replaced = recount::Way { route: Route::Ingress, recipe: Recipe::Replace };
        matches!(self, Self::Recount { way, .. } if *way == replaced)
    }
}

pub(super) fn method<'l>(
    action: &Action,
    hidden: Option<Hidden>,
    before: Option<&'l Vec<LimitRule>>,
    recounter: Option<&mut impl Recount>,
    now: Instant,
) -> Method<'l> {
    let Some(recounter) = recounter.filter(|_| action.kind.needs_recount()) else {
        return Method::InPlace { instead_of_recount: None };
    };
    let entry = &action.template;
    let seal = action.kind == ActionKind::Revive && action.view.socket.is_some()
        || hidden == Some(Hidden::FinsAndRsts)
        || action.kind == ActionKind::Recount && is_held_as_established(action);
    match recounter.way(entry, now) {
        Err(error) => Method::InPlace { instead_of_recount: Some(error) },
        Ok(_) if !recounter.admit(entry, now) => {
            let what = "nudged too often, repaired in place".to_owned();
            let error = Op::on("recount", entry.orig).failed(Cause::Limited(what));
            Method::InPlace { instead_of_recount: Some(error) }
        }
        Ok(way) => {
            let before =
                before.filter(|_| way.route == Route::Ingress).map_or(&[][..], Vec::as_slice);
            Method::Recount { way, seal: seal && recounter.can_seal(), before }
        }
    }
}
