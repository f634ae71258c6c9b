//! Asks the limits how much room they have: no kernel shows what a list holds, but it can be tried.
//!
//! A *probe* is a SYN of an unused port of the client. It comes in by the ingress route, passes or
//! does not pass the host's rules, and ends in a chain of ours behind the last of them: no entry, no
//! socket, nothing on the wire. A limit puts it on its list like a connection, and throws it off
//! when it sweeps the list again and finds no entry: at the first packet of that source in another
//! jiffy.
//!
//! One probe answers "is it full?". To count the room, each probe that gets through is given an
//! entry, so that it keeps its place, until one gets through no more. Then the entries are closed,
//! which makes every processor throw them off, and deleted. docs/limiter.md draws it.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use super::pace::{FORGOTTEN, Pace};
use super::packet::Purpose;
use super::reply_filter::{IPPROTO_TCP, LAST, MagicSeq, TCP_SEQ};
use super::trace::{Trace, Tracer};
use super::{Recounter, Route, jiffy};
use crate::conntrack::{Change, Conntrack, Entry, Insert, Status, TcpState, Zone};
use crate::error::{Cause, Op, Result};
use crate::flow::{Endpoint, FourTuple};
use crate::host::random;
use crate::nftables::{ChainSpec, Expr, Hook, SetSpec, Table, TableSpec, key};
use crate::rtnetlink::neighbour::Mac;

const TCP_SOURCE_PORT: u32 = 0;
const TCP_WINDOW: u32 = 14;
/// Source ports of the probes that got behind all rules.
const ARRIVED: &str = "arrived";
/// They are looked for at once, and no port is used again so soon.
const ARRIVED_FOR: Duration = Duration::from_secs(1);

/// Times that the room is counted until a question is given up. Two in a row that agree are an
/// answer.
const ROUNDS: u32 = 6;
/// Kernels without the change to 64 (CVE-2026-45860) throw no more off a list at one sweep
/// (`CONNCOUNT_GC_MAX_NODES`).
const SWEPT: usize = 8;
/// A clock that stands still must not hold us.
const WAITS: u32 = 100;
/// What a packet that is steered to another processor may take.
const STEERED: Duration = Duration::from_millis(1);
/// What a program may take for a packet that it has been handed (NFQUEUE); one that takes longer gives no
/// answer.
const QUEUED: Duration = Duration::from_millis(500);
/// From one look for a probe to the next.
const PAUSE: Duration = Duration::from_micros(500);
/// Of the entries of probes; they are deleted long before.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Where Linux takes ports of its own from (`ip_local_port_range`).
const EPHEMERAL: std::ops::Range<u16> = 32_768..60_999;
const PORTS: u16 = EPHEMERAL.end - EPHEMERAL.start;

/// Whose room is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The client.
    pub client: IpAddr,
    /// What it asks for: before destination NAT.
    pub server: Endpoint,
    /// The conntrack zone of its connections.
    pub zone: Zone,
}

/// What became of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It got behind all rules: one more connection would be let in.
    LetIn,
    /// Some rule stopped it, the limit or another one, on this way.
    Stopped(Trace),
}

/// How many more connections would be let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// So many, and not one more.
    For {
        /// How many.
        more: u32,
        /// The way of the one that was not let in.
        trace: Trace,
    },
    /// At least so many; more were not tried.
    AtLeast(u32),
    /// It was another number each time.
    Unsteady,
}

/// What questions need.
#[derive(Debug)]
pub(super) struct Asking {
    table: Table,
    /// What reports the ways of probes; or why nothing does.
    tracer: std::result::Result<Tracer, String>,
    conntrack: Conntrack,
    pace: Pace,
    /// The next port, from the first of [`EPHEMERAL`].
    next: u16,
}

/// The way to the rules for one question.
struct Passage {
    op: Op,
    question: Question,
    id: u16,
    mac: Option<Mac>,
    routed: bool,
}

/// Goes on only with a probe; what nearly every packet fails comes first.
pub(super) fn probes(marks: MagicSeq) -> Vec<Expr> {
    vec![
        Expr::transport(TCP_SEQ, 4),
        Expr::Equals(marks.nudge.to_be_bytes().to_vec()),
        Expr::L4Proto,
        Expr::Equals(vec![IPPROTO_TCP]),
        Expr::transport(TCP_WINDOW, 2),
        Expr::Equals(Purpose::Probe.window().to_be_bytes().to_vec()),
    ]
}

impl Asking {
    fn open(name: &str, marks: MagicSeq) -> Result<Self> {
        let mut rule = probes(marks);
        rule.extend([Expr::transport(TCP_SOURCE_PORT, 2), Expr::Add(ARRIVED), Expr::Drop]);
        let arrived = SetSpec {
            name: ARRIVED,
            key: key::PORT,
            size: Some(PORTS.into()),
            timeout: Some(ARRIVED_FOR),
            elements: Vec::new(),
        };
        let chains = [("input", Hook::Input), ("forward", Hook::Forward)];
        let chains = chains.map(|(name, hook)| ChainSpec {
            name,
            hook,
            // Before the chain that ends every packet of ours.
            priority: LAST - 1,
            rules: vec![rule.clone()],
        });
        let layout =
            TableSpec { sets: vec![arrived], chains: chains.into(), ..TableSpec::default() };
        let table = Table::create(&format!("{name}-ask"), &layout)?;
        let next = u16::try_from(random::bits() % u64::from(PORTS)).unwrap_or(0);
        // Whether a probe arrives is known without it.
        let tracer = Tracer::open(name, marks)
            .map_err(|error| format!("the ways of probes are not reported: {error}"));
        let conntrack = Conntrack::open()?;
        let pace = Pace::new(jiffy::length());
        Ok(Self { table, tracer, conntrack, pace, next })
    }

