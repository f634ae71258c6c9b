//! Sends nudges and seals in one network namespace.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::budget::Budget;
use super::ingress::Ingress;
use super::loopback::RawSockets;
use super::packet::{self, Silencer};
use super::reply_filter::{Marks, ReplyFilter};
use super::{Mode, Notrack, Recount, Route};
use crate::conntrack::Entry;
use crate::error::{Cause, Error, Op, Result};
use crate::flow::FourTuple;
use crate::rtnetlink::route::{Destination, Routes};

/// Addresses whose destination is remembered between two refreshes: all clients of a busy host,
/// in some 5 MiB.
const REMEMBERED: usize = 65_536;

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

/// The [`Recount`] of a real kernel.
#[derive(Debug)]
pub struct Recounter {
    /// Of the helper device and of the nftables table.
    name: String,
    raw: RawSockets,
    ingress: Option<Ingress>,
    loopback: bool,
    filter: Filter,
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
        let mut this = Self {
            name: name.to_owned(),
            raw: RawSockets::open()?,
            ingress: None,
            loopback: mode != Mode::Ingress,
            filter: Filter::Down,
            marks: Marks::draw(),
            routes: Routes::open()?,
            remembered: HashMap::new(),
            budget: Budget::new(now),
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

    /// What could not be had, in words.
    pub fn shortfalls(&self) -> &[String] {
        &self.shortfalls
    }

    /// The reply filter, raised now if it was down; `None` where it cannot be had.
    fn raise_filter(&mut self, now: Instant) -> Result<Option<&mut ReplyFilter>> {
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

impl Recount for Recounter {
    fn admit(&mut self, entry: &Entry, now: Instant) -> bool {
        self.budget.take(entry.orig, now)
    }

    fn nudge(&mut self, entry: &Entry, now: Instant) -> Result<Route> {
        let op = Op::on("recount", entry.orig);
        self.raise_filter(now)?;
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
                // Stop at the first route. A reset by REJECT closes the entry and the last step
                // opens it again; a second nudge would begin a new handshake.
                Ok(()) => return Ok(route),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| op.failed(Cause::Unavailable("no route".to_owned()))))
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

    fn notrack(&mut self, wanted: &[(FourTuple, Notrack)], now: Instant) -> Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        self.raise_filter(now)?.map_or(Ok(()), |filter| filter.notrack(wanted))
    }

    fn narrow_notrack(
        &mut self,
        held: impl Iterator<Item = FourTuple>,
        now: Instant,
    ) -> Result<()> {
        let Filter::Up { filter, used } = &mut self.filter else { return Ok(()) };
        if filter.untracked().next().is_none() {
            if now.saturating_duration_since(*used) >= FILTER_REST {
                self.filter = Filter::Down;
            }
            return Ok(());
        }
        let held: HashSet<_> = held.collect();
        let over: Vec<_> = filter.untracked().filter(|flow| !held.contains(flow)).collect();
        filter.track_again(&over)
    }

    fn refresh(&mut self, now: Instant) {
        self.remembered.clear();
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
