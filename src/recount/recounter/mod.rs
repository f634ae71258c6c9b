//! Sends nudges and seals in one network namespace.

mod hops;
mod ways;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::budget::Budget;
use super::ingress::{Condition, Entrance, Ingress};
use super::loopback::RawSockets;
use super::packet::{self, DropBy, Purpose, Shape};
use super::probe::Asking;
use super::reply_filter::{MagicSeq, ReplyFilter};
use super::{
    Asked, HeldUp, Hidden, Mode, Question, Recipe, Recount, Room, Route, Tried, Way, jiffy,
};
use crate::conntrack::Entry;
use crate::error::{Cause, Error, Op, Result};
use crate::flow::FourTuple;
use crate::rtnetlink::link::links;
use crate::rtnetlink::neighbour::Neighbours;
use crate::rtnetlink::route::Routes;

/// Addresses whose destination is remembered between two refreshes: all clients of a busy host,
/// in some 5 MiB.
const REMEMBERED: usize = 65_536;

/// `LOOPBACK_IFINDEX`: the same in every namespace.
const LOOPBACK: u32 = 1;

/// For so long after its last use the reply filter stays, and costs every packet a little.
const FILTER_REST: Duration = Duration::from_secs(60);

/// The reply filter as it comes and goes.
#[derive(Debug)]
enum Filter {
    /// The kernel has no nf_tables, or not for us.
    Unavailable,
    /// Not needed for now, or flushed by others.
    Down,
    /// In force since something last went out behind it, or longer.
    Up { filter: ReplyFilter, used: Instant },
}

/// The helper device of the ingress route.
#[derive(Debug)]
enum Helper {
    /// Not wanted, or not to be had at the start.
    Absent,
    /// There.
    Open(Box<Ingress>),
    /// Set down, stripped of its filters or deleted by others; made anew at the next use.
    Broken,
}

/// Where the packets of a client come in.
#[derive(Clone, Copy, Debug)]
enum Hop {
    /// From this host.
    Local,
    /// From outside.
    Entrance(Entrance),
    /// No route leads there.
    Unreachable,
}

/// The [`Recount`] of a real kernel.
#[derive(Debug)]
pub struct Recounter {
    /// Of the helper device and of the nftables table.
    pub(in crate::recount) name: String,
    raw: RawSockets,
    helper: Helper,
    loopback: bool,
    filter: Filter,
    pub(in crate::recount) marks: MagicSeq,
    routes: Routes,
    neighbours: Neighbours,
    remembered: HashMap<(IpAddr, Option<IpAddr>), Hop>,
    /// Of the connections of a client to an address of this host, the mark that was seen last: rules may give it
    /// to their packets (CONNMARK), and routing may go by it.
    connmarks: HashMap<(IpAddr, IpAddr), u32>,
    /// The devices that sockets of link-local clients are bound to.
    devices: HashMap<(IpAddr, IpAddr), u32>,
    /// Of devices, by their numbers.
    names: HashMap<u32, String>,
    budget: Budget,
    tried: Vec<Tried>,
    hides: Option<bool>,
    held_up: HeldUp,
    /// Opened at the first question.
    pub(in crate::recount) asking: Option<Asking>,
    shortfalls: Vec<String>,
}

impl Recounter {
    /// Opens what the mode needs, in the network namespace of the calling thread. `name` is that
    /// of the helper device and of the nftables table.
    ///
    /// # Errors
    /// `CAP_NET_RAW` is missing; in the mode [`Mode::Ingress`] also whatever that route lacks.
    pub fn open(mode: Mode, name: &str, now: Instant) -> Result<Option<Self>> {
        if mode == Mode::Off {
            return Ok(None);
        }
        let mut this = Self::untried(mode, name, now)?;
        this.try_recipes();
        // It can be had. Until something goes out behind it no packet need pay for it.
        this.filter = match this.filter {
            Filter::Up { .. } => Filter::Down,
            filter => filter,
        };
        Ok(Some(this))
    }

    /// One that only asks: by the ingress route, without a trial of recipes.
    ///
    /// # Errors
    /// As [`Self::open`] in the mode [`Mode::Ingress`].
    pub fn to_ask(name: &str, now: Instant) -> Result<Self> {
        Self::untried(Mode::Ingress, name, now)
    }

    fn untried(mode: Mode, name: &str, now: Instant) -> Result<Self> {
        let mut this = Self {
            name: name.to_owned(),
            raw: RawSockets::open()?,
            helper: Helper::Absent,
            loopback: mode != Mode::Ingress,
            filter: Filter::Down,
            marks: MagicSeq::draw(),
            routes: Routes::open()?,
            neighbours: Neighbours::open()?,
            remembered: HashMap::new(),
            connmarks: HashMap::new(),
            devices: HashMap::new(),
            names: HashMap::new(),
            budget: Budget::new(now),
            tried: Vec::new(),
            hides: None,
            held_up: HeldUp::Nowhere,
            asking: None,
            shortfalls: Vec::new(),
        };
        if let Err(error) = this.raise_filter(now) {
            if mode == Mode::Ingress {
                return Err(missing(error));
            }
            this.filter = Filter::Unavailable;
            this.shortfalls.push(error.to_string());
        }
        // Without the filter a rule that rejects would answer the client.
        if mode != Mode::Loopback && this.can_seal() {
            match Ingress::open(name) {
                Ok(ingress) => this.helper = Helper::Open(Box::new(ingress)),
                Err(error) if mode == Mode::Ingress => return Err(missing(error)),
                Err(error) => this.shortfalls.push(error.to_string()),
            }
        }
        Ok(this)
    }

