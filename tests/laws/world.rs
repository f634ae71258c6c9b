//! The world of the laws: the model, ctkeep's keepers on it, and what goes wrong between the two.

#![allow(unreachable_pub)]

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ctkeep::conntrack::Entry;
use ctkeep::flow::{Connection, FourTuple};
use ctkeep::netlink::Transport;
use ctkeep::reconcile::keeper::{Acted, Depth, Keeper, Settings, Trigger, Witness};
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::plan::Action;
use ctkeep::reconcile::policy::Policy;
use ctkeep::reconcile::pressure::Defence;
use ctkeep::reconcile::snapshot::{Direction, View};
use ctkeep::sockdiag::{Socket, State};
use ctkeep::watch::Suspect;

use crate::dialled::Dialled;
use crate::model::{self, Counting, Model, PORT, Rst, bystanders};
use crate::played::host::{Host, Shared, tuple};
use crate::played::{
    CT_DELETE, CT_NEW, NLM_F_DUMP_INTR, NLMSG_DONE, Played, descend, requests, u16_at,
};
use crate::steps::{Step, Trick};

/// A source whose connections nobody attacks: they show that the port is tracked.
const HONEST: u8 = 200;
pub const SOURCES: [u8; 2] = [1, 2];
pub const LIMIT: usize = 5;

/// What goes wrong between the kernel and ctkeep.
#[derive(Default)]
pub struct Line {
    /// A dump loses every so many-th message.
    pub loses: Cell<Option<usize>>,
    /// The next dump says that the table has changed under it.
    interrupted: Cell<bool>,
    dumped: Cell<usize>,
    /// Connections that ctkeep answered for before it acted.
    held: RefCell<HashSet<FourTuple>>,
    /// Calls until one fails, and how many fail then.
    fails: Cell<Option<(u32, u32)>>,
    failed: Cell<u32>,
}

impl Line {
    /// Sends and receives fail as they do on a host without memory, or with a signal.
    fn call(&self) -> io::Result<()> {
        const ERRORS: [i32; 4] = [ENOMEM, ENOBUFS, EINTR, EPERM];
        match self.fails.get() {
            None => return Ok(()),
            Some((0, times)) => {
                self.fails.set((times > 1).then(|| (0, times - 1)));
            }
            Some((calls, times)) => {
                self.fails.set(Some((calls - 1, times)));
                return Ok(());
            }
        }
        let failed = self.failed.replace(self.failed.get() + 1) as usize;
        Err(io::Error::from_raw_os_error(ERRORS[failed % ERRORS.len()]))
    }
}

const EPERM: i32 = 1;
const EINTR: i32 = 4;
const ENOMEM: i32 = 12;
const ENOBUFS: i32 = 105;

/// The transport; every change is held against the truth on its way.
pub struct Watched {
    kernel: Played,
    host: Rc<RefCell<Option<Shared>>>,
    line: Rc<Line>,
    in_dump: bool,
}

