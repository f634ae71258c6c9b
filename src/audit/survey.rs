//! The figures of the whole tables, from the snapshot of a deep sweep. Pure: what has to be looked
//! up for them is named here, and the answers are arguments.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::ops::Range;

use super::classes::Class;
use crate::conntrack::{Counters, TcpState};
use crate::flow::Connection;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::plan::cell;
use crate::reconcile::policy::{Policy, Scope};
use crate::reconcile::snapshot::{Snapshot, View};
use crate::sockdiag::{Lookup, Socket, State, States};

/// So many disagreements are made sure of by exact look-ups, some milliseconds; of more than these
/// the dump is believed.
const EXACT: usize = 1024;

/// States whose sockets a deep sweep has seen already.
const SWEPT: [State; 7] = State::OPEN;

/// Conntrack states that have a timeout.
pub const TIMED: [TcpState; 8] = [
    TcpState::SynSent,
    TcpState::SynRecv,
    TcpState::Established,
    TcpState::FinWait,
    TcpState::CloseWait,
    TcpState::LastAck,
    TcpState::TimeWait,
    TcpState::Close,
];

/// What a deep sweep saw, and what was made of it.
#[derive(Clone, Copy, Debug)]
pub struct SweepResult<'a> {
    /// The connections, with sockets that are open on the server's side.
    pub snapshot: &'a Snapshot,
    /// The scope then.
    pub scope: &'a Scope,
    /// The administrator's wishes.
    pub policy: &'a Policy,
    /// The connections that are held now.
    pub ledger: &'a Ledger,
    /// The connections that it has just put right.
    pub repaired: &'a HashSet<Connection>,
}

/// The figures.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Sockets of the scope by state, of IPv4 and of IPv6.
    pub sockets: [BTreeMap<State, u64>; 2],
    /// What waits at each port.
    pub queues: BTreeMap<u16, Queue>,
    /// Connections of each peer with each port.
    pub sources: HashMap<(IpAddr, u16), SourceCounts>,
    /// How the tables stood to each other after the repairs.
    pub classes: BTreeMap<Class, Found>,
    /// What the kernel is told about conntrack, and what it counts itself; set by the caller.
    pub kernel: Kernel,
    /// Connections to look up exactly.
    suspects: Vec<Lookup>,
    /// Those whose sockets are in [`Survey::states`].
    closing: HashSet<Connection>,
}

/// The listeners of one port together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Connections that wait to be accepted.
    pub waiting: u64,
    /// How many may.
    pub limit: u64,
}

/// The connections of one peer with one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SourceCounts {
    /// Sockets that are open on the server's side.
    pub open: u64,
    /// Those of them that the peer has half-closed.
    pub half_closed: u64,
    /// Entries that a limiter counts.
    pub counted: u64,
    /// Open sockets without a counted entry.
    pub uncounted: u64,
}

/// The connections of one class.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// How many.
    pub connections: u64,
    /// Whose.
    pub sources: HashSet<IpAddr>,
}

/// Conntrack's settings and counters.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    /// Entries that were refused or evicted.
    pub counters: Counters,
    /// `nf_conntrack_tcp_timeout_*`, in seconds.
    pub timeouts: Vec<(TcpState, u64)>,
    /// `nf_conntrack_tcp_loose`.
    pub tcp_loose: Option<u64>,
}

impl Survey {
    /// States of the sockets that are still to be listed for it.
    pub fn states() -> States {
        State::ALL.into_iter().filter(|state| !SWEPT.contains(state)).collect()
    }

    /// The figures of all sockets in [`Survey::states`].
    pub fn begin(sweep: SweepResult<'_>, others: &[Socket]) -> Self {
        let (mut listeners, mut others): (Vec<Socket>, Vec<Socket>) =
            others.iter().copied().partition(|socket| socket.state == State::Listen);
        others.retain(|socket| sweep.scope.contains(sweep.policy, socket.connection()));
        listeners.retain(|socket| sweep.scope.ports.contains(&socket.local.port()));
        let mut this = Self::default();
        this.count_sockets(others.iter().chain(&listeners).copied());
        this.count_queues(&listeners);
        this.closing = others.iter().map(Socket::connection).collect();
        this.classes = Class::ALL.map(|class| (class, Found::default())).into();
        this.classes.entry(Class::Agree).or_default().connections = sweep.snapshot.over;
        this
    }