    /// What could not be had, in words.
    pub fn shortfalls(&self) -> &[String] {
        &self.shortfalls
    }

    /// The reply filter, raised now if it was down; `None` where it cannot be had.
    pub(in crate::recount) fn raise_filter(
        &mut self,
        now: Instant,
    ) -> Result<Option<&mut ReplyFilter>> {
        if let Filter::Up { filter, .. } = &mut self.filter
            && !filter.is_there()?
        {
            // Dropped before it is made anew: before Linux 5.12 the end of the old one would
            // delete the new one, which has its name.
            self.filter = Filter::Down;
        }
        if let Filter::Down = self.filter {
            let filter = ReplyFilter::open(&self.name, self.marks)?;
            self.filter = Filter::Up { filter, used: now };
        }
        Ok(match &mut self.filter {
            Filter::Up { filter, used } => {
                *used = now;
                Some(filter)
            }
            Filter::Unavailable | Filter::Down => None,
        })
    }

    /// Makes the helper device anew if others have broken it, and forgets what led to interfaces
    /// that have left.
    pub(in crate::recount) fn mend_helper(&mut self) -> Result<()> {
        if let Helper::Open(ingress) = &mut self.helper {
            match ingress.condition()? {
                Condition::Sound => return Ok(()),
                Condition::OthersLeft => self.remembered.clear(),
                // Its name is free only when it is gone.
                Condition::Broken => self.helper = Helper::Broken,
            }
        }
        if let Helper::Broken = self.helper {
            self.remembered.clear();
            self.helper = Helper::Open(Box::new(Ingress::open(&self.name)?));
        }
        Ok(())
    }

    pub(in crate::recount) fn helper(&mut self, op: Op) -> Result<&mut Ingress> {
        match &mut self.helper {
            Helper::Open(ingress) => Ok(ingress),
            Helper::Absent | Helper::Broken => {
                Err(op.failed(Cause::Unavailable("no helper device".to_owned())))
            }
        }
    }

    /// Where the client of this connection comes in.
    pub(in crate::recount) fn entrance(&mut self, op: Op, orig: FourTuple) -> Result<Entrance> {
        let unavailable = |what: &str| Err(op.failed(Cause::Unavailable(what.to_owned())));
        match self.hop(orig.src.addr(), Some(orig.dst.addr()))? {
            Hop::Entrance(entrance) => Ok(entrance),
            Hop::Local => unavailable("the client is on this host"),
            Hop::Unreachable => unavailable("no route to the client"),
        }
    }

    pub(in crate::recount) fn syn(
        &self,
        op: Op,
        flow: FourTuple,
        purpose: Purpose,
        id: u16,
        routed: bool,
        route: Route,
    ) -> Result<Vec<u8>> {
        let drop_by = match (route, &self.filter) {
            (Route::Loopback, _) => DropBy::WrongChecksum,
            // Others can flush the chain that ends it, just now.
            (Route::Ingress, Filter::Up { filter, .. }) if filter.is_exposed() => DropBy::Md5Option,
            (Route::Ingress, _) => DropBy::None,
        };
        let shape = Shape { seq: self.marks.nudge, purpose, id, routed, drop_by };
        packet::syn(flow, shape).ok_or_else(|| op.malformed("addresses of two families"))
    }

    fn nudge_by_ingress(&mut self, op: Op, flow: FourTuple) -> Result<()> {
        self.mend_helper()?;
        let Entrance { interface, mac, routed } = self.entrance(op, flow)?;
        let id = self.helper(op)?.id(interface)?;
        let packet = self.syn(op, flow, Purpose::Nudge, id, routed, Route::Ingress)?;
        self.helper(op)?.send(op, &packet, mac)
    }

    fn nudge_by_loopback(&mut self, op: Op, flow: FourTuple) -> Result<()> {
        let packet = self.syn(op, flow, Purpose::Nudge, 0, false, Route::Loopback)?;
        self.raw.send(&packet, flow.dst.addr()).map_err(|error| op.io(error))
    }
}

impl Recount for Recounter {
    fn admit(&mut self, entry: &Entry, now: Instant) -> bool {
        self.budget.take(entry.orig, now)
    }

    fn know_mark(&mut self, entry: &Entry) {
        self.note_mark(entry);
    }

    fn know_device(&mut self, client: IpAddr, server: IpAddr, device: u32) {
        self.note_device(client, server, device);
    }

