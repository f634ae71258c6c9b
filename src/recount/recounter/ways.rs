//! Which ways of a nudge this kernel's limits count, and whether one leads to the rules.

use nix::errno::Errno;

use super::{Helper, Hop, Recounter};
use crate::conntrack::Entry;
use crate::error::{Cause, Op, Result};
use crate::recount::{HeldUp, Recipe, Route, Tried, Verdict, Way, trial};

impl Recounter {
    /// What the trials at the start have shown.
    pub fn tried(&self) -> &[Tried] {
        &self.tried
    }

    /// Whether what hides packets from conntrack is written, as the trials at the start have shown; `None`
    /// where none of them arrived.
    pub fn hides(&self) -> Option<bool> {
        self.hides
    }

    /// Finds out how this kernel's limits count again.
    pub(super) fn try_recipes(&mut self) {
        let ingress = match &self.helper {
            Helper::Open(ingress) => Some(ingress.as_ref()),
            Helper::Absent | Helper::Broken => None,
        };
        let loopback = self.loopback.then_some(&self.raw);
        match trial::run(&format!("{}-trial", self.name), ingress, loopback) {
            Ok(trial::Shown { tried, hides }) => {
                (self.tried, self.hides) = (tried, hides);
                for route in self.opened() {
                    if self.recipe(route).is_none() {
                        let what = "no limit of this kernel counts a connection again by";
                        self.shortfalls.push(format!("{what} {route}"));
                    }
                }
            }
            Err(error) => self.shortfalls.push(format!("recount was not tried: {error}")),
        }
    }

    /// The ways that are counted as far as is known, the first one first.
    pub fn ways(&self) -> Vec<Way> {
        let ways = self
            .opened()
            .into_iter()
            .filter_map(|route| self.recipe(route).map(|recipe| Way { route, recipe }));
        ways.collect()
    }

    /// The routes that a nudge is tried by, in this order.
    pub fn routes(&self) -> Vec<Route> {
        self.ways().into_iter().map(|way| way.route).collect()
    }

    /// The recipe of a route; `None` where the trial has shown that none of them is counted.
    fn recipe(&self, route: Route) -> Option<Recipe> {
        let of_route = || self.tried.iter().filter(|one| one.route == route);
        let counted = of_route().find(|one| one.verdict == Verdict::Counted);
        match counted {
            // Without one that it meets, it brings its own, whenever it gets to the limit.
            Some(_) if self.held_up == HeldUp::BehindConntrack => Some(Recipe::Fresh),
            Some(one) => Some(one.recipe),
            None if of_route().next().is_some()
                && of_route().all(|one| one.verdict == Verdict::NotCounted) =>
            {
                None
            }
            // Not known. By ingress every kernel counts the fresh one; by loopback most count the
            // other.
            None => Some(match route {
                // There no entry can be missing for so long; and the trial may have been held up itself.
                Route::Ingress if self.held_up == HeldUp::BeforeConntrack => Recipe::Replace,
                Route::Ingress => Recipe::Fresh,
                Route::Loopback => Recipe::Replace,
            }),
        }
    }

    /// The routes that are open, counted or not.
    fn opened(&self) -> Vec<Route> {
        let ingress = match self.helper {
            Helper::Absent => None,
            Helper::Open(_) | Helper::Broken => Some(Route::Ingress),
        };
        ingress.into_iter().chain(self.loopback.then_some(Route::Loopback)).collect()
    }

    /// Whether the ingress route leads to the rules for this connection.
    pub(super) fn check_ingress(&mut self, op: Op, entry: &Entry) -> Result<()> {
        self.mend_helper()?;
        if matches!(self.hop(entry.orig.src.addr(), Some(entry.orig.dst.addr()))?, Hop::Unreachable)
        {
            // For now: the kernel may learn one.
            let word = Some("no route to the client".to_owned());
            return Err(op.failed(Cause::Kernel { errno: Errno::ENETUNREACH, word }));
        }
        let entrance = self.entrance(op, entry.orig)?;
        self.helper(op)?.id(entrance.interface).map(drop)
    }

    /// Whether the loopback route leads to the rules for this connection.
    pub(super) fn check_loopback(&mut self, op: Op, entry: &Entry) -> Result<()> {
        let to = entry.orig.dst.addr();
        let unavailable = |what: String| Err(op.failed(Cause::Unavailable(what)));
        if self.recipe(Route::Loopback) == Some(Recipe::Fresh) && entry.is_translated() {
            // It would not meet the rules that translated the first SYN.
            return unavailable("translated: the loopback route does not reach its rules".into());
        }
        match self.hop(to, None)? {
            Hop::Local => Ok(()),
            // Anything else would leave this host.
            Hop::Entrance(_) | Hop::Unreachable => unavailable(format!(
                "{to} is no address of this host: the loopback route does not reach its rules"
            )),
        }
    }
}
