//! Makes sure of a plan by exact look-ups, right before it is carried out.

use super::ledger::Ledger;
use super::observe::Tables;
use super::plan::{Action, Plan, plan};
use super::policy::{Policy, Scope};
use crate::error::Result;
use crate::netlink::Transport;
use crate::sockdiag::Lookup;

/// A plan that both tables have just confirmed, connection by connection.
///
/// Only [`confirm`] builds one: acting on the word of a dump does not compile.
#[derive(Clone, Debug)]
pub struct Confirmed(Plan);

impl Confirmed {
    /// The actions.
    pub fn actions(&self) -> &[Action] {
        &self.0.actions
    }
}

/// Looks at each connection of `plan` again, exactly, and plans anew from what is there now.
///
/// # Errors
/// A broken conversation: nothing is confirmed then.
pub fn confirm<T: Transport>(
    tables: &mut Tables<T>,
    plan_: &Plan,
    scope: &Scope,
    policy: &Policy,
    ledger: &Ledger,
) -> Result<Confirmed> {
    if plan_.actions.is_empty() {
        return Ok(Confirmed(Plan::default()));
    }
    let lookups: Vec<_> = plan_
        .actions
        .iter()
        .map(|action| match action.view.socket {
            Some(socket) => Lookup::from(&socket),
            None => {
                Lookup { flow: action.view.flow, interface: ledger.interface(action.view.flow) }
            }
        })
        .collect();
    let mut snapshot = tables.exactly(&lookups, ledger)?;
    // Evidence that siblings gave to the plan holds for its confirmation.
    snapshot.tracked.extend(plan_.tracked.iter());
    snapshot.zones.extend(plan_.zones.iter());
    snapshot.destinations.clone_from(&plan_.destinations);
    Ok(Confirmed(plan(&snapshot, scope, policy, ledger)))
}
