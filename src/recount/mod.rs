//! Makes the limiter take a connection back that it has thrown out, and keeps it there.
//!
//! connlimit and `ct count` keep lists of tuples; a tuple gets onto a list only when a packet of
//! an entry that is not yet assured reaches the rule. So a repaired entry is first inserted
//! unassured, then a *nudge* passes the rules: a SYN of the connection's own tuple that TCP drops
//! in silence. A *seal* then shows conntrack one packet of the server, after which stale RSTs leave
//! an ESTABLISHED entry alone. docs/recount.md draws the paths.

mod budget;
mod ingress;
mod loopback;
mod packet;
mod reply_filter;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use self::budget::Budget;
use self::ingress::Ingress;
use self::loopback::RawSockets;
use self::packet::Silencer;
use self::reply_filter::{Marks, ReplyFilter};
use crate::conntrack::Entry;
use crate::error::{Cause, Error, Op, Result};
use crate::flow::FourTuple;
use crate::rtnetlink::route::{Destination, Routes};

/// How the limiter is made to count again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// By ingress where it can be had, else by loopback; behind SYNPROXY the other way round.
    #[default]
    Auto,
    /// By the interface of the client.
    Ingress,
    /// By the loopback device.
    Loopback,
    /// Not at all: entries are repaired in place.
    Off,
}

/// The way that a nudge takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// In by the interface that the client is reached by.
    Ingress,
    /// Out of a raw socket and in by the loopback device.
    Loopback,
}

impl Route {
    /// The route's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Loopback => "loopback",
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which packets of a peer conntrack no longer sees, so that they cannot fool it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Notrack {
    /// FINs: they move even a sealed entry, and the socket has had its own.
    Fins,
    /// FINs and RSTs: of a peer that does it again. No honest stack does that.
    FinsAndRsts,
}

/// Addresses whose destination is remembered between two refreshes.
const REMEMBERED: usize = 65_536;

/// For so long after its last use the reply filter stays, and costs every packet a little.
const FILTER_REST: Duration = Duration::from_secs(60);

/// Sends nudges and seals in one network namespace.
#[derive(Debug)]
pub struct Recounter {
    raw: RawSockets,
    ingress: Option<Ingress>,
    loopback: bool,
    /// The reply filter's name, where it can be had.
    filter_name: Option<String>,
    filter: Option<ReplyFilter>,
    /// When something last went out behind the filter.
    used: Option<Instant>,
    marks: Marks,
    routes: Routes,
    remembered: HashMap<(IpAddr, Option<IpAddr>), Destination>,
    budget: Budget,
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
        let marks = Marks::draw();
        let mut this = Self {
            raw: RawSockets::open()?,
            ingress: None,
            loopback: mode != Mode::Ingress,
            filter_name: None,
            filter: None,
            used: None,
            marks,
            routes: Routes::open()?,
            remembered: HashMap::new(),
            budget: Budget::new(now),
            shortfalls: Vec::new(),
        };
        match ReplyFilter::open(name, marks) {
            Ok(filter) => (this.filter, this.filter_name) = (Some(filter), Some(name.to_owned())),
            Err(error) if mode == Mode::Ingress => return Err(missing(error)),
            Err(error) => this.shortfalls.push(error.to_string()),
        }
        // Without the filter a rule that rejects would answer the client.
        if mode != Mode::Loopback && this.filter_name.is_some() {
            match Ingress::open(name) {
                Ok(ingress) => this.ingress = Some(ingress),
                Err(error) if mode == Mode::Ingress => return Err(missing(error)),
                Err(error) => this.shortfalls.push(error.to_string()),
            }
        }
        Ok(Some(this))
    }

    /// The routes that a nudge is tried by, in this order.
    pub fn routes(&self) -> Vec<Route> {
        let ingress = self.ingress.is_some().then_some(Route::Ingress);
        ingress.into_iter().chain(self.loopback.then_some(Route::Loopback)).collect()
    }

    /// Whether entries can be sealed.
    pub fn can_seal(&self) -> bool {
        self.filter_name.is_some()
    }

    /// The reply filter, raised now if it was down; `None` where it cannot be had.
    ///
    /// # Errors
    /// The kernel refused it this time.
    fn filter(&mut self) -> Result<Option<&mut ReplyFilter>> {
        self.used = Some(Instant::now());
        if let (Some(name), None) = (&self.filter_name, &self.filter) {
            self.filter = Some(ReplyFilter::open(name, self.marks)?);
        }
        Ok(self.filter.as_mut())
    }

    /// What could not be had, in words.
    pub fn shortfalls(&self) -> &[String] {
        &self.shortfalls
    }

    /// Forgets how addresses are reached; they are asked for again.
    pub fn refresh(&mut self, now: Instant) {
        self.remembered.clear();
        self.budget.prune(now);
    }

    /// Whether the connection of `entry` may be nudged now; counts as one nudge.
    pub(crate) fn admit(&mut self, entry: &Entry, now: Instant) -> bool {
        self.budget.take(entry.orig, now)
    }

