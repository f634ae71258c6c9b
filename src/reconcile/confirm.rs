//! Makes sure of a plan by exact look-ups, right before it is carried out.

use super::evidence::Evidence;
use super::ledger::Ledger;
use super::observe::{Exact, Tables};
use super::plan::{self, Action, Plan};
use super::policy::{Policy, Scope};
use crate::error::Result;
use crate::netlink::Transport;
use crate::sockdiag::{Lookup, Socket};

/// A plan that both tables have just confirmed, connection by connection.
///
/// It comes from an [`Exact`] snapshot alone: acting on the word of a dump does not compile.
#[derive(Clone, Debug, Default)]
pub struct Confirmed {
    plan: Plan,
    opened_here: Vec<Socket>,
}

impl Confirmed {
    /// What exact look-ups call for.
    pub fn new(snapshot: &Exact, scope: &Scope, policy: &Policy, ledger: &Ledger) -> Self {
        Self::by(snapshot, &snapshot.evidence, scope, policy, ledger)
    }

    fn by(
        snapshot: &Exact,
        evidence: &Evidence,
        scope: &Scope,
        policy: &Policy,
        ledger: &Ledger,
    ) -> Self {
        let own = &snapshot.evidence.opened_here;
        let sockets = snapshot.views.iter().filter_map(|view| view.socket);
        Self {
            plan: plan::plan_for(snapshot.views.iter(), evidence, scope, policy, ledger),
            opened_here: sockets.filter(|socket| own.contains(&socket.connection())).collect(),
        }
    }

    /// Sockets that have turned out to have opened their connections themselves.
    pub fn opened_here(&self) -> &[Socket] {
        &self.opened_here
    }

    /// The actions.
    pub fn actions(&self) -> &[Action] {
        &self.plan.actions
    }

    /// Drops the actions that `wanted` does not want.
    pub fn retain(&mut self, wanted: impl Fn(&Action) -> bool) {
        self.plan.actions.retain(wanted);
    }
}

/// Looks at each connection of `plan` again, exactly, and plans anew from what is there now, by the
/// `evidence` that the plan was made by.
///
/// # Errors
/// A broken conversation: nothing is confirmed then.
pub fn confirm<T: Transport>(
    tables: &mut Tables<T>,
    plan: &Plan,
    evidence: &Evidence,
    scope: &Scope,
    policy: &Policy,
    ledger: &Ledger,
) -> Result<Confirmed> {
    if plan.actions.is_empty() {
        return Ok(Confirmed::default());
    }
    let lookups: Vec<_> = plan
        .actions
        .iter()
        .map(|action| match action.view.socket {
            Some(socket) => Lookup::from(&socket),
            None => {
                let interface = ledger.interface(action.view.connection).unwrap_or(0);
                Lookup { connection: action.view.connection, interface }
            }
        })
        .collect();
    let snapshot = tables.exactly(&lookups, ledger)?;
    let exact = &snapshot.evidence;
    let known;
    let evidence = if exact.opened_here.is_empty()
        && exact.untracked.is_empty()
        && evidence.direct == exact.direct
    {
        evidence
    } else {
        known = Evidence {
            opened_here: exact.opened_here.clone(),
            untracked: exact.untracked.clone(),
            direct: exact.direct.clone(),
            direct_and_limited: exact.direct_and_limited.clone(),
            ..evidence.clone()
        };
        &known
    };
    Ok(Confirmed::by(&snapshot, evidence, scope, policy, ledger))
}