impl Transport for Watched {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.line.call()?;
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
        self.line.call()?;
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
        let outgoing =
            |entry: &Entry| entry.orig == flow && !entry.is_picked_up() && !entry.is_ours();
        assert!(!entry.is_some_and(outgoing), "{orig} was opened by this host");
        match host.sockets.iter().find(|socket| socket.connection().sent() == flow) {
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

/// What the keeper did between two steps of a history.
#[derive(Default)]
struct Deeds {
    /// Connections that were repaired.
    repaired: HashSet<FourTuple>,
    /// Nothing fails, and nobody else repairs.
    is_sound: bool,
}

impl Witness for Deeds {
    fn seen(&mut self, _ports: &HashSet<u16>, _half_closed: Option<&[Socket]>) {}

    fn acted(&mut self, acted: Acted) {
        for outcome in acted.outcomes.iter().filter(|outcome| outcome.result.is_ok()) {
            let Action { kind, view, .. } = outcome.action;
            let first = !kind.needs_recount() || self.repaired.insert(view.connection.sent());
            assert!(first || !self.is_sound, "right after its repair: {kind} {}", view.connection);
        }
    }

    fn planned(&mut self, _actions: &[Action], _trigger: Trigger) {}
}

/// Longer than any look at a connection is put off.
const LATER: Duration = Duration::from_millis(5);

/// What becomes of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Events {
    Prompt,
    Lost,
    Doubled,
    /// They come with the next ones.
    Late,
}

pub struct World {
    pub model: Model,
    /// One, or two on one table.
    keepers: Vec<Keeper<Watched, Counting>>,
    pub line: Rc<Line>,
    now: Instant,
    events: Events,
    late: Vec<FourTuple>,
    /// The server is in another namespace, which ctkeep knows of or not.
    inside: Option<bool>,
    /// What the host has opened itself, where that is kept, too.
    dialled: Option<Dialled>,
}

/// Of the namespace that a server can be in.
const INSIDE: u64 = 7;

type Truth = Rc<RefCell<Option<Shared>>>;

/// The way from the kernel to ctkeep.
fn watched(truth: &Truth, line: &Rc<Line>) -> impl Fn(Played, bool) -> Watched {
    let (host, line) = (truth.clone(), line.clone());
    move |kernel, _| Watched { kernel, host: host.clone(), line: line.clone(), in_dump: false }
}

/// A keeper with an empty memory.
fn keeper(
    tables: Tables<Watched>,
    model: &Model,
    instance: usize,
    now: Instant,
) -> Keeper<Watched, Counting> {
    let settings = Settings {
        policy: Policy { ports: HashSet::from([PORT]), ..Policy::default() },
        sweep_interval: Duration::from_secs(10),
        deep_interval: Duration::from_secs(30),
        dry_run: false,
    };
    let recounter = Some(model.counting(instance));
    let mut keeper = Keeper::new(tables, recounter, settings, Defence::Auto, now, || 0).unwrap();
    keeper.maximum = model.host.borrow().maximum.map(|maximum| maximum as u64);
    keeper
}

impl World {
    pub fn new(limit: usize, maximum: Option<usize>, reversed: bool) -> Self {
        let (sockets, entries) = bystanders();
        let line = Rc::<Line>::default();
        let truth = Truth::default();
        let host =
            Host { sockets, entries, maximum, is_listed_backwards: reversed, ..Host::default() };
        let (host, tables) = host.open_by(watched(&truth, &line));
        truth.replace(Some(host.clone()));
        let mut model = Model::new(host, limit);
        assert!(model.syn(Model::flow(HONEST, 4000)));
        let now = Instant::now();
        let keepers = vec![keeper(tables, &model, 0, now)];
        let (events, late) = (Events::Prompt, Vec::new());
        let (inside, dialled) = (None, None);
        let mut this = Self { model, keepers, line, now, events, late, inside, dialled };
        this.sweep(true);
        this
    }

    /// The server is in a namespace of its own, which ctkeep has found.
    pub fn with_a_container() -> Self {
        let mut this = Self::new(LIMIT, None, false);
        this.model.host.borrow_mut().inside = Some(PORT);
        this.inside = Some(true);
        this.meet();
        this.sweep(true);
        this
    }

    /// A container has dialled out, and its connections are kept.
    pub fn with_dialled(maximum: Option<usize>) -> Self {
        let mut this = Self::new(LIMIT, maximum, false);
        this.dialled = Some(Dialled::new(&this.model.host, this.now));
        this.look_at_dialled();
        this
    }

    fn look_at_dialled(&mut self) {
        if let (Some(dialled), Some(keeper)) = (&mut self.dialled, self.keepers.first()) {
            dialled.turn(keeper, self.now);
        }
    }

