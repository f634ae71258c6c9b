//! Reads both tables whole, and puts them together while they are read: of millions of entries only
//! those of the scope take room.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::evidence::{Evidence, Shown};
use super::observe::Tables;
use super::policy::{Policy, Scope};
use super::snapshot::{Direction, Snapshot, View, Views};
use crate::conntrack::{Entry, Filter, Zone};
use crate::error::Result;
use crate::firewall::tracking::{Opened, Tracking, Zones};
use crate::flow::{AF_INET, AF_INET6, Connection, Endpoint};
use crate::netlink::Transport;
use crate::rtnetlink::route::Routes;
use crate::sockdiag::{Cookie, Lookup, Socket, State, States};

/// Up to this many ports the kernel filters a dump by port; each port costs two walks of the table
/// for each family, and two ports cost more than to read all of 200 000 entries (benches/audit.rs).
const FILTERED_PORTS: usize = 1;

/// Entries that are looked up at once.
const PART: usize = 1024;

/// How much is kept of connections that are over: no socket, and an entry that no limiter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Each of them.
    Each,
    /// Their number: on a busy server most entries are in TIME_WAIT.
    Number,
}

/// By what a deep sweep reads entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// The whole table, with what no socket backs.
    Dump,
    /// One exact question for each socket, in these zones: some 4 us where a dump takes 2 us for each
    /// entry of the host.
    LookUps(Vec<Zone>),
}

/// What a deep sweep is to read.
#[derive(Clone, Debug)]
pub struct Reading {
    /// By what.
    pub by: By,
    /// The ports.
    pub scope: Scope,
    /// Whose connections.
    pub policy: Policy,
    /// States of sockets that are listed besides.
    pub aside: States,
    /// Open sockets of other namespaces.
    pub of_members: Vec<Socket>,
    /// Addresses of theirs.
    pub theirs: HashSet<IpAddr>,
    /// Rules that say in which zone connections are.
    pub tracking: Option<Arc<Tracking>>,
}

/// Both tables, as a deep sweep wants them.
#[derive(Debug, Default)]
pub struct Whole {
    /// Connections without a socket are not among them.
    pub lacks_orphans: bool,
    /// The connections.
    pub snapshot: Snapshot,
    /// The sockets among them.
    pub cookies: HashSet<Cookie>,
    /// Those of them that the peer has half-closed.
    pub half_closed: Vec<Socket>,
    /// Sockets that were to be listed besides.
    pub aside: Vec<Socket>,
    /// What named ports lead to.
    pub published: HashMap<Endpoint, u16>,
}

impl<T: Transport> Tables<T> {
    /// Every connection of the scope that ends in one of our namespaces and has a socket in one of
    /// `states`, an entry, or both.
    ///
    /// Dumps of two tables at two moments: a disagreement in it is only a suspicion.
    ///
    /// # Errors
    /// The kernel refused, or an answer was lost.
    pub fn whole(
        &mut self,
        scope: &mut Scope,
        policy: &Policy,
        states: States,
    ) -> Result<Snapshot> {
        let sockets = self.sockets.sockets(states)?;
        self.with_entries(sockets, scope, policy, Over::Each)
    }

    /// What a deep sweep wants. It may be read by other sockets than those of the sweep.
    ///
    /// # Errors
    /// As [`Tables::whole`].
    pub fn read(&mut self, reading: Reading) -> Result<Whole> {
        let Reading { by, mut scope, policy, aside, of_members, theirs, tracking } = reading;
        self.tracking = tracking;
        if self.sockets.members().len() == 0 {
            self.sockets.know_addresses(theirs);
        }
        let mut sockets = self.sockets.sockets(States::open())?;
        sockets.extend(of_members);
        let snapshot = match &by {
            By::Dump => self.with_entries(sockets, &mut scope, &policy, Over::Number)?,
            By::LookUps(zones) => self.one_by_one(sockets, zones, &scope, &policy)?,
        };
        let lacks_orphans = by != By::Dump;
        let sockets = || snapshot.views.iter().filter_map(|view| view.socket);
        let cookies = sockets().map(|socket| socket.cookie).collect();
        let half_closed = sockets().filter(|socket| socket.state == State::CloseWait).collect();
        let aside = if aside == States::default() || lacks_orphans {
            Vec::new()
        } else {
            self.sockets.sockets(aside)?
        };
        Ok(Whole {
            lacks_orphans,
            snapshot,
            cookies,
            half_closed,
            aside,
            published: scope.published,
        })
    }

    /// These sockets and all entries of the scope. What named ports lead to is seen with them: where that
    /// is news, they are read once more.
    ///
    /// # Errors
    /// As [`Tables::whole`].
    pub fn with_entries(
        &mut self,
        sockets: Vec<Socket>,
        scope: &mut Scope,
        policy: &Policy,
        over: Over,
    ) -> Result<Snapshot> {
        if policy.ports.is_empty() {
            return Ok(self.put_together(sockets, scope, policy, over)?.0);
        }
        for entry in self.asked_of(policy)? {
            scope.learn(policy, &entry);
        }
        let (mut snapshot, mut led) = self.put_together(sockets.clone(), scope, policy, over)?;
        if led.keys().any(|local| !scope.published.contains_key(local)) {
            scope.published.extend(led);
            (snapshot, led) = self.put_together(sockets, scope, policy, over)?;
        }
        let open =
            snapshot.views.iter().filter(|view| view.socket.is_some() || view.entry.is_some());
        let open: HashSet<_> = open.map(|view| view.connection.local).collect();
        scope.published.retain(|local, _| open.contains(local) || led.contains_key(local));
        Ok(snapshot)
    }

