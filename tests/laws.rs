//! Laws that hold whatever happens, in whatever order: ctkeep's own observation, plan, confirmation
//! and repair, against a model of a kernel with a limiter and of peers that mean harm.
//!
//! `PROPTEST_CASES=10000 cargo test --release --test laws` for a long run.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

#[path = "laws/model.rs"]
mod model;
mod played;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, TcpState};
use ctkeep::flow::FourTuple;
use ctkeep::netlink::Transport;
use ctkeep::reconcile::apply::apply;
use ctkeep::reconcile::confirm::{Confirmed, confirm};
use ctkeep::reconcile::ledger::Ledger;
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::plan::{ActionKind, plan};
use ctkeep::reconcile::policy::{Policy, Scope};
use ctkeep::reconcile::snapshot::{Direction, View};
use ctkeep::recount::{Notrack, Recounter};
use ctkeep::sockdiag::{Lookup, Socket, State, States};
use model::{Model, PORT, Rst, bystanders};
use played::host::{Host, Shared, tuple};
use played::{CT_DELETE, CT_NEW, NLM_F_DUMP_INTR, NLMSG_DONE, Played, descend, requests, u16_at};
use proptest::prelude::*;
use proptest::sample::select;

/// A source whose connections nobody attacks: they show that the port is tracked.
const HONEST: u8 = 200;
const SOURCES: [u8; 2] = [1, 2];

/// What goes wrong between the kernel and ctkeep.
#[derive(Default)]
struct Line {
    /// A dump loses every so many-th message.
    loses: Cell<Option<usize>>,
    /// The next dump says that the table has changed under it.
    interrupted: Cell<bool>,
    dumped: Cell<usize>,
    /// Connections that ctkeep answered for before it acted.
    held: RefCell<HashSet<FourTuple>>,
}

/// The transport; every change is held against the truth on its way.
struct Watched {
    kernel: Played,
    host: Rc<RefCell<Option<Shared>>>,
    line: Rc<Line>,
    in_dump: bool,
}

impl Transport for Watched {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        for request in requests(datagram) {
            self.in_dump = request.is_dump();
            let body = request.body.get(4..).unwrap_or_default();
            if [CT_NEW, CT_DELETE].contains(&request.kind) && !self.in_dump {
                self.assert_guarded(tuple(descend(body, &[1]).expect("never without a tuple")));
            }
        }
        self.kernel.send(datagram)
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        loop {
            self.kernel.recv(datagram)?;
            if !self.in_dump || u16_at(datagram, 4) == NLMSG_DONE {
                return Ok(());
            }
            if self.line.interrupted.take() {
                datagram[6] |= NLM_F_DUMP_INTR as u8;
            }
            self.line.dumped.set(self.line.dumped.get() + 1);
            match self.line.loses.get() {
                Some(nth) if self.line.dumped.get().is_multiple_of(nth) => {}
                _ => return Ok(()),
            }
        }
    }
}

impl Watched {
    /// An entry is changed only for an open connection of the scope, or because the socket that it
    /// was held for is gone.
    fn assert_guarded(&self, orig: FourTuple) {
        let host = self.host.borrow();
        let host = host.as_ref().unwrap().borrow();
        let entry = host.entries.iter().find(|e| e.orig == orig || e.reply == orig);
        let flow = if orig.src == model::server() { orig } else { orig.inverse() };
        assert_eq!(flow.src.port(), PORT, "{orig} is out of scope");
        let outgoing = |entry: &Entry| entry.orig == flow && !entry.is_picked_up();
        assert!(!entry.is_some_and(outgoing), "{orig} was opened by this host");
        match host.sockets.iter().find(|socket| socket.flow() == flow) {
            Some(socket) => {
                assert!([State::CloseWait, State::Established].contains(&socket.state), "{orig}");
            }
            None => {
                let ours = entry.is_some_and(Entry::is_ours);
                assert!(ours || self.line.held.borrow().contains(&flow), "{orig} is not held");
            }
        }
    }
}

/// ctkeep, as its daemon goes about it.
struct Keeper {
    tables: Tables<Watched>,
    ledger: Ledger,
    policy: Policy,
    scope: Scope,
    line: Rc<Line>,
    now: Instant,
}

