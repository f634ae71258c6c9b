//! What the connections of a snapshot show of their siblings: whether a port is tracked, in which
//! zone, and how its peers' packets are translated. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::snapshot::{View, Views};
use crate::conntrack::Zone;
use crate::flow::{Endpoint, FourTuple};

/// What a missing entry may be inferred from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Local ports of which some connection has an entry: tracking is on there.
    pub tracked: HashSet<u16>,
    /// Zones that entries of the scope were found in.
    pub zones: BTreeSet<Zone>,
    /// For each local port the first destination that its peers have, before translation.
    pub destinations: HashMap<u16, Destination>,
    /// Connections that sockets of this host have opened, though no entry shows it.
    pub opened_here: HashSet<FourTuple>,
    /// Connections that the firewall's rules keep out of conntrack, or may.
    pub untracked: HashSet<FourTuple>,
}

/// Where the peers of a local port send their packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// To the socket itself, all of them.
    Direct,
    /// To this other endpoint, all of them: it is translated (REDIRECT, DNAT).
    Translated(Endpoint),
    /// Some here, some there.
    Various,
}

impl Evidence {
    /// What these connections show.
    pub fn of(views: &Views) -> Self {
        let mut this = Self::default();
        let mut last = None;
        for view in views.iter() {
            let Some(entry) = view.entry else { continue };
            let port = view.flow.src.port();
            let destination = (entry.reply == view.flow).then(|| {
                let direct = entry.orig.dst == view.flow.src;
                if direct { Destination::Direct } else { Destination::Translated(entry.orig.dst) }
            });
            // Most say what the one before them said.
            let now = Some((port, entry.zone, destination));
            if std::mem::replace(&mut last, now) == now {
                continue;
            }
            this.tracked.insert(port);
            this.zones.insert(entry.zone);
            if let Some(destination) = destination {
                let all = this.destinations.entry(port).or_insert(destination);
                if *all != destination {
                    *all = Destination::Various;
                }
            }
        }
        this
    }

    /// The zone that all siblings are in, if it is one.
    pub fn zone(&self) -> Option<Zone> {
        (self.zones.len() == 1).then(|| self.zones.first().copied()).flatten()
    }

    /// The endpoint that the peers of this connection's port are translated from, all of them.
    pub fn translated_from(&self, view: &View) -> Option<Endpoint> {
        match self.destinations.get(&view.flow.src.port()) {
            Some(Destination::Translated(first)) => Some(*first),
            _ => None,
        }
    }

    /// Whether siblings show that the connection is perhaps translated, and not how: a plain entry
    /// in the place of a translated one would break it.
    pub fn is_translated_somehow(&self, view: &View) -> bool {
        self.destinations.get(&view.flow.src.port()) == Some(&Destination::Various)
    }
}
