//! The figures that take whole tables, from the snapshot of a deep sweep.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;

use super::gauges::Gauges;
use super::spec::{DROPS, FAMILIES, Gauge, TABLES, THRESHOLDS, TIMED};
use crate::audit::classes::Class;
use crate::error::Result;
use crate::flow::FourTuple;
use crate::host::sysctl;
use crate::netlink::Transport;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::plan::cell;
use crate::reconcile::policy::{Policy, Scope};
use crate::reconcile::snapshot::{Snapshot, View};
use crate::sockdiag::{Lookup, Socket, State};

/// So many disagreements are made sure of by exact look-ups, some milliseconds; of more than these
/// the dump is believed.
const EXACT: usize = 1024;

/// What a deep sweep saw, and what was made of it.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// The connections, with sockets that are open on the server's side.
    pub snapshot: &'a Snapshot,
    /// The scope then.
    pub scope: &'a Scope,
    /// The administrator's wishes.
    pub policy: &'a Policy,
    /// What is held now.
    pub ledger: &'a Ledger,
}

/// Sets the gauges, and returns the kernel's own counters of what it dropped; `repaired` are the
/// connections that the sweep has just put right.
pub(super) fn survey<T: Transport>(
    tables: &mut Tables<T>,
    look: Look<'_>,
    repaired: &HashSet<FourTuple>,
    gauges: &mut Gauges,
) -> Result<[u64; DROPS.len()]> {
    let Look { snapshot, scope, policy, .. } = look;
    let in_scope = |socket: &Socket| scope.contains(policy, socket.flow());
    let open = [State::Established, State::CloseWait];
    let rest = State::ALL.into_iter().filter(|state| !open.contains(state)).collect();
    let (mut listeners, mut others): (Vec<_>, Vec<_>) =
        tables.sockets.sockets(rest)?.into_iter().partition(|it| it.state == State::Listen);
    others.retain(in_scope);
    listeners.retain(|socket| scope.ports.contains(&socket.local.port()));

    let seen = snapshot.views.iter().filter_map(|view| view.socket);
    sockets(seen.chain(others.iter().chain(&listeners).copied()), gauges);
    queues(&listeners, gauges);
    sources(snapshot.views.iter(), repaired, gauges);
    let closing = others.iter().map(Socket::flow).collect();
    mismatches(tables, look, repaired, &closing, gauges)?;
    settings(tables, gauges)
}

fn family(addr: IpAddr) -> &'static str {
    let [ipv4, ipv6] = FAMILIES;
    if addr.is_ipv4() { ipv4 } else { ipv6 }
}

fn sockets(all: impl Iterator<Item = Socket>, gauges: &mut Gauges) {
    let mut counts: HashMap<_, u64> = HashMap::new();
    for socket in all {
        *counts.entry((family(socket.local.addr()), socket.state)).or_default() += 1;
    }
    for ((family, state), count) in counts {
        gauges.set(Gauge::Sockets, &[family, state.name()], count as f64);
    }
}

/// Several listeners of one port (`SO_REUSEPORT`, IPv4 beside IPv6) add up.
fn queues(listeners: &[Socket], gauges: &mut Gauges) {
    let mut ports: BTreeMap<u16, (u64, u64)> = BTreeMap::new();
    for listener in listeners {
        let (waiting, limit) = ports.entry(listener.local.port()).or_default();
        *waiting += u64::from(listener.recv_queue);
        *limit += u64::from(listener.send_queue);
    }
    for (port, (waiting, limit)) in ports {
        let port = port.to_string();
        gauges.set(Gauge::QueueConnections, &[&port], waiting as f64);
        gauges.set(Gauge::QueueLimit, &[&port], limit as f64);
    }
}

fn sources(views: impl Iterator<Item = View>, repaired: &HashSet<FourTuple>, gauges: &mut Gauges) {
    let mut sources: HashMap<IpAddr, [u64; 2]> = HashMap::new();
    for view in views {
        let is_open = view
            .socket
            .is_some_and(|socket| matches!(socket.state, State::Established | State::CloseWait));
        // The snapshot is older than the repair. What was repaired without a socket was given back.
        let is_counted = if repaired.contains(&view.flow) { is_open } else { view.is_counted() };
        if is_open || is_counted {
            let [sockets, entries] = sources.entry(view.flow.dst.addr()).or_default();
            *sockets += u64::from(is_open);
            *entries += u64::from(is_counted);
        }
    }
    for (index, table) in TABLES.into_iter().enumerate() {
        let counts = || sources.values().filter_map(|counts| counts.get(index).copied());
        gauges.set(Gauge::SourceMaximum, &[table], counts().max().unwrap_or(0) as f64);
        for (threshold, name) in THRESHOLDS {
            let over = counts().filter(|count| *count > threshold).count();
            gauges.set(Gauge::SourcesOver, &[table, name], over as f64);
        }
    }
}

/// Two dumps are taken at two moments, and the sweep has repaired since: what it leaves is looked up
/// again.
fn mismatches<T: Transport>(
    tables: &mut Tables<T>,
    look: Look<'_>,
    repaired: &HashSet<FourTuple>,
    closing: &HashSet<FourTuple>,
    gauges: &mut Gauges,
) -> Result<()> {
    let Look { snapshot, scope, policy, ledger } = look;
    let mut found: BTreeMap<Class, (u64, HashSet<IpAddr>)> =
        Class::ALL.map(|class| (class, <(u64, HashSet<IpAddr>)>::default())).into();
    let mut note = |class: Class, view: &View| {
        let (connections, sources) = found.entry(class).or_default();
        *connections += 1;
        sources.insert(view.flow.dst.addr());
    };
    let class = |view: &View, snapshot| Class::of(cell(view, snapshot, scope, policy, ledger));
    let mut suspects = Vec::new();
    for view in snapshot.views.iter() {
        let agrees =
            repaired.contains(&view.flow) || view.socket.is_none() && closing.contains(&view.flow);
        match if agrees { Class::Agree } else { class(&view, &snapshot.evidence) } {
            Class::Agree => note(Class::Agree, &view),
            _ if suspects.len() < EXACT => suspects.push(Lookup {
                flow: view.flow,
                interface: view.socket.map_or(0, |socket| socket.interface),
            }),
            class => note(class, &view),
        }
    }
    let again = tables.exactly(&suspects, ledger)?;
    for view in again.views.iter().filter(|view| view.socket.is_some() || view.entry.is_some()) {
        note(class(&view, &again.evidence), &view);
    }
    for (class, (connections, sources)) in found {
        gauges.set(Gauge::Mismatches, &[class.name()], connections as f64);
        gauges.set(Gauge::MismatchSources, &[class.name()], sources.len() as f64);
    }
    Ok(())
}

/// What the kernel is told about conntrack, and what it counts itself.
fn settings<T: Transport>(
    tables: &mut Tables<T>,
    gauges: &mut Gauges,
) -> Result<[u64; DROPS.len()]> {
    let counters = tables.conntrack.counters()?;
    for state in TIMED {
        let setting = state.timeout_setting();
        if let Some(seconds) = setting.and_then(|name| sysctl::conntrack(&name)) {
            gauges.set(Gauge::Timeout, &[state.name()], seconds as f64);
        }
    }
    if let Some(loose) = sysctl::conntrack("nf_conntrack_tcp_loose") {
        gauges.set(Gauge::TcpLoose, &[], loose as f64);
    }
    Ok([counters.drop, counters.early_drop, counters.insert_failed, counters.chain_toolong])
}