    fn way(&mut self, entry: &Entry, now: Instant) -> Result<Way> {
        let op = Op::on("recount", entry.orig);
        self.know_mark(entry);
        self.raise_filter(now)?;
        let mut failed = None;
        let mut ways = self.ways();
        if entry.synproxy.is_some() {
            // The SYN that the limiter saw was the proxy's own, by loopback. One that comes in by
            // the client's interface is answered by the proxy and gets no further.
            ways.reverse();
        }
        for way in ways {
            let reaches = match way.route {
                Route::Ingress => self.check_ingress(op, entry),
                Route::Loopback => self.check_loopback(op, entry),
            };
            match reaches {
                Ok(()) => return Ok(way),
                // What may pass is worth more to know.
                Err(error) if failed.as_ref().is_none_or(Error::is_unavailable) => {
                    failed = Some(error);
                }
                Err(_) => {}
            }
        }
        // An address or a route may be back by the next try.
        let [client, server] = [entry.orig.src.addr(), entry.orig.dst.addr()];
        self.remembered.remove(&(client, Some(server)));
        self.remembered.remove(&(server, None));
        Err(failed.unwrap_or_else(|| {
            let what = "no limit of this kernel counts a connection again (ctkeep doctor)";
            op.failed(Cause::Unavailable(what.to_owned()))
        }))
    }

    fn doubles(&self) -> bool {
        // While there is no entry the tuple is compared with the list only where that is swept.
        self.ways().first().is_some_and(|way| way.recipe == Recipe::Fresh)
    }

    fn nudge(&mut self, entry: &Entry, route: Route, now: Instant) -> Result<()> {
        let op = Op::on("recount", entry.orig);
        self.raise_filter(now)?;
        match route {
            Route::Ingress => self.nudge_by_ingress(op, entry.orig),
            Route::Loopback => self.nudge_by_loopback(op, entry.orig),
        }
    }

    fn expect_queues(&mut self, held_up: HeldUp) {
        self.held_up = held_up;
    }

    fn is_held_up_before_conntrack(&self) -> bool {
        self.held_up == HeldUp::BeforeConntrack
    }

    fn show(&mut self, entry: &Entry, now: Instant) -> Result<Asked> {
        self.show_as_probe(entry, now)
            .or_else(|_| self.nudge(entry, Route::Ingress, now).map(|()| Asked::LetIn))
    }

    fn await_sweep(&mut self) {
        jiffy::await_next();
    }

    fn can_seal(&self) -> bool {
        !matches!(self.filter, Filter::Unavailable)
    }

    fn seal(&mut self, entry: &Entry, now: Instant) -> Result<()> {
        let op = Op::on("seal", entry.orig);
        if self.raise_filter(now)?.is_none() {
            return Err(op.failed(Cause::Unavailable("no nftables table of our own".to_owned())));
        }
        let packet = packet::seal(entry.reply, self.marks.seal)
            .ok_or_else(|| op.malformed("addresses of two families"))?;
        match self.raw.send(&packet, entry.reply.dst.addr()) {
            // The filter's verdict, after conntrack has seen it.
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(()),
            Err(error) => Err(op.io(error)),
            Ok(()) => {
                // Flushed since it was looked for; the next use raises it again.
                self.filter = Filter::Down;
                Err(op.failed(Cause::Unavailable("our nftables table was taken away".to_owned())))
            }
        }
    }

    fn hide(&mut self, wanted: &[(FourTuple, Hidden)], now: Instant) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        self.raise_filter(now)?.map_or(Ok(()), |filter| filter.hide(wanted))
    }

    fn narrow_hidden(&mut self, held: impl Iterator<Item = FourTuple>, now: Instant) -> Result<()> {
        let Filter::Up { filter, used } = &mut self.filter else { return Ok(()) };
        if filter.hidden().next().is_none() {
            if now.saturating_duration_since(*used) >= FILTER_REST {
                self.filter = Filter::Down;
                self.asking = None;
            }
            return Ok(());
        }
        let held: HashSet<_> = held.collect();
        let over: Vec<_> = filter.hidden().filter(|flow| !held.contains(flow)).collect();
        filter.show_again(&over)
    }

    fn interface(&mut self, client: IpAddr, server: IpAddr) -> Result<Option<(String, u32)>> {
        let index = match self.hop(client, Some(server))? {
            Hop::Local => LOOPBACK,
            Hop::Entrance(entrance) => entrance.interface,
            Hop::Unreachable => return Ok(None),
        };
        if !self.names.contains_key(&index) {
            self.names = links()?.into_iter().map(|link| (link.index, link.name)).collect();
        }
        Ok(self.names.get(&index).map(|name| (name.clone(), index)))
    }

    fn ask(&mut self, question: Question, now: Instant) -> Result<Asked> {
        Self::ask(self, question, now)
    }

    fn room(&mut self, question: Question, most: u32, now: Instant) -> Result<Room> {
        Self::room(self, question, most, now)
    }

    fn refresh(&mut self, now: Instant) {
        self.remembered.clear();
        self.names.clear();
        self.budget.prune(now);
    }
}

/// A route that was asked for by name and cannot be had.
fn missing(error: Error) -> Error {
    if error.is_unavailable() {
        return error;
    }
    error.op.failed(Cause::Unavailable(error.cause.to_string()))
}