    /// Sends one nudge for the connection of `entry`, which a look-up has just shown to be alive.
    ///
    /// # Errors
    /// No route reaches the rules for this connection; the last one's reason.
    pub(crate) fn nudge(&mut self, entry: &Entry) -> Result<Route> {
        let op = Op::on("recount", entry.orig);
        self.filter()?;
        let mut failed = None;
        let mut routes = self.routes();
        if entry.synproxy.is_some() {
            // The SYN that the limiter saw was the proxy's own, by loopback. One that comes in by
            // the client's interface is answered by the proxy and gets no further.
            routes.reverse();
        }
        for route in routes {
            let sent = match route {
                Route::Ingress => self.nudge_by_ingress(op, entry),
                Route::Loopback => self.nudge_by_loopback(op, entry),
            };
            match sent {
                // The end: REJECT with a reset closes the entry, which the last step mends, but
                // not after a second nudge has begun it anew.
                Ok(()) => return Ok(route),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| op.failed(Cause::Unavailable("no route".to_owned()))))
    }

    fn nudge_by_ingress(&mut self, op: Op, entry: &Entry) -> Result<()> {
        let (client, server) = (entry.orig.src.addr(), entry.orig.dst.addr());
        let target = match self.destination(client, Some(server))? {
            Destination::Interface(index) => index,
            Destination::Local => {
                return Err(op.failed(Cause::Unavailable("the client is on this host".to_owned())));
            }
            Destination::Unreachable => {
                return Err(op.failed(Cause::Unavailable("no route to the client".to_owned())));
            }
        };
        let packet = packet::nudge(entry.orig, self.marks.nudge, Silencer::Md5Option)
            .ok_or_else(|| op.malformed("addresses of two families"))?;
        match &mut self.ingress {
            Some(ingress) => ingress.send(op, &packet, target),
            None => Err(op.failed(Cause::Unavailable("no helper device".to_owned()))),
        }
    }

    fn nudge_by_loopback(&mut self, op: Op, entry: &Entry) -> Result<()> {
        let to = entry.orig.dst.addr();
        // Anything else would leave this host.
        if self.destination(to, None)? != Destination::Local {
            return Err(op.failed(Cause::Unavailable(format!(
                "{to} is no address of this host: the loopback route does not reach its rules"
            ))));
        }
        let packet = packet::nudge(entry.orig, self.marks.nudge, Silencer::WrongChecksum)
            .ok_or_else(|| op.malformed("addresses of two families"))?;
        self.raw.send(&packet, to).map_err(|error| op.io(error))
    }

    /// Shows conntrack one ACK of the server, so that stale RSTs leave the entry alone.
    ///
    /// # Errors
    /// There is no filter that keeps it on this host, or the send failed.
    pub(crate) fn seal(&mut self, entry: &Entry) -> Result<()> {
        let op = Op::on("seal", entry.orig);
        if self.filter()?.is_none() {
            return Err(op.failed(Cause::Unavailable("no nftables table of our own".to_owned())));
        }
        let packet = packet::seal(entry.reply, self.marks.seal)
            .ok_or_else(|| op.malformed("addresses of two families"))?;
        match self.raw.send(&packet, entry.reply.dst.addr()) {
            // The filter's verdict, after conntrack has seen it.
            Err(error) if error.raw_os_error() == Some(Errno::EPERM as i32) => Ok(()),
            Err(error) => Err(op.io(error)),
            Ok(()) => {
                // Somebody took the table away: no more seals, they would leave this host.
                (self.filter, self.filter_name) = (None, None);
                self.ingress = None;
                Err(op.failed(Cause::Unavailable("our nftables table is gone".to_owned())))
            }
        }
    }

    /// Keeps conntrack from seeing what could fool it again, of these tuples seen from the peer.
    ///
    /// # Errors
    /// The sets are full, or the table is gone.
    pub(crate) fn notrack(&mut self, wanted: &[(FourTuple, Notrack)]) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        self.filter()?.map_or(Ok(()), |filter| filter.notrack(wanted))
    }

    /// Keeps in the notrack sets only what is held, by its original tuples, and takes the filter away
    /// where nothing needs it.
    ///
    /// # Errors
    /// The table is gone.
    pub fn narrow_notrack(&mut self, held: impl Iterator<Item = FourTuple>) -> Result<()> {
        let Some(filter) = &mut self.filter else { return Ok(()) };
        if filter.untracked().next().is_none() {
            if self.used.is_none_or(|used| used.elapsed() >= FILTER_REST) {
                self.filter = None;
            }
            return Ok(());
        }
        let held: HashSet<_> = held.collect();
        let over: Vec<_> = filter.untracked().filter(|flow| !held.contains(flow)).collect();
        filter.track_again(&over)
    }

    fn destination(&mut self, addr: IpAddr, from: Option<IpAddr>) -> Result<Destination> {
        if let Some(known) = self.remembered.get(&(addr, from)) {
            return Ok(*known);
        }
        let destination = self.routes.destination(addr, from)?;
        if self.remembered.len() >= REMEMBERED {
            self.remembered.clear();
        }
        self.remembered.insert((addr, from), destination);
        Ok(destination)
    }
}

/// A route that was asked for by name and cannot be had.
fn missing(error: Error) -> Error {
    if error.is_unavailable() {
        return error;
    }
    error.op.failed(Cause::Unavailable(error.cause.to_string()))
}