impl Keeper {
    fn react(&mut self, model: &mut Model) {
        let told: HashSet<_> = model.told.drain(..).collect();
        let told = told.into_iter().filter(|flow| self.scope.contains(&self.policy, *flow));
        let mut lookups: Vec<_> = told.map(|flow| Lookup { flow, interface: 0 }).collect();
        lookups.sort_by_key(|lookup| lookup.flow);
        self.look_at(&lookups, model);
    }

    fn look_at(&mut self, lookups: &[Lookup], model: &mut Model) {
        let snapshot = self.tables.exactly(lookups, &self.ledger).unwrap();
        let confirmed = Confirmed::new(&snapshot, &self.scope, &self.policy, &self.ledger);
        self.carry_out(&confirmed, model);
    }

    fn sweep(&mut self, deep: bool, model: &mut Model) {
        let Self { tables, ledger, policy, scope, .. } = self;
        let open = States::from_iter([State::Established, State::CloseWait]);
        let snapshot = if deep {
            let snapshot = tables.whole(scope, policy, open).unwrap();
            let alive = snapshot.views.iter().filter_map(|view| view.socket);
            ledger.retain_seen(alive.map(|socket| socket.cookie));
            snapshot
        } else {
            tables.half_closed(scope, policy, ledger).unwrap()
        };
        ledger.note(&snapshot);
        if !deep {
            ledger.settle(&snapshot);
        }
        let mut planned = plan(&snapshot, scope, policy, ledger);
        if !ledger.pressure().allows_inserts() {
            planned.actions.retain(|action| action.kind != ActionKind::Reinsert);
        }
        let confirmed =
            confirm(tables, &planned, &snapshot.evidence, scope, policy, ledger).unwrap();
        self.carry_out(&confirmed, model);
        if deep {
            self.ledger.set_tracked(snapshot.evidence.tracked.clone());
        }
        let entries = self.tables.conntrack.size().unwrap().entries;
        let maximum = model.host.borrow().maximum.unwrap_or(1 << 20);
        self.ledger.pressure_mut().tick(f64::from(entries) / maximum as f64, self.now);
    }

    fn carry_out(&mut self, confirmed: &Confirmed, model: &mut Model) {
        let held = self.ledger.held().map(|held| held.lookup.flow);
        self.line.held.replace(held.collect());
        let (tables, ledger) = (&mut self.tables, &mut self.ledger);
        let outcomes =
            apply(tables, &mut None::<Recounter>, confirmed, &self.policy, ledger, self.now)
                .unwrap();
        let mut again = Vec::new();
        for outcome in outcomes {
            let (kind, Some(socket)) = (outcome.action.kind, outcome.action.view.socket) else {
                continue;
            };
            let Ok(()) = outcome.result else { continue };
            let notrack = self.ledger.notrack(&socket);
            if kind.needs_recount() {
                let seal = kind == ActionKind::Revive || notrack == Some(Notrack::FinsAndRsts);
                model.recounted(&socket, seal);
                self.ledger.pressure_mut().repaired(socket.remote.addr(), self.now);
                again.push(Lookup::from(&socket));
            } else if kind == ActionKind::Seal {
                model.sealed(&socket);
            }
            if let Some(notrack) = notrack {
                model.notrack(socket.cookie, notrack);
            }
        }
        if !again.is_empty() {
            let snapshot = self.tables.exactly(&again, &self.ledger).unwrap();
            self.ledger.settle(&snapshot);
            let confirmed = Confirmed::new(&snapshot, &self.scope, &self.policy, &self.ledger);
            assert!(confirmed.actions().is_empty(), "right after its repair: {confirmed:?}");
        }
    }
}

struct World {
    model: Model,
    keeper: Keeper,
    loses_events: bool,
}