    /// Entries of translated connections to the named port, where the kernel filters by it.
    fn asked_of(&mut self, policy: &Policy) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        for port in policy.ports.iter().filter(|_| policy.ports.len() <= FILTERED_PORTS) {
            for family in [AF_INET, AF_INET6] {
                let filter = Filter::AskedOf(*port);
                all.extend(self.conntrack.entries(family, filter, |led: &mut Vec<_>, entry| {
                    if entry.reply.src != entry.orig.dst {
                        led.push(*entry);
                    }
                })?);
            }
        }
        Ok(all)
    }

    /// The same by what is in scope now, and what named ports lead to.
    fn put_together(
        &mut self,
        sockets: Vec<Socket>,
        scope: &Scope,
        policy: &Policy,
        over: Over,
    ) -> Result<(Snapshot, HashMap<Endpoint, u16>)> {
        let mut led = HashMap::new();
        let tracking = self.tracking.clone();
        let zones = tracking.as_deref().and_then(Tracking::zones);
        let other_ends = self.other_ends(&sockets);
        let mut joined = Joined { zones, ..Joined::of(sockets, scope, policy, over) };
        let mut homes = HashMap::new();
        let mut refused = None;
        let Self { conntrack, sockets: diag, homes: routes, .. } = self;
        // The sockets of connections that end elsewhere are not missing here.
        let mut is_here = |connection: Connection| {
            let addr = connection.local.addr();
            *homes.entry(addr).or_insert_with(|| {
                diag.is_of_member(addr)
                    || is_home(routes, addr).unwrap_or_else(|error| {
                        refused.get_or_insert(error);
                        true
                    })
            })
        };
        for filter in filters(scope) {
            for family in [AF_INET, AF_INET6] {
                conntrack.entries(family, filter, |(), entry| {
                    led.extend(scope.led(policy, entry));
                    joined.take(entry, &mut is_here);
                })?;
            }
        }
        if let Some(error) = refused {
            return Err(error);
        }
        let snapshot = self.but_bridged(joined.end(), &other_ends)?;
        Ok((snapshot, led))
    }

    /// These sockets, each with its entry.
    fn one_by_one(
        &mut self,
        mut sockets: Vec<Socket>,
        zones: &[Zone],
        scope: &Scope,
        policy: &Policy,
    ) -> Result<Snapshot> {
        let other_ends = self.other_ends(&sockets);
        sockets.retain(|socket| scope.contains(policy, socket.connection()));
        let mut views = Views::default();
        for part in sockets.chunks(PART) {
            let lookups: Vec<_> = part.iter().map(Lookup::from).collect();
            let entries = self.entries_of(&lookups, zones.iter().copied())?;
            let all = part.iter().zip(entries);
            views.extend(all.map(|(socket, entry)| View {
                connection: socket.connection(),
                socket: Some(*socket),
                entry,
            }));
        }
        self.but_bridged(Snapshot::of(views), &other_ends)
    }

    /// Leaves out what a bridge passes on and conntrack never sees; `other_ends` are sockets of other namespaces
    /// that have a connection with each other, as their peers see them.
    fn but_bridged(
        &mut self,
        mut snapshot: Snapshot,
        other_ends: &HashSet<Connection>,
    ) -> Result<Snapshot> {
        let aside = self.bridged(snapshot.views.iter())?;
        if !aside.is_empty() {
            snapshot.views.retain(|view| !aside.contains(&view.connection));
        }
        snapshot.evidence.behind = self.behind(&snapshot);
        if !other_ends.is_empty() {
            let lost = snapshot.views.iter().filter(|view| view.entry.is_none());
            let direct = lost.map(|view| view.connection).filter(|it| other_ends.contains(it));
            snapshot.evidence.direct = direct.collect();
        }
        Ok(snapshot)
    }
}

/// Puts the entries and the sockets of the scope together: first the connections that have a
/// socket, as the sockets come, then the others in their own order.
pub fn join(
    entries: impl IntoIterator<Item = Entry>,
    sockets: impl IntoIterator<Item = Socket>,
    scope: &Scope,
    policy: &Policy,
) -> Snapshot {
    let mut joined = Joined::of(sockets, scope, policy, Over::Each);
    for entry in entries {
        joined.take(&entry, |_| true);
    }
    joined.end()
}

/// Both tables, while entries come.
struct Joined<'a> {
    scope: &'a Scope,
    policy: &'a Policy,
    over: Over,
    zones: Option<Zones<'a>>,
    /// Those with sockets.
    views: Views,
    by_connection: HashMap<Connection, usize>,
    orphans: Views,
    /// Of what is over: how many, and what they show of their siblings.
    number: u64,
    evidence: Evidence,
    last: Option<Shown>,
    others: Others,
}

