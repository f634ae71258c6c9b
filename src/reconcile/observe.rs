//! Reads both tables into a [`Snapshot`], connection by connection; [`super::whole`] reads them whole.

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use super::evidence::{Arrival, TrackedPort};
use super::ledger::Ledger;
use super::policy::{Policy, Scope};
use super::snapshot::{Snapshot, View};
use super::whole::rank;
use crate::conntrack::{Conntrack, Entry, Zone};
use crate::error::Result;
use crate::firewall::Ruleset;
use crate::firewall::limits::Limiter;
use crate::firewall::tracking::{Opened, Tracking};
use crate::flow::{Connection, FourTuple};
use crate::netlink::{KernelSocket, Transport};
use crate::rtnetlink::route::Routes;
use crate::sockdiag::{Cookie, Lookup, Opener, SockDiag, Socket, State};

/// What exact look-ups have just shown, connection by connection: it may be acted upon.
///
/// Only [`Tables::exactly`] makes one.
#[derive(Clone, Debug)]
pub struct Exact(Snapshot);

impl Deref for Exact {
    type Target = Snapshot;

    fn deref(&self) -> &Snapshot {
        &self.0
    }
}

impl Exact {
    /// The snapshot.
    pub fn into_snapshot(self) -> Snapshot {
        self.0
    }
}

/// Both tables of one network namespace.
#[derive(Debug)]
pub struct Tables<T = KernelSocket> {
    /// The entries.
    pub conntrack: Conntrack<T>,
    /// The sockets.
    pub sockets: SockDiag<T>,
    /// Routes of the namespaces that the sockets are in: what is local to one of them ends there.
    /// Empty: every address is taken for one.
    pub homes: Vec<Routes<T>>,
    /// The firewall's rules, where some keep connections out of conntrack.
    pub tracking: Option<Arc<Tracking>>,
}

impl Tables<KernelSocket> {
    /// Opens both in the network namespace of the calling thread.
    ///
    /// # Errors
    /// A missing privilege or module, named.
    pub fn open() -> Result<Self> {
        let (mut sockets, homes) = (SockDiag::open()?, vec![Routes::open()?]);
        let conntrack = Conntrack::open()?;
        sockets.probe()?;
        Ok(Self { conntrack, sockets, homes, tracking: None })
    }
}

impl<T: Transport> Tables<T> {
    /// The scope at this moment.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost.
    pub fn scope(&mut self, policy: &Policy) -> Result<Scope> {
        // With ports named there is nothing to ask.
        let listeners =
            if policy.ports.is_empty() { self.sockets.listeners_lately()? } else { Vec::new() };
        Ok(policy.scope(&listeners))
    }

    /// The sockets of the scope that one side has closed: one dump, of nothing else.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost.
    pub fn half_closed(
        &mut self,
        scope: &Scope,
        policy: &Policy,
        ledger: &Ledger,
    ) -> Result<Vec<Socket>> {
        let states = policy.states.iter().filter(|state| *state != State::Established).collect();
        let mut sockets = self.sockets.sockets_lately(states)?;
        sockets.retain(|socket| {
            ledger.holds(socket)
                || policy.guards(socket) && scope.contains(policy, socket.connection())
        });
        Ok(sockets)
    }

    /// These connections, exactly: each entry by its tuple, then each socket by its tuple.
    ///
    /// In this order, so that an entry that closes because its server closes is never taken for
    /// one that was fooled: the socket changes first.
    ///
    /// # Errors
    /// A broken conversation. An unanswered question never looks like an absent socket.
    pub fn exactly(&mut self, lookups: &[Lookup], ledger: &Ledger) -> Result<Exact> {
        self.exactly_again(lookups, ledger, &Snapshot::default())
    }

