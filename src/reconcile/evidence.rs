//! What the connections of a snapshot show of their siblings: whether a port is tracked, in which
//! zone, and how its peers' packets are translated. Pure.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use super::snapshot::{View, Views};
use crate::conntrack::{Entry, Zone};
use crate::flow::{Connection, Endpoint};

/// Local endpoints whose siblings are remembered: those of all containers of a large host. A transparent
/// proxy has as many as its clients have destinations; of the others nothing is inferred.
const ENDPOINTS: usize = 65_536;

/// What a missing entry may be inferred from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Local ports of which some connection has an entry: tracking is on there.
    pub tracked: HashSet<TrackedPort>,
    /// Zones that entries of the scope were found in.
    pub zones: BTreeSet<Zone>,
    /// How packets get to each local endpoint.
    pub arrivals: Arrivals,
    /// Local addresses of other namespaces: what gets to a port of this host says nothing of them.
    pub behind: HashSet<IpAddr>,
    /// Connections between two of these, that nothing translates: both sockets show the same addresses.
    pub direct: HashSet<Connection>,
    /// Those of them that a limit is for, so that conntrack has an entry of them.
    pub direct_and_limited: HashSet<Connection>,
    /// Connections that sockets of this host have opened, though no entry shows it.
    pub opened_here: HashSet<Connection>,
    /// Connections that the firewall's rules keep out of conntrack, or may.
    pub untracked: HashSet<Connection>,
}

/// A local port for one family: a rule makes conntrack see the packets of its own family alone
/// (`nf_ct_netns_get()`), so entries over IPv4 say nothing of connections over IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TrackedPort {
    /// Or IPv6.
    pub is_ipv4: bool,
    /// Its number.
    pub number: u16,
}

impl TrackedPort {
    /// That of a local endpoint.
    pub fn of(local: Endpoint) -> Self {
        Self { is_ipv4: local.addr().is_ipv4(), number: local.port() }
    }
}

/// What one entry shows: its local endpoint, its zone, and how packets get there.
pub(super) type Shown = (Endpoint, Zone, Option<Arrival>);

/// How packets get to local endpoints, by their entries.
pub type Arrivals = HashMap<Endpoint, Arrival>;

/// How all peers' packets get to a local endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// Sent to it, in this zone.
    Direct(Zone),
    /// Sent to this other endpoint and translated (REDIRECT, DNAT), in this zone.
    Translated(Endpoint, Zone),
    /// Some in one way and some in another; or from addresses that are not theirs (masquerade).
    Various,
}

