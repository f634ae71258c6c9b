//! Sources over an overload of the settings: looked for at each sweep interval, and at once when an
//! event shows that connections change, as far as a hundredth of a core reaches.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;

use super::Live;
use super::threads::cpu_time;
use crate::containers::addresses;
use crate::error::Result;
use crate::metrics::GuardMetrics;
use crate::nftables::shared::Shape;
use crate::overload::sets::{self, Sets};
use crate::overload::{Changes, Marked, Overload, Place};
use crate::reconcile::policy::{Policy, Scope};
use crate::sockdiag::{SockDiag, Socket, States};

/// A look may cost this share of a core.
const SHARE: u32 = 100;

/// The set for a source, where there is one for its family.
type Found = Option<(Place, Shape)>;

/// The overloads of one worker.
#[derive(Debug)]
pub(super) struct Overloads {
    live: Arc<Live>,
    dry_run: bool,
    marked: Vec<Marked>,
    sets: Option<Sets>,
    /// The sets as this look has found them.
    places: HashMap<(Vec<Place>, bool), Found>,
    /// Our own table is there: rules that name its sets can be loaded before a source is in one.
    has_own: bool,
    due: Instant,
    /// No look comes sooner.
    free: Instant,
    is_failing: bool,
}

impl Overloads {
    pub(super) fn new(live: Arc<Live>, dry_run: bool, now: Instant) -> Self {
        let marked = live.overloads.iter().map(|_| Marked::default()).collect();
        Self {
            live,
            dry_run,
            marked,
            sets: None,
            places: HashMap::new(),
            has_own: false,
            due: now,
            free: now,
            is_failing: false,
        }
    }

    /// Goes by these settings from now on; what is no longer asked for leaves its sets.
    pub(super) fn apply_settings(&mut self, live: Arc<Live>, share: &GuardMetrics) {
        let before = std::mem::replace(&mut self.live, live);
        let mut known: Vec<_> =
            before.overloads.iter().zip(std::mem::take(&mut self.marked)).map(Some).collect();
        for overload in &self.live.overloads {
            let same = |it: &&mut Option<(&Overload, Marked)>| {
                it.as_ref().is_some_and(|(known, _)| *known == overload)
            };
            let found = known.iter_mut().find(same).and_then(Option::take);
            self.marked.push(found.map(|(_, marked)| marked).unwrap_or_default());
        }
        for (overload, marked) in known.into_iter().flatten() {
            for net in marked.into_nets() {
                if let Err(error) = self.leave(overload, net) {
                    tracing::warn!(source = %net, %error, "a source stays in a set");
                }
            }
        }
        self.publish(share, &before.overloads);
        self.due = self.free;
    }