impl World {
    fn new(limit: usize, maximum: Option<usize>, reversed: bool) -> Self {
        let (sockets, entries) = bystanders();
        let line = Rc::<Line>::default();
        let truth = Rc::new(RefCell::new(None));
        let host =
            Host { sockets, entries, maximum, is_listed_backwards: reversed, ..Host::default() };
        let (host, tables) = host.open_by(|kernel, _| Watched {
            kernel,
            host: truth.clone(),
            line: line.clone(),
            in_dump: false,
        });
        truth.replace(Some(host.clone()));
        let mut model = Model::new(host, limit);
        assert!(model.syn(Model::flow(HONEST, 4000)));
        let keeper = Keeper {
            tables,
            ledger: Ledger::default(),
            policy: Policy::default(),
            scope: Scope { ports: HashSet::from([PORT]) },
            line,
            now: Instant::now(),
        };
        let mut this = Self { model, keeper, loses_events: false };
        this.keeper.sweep(true, &mut this.model);
        this
    }

    fn flows(&self, source: u8) -> Vec<FourTuple> {
        let of = Model::flow(source, 1).dst.addr();
        let host = self.model.host.borrow();
        let flows = host.sockets.iter().map(|socket| socket.flow());
        flows.filter(|flow| flow.dst.addr() == of).collect()
    }

    fn play(&mut self, step: &Step) {
        match *step {
            Step::Burst { source, trick, first, many, syns } => {
                let flows = self.flows(source);
                for flow in flows.iter().cycle().skip(first).take(many.min(flows.len())) {
                    self.trick(*flow, trick);
                }
                self.open(source, syns);
            }
            Step::Close { source, nth } => self.of(source, nth, Model::close),
            Step::Evict { source, nth } => self.of(source, nth, Model::evict),
            Step::ServerSends { source, nth } => self.of(source, nth, Model::server_sends),
            Step::ExactRst { source, nth } => {
                self.of(source, nth, |model, flow| model.rst(flow, Rst::Exact));
            }
            Step::Reuse { source, nth } => self.of(source, nth, |model, flow| {
                model.rst(flow, Rst::Exact);
                model.syn(flow);
            }),
            Step::Flood(count) => self.model.flood(count),
            Step::Wait(seconds) => self.pass(seconds),
            Step::Sweep { deep } => self.keeper.sweep(deep, &mut self.model),
            Step::LoseEvents(loses) => self.loses_events = loses,
            Step::LoseParts(nth) => self.keeper.line.loses.set(nth),
            Step::Interrupt => self.keeper.line.interrupted.set(true),
            Step::Crash => {
                self.keeper.ledger = Ledger::default();
                self.model.drop_notracks();
            }
        }
        if self.loses_events {
            self.model.told.clear();
        } else {
            self.keeper.react(&mut self.model);
        }
    }

    fn of(&mut self, source: u8, nth: usize, act: impl FnOnce(&mut Model, FourTuple)) {
        let flows = self.flows(source);
        if let Some(flow) = flows.get(nth % flows.len().max(1)) {
            act(&mut self.model, *flow);
        }
    }

    fn trick(&mut self, flow: FourTuple, trick: Trick) {
        let model = &mut self.model;
        match trick {
            Trick::Fin => model.fin(flow, false),
            Trick::FinRst => {
                model.fin(flow, false);
                model.rst(flow, Rst::Stale);
            }
            Trick::FinTwice => (0..3).for_each(|_| model.fin(flow, false)),
            Trick::HoleRst => {
                model.fin(flow, true);
                model.rst(flow, Rst::Stale);
            }
            Trick::HoleTwice => (0..3).for_each(|_| model.fin(flow, true)),
            Trick::Ahead => model.rst(flow, Rst::Ahead),
            Trick::SynRst => {
                model.fin(flow, false);
                model.rst(flow, Rst::Stale);
                model.syn(flow);
                model.rst(flow, Rst::Stale);
            }
        }
    }

    fn open(&mut self, source: u8, mut syns: usize) {
        for port in 4000..4200 {
            let flow = Model::flow(source, port);
            if syns > 0 && self.model.socket(flow).is_none() {
                self.model.syn(flow);
                syns -= 1;
            }
        }
    }

    /// Time, with the sweeps that belong to it.
    fn pass(&mut self, seconds: u64) {
        for second in 1..=seconds {
            self.model.pass(1);
            self.keeper.now += Duration::from_secs(1);
            if second.is_multiple_of(10) {
                self.keeper.sweep(second.is_multiple_of(30), &mut self.model);
            }
        }
    }

