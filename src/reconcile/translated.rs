//! Suspects whose packets are translated: the entry says where they get to.

use std::collections::HashMap;

use super::ledger::Ledger;
use super::observe::Tables;
use super::policy::{Policy, Scope};
use crate::error::Result;
use crate::flow::Connection;
use crate::netlink::Transport;
use crate::watch::Suspect;

impl<T: Transport> Tables<T> {
    /// These suspects by the tuples that their sockets have, and where named ports lead to for the
    /// scope. One whose entry is gone is left to the sweep.
    pub(super) fn as_their_sockets_see_them(
        &mut self,
        suspects: HashMap<Connection, Suspect>,
        ledger: &Ledger,
        scope: &mut Scope,
        policy: &Policy,
    ) -> Result<HashMap<Connection, Suspect>> {
        let (translated, mut all): (HashMap<_, _>, HashMap<_, _>) =
            suspects.into_iter().partition(|(_, suspect)| suspect.is_translated);
        if translated.is_empty() {
            return Ok(all);
        }
        for zone in ledger.zones() {
            let asked: Vec<_> = translated.keys().map(|it| (it.received(), zone)).collect();
            let entries = self.conntrack.get(&asked)?;
            for (suspect, entry) in translated.values().zip(entries) {
                if let Some(entry) =
                    entry.filter(|entry| entry.orig == suspect.connection.received())
                {
                    scope.learn(policy, &entry);
                    let connection = Connection::of_sender(entry.reply);
                    let seen =
                        Suspect { connection, interface: 0, is_translated: false, ..*suspect };
                    let known = all.entry(connection).or_insert(seen);
                    *known = known.and_then(seen);
                }
            }
        }
        Ok(all)
    }
}