    /// Adds those of some connections of the sweep, by their numbers.
    pub fn take(&mut self, sweep: SweepResult<'_>, part: Range<usize>) {
        let views = sweep.snapshot.views.part(part);
        self.count_sockets(views.clone().filter_map(|view| view.socket));
        for view in views {
            self.count_source(&view, sweep);
            self.compare(&view, sweep);
        }
    }

    fn count_sockets(&mut self, all: impl Iterator<Item = Socket>) {
        for socket in all {
            let [ipv4, ipv6] = &mut self.sockets;
            let family = if socket.local.addr().is_ipv4() { ipv4 } else { ipv6 };
            *family.entry(socket.state).or_default() += 1;
        }
    }

    /// Several listeners of one port (`SO_REUSEPORT`, IPv4 beside IPv6) add up.
    fn count_queues(&mut self, listeners: &[Socket]) {
        for listener in listeners {
            let queue = self.queues.entry(listener.local.port()).or_default();
            queue.waiting += u64::from(listener.recv_queue);
            queue.limit += u64::from(listener.send_queue);
        }
    }

    fn count_source(&mut self, view: &View, sweep: SweepResult<'_>) {
        let state = view.socket.map(|socket| socket.state);
        let is_open = view.socket.is_some_and(|socket| socket.takes_a_slot());
        // The snapshot is older than the repair. What was repaired without a socket was given back.
        let is_repaired = sweep.repaired.contains(&view.connection);
        let is_counted = if is_repaired { is_open } else { view.is_counted() };
        if is_open || is_counted {
            let key = (view.client().addr(), view.connection.local.port());
            let source = self.sources.entry(key).or_default();
            source.open += u64::from(is_open);
            source.half_closed += u64::from(state == Some(State::CloseWait));
            source.counted += u64::from(is_counted);
            source.uncounted += u64::from(is_open && !is_counted);
        }
    }

    /// Two dumps are taken at two moments, and the sweep has repaired since: what it leaves is to be
    /// looked up again.
    fn compare(&mut self, view: &View, sweep: SweepResult<'_>) {
        let agrees = sweep.repaired.contains(&view.connection)
            || view.socket.is_none() && self.closing.contains(&view.connection);
        match if agrees { Class::Agree } else { class(view, sweep.snapshot, sweep) } {
            Class::Agree => self.note(Class::Agree, view),
            _ if self.suspects.len() < EXACT => self.suspects.push(Lookup {
                connection: view.connection,
                interface: view.socket.map_or(0, |socket| socket.interface),
            }),
            class => self.note(class, view),
        }
    }

    fn note(&mut self, class: Class, view: &View) {
        let found = self.classes.entry(class).or_default();
        found.connections += 1;
        found.sources.insert(view.client().addr());
    }

    /// What [`Survey::make_sure`] wants looked up exactly.
    pub fn suspects(&self) -> &[Lookup] {
        &self.suspects
    }

    /// Takes what exact look-ups of the suspects have shown.
    pub fn make_sure(&mut self, sweep: SweepResult<'_>, now: &Snapshot) {
        self.suspects.clear();
        for view in now.views.iter().filter(|view| view.socket.is_some() || view.entry.is_some()) {
            self.note(class(&view, now, sweep), &view);
        }
    }
}