impl Arrival {
    fn of(view: &View, entry: &Entry) -> Option<Self> {
        if entry.reply != view.connection.sent() {
            return None;
        }
        Some(match entry.orig {
            orig if orig.src != view.connection.remote => Self::Various,
            orig if orig.dst == view.connection.local => Self::Direct(entry.zone),
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
        let local = view.connection.local;
        let arrival = Arrival::of(view, &entry);
        // Most say what the one before them said.
        let now = Some((local, entry.zone, arrival));
        if std::mem::replace(last, now) == now {
            return;
        }
        self.tracked.insert(TrackedPort::of(local));
        self.zones.insert(entry.zone);
        if let Some(arrival) = arrival.filter(|_| self.arrivals.len() < ENDPOINTS) {
            let all = self.arrivals.entry(local).or_insert(arrival);
            if *all != arrival {
                *all = Arrival::Various;
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
    pub fn arrival(&self, view: &View, before: &Arrivals) -> Option<Arrival> {
        let local = view.connection.local;
        let known = self.arrivals.get(&local).or_else(|| before.get(&local)).copied();
        if self.direct.contains(&view.connection) {
            // However others get there.
            return known.filter(|it| matches!(it, Arrival::Direct(_)));
        }
        known.or_else(|| match self.behind.contains(&local.addr()) {
            true => Some(Arrival::Various),
            false => self.arrival_at_port(local.port(), before),
        })
    }

    /// The same by the siblings at other addresses of this host.
    fn arrival_at_port(&self, port: u16, before: &Arrivals) -> Option<Arrival> {
        let all = self.arrivals.iter().chain(before);
        let mut arrivals =
            all.filter(|(local, _)| local.port() == port).map(|(_, arrival)| *arrival);
        let first = arrivals.next()?;
        // Where another address is translated from says nothing of this one.
        let is_one =
            matches!(first, Arrival::Direct(_)) && arrivals.all(|arrival| arrival == first);
        Some(if is_one { first } else { Arrival::Various })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::FourTuple;

    const HOST: &str = "192.0.2.1:8080";
    const POD: &str = "10.1.1.2:8080";
    const PUBLISHED: &str = "192.0.2.1:80";

    fn end(text: &str) -> Endpoint {
        text.parse().unwrap()
    }

    /// A connection of `client`, which asked for `asked` and is shown to the socket as `shown`.
    fn view(local: &str, asked: &str, client: &str, shown: &str, zone: u16) -> View {
        let connection = Connection::new(end(local), end(shown));
        let orig = FourTuple::new(end(client), end(asked));
        let entry = Entry { orig, ..Entry::plain(connection.received(), Zone::both(zone)) };
        View { connection, socket: None, entry: Some(entry) }
    }

    fn arrival(siblings: &[View], local: &str) -> Option<Arrival> {
        let lost = view(local, local, "198.51.100.9:9", "198.51.100.9:9", 0);
        let evidence = Evidence::of(&siblings.iter().copied().collect());
        evidence.arrival(&View { entry: None, ..lost }, &Arrivals::new())
    }

    #[test]
    fn a_port_of_the_host_and_the_same_port_of_a_container_have_each_their_own_way() {
        let client = "198.51.100.7:4000";
        let direct = view(HOST, HOST, client, client, 0);
        let translated = view(POD, PUBLISHED, client, client, 3);
        let both = [direct, translated];
        assert_eq!(arrival(&both, HOST), Some(Arrival::Direct(Zone::default())));
        assert_eq!(arrival(&both, POD), Some(Arrival::Translated(end(PUBLISHED), Zone::both(3))));
        // How packets get to another pod with this port is not known from these.
        assert_eq!(arrival(&both, "10.1.2.2:8080"), Some(Arrival::Various));
        assert_eq!(arrival(&[translated], "10.1.2.2:8080"), Some(Arrival::Various));
        assert_eq!(arrival(&[direct], "192.0.2.9:8080"), Some(Arrival::Direct(Zone::default())));
        assert_eq!(arrival(&both, "192.0.2.1:81"), None);
    }

    #[test]
    fn what_is_masqueraded_or_comes_in_two_ways_is_not_guessed() {
        let (client, node) = ("198.51.100.7:4000", "10.1.0.1:61000");
        let masqueraded = view(POD, PUBLISHED, client, node, 0);
        assert_eq!(arrival(&[masqueraded], POD), Some(Arrival::Various));
        let by_another = view(POD, "192.0.2.1:30080", client, client, 0);
        assert_eq!(
            arrival(&[view(POD, PUBLISHED, client, client, 0), by_another], POD),
            Some(Arrival::Various)
        );
        let elsewhere = view(POD, PUBLISHED, client, client, 1);
        assert_eq!(
            arrival(&[view(POD, PUBLISHED, client, client, 2), elsewhere], POD),
            Some(Arrival::Various)
        );
    }

    #[test]
    fn ports_of_the_host_say_nothing_of_other_namespaces() {
        let client = "198.51.100.7:4000";
        let mut evidence =
            Evidence::of(&[view(HOST, HOST, client, client, 0)].into_iter().collect());
        evidence.behind.insert(end(POD).addr());
        let lost = View { entry: None, ..view(POD, POD, client, client, 0) };
        assert_eq!(evidence.arrival(&lost, &Arrivals::new()), Some(Arrival::Various));
        // But for what an earlier look has shown of this very endpoint.
        let before =
            Arrivals::from([(end(POD), Arrival::Translated(end(PUBLISHED), Zone::default()))]);
        assert_eq!(evidence.arrival(&lost, &before), before.get(&end(POD)).copied());
        // And for what the client's own socket shows.
        evidence.direct.insert(lost.connection);
        assert_eq!(evidence.arrival(&lost, &before), None);
        let direct = Arrivals::from([(end(POD), Arrival::Direct(Zone::both(3)))]);
        assert_eq!(evidence.arrival(&lost, &direct), direct.get(&end(POD)).copied());
    }
}