    /// All keepers know of the server's namespace, or none does any more.
    fn meet(&mut self) {
        let host = &self.model.host;
        let truth = Rc::new(RefCell::new(Some(host.clone())));
        for keeper in &mut self.keepers {
            let sockets = &mut keeper.parts().0.sockets;
            sockets.leave(INSIDE);
            if self.inside == Some(true) {
                let way = watched(&truth, &self.line);
                let addresses = [model::server().addr()].into();
                sockets.join(INSIDE, Host::sockets_inside(host, way), addresses);
            }
        }
    }

    /// Lets each keeper act, and look again at what it has repaired. What fails is an error only
    /// where something was made to fail.
    fn act(
        &mut self,
        act: impl Fn(&mut Keeper<Watched, Counting>, Instant, &mut Deeds) -> ctkeep::Result<()>,
    ) {
        let is_alone = self.keepers.len() == 1;
        for keeper in &mut self.keepers {
            // What was given back for a namespace that was not seen is shown to limits anew.
            let sees_all = self.inside.is_none();
            let is_sound = is_alone && sees_all && self.line.fails.get().is_none();
            let mut deeds = Deeds { is_sound, ..Deeds::default() };
            let line = &self.line;
            let hold = |keeper: &Keeper<Watched, Counting>| {
                line.held
                    .replace(keeper.held().map(|held| held.lookup.connection.sent()).collect());
            };
            let failed = line.failed.get();
            let check = |done: ctkeep::Result<()>| {
                assert!(done.is_ok() || line.failed.get() > failed, "{done:?}");
            };
            hold(keeper);
            check(act(keeper, self.now, &mut deeds));
            for _ in 0..2 {
                self.now += LATER;
                hold(keeper);
                check(keeper.look_again(self.now, &mut deeds));
            }
        }
    }

    pub fn sweep(&mut self, deep: bool) {
        let depth = if deep { Depth::Deep } else { Depth::Shallow };
        self.act(|keeper, now, deeds| keeper.sweep(depth, now, deeds).map(drop));
    }

    fn react(&mut self) {
        let now: Vec<_> = self.model.told.drain(..).collect();
        let told = match self.events {
            Events::Lost => return,
            Events::Late => std::mem::replace(&mut self.late, now),
            Events::Prompt | Events::Doubled => [std::mem::take(&mut self.late), now].concat(),
        };
        let suspect = |connection| Suspect {
            connection,
            interface: 0,
            is_translated: false,
            is_spoofed: false,
            is_answered: false,
            has_waited: false,
            destroyed: None,
            at: None,
        };
        let suspects: HashMap<_, _> =
            told.iter().map(|it| Connection::of_sender(*it)).map(|it| (it, suspect(it))).collect();
        for _ in 0..if self.events == Events::Doubled { 2 } else { 1 } {
            self.act(|keeper, now, deeds| keeper.suspects(suspects.clone(), now, now, deeds));
        }
    }

    /// ctkeep ends without a word, and begins anew.
    fn crash(&mut self) {
        let tables = self.keepers.remove(0).into_tables();
        self.model.drop_hidden(0);
        self.line.fails.set(None);
        self.keepers.insert(0, keeper(tables, &self.model, 0, self.now));
        self.meet();
    }

    /// Another instance begins to work on the same table, or ends without a word.
    fn second(&mut self) {
        if self.keepers.len() > 1 {
            self.keepers.truncate(1);
            self.model.drop_hidden(1);
            return;
        }
        self.line.fails.set(None);
        let truth = Rc::new(RefCell::new(Some(self.model.host.clone())));
        let tables = Host::tables(&self.model.host, watched(&truth, &self.line));
        self.keepers.push(keeper(tables, &self.model, 1, self.now));
        self.meet();
        self.sweep(true);
    }

    pub fn flows(&self, source: u8) -> Vec<FourTuple> {
        let of = Model::flow(source, 1).dst.addr();
        let host = self.model.host.borrow();
        let flows = host.sockets.iter().map(|socket| socket.connection().sent());
        flows.filter(|flow| flow.dst.addr() == of).collect()
    }