    /// The way of the last probe.
    fn trace(&mut self) -> Result<Trace> {
        match &mut self.tracer {
            Ok(tracer) => tracer.read(),
            Err(why) => Ok(Trace { lacks: Some(why.clone()), ..Trace::default() }),
        }
    }

    /// Whether the probe from this port got behind all rules.
    fn has_arrived(&mut self, port: u16) -> Result<bool> {
        let key = [port.to_be_bytes().to_vec()];
        Ok(self.table.contains(ARRIVED, &key)?.contains(&true))
    }

    /// One of this port may have arrived before.
    fn forget(&mut self, port: u16) -> Result<()> {
        match self.table.remove(ARRIVED, &[port.to_be_bytes().to_vec()]) {
            Err(error) if !error.is_absent() => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits until no list has a probe any more that this client would meet.
    fn await_turn(&mut self, client: IpAddr) {
        for _ in 0..WAITS {
            let Some(wait) = self.pace.wait(client, jiffy::now()) else { return };
            thread::sleep(wait);
        }
    }

    /// Each change as far as it goes: what is not there need not be changed.
    fn change(&mut self, changes: &[Change]) -> Result<()> {
        self.conntrack.change(changes).map(drop)
    }
}

/// Questions to the limits.
impl Recounter {
    /// Whether one more connection would be let in, without making one.
    ///
    /// # Errors
    /// The ingress route does not lead to the rules for this client.
    pub fn ask(&mut self, question: Question, now: Instant) -> Result<Asked> {
        let way = self.way_of(question, now)?;
        self.asking()?.await_turn(question.client);
        let port = self.unused_port_by(&way)?;
        let asked = self.probe(&way, port);
        // Now, as the probe may have been held up.
        let is_let_in = matches!(asked, Ok(Asked::LetIn));
        self.asking()?.pace.asked(question.client, is_let_in, jiffy::now());
        asked
    }

    /// How many more connections would be let in; no more than `most` are tried.
    ///
    /// # Errors
    /// As [`Self::ask`]; the conntrack table is full.
    pub fn room(&mut self, question: Question, most: u32, now: Instant) -> Result<Room> {
        let way = self.way_of(question, now)?;
        self.asking()?.await_turn(question.client);
        let mut last = None;
        for _ in 0..ROUNDS {
            let (more, trace) = self.fill(&way, most)?;
            match trace {
                Some(trace) if last == Some(more) => return Ok(Room::For { more, trace }),
                Some(_) => last = Some(more),
                None => return Ok(Room::AtLeast(most)),
            }
        }
        Ok(Room::Unsteady)
    }

    /// A nudge that is a probe too: whether it gets behind all rules, and else where it ends.
    pub(super) fn show_as_probe(&mut self, entry: &Entry, now: Instant) -> Result<Asked> {
        let FourTuple { src, dst: server } = entry.orig;
        let question = Question { client: src.addr(), server, zone: entry.zone };
        let way = self.way_of(question, now)?;
        self.asking()?.forget(src.port())?;
        self.probe(&way, src.port())
    }

    /// Fills the room with probes, and gives it back; how many it took, and the way of the one that
    /// had none.
    fn fill(&mut self, way: &Passage, most: u32) -> Result<(u32, Option<Trace>)> {
        let ports = self.unused_ports(way, most)?;
        let mut keeping = Vec::new();
        let filled = self.keep(way, &ports, &mut keeping);
        // Whatever has happened.
        self.give_back(way, &keeping)?;
        Ok((u32::try_from(keeping.len()).unwrap_or(u32::MAX), filled?))
    }

    /// Sends probes that keep their places until one gets through no more: the way of that one.
    fn keep(
        &mut self,
        way: &Passage,
        ports: &[u16],
        keeping: &mut Vec<Entry>,
    ) -> Result<Option<Trace>> {
        for port in ports {
            if let Asked::Stopped(trace) = self.probe(way, *port)? {
                return Ok(Some(trace));
            }
            let flow =
                FourTuple::new(Endpoint::new(way.question.client, *port), way.question.server);
            let like = Entry::plain(flow, way.question.zone);
            keeping.push(like);
            let (state, status, timeout) = (TcpState::SynSent, Status::FRESH, TIMEOUT);
            let insert = Change::Insert(Insert { like, state, status, timeout });
            self.asking()?.conntrack.change(&[insert])?.into_iter().collect::<Result<()>>()?;
        }
        Ok(None)
    }

    fn give_back(&mut self, way: &Passage, kept: &[Entry]) -> Result<()> {
        let keys = || kept.iter().map(Entry::key);
        let close = |key| {
            let (state, timeout) = (TcpState::Close, TIMEOUT);
            Change::Update { key, state, status: None, timeout }
        };
        let closed = keys().map(close).collect::<Vec<_>>();
        self.asking()?.change(&closed)?;
        let swept = self.sweep(way, kept.len());
        let deleted = keys().map(|key| Change::Delete { key, id: None }).collect::<Vec<_>>();
        self.asking()?.change(&deleted)?;
        swept?;
        await_forgotten();
        Ok(())
    }

    /// Has the limit throw what is closed off its list: each probe in another jiffy has it swept.
    fn sweep(&mut self, way: &Passage, closed: usize) -> Result<()> {
        for port in self.unused_ports(way, (closed / SWEPT + 1).try_into().unwrap_or(u32::MAX))? {
            jiffy::await_next();
            self.probe(way, port)?;
        }
        Ok(())
    }

    /// One that no entry has.
    pub(super) fn unused_port(&mut self, question: Question, now: Instant) -> Result<u16> {
        let way = self.way_of(question, now)?;
        self.unused_port_by(&way)
    }

    fn unused_port_by(&mut self, way: &Passage) -> Result<u16> {
        let ports = self.unused_ports(way, 1)?;
        Ok(ports.first().copied().unwrap_or(EPHEMERAL.start))
    }

    /// Changes the conntrack table.
    pub(super) fn change(&mut self, changes: &[Change]) -> Result<()> {
        self.asking()?.conntrack.change(changes)?.into_iter().collect()
    }

    fn way_of(&mut self, question: Question, now: Instant) -> Result<Passage> {
        let begin = FourTuple::new(Endpoint::new(question.client, 0), question.server);
        let op = Op::on("ask the limit", begin);
        if self.raise_filter(now)?.is_none() {
            return Err(op.failed(Cause::Unavailable("no nftables table of our own".into())));
        }
        self.mend_helper()?;
        let entrance = self.entrance(op, begin)?;
        let id = self.helper(op)?.id(entrance.interface)?;
        self.asking()?;
        Ok(Passage { op, question, id, mac: entrance.mac, routed: entrance.routed })
    }

    /// Whether a probe from this port gets behind all rules.
    fn probe(&mut self, way: &Passage, port: u16) -> Result<Asked> {
        let Passage { op, question: Question { client, server, .. }, id, mac, routed } = *way;
        let flow = FourTuple::new(Endpoint::new(client, port), server);
        let packet = self.syn(op, flow, Purpose::Probe, id, routed, Route::Ingress)?;
        // What was reported of the one before.
        self.asking()?.trace()?;
        self.helper(op)?.send(op, &packet, mac)?;
        let (sent, mut trace) = (Instant::now(), Trace::default());
        let asking = self.asking()?;
        loop {
            // Looked for behind each end, so that none is taken for stopped that has just arrived.
            let is_over = sent.elapsed() >= if trace.is_queued() { QUEUED } else { STEERED };
            if asking.has_arrived(port)? {
                return Ok(Asked::LetIn);
            }
            if is_over || trace.is_dropped() {
                return Ok(Asked::Stopped(trace));
            }
            thread::sleep(PAUSE);
            let Trace { steps, lacks } = asking.trace()?;
            trace.steps.extend(steps);
            trace.lacks = lacks;
        }
    }

    fn asking(&mut self) -> Result<&mut Asking> {
        if self.asking.is_none() {
            self.asking = Some(Asking::open(&self.name, self.marks)?);
        }
        let closed = || Op::new("ask the limit").failed(Cause::Unavailable("closed".into()));
        self.asking.as_mut().ok_or_else(closed)
    }

    /// Ports of the client that no entry to the server has.
    fn unused_ports(&mut self, way: &Passage, count: u32) -> Result<Vec<u16>> {
        let Question { client, server, zone } = way.question;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let Asking { conntrack, next: from, .. } = self.asking()?;
        let mut steps = (*from..PORTS).chain(0..*from);
        let mut ports = steps.by_ref().map(|step| EPHEMERAL.start + step);
        let mut unused = Vec::new();
        while unused.len() < count {
            let next: Vec<_> = ports.by_ref().take(count - unused.len()).collect();
            if next.is_empty() {
                let what = "the client has no unused ports left".to_owned();
                return Err(way.op.failed(Cause::Unavailable(what)));
            }
            let flow = |port: &u16| FourTuple::new(Endpoint::new(client, *port), server);
            let keys: Vec<_> = next.iter().map(|port| (flow(port), zone)).collect();
            let entries = conntrack.get(&keys)?;
            let free = next.iter().zip(entries).filter(|(_, entry)| entry.is_none());
            unused.extend(free.map(|(port, _)| *port));
        }
        *from = steps.next().unwrap_or(0);
        Ok(unused)
    }
}

/// Waits until every processor throws the last probe off a list.
fn await_forgotten() {
    (0..FORGOTTEN).for_each(|_| jiffy::await_next());
}
