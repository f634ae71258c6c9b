//! Puts saved tables together as a look at their host would, and says what they leave open. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use super::Saved;
use super::entries::Entries;
use super::refusal::{File, Refusal};
use super::unlisted::unlisted;
use crate::audit::look::Seen;
use crate::audit::processes::Owners;
use crate::conntrack::Entry;
use crate::flow::{Connection, Endpoint, FourTuple};
use crate::reconcile::policy::{Policy, Scope};
use crate::reconcile::snapshot::{Direction, View, Views};
use crate::reconcile::whole::join;
use crate::sockdiag::{Socket, State};

/// The host that two texts come from.
#[derive(Debug)]
pub struct Host {
    /// What they show.
    pub seen: Seen,
    /// Which ports are looked at.
    pub scope: Scope,
    /// What the texts cannot tell, or was concluded from them; sentences for the user.
    pub notes: Vec<String>,
}

impl Saved {
    /// Puts both tables together.
    ///
    /// # Errors
    /// No port is known to be served.
    pub fn join(&self, policy: &Policy) -> Result<Host, Refusal> {
        let (listeners, connected): (Vec<_>, Vec<_>) =
            self.sockets.values.iter().partition(|socket: &&Socket| socket.state == State::Listen);
        let mut notes = Vec::new();
        let mut scope = policy.scope(&listeners);
        if policy.ports.is_empty() {
            let more = self.served_without_listener(&connected, &scope);
            notes.extend(listenerless(&more, &connected, listeners.is_empty()));
            scope.ports.extend(more);
        }
        if scope.ports.is_empty() {
            return Err(Refusal {
                file: File::Sockets,
                line: None,
                what:
                    "no listening socket, and the entries show no port as served; name the ports \
                       by --port"
                        .to_owned(),
            });
        }
        if listeners.len() == self.sockets.values.len() && !self.entries.is_of_report {
            notes.push(
                "only listening sockets: the host is idle, or this is ss -l, which leaves the \
                 connections out"
                    .to_owned(),
            );
        }
        let mut snapshot = join(self.entries.values.iter().copied(), connected, &scope, policy);
        let homes = Homes::of(&self.sockets.values);
        snapshot.views.retain(|view| view.socket.is_some() || homes.contain(view));
        if policy.ports.is_empty() && !self.entries.is_of_report {
            let is_in_scope = |port| scope.ports.contains(&port);
            let (entries, sockets) = (&self.entries.values, &self.sockets.values);
            notes.extend(unlisted(entries, sockets, &homes.addresses, is_in_scope));
        }
        notes.extend(self.leave_out(&mut snapshot.views));
        if !self.entries.is_of_report {
            notes.extend(unknown_direction(snapshot.views.iter(), &scope));
        }
        if self.entries.mentioned.is_none() && !self.entries.is_of_report {
            notes.extend(without_any_entry(snapshot.views.iter()));
            notes.extend(self.in_one_state(snapshot.views.iter()));
        }
        let owners =
            Owners::named(self.sockets.holders.clone(), self.sockets.has_inodes, &listeners);
        let mut seen = Seen {
            netns: "saved tables".to_owned(),
            snapshot,
            listeners,
            owners,
            ..Seen::default()
        };
        seen.ledger.note(&seen.snapshot);
        seen.limiter.unread.push("rules are not part of saved tables".to_owned());
        Ok(Host { seen, scope, notes })
    }

    /// Entries as `--state` or `grep` leave them, or as they really are.
    fn in_one_state(&self, views: impl Iterator<Item = View>) -> Option<String> {
        let state = self.entries.values.first()?.state()?;
        let values = &self.entries.values;
        let is_one = values.len() > 1 && values.iter().all(|it| it.state() == Some(state));
        let missing = views.filter(|view| view.entry.is_none()).count();
        (is_one && missing > 0).then(|| {
            format!(
                "all {} entries are {}: if a filter (--state, grep) has left others out, the \
                 {missing} that are missing may be there",
                values.len(),
                state.name()
            )
        })
    }