    /// When it is time to look; `None` where nothing is asked for.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let is_wanted = !self.live.overloads.is_empty();
        is_wanted.then(|| self.due.max(self.free))
    }

    /// Connections change.
    pub(super) fn hasten(&mut self) {
        self.due = self.free;
    }

    /// Looks, where it is time.
    ///
    /// # Errors
    /// The sockets cannot be listed.
    pub(super) fn turn(
        &mut self,
        sockets: &mut SockDiag,
        scope: &Scope,
        policy: &Policy,
        share: &GuardMetrics,
    ) -> Result<()> {
        let began = Instant::now();
        if self.next_timeout().is_none_or(|due| due > began) {
            return Ok(());
        }
        let worked = cpu_time();
        let done = self.look(sockets, scope, policy, began);
        let ended = Instant::now();
        self.free = ended + cpu_time().saturating_sub(worked) * SHARE;
        self.due = (began + self.live.sweep_interval).max(self.free);
        self.publish(share, &[]);
        done
    }

    fn look(
        &mut self,
        sockets: &mut SockDiag,
        scope: &Scope,
        policy: &Policy,
        now: Instant,
    ) -> Result<()> {
        self.places.clear();
        let live = self.live.clone();
        let own = live.overloads.iter().find(|it| it.sets.is_empty());
        if let Some(overload) = own.filter(|_| !self.has_own && !self.dry_run) {
            self.has_own = true;
            if let Err(error) = self.find(overload, true) {
                tracing::warn!(%error, "no sets of our own yet");
            }
        }
        let states = live.overloads.iter().flat_map(|overload| overload.states.iter());
        let mut all = sockets.sockets(States::from_iter(states))?;
        if sockets.members().len() > 0 {
            // A proxy's, or a masquerade's: whose connection to the container it is does not show.
            let own = addresses()?;
            let is_of_member = |it: &Socket| sockets.is_of_member(it.local.addr());
            all.retain(|it| !(own.contains(&it.remote.addr()) && is_of_member(it)));
        }
        for (index, overload) in live.overloads.iter().enumerate() {
            let is_named = !overload.ports.is_empty();
            let over = overload.over(&all, |socket| {
                policy.admits(socket.remote.addr())
                    && (is_named || scope.ports.contains(&socket.local.port()))
            });
            let Some(marked) = self.marked.get_mut(index) else { continue };
            let changes = marked.step(over, overload.time, now);
            self.carry_out(index, overload, changes);
        }
        Ok(())
    }

    fn carry_out(&mut self, index: usize, overload: &Overload, changes: Changes) {
        for over in changes.enter {
            match self.put(overload, over.net) {
                Ok(set) => {
                    tracing::warn!(
                        source = %name(over.net),
                        port = over.port,
                        open = over.open,
                        above = overload.above,
                        set = set.as_ref().map_or("none", |place| &place.set),
                        "overload"
                    );
                    self.is_failing = false;
                }
                Err(error) => {
                    self.places.clear();
                    if !std::mem::replace(&mut self.is_failing, true) {
                        tracing::warn!(%error, source = %over.net, "a source is in no set, will be tried again");
                    }
                    if let Some(marked) = self.marked.get_mut(index) {
                        marked.forget(over.net);
                    }
                }
            }
        }
        for net in changes.renew {
            if let Err(error) = self.put(overload, net) {
                tracing::debug!(%error, source = %net, "not renewed");
                if let Some(marked) = self.marked.get_mut(index) {
                    marked.forget(net);
                }
            }
        }
        for net in changes.leave {
            match self.leave(overload, net) {
                Ok(()) => tracing::info!(source = %name(net), "a source is over no more"),
                Err(error) => tracing::warn!(source = %net, %error, "a source stays in a set"),
            }
        }
    }

    /// Puts a source into the set that it belongs to, and says which; `None` where there is none for
    /// its family, or nothing is changed.
    fn put(&mut self, overload: &Overload, net: IpNet) -> Result<Option<Place>> {
        let Some((place, shape)) = self.place(overload, net)? else { return Ok(None) };
        // Another overload may want it there for longer.
        let time = self.live.overloads.iter().zip(&self.marked);
        let time = time.filter(|(other, marked)| other.sets == overload.sets && marked.has(net));
        let time = time.map(|(other, _)| other.time).max().unwrap_or(overload.time);
        if let Some(sets) = &mut self.sets {
            sets.put(&place, shape, net, time)?;
        }
        Ok(Some(place))
    }

    fn leave(&mut self, overload: &Overload, net: IpNet) -> Result<()> {
        let mut others = self.live.overloads.iter().zip(&self.marked);
        if others.any(|(other, marked)| other.sets == overload.sets && marked.has(net)) {
            return Ok(());
        }
        match self.place(overload, net)? {
            Some((place, shape)) => {
                self.sets.as_mut().map_or(Ok(()), |sets| sets.take(&place, shape, net))
            }
            None => Ok(()),
        }
    }

    /// The set for a source.
    fn place(&mut self, overload: &Overload, net: IpNet) -> Result<Found> {
        let key = (overload.sets.clone(), net.addr().is_ipv4());
        if let Some(known) = self.places.get(&key) {
            return Ok(known.clone());
        }
        let found = if self.dry_run { None } else { self.find(overload, key.1)? };
        self.places.insert(key, found.clone());
        Ok(found)
    }

    fn find(&mut self, overload: &Overload, is_ipv4: bool) -> Result<Found> {
        let sets = match &mut self.sets {
            Some(sets) => sets,
            none => none.insert(Sets::open()?),
        };
        if overload.sets.is_empty() {
            let all = || self.live.overloads.iter().filter(|it| it.sets.is_empty());
            let networks = [true, false].map(|is_ipv4| all().any(|it| it.is_of_networks(is_ipv4)));
            sets.make_own(networks)?;
            let place = sets::own(is_ipv4);
            let shape = sets.shape(&place)?;
            return Ok(Some((place, shape)));
        }
        for place in &overload.sets {
            let shape = sets.shape(place)?;
            if shape.key_length == if is_ipv4 { 4 } else { 16 } {
                return Ok(Some((place.clone(), shape)));
            }
        }
        Ok(None)
    }

    /// How many are in each set; `before` are overloads that may be gone.
    fn publish(&self, share: &GuardMetrics, before: &[Overload]) {
        let mut counts = BTreeMap::new();
        for overload in before {
            counts.insert(label(overload), 0);
        }
        for (overload, marked) in self.live.overloads.iter().zip(&self.marked) {
            *counts.entry(label(overload)).or_default() += marked.len();
        }
        for (set, sources) in counts {
            share.overload_sources(&set, sources);
        }
    }
}

/// How metrics call the sets of an overload.
fn label(overload: &Overload) -> String {
    match overload.sets.first() {
        Some(place) => format!("{} {} {}", place.family, place.table, place.set),
        None => "inet ctkeep over".to_owned(),
    }
}

/// An address where the network is one.
fn name(net: IpNet) -> String {
    if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_of_one_address_is_logged_as_an_address() {
        assert_eq!(name("198.51.100.7/32".parse().unwrap()), "198.51.100.7");
        assert_eq!(name("2001:db8::/64".parse().unwrap()), "2001:db8::/64");
    }
}