fn class(view: &View, snapshot: &Snapshot, sweep: SweepResult<'_>) -> Class {
    let evidence = &snapshot.evidence;
    Class::of(view, cell(view, evidence, sweep.scope, sweep.policy, sweep.ledger), evidence)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::conntrack::{Entry, Tcp, Zone};
    use crate::flow::Endpoint;
    use crate::reconcile::pressure::Defence;
    use crate::sockdiag::Cookie;

    fn view(port: u16, state: Option<State>, entry: Option<TcpState>) -> View {
        let server: Endpoint = "192.0.2.1:80".parse().unwrap();
        let peer = Endpoint::new("198.51.100.7".parse().unwrap(), port);
        let connection = Connection::new(server, peer);
        let socket = state.map(|state| Socket {
            local: connection.local,
            remote: connection.remote,
            state,
            inode: 1,
            uid: 0,
            cookie: Cookie(port.into()),
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        });
        let entry = entry.map(|state| Entry {
            timeout: Some(Duration::from_secs(3600)),
            tcp: Some(Tcp { state, wscale: [7, 7], flags: [0; 2] }),
            ..Entry::plain(connection.received(), Zone::default())
        });
        View { connection, socket, entry }
    }

    #[test]
    fn what_a_sweep_has_repaired_agrees_and_what_it_left_is_looked_up_again() {
        let open = Some(State::CloseWait);
        let (repaired, left, sound) = (
            view(1, open, Some(TcpState::Close)),
            view(2, open, Some(TcpState::Close)),
            view(3, open, Some(TcpState::CloseWait)),
        );
        let snapshot = Snapshot::new([repaired, left, sound]);
        let policy = Policy::default();
        let scope = Scope { ports: [80].into(), ..Scope::default() };
        let ledger = Ledger::new(Defence::Auto, 0);
        let put_right = [repaired.connection].into();
        let sweep = SweepResult {
            snapshot: &snapshot,
            scope: &scope,
            policy: &policy,
            ledger: &ledger,
            repaired: &put_right,
        };
        let mut survey = Survey::begin(sweep, &[]);
        survey.take(sweep, 0..usize::MAX);
        let source = (left.connection.remote.addr(), 80);
        let counts = SourceCounts { open: 3, half_closed: 3, counted: 2, uncounted: 1 };
        assert_eq!(survey.sources[&source], counts);
        assert_eq!(survey.sockets[0][&State::CloseWait], 3);
        let flows = |survey: &Survey| {
            survey.suspects().iter().map(|suspect| suspect.connection).collect::<Vec<_>>()
        };
        assert_eq!(flows(&survey), [left.connection]);
        // Gone by now: it was no disagreement.
        let mut gone = survey.clone();
        gone.make_sure(sweep, &Snapshot::new([View { socket: None, entry: None, ..left }]));
        assert_eq!(gone.classes[&Class::EntryClosed].connections, 0);
        survey.make_sure(sweep, &Snapshot::new([left]));
        assert_eq!(survey.classes[&Class::EntryClosed].connections, 1);
        assert_eq!(survey.classes[&Class::EntryClosed].sources.len(), 1);
        assert_eq!(survey.classes[&Class::Agree].connections, 2);
        assert_eq!(flows(&survey), []);
    }

    #[test]
    fn where_nothing_is_tracked_nothing_is_missing() {
        let views = [1, 2, 3].map(|port| view(port, Some(State::CloseWait), None));
        let policy = Policy::default();
        let scope = Scope { ports: [80].into(), ..Scope::default() };
        let (ledger, none) = (Ledger::new(Defence::Auto, 0), HashSet::new());
        let survey = |views: &[View]| {
            let snapshot = Snapshot::new(views.iter().copied());
            let sweep = SweepResult {
                snapshot: &snapshot,
                scope: &scope,
                policy: &policy,
                ledger: &ledger,
                repaired: &none,
            };
            let mut survey = Survey::begin(sweep, &[]);
            survey.take(sweep, 0..usize::MAX);
            survey.make_sure(sweep, &snapshot);
            let of = |class| survey.classes[&class].connections;
            (of(Class::EntryMissing), of(Class::Untracked))
        };
        assert_eq!(survey(&views), (0, 3));
        // The entry of a sibling shows that the port is tracked.
        let tracked = view(4, Some(State::CloseWait), Some(TcpState::CloseWait));
        assert_eq!(survey(&[views[0], tracked]), (1, 0));
    }

    #[test]
    fn listeners_of_one_port_add_up() {
        let listener = |backlog| Socket {
            state: State::Listen,
            recv_queue: 1,
            send_queue: backlog,
            ..view(1, Some(State::Listen), None).socket.unwrap()
        };
        let policy = Policy::default();
        let scope = Scope { ports: [80].into(), ..Scope::default() };
        let sweep = SweepResult {
            snapshot: &Snapshot::default(),
            scope: &scope,
            policy: &policy,
            ledger: &Ledger::default(),
            repaired: &HashSet::new(),
        };
        let survey = Survey::begin(sweep, &[listener(128), listener(511)]);
        assert_eq!(survey.queues[&80], Queue { waiting: 2, limit: 639 });
    }
}
