//! How half-closed connections that this host opened stand, at one look that changes nothing.

use super::plan::{self, HALF_CLOSED, is_candidate};
use crate::conntrack::{TcpState, Zone};
use crate::error::Result;
use crate::netlink::Transport;
use crate::reconcile::observe::Tables;
use crate::reconcile::policy::{Policy, Scope};
use crate::sockdiag::{Lookup, Opener, Socket};

/// Sockets that are looked up at once.
const PART: usize = 1024;

/// How many there are of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Half-closed sockets that this host or its containers opened.
    pub sockets: usize,
    /// Those whose entry is translated.
    pub translated: usize,
    /// Those whose entry conntrack believes to close, or to have closed.
    pub closing: usize,
    /// Those that have no entry: it has expired, or there never was one.
    pub without_entry: usize,
}

impl Survey {
    /// Looks.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost.
    pub fn look<T: Transport>(
        tables: &mut Tables<T>,
        scope: &Scope,
        policy: &Policy,
    ) -> Result<Self> {
        let mut sockets = tables.sockets.sockets(HALF_CLOSED.into_iter().collect())?;
        sockets.retain(|socket| {
            is_candidate(socket)
                && policy.admits(socket.remote.addr())
                && !scope.contains(policy, socket.connection())
        });
        let mut survey = Self::default();
        for part in sockets.chunks(PART) {
            survey.count(tables, part, policy)?;
        }
        Ok(survey)
    }

    fn count<T: Transport>(
        &mut self,
        tables: &mut Tables<T>,
        sockets: &[Socket],
        policy: &Policy,
    ) -> Result<()> {
        let lookups: Vec<_> = sockets.iter().map(Lookup::from).collect();
        let zones = [Zone::default(), Zone::both(policy.zone)];
        let zones = zones.into_iter().take(if policy.zone == 0 { 1 } else { 2 });
        let entries = tables.entries_of(&lookups, zones)?;
        let openers = tables.sockets.openers(&lookups)?;
        for ((socket, entry), by_tcp) in sockets.iter().zip(entries).zip(openers) {
            let connection = socket.connection();
            let by_entry = entry.and_then(|entry| plan::opener(&entry, connection));
            if by_entry.or(by_tcp) != Some(Opener::Here) {
                continue;
            }
            self.sockets += 1;
            match entry {
                None => self.without_entry += 1,
                Some(entry) => {
                    self.translated += usize::from(entry.is_translated());
                    let is_closing = entry.state().is_some_and(TcpState::is_closing);
                    self.closing += usize::from(is_closing);
                }
            }
        }
        Ok(())
    }
}