    pub fn play(&mut self, step: &Step) {
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
            Step::Sweep { deep } => self.sweep(deep),
            Step::Events(events) => self.events = events,
            Step::LoseParts(nth) => self.line.loses.set(nth),
            Step::Interrupt => self.line.interrupted.set(true),
            Step::Crash => self.crash(),
            Step::Fail { calls, times } => self.line.fails.set(Some((calls, times))),
            Step::Jump(seconds) => {
                self.model.pass(seconds);
                self.now += Duration::from_secs(seconds);
            }
            Step::Second => self.second(),
            Step::Dialled { nth, harm } => {
                self.dialled.iter_mut().for_each(|dialled| dialled.harm(nth, harm));
            }
            Step::Namespace => {
                self.inside = self.inside.map(|is_known| !is_known);
                self.meet();
            }
        }
        self.react();
    }

    fn of(&mut self, source: u8, nth: usize, act: impl FnOnce(&mut Model, FourTuple)) {
        let flows = self.flows(source);
        if let Some(flow) = flows.get(nth % flows.len().max(1)) {
            act(&mut self.model, *flow);
        }
    }

    pub fn trick(&mut self, flow: FourTuple, trick: Trick) {
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

    pub fn open(&mut self, source: u8, mut syns: usize) {
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
            self.now += Duration::from_secs(1);
            self.look_at_dialled();
            if second.is_multiple_of(10) {
                self.sweep(second.is_multiple_of(30));
            }
        }
    }

    /// Nobody does anything; what a flood left runs out.
    pub fn rest(&mut self) {
        self.events = Events::Prompt;
        self.late.clear();
        self.model.told.clear();
        self.line.fails.set(None);
        self.line.loses.set(None);
        self.line.interrupted.set(false);
        self.inside = self.inside.and(Some(true));
        self.meet();
        self.sweep(true);
        self.pass(120);
        self.sweep(true);
    }

    /// What is wrong with the tables, one sentence each.
    pub fn disagreements(&mut self) -> Vec<String> {
        let sockets = self.model.host.borrow().sockets.clone();
        let mut all = Vec::new();
        let bystanders: Vec<_> = bystanders().0.iter().map(Socket::connection).collect();
        let is_another = |it: &&Socket| !bystanders.contains(&it.connection()) && !Dialled::has(it);
        for socket in sockets.iter().filter(is_another) {
            let flow = socket.connection().sent();
            let view = View {
                connection: Connection::of_sender(flow),
                socket: Some(*socket),
                entry: self.model.entry(flow),
            };
            match view.entry_side() {
                Some((Direction::FromPeer, state)) if state.is_counted() => {}
                // The kernel has more sockets than entries.
                None if self.is_full() => continue,
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
        let is_full = self.is_full();
        all.extend(self.dialled.iter().flat_map(|dialled| dialled.disagreements(is_full)));
        all
    }

    /// Whether the table has no room for an entry of each socket.
    pub fn is_full(&self) -> bool {
        let host = self.model.host.borrow();
        let wanted = host.entries.len().max(host.sockets.len());
        host.maximum.is_some_and(|maximum| wanted >= maximum)
    }

    /// What both tables have, without identities.
    pub fn tables(&self) -> (Vec<FourTuple>, Vec<Entry>) {
        let host = self.model.host.borrow();
        let mut flows: Vec<_> =
            host.sockets.iter().map(|socket| socket.connection().sent()).collect();
        let mut entries: Vec<_> =
            host.entries.iter().map(|entry| Entry { id: None, ..*entry }).collect();
        flows.sort();
        entries.sort_by_key(Entry::key);
        (flows, entries)
    }

    pub fn assert_bystanders_untouched(&self) {
        let host = self.model.host.borrow();
        for entry in bystanders().1 {
            let now = host.entries.iter().find(|other| other.orig == entry.orig).unwrap();
            assert_eq!((now.tcp, now.status), (entry.tcp, entry.status), "{:?}", entry.orig);
        }
    }
}