    /// Nobody does anything; what a flood left runs out.
    fn rest(&mut self) {
        self.loses_events = false;
        self.model.told.clear();
        self.keeper.line.loses.set(None);
        self.keeper.line.interrupted.set(false);
        self.keeper.sweep(true, &mut self.model);
        self.pass(120);
        self.keeper.sweep(true, &mut self.model);
    }

    /// What is wrong with the tables, one sentence each.
    fn disagreements(&mut self) -> Vec<String> {
        let sockets = self.model.host.borrow().sockets.clone();
        let mut all = Vec::new();
        let bystanders: Vec<_> = bystanders().0.iter().map(Socket::flow).collect();
        for socket in sockets.iter().filter(|socket| !bystanders.contains(&socket.flow())) {
            let flow = socket.flow();
            let view = View { flow, socket: Some(*socket), entry: self.model.entry(flow) };
            match view.entry_side() {
                Some((Direction::FromPeer, state)) if state.is_counted() => {}
                other => all.push(format!("{flow}, socket in {}: {other:?}", socket.state)),
            }
            if !self.model.is_counted(flow) {
                all.push(format!("{flow} is not counted"));
            }
        }
        let entries = self.model.host.borrow().entries.clone();
        for entry in entries.iter().filter(|entry| entry.is_ours()) {
            let is_alive = entry.state().is_some_and(|state| !state.is_closing());
            if is_alive && self.model.socket(entry.reply).is_none() {
                all.push(format!("{:?} is kept without a socket", entry.reply));
            }
        }
        all
    }

    /// What both tables have, without identities.
    fn tables(&self) -> (Vec<FourTuple>, Vec<Entry>) {
        let host = self.model.host.borrow();
        let mut flows: Vec<_> = host.sockets.iter().map(|socket| socket.flow()).collect();
        let mut entries: Vec<_> =
            host.entries.iter().map(|entry| Entry { id: None, ..*entry }).collect();
        flows.sort();
        entries.sort_by_key(Entry::key);
        (flows, entries)
    }