    /// Takes away what the texts cannot tell, and says so.
    fn leave_out(&self, views: &mut Views) -> Vec<String> {
        let (sockets, entries) = (&self.sockets, &self.entries);
        let mut notes = Vec::new();
        let is_doubtful =
            |view: &View| sockets.doubtful == Some(view.connection) && view.entry.is_none();
        let is_cut = remove(views, is_doubtful) > 0;
        if is_cut {
            notes.push(
                "the text of the sockets ends in the middle of a line: the last socket, whose peer may \
                 go on, is left out"
                    .to_owned(),
            );
        }
        let cut = cut_off(views, &sockets.at_edge);
        let is_cut = match remove(views, |view| {
            view.entry.is_none() && cut.contains(&view.connection)
        }) {
            0 => is_cut,
            count => {
                notes.push(format!(
                    "{count} sockets end where the longest line of the text does, and an entry has a port \
                     that goes on there: they may be cut, and are left out"
                ));
                true
            }
        };
        let alone = views.iter().filter(|view| view.socket.is_none()).count();
        let is_partial = if entries.is_of_report { sockets.is_part } else { sockets.is_partial() };
        let is_unread = is_cut || is_partial || alone <= sockets.unread;
        match remove(views, |view| view.socket.is_none() && is_unread) {
            0 => {}
            count => notes.push(format!(
                "the text holds a part of the sockets (a filter, grep, a line that could not be \
                 read): {count} entries without a socket are left out"
            )),
        }
        if !is_unread {
            notes.extend(perhaps_unread("entries without a socket", alone, sockets.unread));
        }
        let is_of_multipath = |view: &View| sockets.multipath.contains(&view.connection);
        match remove(views, |view| view.socket.is_none() && is_of_multipath(view)) {
            0 => {}
            count => notes.push(format!(
                "{count} entries without a TCP socket are of connections of Multipath TCP, which may go \
                 on by another one, and are left out"
            )),
        }
        let is_outdated = |view: &View| {
            view.socket.is_none()
                && view.entry.is_some_and(|entry| entries.outdated.contains(&entry.key()))
        };
        match remove(views, is_outdated) {
            0 => {}
            count => notes.push(format!(
                "the entries are listed more than once: {count} without a socket may have ended \
                 before the last list, and are left out"
            )),
        }
        let missing = views.iter().filter(|view| view.entry.is_none()).count();
        // A report counts those that it has left out on purpose, too.
        let lacking = if entries.is_of_report { 0 } else { entries.lacking };
        let is_unread = entries.is_part || lacking > 0 || missing <= entries.unread;
        let is_left_out = |view: &View| is_unread || !entries.may_show(view.connection);
        match remove(views, |view| view.entry.is_none() && is_left_out(view)) {
            0 => {}
            count if lacking > 0 => notes.push(entries.incomplete(count)),
            count => notes.push(format!(
                "the text holds a part of the entries (a filter, grep, a line that could not be \
                 read): {count} sockets without an entry are left out"
            )),
        }
        if !is_unread {
            notes.extend(perhaps_unread("sockets without an entry", missing, entries.unread));
        }
        if let Some(mentioned) = &entries.mentioned {
            let before = views.len();
            match remove(views, |view| !is_mentioned(mentioned, view.connection)) {
                0 => {}
                count => notes.push(format!(
                    "the entries are events (conntrack -E): {count} of {before} connections do not \
                     appear in them and are left out; conntrack -L shows them all"
                )),
            }
            return notes;
        }
        if entries.is_of_report {
            return notes;
        }
        for (is_ipv4, family) in [(true, "ipv4"), (false, "ipv6")] {
            let of_family = |entry: &Entry| entry.orig.is_ipv4() == is_ipv4;
            if entries.values.is_empty() || entries.values.iter().any(of_family) {
                continue;
            }
            match remove(views, |view| {
                view.entry.is_none() && view.connection.sent().is_ipv4() == is_ipv4
            }) {
                0 => {}
                count => notes.push(format!(
                    "not one entry of {family}, which older conntrack -L shows only with -f \
                     {family}: {count} sockets of that family are left out"
                )),
            }
        }
        notes
    }