    /// As [`Tables::exactly`], a moment after `before`, which was seen so: who opened a socket does not
    /// change, and is not asked again.
    ///
    /// # Errors
    /// As [`Tables::exactly`].
    pub fn exactly_again(
        &mut self,
        lookups: &[Lookup],
        ledger: &Ledger,
        before: &Snapshot,
    ) -> Result<Exact> {
        let entries = self.entries_of(lookups, ledger.zones())?;
        let sockets = self.open_sockets(lookups)?;
        let views = lookups
            .iter()
            .zip(sockets)
            .zip(entries)
            .map(|((lookup, socket), entry)| View { connection: lookup.connection, socket, entry });
        let mut snapshot = Snapshot::new(views);
        let unseen = snapshot
            .views
            .iter()
            .filter(|view| view.socket.is_some_and(|socket| ledger.last_entry(&socket).is_none()));
        let aside = self.bridged(unseen)?;
        if !aside.is_empty() {
            let set_aside = |view: View| match aside.contains(&view.connection) {
                true => View { socket: None, ..view },
                false => view,
            };
            snapshot = Snapshot::new(snapshot.views.iter().map(set_aside));
        }
        snapshot.evidence.behind = self.behind(&snapshot);
        snapshot.evidence.direct = self.direct(snapshot.views.iter())?;
        snapshot.evidence.opened_here = self.opened_here(&snapshot, ledger, before)?;
        self.play(&mut snapshot, ledger);
        Ok(Exact(snapshot))
    }

    /// The sockets of these connections, in the order asked.
    ///
    /// # Errors
    /// A broken conversation. An unanswered question never looks like an absent socket.
    pub fn open_sockets(&mut self, lookups: &[Lookup]) -> Result<Vec<Option<Socket>>> {
        // A connection in TIME_WAIT is over: the kernel only remembers its tuple.
        let is_there = |socket: &Socket| socket.state != State::TimeWait;
        let sockets = self.sockets.lookup(lookups)?;
        Ok(sockets.into_iter().map(|socket| socket.filter(is_there)).collect())
    }

    /// Local addresses of other namespaces that have a connection whose entry does not show how its
    /// packets get there.
    pub(super) fn behind(&self, snapshot: &Snapshot) -> HashSet<IpAddr> {
        let shows =
            |view: &View| view.entry.is_some_and(|entry| entry.reply == view.connection.sent());
        let hidden = snapshot.views.iter().filter(|view| !shows(view));
        hidden
            .map(|view| view.connection.local.addr())
            .filter(|it| self.sockets.is_of_member(*it))
            .collect()
    }

    /// Goes by these rules from now on.
    pub fn follow_tracking(&mut self, rules: &Ruleset) {
        let limits = |rules: &Ruleset| Limiter::of(rules).rules;
        self.tracking = Tracking::of(rules.chains.iter().cloned(), limits).map(Arc::new);
    }

    /// Lets the rules say which of the connections without an entry of their own conntrack never
    /// sees.
    pub fn play(&self, snapshot: &mut Snapshot, ledger: &Ledger) {
        if let Some(tracking) = &self.tracking {
            play(tracking, snapshot, ledger);
        }
    }

    /// The connections that this host has opened, among those of which no entry shows it: it is
    /// gone, or was made by a packet in the connection's middle.
    fn opened_here(
        &mut self,
        snapshot: &Snapshot,
        ledger: &Ledger,
        before: &Snapshot,
    ) -> Result<HashSet<Connection>> {
        let told: HashSet<Cookie> =
            sockets_to_ask(before, ledger).map(|socket| socket.cookie).collect();
        let (told, unknown): (Vec<_>, Vec<_>) =
            sockets_to_ask(snapshot, ledger).partition(|socket| told.contains(&socket.cookie));
        let told = told.into_iter().map(|socket| socket.connection());
        let mut here: HashSet<_> =
            told.filter(|it| before.evidence.opened_here.contains(it)).collect();
        if !unknown.is_empty() {
            let lookups: Vec<_> = unknown.iter().map(Lookup::from).collect();
            let openers = lookups.iter().zip(self.sockets.openers(&lookups)?);
            let found = openers.filter(|(_, opener)| *opener == Some(Opener::Here));
            here.extend(found.map(|(lookup, _)| lookup.connection));
        }
        Ok(here)
    }