    fn assert_bystanders_untouched(&self) {
        let host = self.model.host.borrow();
        for entry in bystanders().1 {
            let now = host.entries.iter().find(|other| other.orig == entry.orig).unwrap();
            assert_eq!((now.tcp, now.status), (entry.tcp, entry.status), "{:?}", entry.orig);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Trick {
    Fin,
    FinRst,
    FinTwice,
    HoleRst,
    HoleTwice,
    Ahead,
    SynRst,
}

#[derive(Clone, Debug)]
enum Step {
    Burst { source: u8, trick: Trick, first: usize, many: usize, syns: usize },
    Close { source: u8, nth: usize },
    Evict { source: u8, nth: usize },
    ServerSends { source: u8, nth: usize },
    ExactRst { source: u8, nth: usize },
    Reuse { source: u8, nth: usize },
    Flood(u16),
    Wait(u64),
    Sweep { deep: bool },
    LoseEvents(bool),
    LoseParts(Option<usize>),
    Interrupt,
    Crash,
}

fn any_source() -> impl Strategy<Value = u8> {
    select(SOURCES.to_vec())
}

fn any_burst() -> impl Strategy<Value = Step> {
    use Trick::*;
    let tricks = vec![Fin, FinRst, FinTwice, HoleRst, HoleTwice, Ahead, SynRst];
    (any_source(), select(tricks), 0..8_usize, 0..12_usize, 0..8_usize).prop_map(
        |(source, trick, first, many, syns)| Step::Burst { source, trick, first, many, syns },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    let one = || (any_source(), 0..8_usize);
    prop_oneof![
        6 => any_burst(),
        2 => one().prop_map(|(source, nth)| Step::Close { source, nth }),
        2 => one().prop_map(|(source, nth)| Step::Evict { source, nth }),
        2 => one().prop_map(|(source, nth)| Step::ServerSends { source, nth }),
        1 => one().prop_map(|(source, nth)| Step::ExactRst { source, nth }),
        1 => one().prop_map(|(source, nth)| Step::Reuse { source, nth }),
        1 => (1..40_u16).prop_map(Step::Flood),
        3 => (1..90_u64).prop_map(Step::Wait),
        2 => any::<bool>().prop_map(|deep| Step::Sweep { deep }),
        1 => any::<bool>().prop_map(Step::LoseEvents),
        1 => proptest::option::of(2..5_usize).prop_map(Step::LoseParts),
        1 => Just(Step::Interrupt),
        1 => Just(Step::Crash),
    ]
}

fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(any_step(), 1..24)
}

const LIMIT: usize = 5;

/// The model itself: what the stock kernel lets happen, the laws are about.
#[test]
fn without_ctkeep_every_trick_breaks_the_bound() {
    use Trick::*;
    for trick in [FinRst, FinTwice, HoleRst, HoleTwice, Ahead, SynRst] {
        let mut world = World::new(LIMIT, None, false);
        for _ in 0..6 {
            for flow in world.flows(1) {
                world.trick(flow, trick);
            }
            world.open(1, LIMIT);
        }
        let held = world.model.held_by(1);
        assert!(held > 3 * LIMIT, "{trick:?}: {held} sockets");
        assert!(!world.disagreements().is_empty(), "{trick:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").map_or(60, |cases| cases.parse().unwrap())
    ))]

    /// Whatever happened: when it is over, and after one look at everything, the tables agree, every
    /// open connection is counted, and a second look finds nothing to do. On the way no connection
    /// was touched that is not guarded ([`Watched::assert_guarded`]).
    #[test]
    fn after_quiet_the_tables_agree(
        steps in any_steps(),
        maximum in proptest::option::of(24..60_usize),
    ) {
        let mut world = World::new(LIMIT, maximum, false);
        steps.iter().for_each(|step| world.play(step));
        world.assert_bystanders_untouched();
        world.rest();
        prop_assert_eq!(world.disagreements(), Vec::<String>::new());
        let changes = world.model.host.borrow().changes;
        world.keeper.sweep(true, &mut world.model);
        world.keeper.sweep(false, &mut world.model);
        prop_assert_eq!(world.model.host.borrow().changes, changes, "a second look");
    }

    /// What ctkeep has put into the table goes with it: but for open connections that conntrack has
    /// seen the packets of, nothing that counts outlives a lease.
    #[test]
    fn without_ctkeep_a_held_entry_expires_within_a_lease(steps in any_steps()) {
        let mut world = World::new(LIMIT, None, false);
        steps.iter().for_each(|step| world.play(step));
        world.keeper.line.loses.set(None);
        world.keeper.sweep(true, &mut world.model);
        world.model.pass(world.keeper.policy.lease.as_secs());
        let entries = world.model.host.borrow().entries.clone();
        for entry in entries.iter().filter(|entry| entry.is_ours()) {
            let state = world.model.socket(entry.reply).map(|socket| socket.state);
            let is_closing = entry.state().is_some_and(TcpState::is_closing);
            prop_assert!(is_closing || state == Some(State::Established), "{entry:?}, {state:?}");
        }
    }

    /// In whatever order the kernel lists its tables.
    #[test]
    fn the_order_of_a_dump_changes_nothing(steps in any_steps()) {
        let run = |reversed| {
            let mut world = World::new(LIMIT, None, reversed);
            // A part that is lost is another one in another order.
            let sound = steps.iter().filter(|step| !matches!(step, Step::LoseParts(_)));
            sound.for_each(|step| world.play(step));
            world.rest();
            world.tables()
        };
        prop_assert_eq!(run(false), run(true));
    }

    /// docs/attack.md: bursts that are further apart than ctkeep's reaction gain one limit, and two
    /// connections that are fooled again before their source is known.
    #[test]
    fn a_source_holds_at_most_twice_the_limit(
        bursts in proptest::collection::vec(prop_oneof![
            6 => any_burst(),
            1 => (1..90_u64).prop_map(Step::Wait),
            1 => any::<bool>().prop_map(|deep| Step::Sweep { deep }),
        ], 1..40),
        limit in 3..12_usize,
    ) {
        let mut world = World::new(limit, None, false);
        for step in &bursts {
            world.play(step);
            for source in SOURCES {
                let held = world.model.held_by(source);
                prop_assert!(held <= 2 * limit + 2, "{held} sockets, limit {limit}");
            }
        }
    }
}