    /// Ports of connections that came to this host although nothing listens there: the listener has
    /// ended, or is not in the text. An entry shows who began; where none does, connections from
    /// several ports to one port did not begin here.
    fn served_without_listener(&self, connected: &[Socket], scope: &Scope) -> HashSet<u16> {
        let replies: HashMap<FourTuple, &Entry> =
            self.entries.values.iter().map(|entry| (entry.reply, entry)).collect();
        let begun_here: HashSet<FourTuple> =
            self.entries.values.iter().map(|entry| entry.orig).collect();
        let mut peers: HashMap<u16, HashSet<u16>> = HashMap::new();
        let mut dialled: HashSet<u16> = HashSet::new();
        let mut served = HashSet::new();
        for socket in connected.iter().filter(|socket| is_open(socket)) {
            let (port, sent) = (socket.local.port(), socket.connection().sent());
            if scope.ports.contains(&port) {
                continue;
            }
            if begun_here.contains(&sent) || scope.ports.contains(&socket.remote.port()) {
                dialled.insert(port);
            } else if replies.contains_key(&sent) {
                served.insert(port);
            } else {
                peers.entry(port).or_default().insert(socket.remote.port());
            }
        }
        let several = peers.into_iter().filter(|(_, ports)| ports.len() > 1).map(|(port, _)| port);
        served.extend(several.filter(|port| !dialled.contains(port)));
        served
    }
}

/// More lack what is in the other text than lines of it could not be read: some of them lack it surely.
fn perhaps_unread(what: &str, count: usize, unread: usize) -> Option<String> {
    (unread > 0 && count > unread).then(|| {
        format!(
            "of {count} {what} {unread} may be in lines that could not be read; the others are not"
        )
    })
}

/// Those of these connections whose port may be cut: an entry without a socket has one that begins with it.
fn cut_off(views: &Views, at_edge: &HashSet<Connection>) -> HashSet<Connection> {
    let mut ports: HashMap<(Endpoint, IpAddr), Vec<String>> = HashMap::new();
    for Connection { local, remote } in
        views.iter().filter(|view| view.socket.is_none()).map(|view| view.connection)
    {
        ports.entry((local, remote.addr())).or_default().push(remote.port().to_string());
    }
    let goes_on = |connection: &&Connection| {
        let begins = connection.remote.port().to_string();
        let ports = ports.get(&(connection.local, connection.remote.addr()));
        ports.is_some_and(|ports| ports.iter().any(|port| port.starts_with(&begins)))
    };
    at_edge.iter().filter(goes_on).copied().collect()
}

/// Removes what is meant; how many that are.
fn remove(views: &mut Views, is_meant: impl Fn(&View) -> bool) -> usize {
    let before = views.len();
    views.retain(|view| !is_meant(view));
    before - views.len()
}

fn is_open(socket: &Socket) -> bool {
    socket.takes_a_slot()
}

fn listenerless(
    ports: &HashSet<u16>,
    connected: &[Socket],
    has_no_listeners: bool,
) -> Option<String> {
    let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
    for socket in connected.iter().filter(|socket| ports.contains(&socket.local.port())) {
        *counts.entry(socket.local.port()).or_default() += 1;
    }
    if counts.is_empty() {
        return None;
    }
    let counts: Vec<_> = counts.iter().map(|(port, n)| format!("{port} ({n} sockets)")).collect();
    let counts = counts.join(", ");
    Some(if has_no_listeners {
        format!(
            "no listening socket in the text; served by the look of it: {counts}; --port names others"
        )
    } else {
        format!("no listener any more, but served: {counts}")
    })
}