    /// The entries of these connections, in these zones.
    pub(super) fn entries_of(
        &mut self,
        connections: &[Lookup],
        zones: impl IntoIterator<Item = Zone>,
    ) -> Result<Vec<Option<Entry>>> {
        let mut found: Vec<Option<Entry>> = vec![None; connections.len()];
        let rules = self.tracking.as_deref().and_then(Tracking::zones);
        for zone in zones {
            // Where rules set zones another entry may be the one that a limit looks at.
            let missing: Vec<usize> = found
                .iter()
                .enumerate()
                .filter_map(|(index, entry)| (entry.is_none() || rules.is_some()).then_some(index))
                .collect();
            let keys: Vec<(FourTuple, Zone)> = missing
                .iter()
                .filter_map(|index| connections.get(*index))
                .map(|lookup| (lookup.connection.sent(), zone))
                .collect();
            for (index, entry) in missing.into_iter().zip(self.conntrack.get(&keys)?) {
                let lookup = connections.get(index);
                if let (Some(slot), Some(lookup), Some(entry)) =
                    (found.get_mut(index), lookup, entry)
                {
                    let worth = |entry: &Entry| rank(lookup.connection, entry, rules.as_ref());
                    if slot.as_ref().is_none_or(|known| worth(known) < worth(&entry)) {
                        *slot = Some(entry);
                    }
                }
            }
        }
        Ok(found)
    }
}

/// Lets rules say which of the connections without an entry of their own conntrack never sees.
pub fn play(tracking: &Tracking, snapshot: &mut Snapshot, ledger: &Ledger) {
    let plain = snapshot.views.iter().filter(|view| is_dark(view, ledger));
    let plain = plain.filter(|view| tracking.is_surely_plain(view.connection));
    let plain: Vec<_> = plain.map(|view| TrackedPort::of(view.connection.local)).collect();
    snapshot.evidence.tracked.extend(plain);
    let direct = &snapshot.evidence.direct;
    let limited = direct.iter().filter(|it| tracking.is_surely_tracked(**it)).copied().collect();
    snapshot.evidence.direct_and_limited = limited;
    let evidence = &snapshot.evidence;
    let dark = || snapshot.views.iter().filter(|view| is_dark(view, ledger));
    let opened = dark().map(|view| {
        let of_entry = view.entry.filter(|entry| entry.reply == view.connection.sent());
        let Connection { local, remote } = view.connection;
        let asked = of_entry.map(|entry| entry.orig.dst);
        let asked = asked.unwrap_or_else(|| match evidence.arrival(&view, ledger.arrivals()) {
            Some(Arrival::Translated(first, _)) => first,
            _ => local,
        });
        Opened { peer: remote, asked, socket: local }
    });
    let untracked = dark().zip(tracking.of_each(opened));
    let untracked = untracked.filter(|(_, tracked)| *tracked != Some(true));
    snapshot.evidence.untracked = untracked.map(|(view, _)| view.connection).collect();
}

/// Whether no entry shows, or has shown, how a socket's connection began.
/// Those that no entry, seen now or before, says anything of.
fn sockets_to_ask<'a>(
    snapshot: &'a Snapshot,
    ledger: &'a Ledger,
) -> impl Iterator<Item = Socket> + 'a {
    let dark = snapshot.views.iter().filter(|view| is_dark(view, ledger));
    dark.filter_map(|view| view.socket).filter(|socket| ledger.last_entry(socket).is_none())
}

fn is_dark(view: &View, ledger: &Ledger) -> bool {
    let tells_nothing = |entry: Entry| entry.is_picked_up();
    view.socket.is_some_and(|socket| {
        socket.takes_a_slot()
            && view.entry.is_none_or(tells_nothing)
            && ledger.last_entry(&socket).is_none_or(tells_nothing)
    })
}