/// Entries of connections that have another one, in another zone.
pub type Others = HashMap<Connection, Vec<Entry>>;

impl<'a> Joined<'a> {
    fn of(
        sockets: impl IntoIterator<Item = Socket>,
        scope: &'a Scope,
        policy: &'a Policy,
        over: Over,
    ) -> Self {
        let views: Views = sockets
            .into_iter()
            .filter(|socket| scope.contains(policy, socket.connection()))
            .map(|socket| View {
                connection: socket.connection(),
                socket: Some(socket),
                entry: None,
            })
            .collect();
        let mut by_connection = HashMap::with_capacity(views.len());
        for (index, view) in views.iter().enumerate() {
            by_connection.entry(view.connection).or_insert(index);
        }
        let (orphans, evidence) = (Views::default(), Evidence::default());
        Self {
            scope,
            policy,
            over,
            zones: None,
            views,
            by_connection,
            orphans,
            number: 0,
            evidence,
            last: None,
            others: Others::new(),
        }
    }

    /// One entry more; `is_here` is asked about connections without a socket.
    fn take(&mut self, entry: &Entry, mut is_here: impl FnMut(Connection) -> bool) {
        let (mut is_of_scope, mut is_orphan) = (false, true);
        for connection in places(entry, self.scope, self.policy) {
            is_of_scope = true;
            let Some(&index) = self.by_connection.get(&connection) else { continue };
            is_orphan = false;
            let Some(view) = self.views.give(index, entry) else { continue };
            let Some(kept) = view.entry else { continue };
            let zones = self.zones.as_ref();
            let is_worth_more = rank(connection, &kept, zones) < rank(connection, entry, zones);
            let (one, other) = if is_worth_more { (*entry, kept) } else { (kept, *entry) };
            self.views.set(index, View { entry: Some(one), ..view });
            self.others.entry(connection).or_default().push(other);
        }
        if !is_of_scope || !is_orphan {
            return;
        }
        for connection in places(entry, self.scope, self.policy).filter(|it| is_here(*it)) {
            let alone = View { connection, socket: None, entry: Some(*entry) };
            if self.over == Over::Number && alone.is_over() {
                self.evidence.see(&alone, &mut self.last);
                self.number += 1;
            } else {
                self.orphans.extend([alone]);
            }
        }
    }

    fn end(self) -> Snapshot {
        let Self {
            mut views,
            mut orphans,
            number,
            mut evidence,
            mut last,
            by_connection,
            others,
            zones,
            ..
        } = self;
        drop(by_connection);
        // In the order of the connections, and the one of two that a limiter counts first.
        let worth =
            |view: &View| view.entry.map(|entry| rank(view.connection, &entry, zones.as_ref()));
        orphans.sort_by_key(|view| (view.connection, Reverse(worth(view))));
        orphans.dedup();
        views.append(orphans);
        views.iter().for_each(|view| evidence.see(&view, &mut last));
        Snapshot { views, over: number, evidence, others }
    }
}

pub(super) fn is_home<T: Transport>(homes: &mut [Routes<T>], addr: IpAddr) -> Result<bool> {
    for home in homes.iter_mut() {
        if home.is_local(addr)? {
            return Ok(true);
        }
    }
    Ok(homes.is_empty())
}

fn filters(scope: &Scope) -> Vec<Filter> {
    if scope.ports.len() > FILTERED_PORTS || !scope.published.is_empty() {
        return vec![Filter::Tcp];
    }
    scope
        .ports
        .iter()
        .flat_map(|port| [Filter::AnsweredFrom(*port), Filter::BegunFrom(*port)])
        .collect()
}

/// The connections of the scope that an entry can belong to: by its answers,
/// or, reversed, by its first packet. Both when the peer's port is in scope too.
fn places<'a>(
    entry: &'a Entry,
    scope: &'a Scope,
    policy: &'a Policy,
) -> impl Iterator<Item = Connection> + 'a {
    let sides = [&entry.reply, &entry.orig].into_iter();
    sides.map(|tuple| Connection::of_sender(*tuple)).filter(|it| scope.contains(policy, *it))
}

/// Where two zones have an entry of one connection: which is worth most. One that runs the right way;
/// the one in the zone that the rules keep the connection in, since a limit looks there; one that has
/// seen the handshake, as the limit has; one that a limit counts.
pub(super) fn rank(
    connection: Connection,
    entry: &Entry,
    zones: Option<&Zones<'_>>,
) -> (bool, bool, bool, bool) {
    let view = View { connection, socket: None, entry: Some(*entry) };
    let right_way = matches!(view.entry_side(), Some((Direction::FromPeer, _)));
    let opened =
        Opened { peer: connection.remote, asked: entry.orig.dst, socket: connection.local };
    let zone = zones.filter(|_| right_way).and_then(|zones| zones.of(opened));
    (right_way, zone == Some(entry.zone.orig), !entry.is_picked_up(), view.is_counted())
}