/// Addresses of the host, as far as its sockets show them.
struct Homes {
    /// Local addresses.
    addresses: HashSet<IpAddr>,
    /// Ports of listeners on every address, for each family.
    any: HashSet<(u16, bool)>,
}

impl Homes {
    fn of(sockets: &[Socket]) -> Self {
        let mut homes = Self { addresses: HashSet::new(), any: HashSet::new() };
        for local in sockets.iter().map(|socket| socket.local) {
            match local.addr() {
                addr if !addr.is_unspecified() => {
                    homes.addresses.insert(addr);
                }
                IpAddr::V4(_) => {
                    homes.any.insert((local.port(), true));
                }
                // One of both families, unless the text says otherwise.
                IpAddr::V6(_) => homes.any.extend([(local.port(), true), (local.port(), false)]),
            }
        }
        homes
    }

    /// Whether the server's end of this entry is here: a known address, or one that a listener on
    /// every address takes, unless the entry leads elsewhere.
    fn contain(&self, view: &View) -> bool {
        let local = view.connection.local;
        let leads_here = || {
            view.entry.is_some_and(|entry| {
                entry.reply == view.connection.sent() && entry.orig.dst.addr() == local.addr()
            })
        };
        self.addresses.contains(&local.addr())
            || self.any.contains(&(local.port(), local.addr().is_ipv4())) && leads_here()
    }
}

impl Entries {
    /// What is said of a text that lacks entries which the tool has counted, and of so many sockets without one.
    fn incomplete(&self, count: usize) -> String {
        let there = self.shown - self.lacking;
        let sure = match count.saturating_sub(self.lacking + self.unread) {
            0 => String::new(),
            sure => format!("; at least {sure} of them have none"),
        };
        format!(
            "the text has {there} of the {} entries that conntrack says it has shown (a filter, grep): {count} \
             sockets without an entry are left out{sure}",
            self.shown
        )
    }

    /// Whether an entry of this connection would be among those that the command of the text shows.
    fn may_show(&self, connection: Connection) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| filter.may_show(connection))
    }
}

fn is_mentioned(mentioned: &HashSet<FourTuple>, connection: Connection) -> bool {
    mentioned.contains(&connection.sent()) || mentioned.contains(&connection.received())
}

/// An entry that begins at a port of the scope belongs to a connection that this host opened from
/// there, or was picked up in its middle at a packet of the server. Only its flags tell.
fn unknown_direction(views: impl Iterator<Item = View>, scope: &Scope) -> Option<String> {
    let is_unknown = |view: &View| {
        let is_begun_here = matches!(view.entry_side(), Some((Direction::Outgoing, _)));
        view.socket.is_some_and(|socket| is_open(&socket))
            && is_begun_here
            && scope.ports.contains(&view.connection.local.port())
    };
    let count = views.filter(is_unknown).count();
    (count > 0).then(|| {
        format!(
            "{count} connections were begun from a served port: this host opened them, or conntrack \
             picked them up in their middle; a text does not tell, ctkeep audit on the host does"
        )
    })
}

/// Ports of which no connection has an entry.
fn without_any_entry(views: impl Iterator<Item = View>) -> Option<String> {
    let mut ports: BTreeMap<u16, bool> = BTreeMap::new();
    for view in views {
        let is_missing = view.entry.is_none() && view.socket.is_some_and(|socket| is_open(&socket));
        let has_entry = view.entry.is_some();
        if is_missing || has_entry {
            *ports.entry(view.connection.local.port()).or_default() |= has_entry;
        }
    }
    let ports: Vec<_> =
        ports.iter().filter(|(_, has)| !**has).map(|(port, _)| port.to_string()).collect();
    (!ports.is_empty()).then(|| {
        format!(
            "no connection to port {} has an entry: forgotten, or never tracked (NOTRACK); the rules \
             would tell",
            ports.join(", ")
        )
    })
}
