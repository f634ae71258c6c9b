//! What the connections of a snapshot show of their siblings: whether a port is tracked, in which
//! zone, and how its peers' packets are translated. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use super::snapshot::{View, Views};
use crate::conntrack::{Entry, Zone};
use crate::flow::{Endpoint, FourTuple};

/// Local endpoints whose siblings are remembered: those of all containers of a large host. A transparent
/// proxy has as many as its clients have destinations; of the others nothing is inferred.
const ENDPOINTS: usize = 65_536;

/// What a missing entry may be inferred from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Local ports of which some connection has an entry: tracking is on there.
    pub tracked: HashSet<u16>,
    /// Zones that entries of the scope were found in.
    pub zones: BTreeSet<Zone>,
    /// How packets get to each local endpoint.
    pub ways: Ways,
    /// Local addresses of other namespaces: what gets to a port of this host says nothing of them.
    pub behind: HashSet<IpAddr>,
    /// Connections that sockets of this host have opened, though no entry shows it.
    pub opened_here: HashSet<FourTuple>,
    /// Connections that the firewall's rules keep out of conntrack, or may.
    pub untracked: HashSet<FourTuple>,
}

/// What one entry shows: its local endpoint, its zone, and how packets get there.
pub(super) type Shown = (Endpoint, Zone, Option<Way>);

/// How packets get to local endpoints, by their entries.
pub type Ways = HashMap<Endpoint, Way>;

/// How all peers' packets get to a local endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Sent to it, in this zone.
    Direct(Zone),
    /// Sent to this other endpoint and translated (REDIRECT, DNAT), in this zone.
    Translated(Endpoint, Zone),
    /// Some in one way and some in another; or from addresses that are not theirs (masquerade).
    Various,
}

impl Way {
    fn of(view: &View, entry: &Entry) -> Option<Self> {
        if entry.reply != view.flow {
            return None;
        }
        Some(match entry.orig {
            orig if orig.src != view.flow.dst => Self::Various,
            orig if orig.dst == view.flow.src => Self::Direct(entry.zone),
            orig => Self::Translated(orig.dst, entry.zone),
        })
    }
}

impl Evidence {
    /// What these connections show.
    pub fn of(views: &Views) -> Self {
        let (mut this, mut last) = (Self::default(), None);
        views.iter().for_each(|view| this.see(&view, &mut last));
        this
    }

    /// One connection more; `last` is what the one before it showed.
    pub(super) fn see(&mut self, view: &View, last: &mut Option<Shown>) {
        let Some(entry) = view.entry else { return };
        let local = view.flow.src;
        let way = Way::of(view, &entry);
        // Most say what the one before them said.
        let now = Some((local, entry.zone, way));
        if std::mem::replace(last, now) == now {
            return;
        }
        self.tracked.insert(local.port());
        self.zones.insert(entry.zone);
        if let Some(way) = way.filter(|_| self.ways.len() < ENDPOINTS) {
            let all = self.ways.entry(local).or_insert(way);
            if *all != way {
                *all = Way::Various;
            }
        }
    }

    /// The zone that all siblings are in, if it is one.
    pub fn zone(&self) -> Option<Zone> {
        (self.zones.len() == 1).then(|| self.zones.first().copied()).flatten()
    }

    /// How the packets of this connection get here, as those of its siblings do by this look or by
    /// `before`: one in the place of a translated entry that is not would break the connection.
    /// `None` where no sibling says anything.
    pub fn way(&self, view: &View, before: &Ways) -> Option<Way> {
        let local = view.flow.src;
        let known = self.ways.get(&local).or_else(|| before.get(&local));
        known.copied().or_else(|| match self.behind.contains(&local.addr()) {
            true => Some(Way::Various),
            false => self.way_of_port(local.port(), before),
        })
    }

    /// The same by the siblings at other addresses of this host.
    fn way_of_port(&self, port: u16, before: &Ways) -> Option<Way> {
        let all = self.ways.iter().chain(before);
        let mut ways = all.filter(|(local, _)| local.port() == port).map(|(_, way)| *way);
        let first = ways.next()?;
        // Where another address is translated from says nothing of this one.
        let is_one = matches!(first, Way::Direct(_)) && ways.all(|way| way == first);
        Some(if is_one { first } else { Way::Various })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "192.0.2.1:8080";
    const POD: &str = "10.1.1.2:8080";
    const PUBLISHED: &str = "192.0.2.1:80";

    fn end(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    /// A connection of `client`, which asked for `asked` and is shown to the socket as `shown`.
    fn view(local: &str, asked: &str, client: &str, shown: &str, zone: u16) -> View {
        let flow = FourTuple::new(end(local), end(shown));
        let orig = FourTuple::new(end(client), end(asked));
        let entry = Entry { orig, ..Entry::plain(flow.inverse(), Zone::both(zone)) };
        View { flow, socket: None, entry: Some(entry) }
    }

    fn way(siblings: &[View], local: &str) -> Option<Way> {
        let lost = view(local, local, "198.51.100.9:9", "198.51.100.9:9", 0);
        let evidence = Evidence::of(&siblings.iter().copied().collect());
        evidence.way(&View { entry: None, ..lost }, &Ways::new())
    }

    #[test]
    fn a_port_of_the_host_and_the_same_port_of_a_container_have_each_their_own_way() {
        let client = "198.51.100.7:4000";
        let direct = view(HOST, HOST, client, client, 0);
        let translated = view(POD, PUBLISHED, client, client, 3);
        let both = [direct, translated];
        assert_eq!(way(&both, HOST), Some(Way::Direct(Zone::default())));
        assert_eq!(way(&both, POD), Some(Way::Translated(end(PUBLISHED), Zone::both(3))));
        // How packets get to another pod with this port is not known from these.
        assert_eq!(way(&both, "10.1.2.2:8080"), Some(Way::Various));
        assert_eq!(way(&[translated], "10.1.2.2:8080"), Some(Way::Various));
        assert_eq!(way(&[direct], "192.0.2.9:8080"), Some(Way::Direct(Zone::default())));
        assert_eq!(way(&both, "192.0.2.1:81"), None);
    }

    #[test]
    fn what_is_masqueraded_or_comes_in_two_ways_is_not_guessed() {
        let (client, node) = ("198.51.100.7:4000", "10.1.0.1:61000");
        let masqueraded = view(POD, PUBLISHED, client, node, 0);
        assert_eq!(way(&[masqueraded], POD), Some(Way::Various));
        let by_another = view(POD, "192.0.2.1:30080", client, client, 0);
        assert_eq!(
            way(&[view(POD, PUBLISHED, client, client, 0), by_another], POD),
            Some(Way::Various)
        );
        let elsewhere = view(POD, PUBLISHED, client, client, 1);
        assert_eq!(
            way(&[view(POD, PUBLISHED, client, client, 2), elsewhere], POD),
            Some(Way::Various)
        );
    }

    #[test]
    fn ports_of_the_host_say_nothing_of_other_namespaces() {
        let client = "198.51.100.7:4000";
        let mut evidence =
            Evidence::of(&[view(HOST, HOST, client, client, 0)].into_iter().collect());
        evidence.behind.insert(end(POD).addr());
        let lost = View { entry: None, ..view(POD, POD, client, client, 0) };
        assert_eq!(evidence.way(&lost, &Ways::new()), Some(Way::Various));
        // But for what an earlier look has shown of this very endpoint.
        let before = Ways::from([(end(POD), Way::Translated(end(PUBLISHED), Zone::default()))]);
        assert_eq!(evidence.way(&lost, &before), before.get(&end(POD)).copied());
    }
}
