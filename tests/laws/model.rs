//! A small kernel with a limiter, an application, and packets of peers that mean harm.
//!
//! Sockets and entries are those of a [`Host`], so that every question and every change of ctkeep
//! passes the real bytes. What packets do to them is as measured on Linux 6.18 (docs/attack.md),
//! reduced to what a decision can depend on. The packets of recount and seal are not sent here:
//! their effect, which the live tests prove, is that of [`Counting`].

#![allow(unreachable_pub)]

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ctkeep::Result;
use ctkeep::conntrack::{Entry, Status, Tcp, TcpState, Zone};
use ctkeep::flow::{Endpoint, FourTuple};
use ctkeep::recount::{Hidden, Recipe, Recount, Route, Way};
use ctkeep::sockdiag::{Socket, State};

use crate::played::host::Shared;
use crate::played::{self, entry, flow, reversed_entry};

pub const PORT: u16 = 80;
pub const SERVER: &str = "192.0.2.1";

/// How long the kernel gives an entry (`nf_conntrack_tcp_timeout_*`), in seconds.
pub fn timeout(state: TcpState) -> u64 {
    match state {
        TcpState::Established => 432_000,
        TcpState::CloseWait => 60,
        TcpState::LastAck => 30,
        TcpState::Close => 10,
        _ => 120,
    }
}

/// An RST that ends nothing, but for the exact one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rst {
    /// TCP takes it, too.
    Exact,
    /// Before the FIN's number, or in the window: conntrack believes it once it has seen a FIN.
    Stale,
    /// Behind an ACK of the same number: conntrack believes it always.
    Ahead,
}

pub struct Model {
    pub host: Shared,
    pub limit: usize,
    limiter: Rc<RefCell<Limiter>>,
    /// What events have told of.
    pub told: Vec<FourTuple>,
    cookies: u64,
    ids: u32,
}

/// What packets do beside the two tables. All tuples are original ones.
#[derive(Default)]
struct Limiter {
    /// The list of each source.
    lists: HashMap<IpAddr, Vec<FourTuple>>,
    /// Entries that conntrack has seen a packet of the server for, after ctkeep put them there.
    sealed: HashSet<FourTuple>,
    /// Connections whose packets of a kind conntrack does not see, by which instance.
    hidden: HashMap<(usize, FourTuple), Hidden>,
}

/// What ctkeep makes the limiter count by: the effect of its packets, which the live tests prove.
pub struct Counting {
    instance: usize,
    host: Shared,
    limiter: Rc<RefCell<Limiter>>,
}

impl Recount for Counting {
    fn admit(&mut self, _entry: &Entry, _now: Instant) -> bool {
        true
    }

    /// Both recipes are played: which one is the connection's.
    fn way(&mut self, entry: &Entry, _now: Instant) -> Result<Way> {
        let even = entry.orig.src.port().is_multiple_of(2);
        let recipe = if even { Recipe::Replace } else { Recipe::Fresh };
        Ok(Way { route: Route::Ingress, recipe })
    }

    fn nudge(&mut self, entry: &Entry, _route: Route, _now: Instant) -> Result<()> {
        let host = self.host.borrow();
        let now = host.entries.iter().find(|other| other.orig == entry.orig);
        let mut limiter = self.limiter.borrow_mut();
        limiter.sealed.remove(&entry.orig);
        // A packet of an entry that is assured is not added.
        if now.is_none_or(|now| !is_assured(now)) {
            let list = limiter.lists.entry(entry.orig.src.addr()).or_default();
            if !list.contains(&entry.orig) {
                list.push(entry.orig);
            }
        }
        Ok(())
    }

    fn can_seal(&self) -> bool {
        true
    }

    fn seal(&mut self, entry: &Entry, _now: Instant) -> Result<()> {
        self.limiter.borrow_mut().sealed.insert(entry.orig);
        Ok(())
    }

    fn hide(&mut self, wanted: &[(FourTuple, Hidden)], _now: Instant) -> Result<()> {
        for (orig, hidden) in wanted {
            let mut limiter = self.limiter.borrow_mut();
            let now = limiter.hidden.entry((self.instance, *orig)).or_insert(*hidden);
            *now = (*now).max(*hidden);
        }
        Ok(())
    }

    fn narrow_hidden(
        &mut self,
        held: impl Iterator<Item = FourTuple>,
        _now: Instant,
    ) -> Result<()> {
        let held: HashSet<_> = held.collect();
        let own = self.instance;
        let mut limiter = self.limiter.borrow_mut();
        limiter.hidden.retain(|(instance, orig), _| *instance != own || held.contains(orig));
        Ok(())
    }

    fn refresh(&mut self, _now: Instant) {}
}

impl Model {
    pub fn new(host: Shared, limit: usize) -> Self {
        Self { host, limit, limiter: Rc::default(), told: Vec::new(), cookies: 0, ids: 1 << 20 }
    }

    /// What ctkeep makes this limiter count by.
    pub fn counting(&self, instance: usize) -> Counting {
        Counting { instance, host: self.host.clone(), limiter: self.limiter.clone() }
    }

    fn hidden(&self, flow: FourTuple) -> Option<Hidden> {
        let limiter = self.limiter.borrow();
        let of_it = limiter.hidden.iter().filter(|((_, orig), _)| *orig == flow.inverse());
        of_it.map(|(_, hidden)| *hidden).max()
    }

    /// The connection of a peer's port, seen from the server.
    pub fn flow(source: u8, port: u16) -> FourTuple {
        flow(&format!("{SERVER}:{PORT}"), &format!("198.51.100.{source}:{port}"))
    }

    pub fn socket(&self, flow: FourTuple) -> Option<Socket> {
        self.host.borrow().sockets.iter().find(|socket| socket.connection().sent() == flow).copied()
    }

    pub fn entry(&self, flow: FourTuple) -> Option<Entry> {
        let host = self.host.borrow();
        host.entries.iter().find(|e| e.reply == flow || e.orig == flow).copied()
    }

    fn set_entry(&self, flow: FourTuple, change: impl FnOnce(&mut Entry)) {
        let mut host = self.host.borrow_mut();
        if let Some(entry) = host.entries.iter_mut().find(|e| e.reply == flow || e.orig == flow) {
            change(entry);
        }
    }

    fn set_state(&self, flow: FourTuple, state: TcpState) {
        self.set_entry(flow, |entry| {
            entry.timeout = Some(Duration::from_secs(timeout(state)));
            entry.tcp = entry.tcp.map(|tcp| Tcp { state, ..tcp });
        });
    }

    fn remove_entry(&self, flow: FourTuple) {
        self.host.borrow_mut().entries.retain(|e| e.reply != flow && e.orig != flow);
    }

    fn insert(&mut self, entry: Entry) -> bool {
        let mut host = self.host.borrow_mut();
        if host.maximum.is_some_and(|most| host.entries.len() >= most) {
            // Early drop: what is not assured goes first.
            let Some(victim) = host.entries.iter().position(|e| !is_assured(e)) else {
                return false;
            };
            host.entries.remove(victim);
        }
        self.ids += 1;
        host.entries.push(Entry { id: Some(self.ids), ..entry });
        true
    }

    /// The limiter's look at its list: what has no entry or a closed one is thrown out.
    fn sweep_list(&mut self, source: IpAddr) {
        let host = self.host.clone();
        let host = host.borrow();
        let counts = |orig: &FourTuple| {
            let entry = host.entries.iter().find(|e| e.orig == *orig || e.reply == *orig);
            entry.and_then(Entry::state).is_some_and(TcpState::is_counted)
        };
        self.limiter.borrow_mut().lists.entry(source).or_default().retain(counts);
    }

    fn count(&mut self, source: IpAddr, orig: FourTuple) {
        self.limiter.borrow_mut().lists.entry(source).or_default().push(orig);
    }

    /// Whether the limiter has the connection in its list, and would leave it there.
    pub fn is_counted(&mut self, flow: FourTuple) -> bool {
        self.sweep_list(flow.dst.addr());
        self.limiter.borrow().lists[&flow.dst.addr()].contains(&flow.inverse())
    }

    /// A SYN of the peer; whether a new connection has come of it.
    pub fn syn(&mut self, flow: FourTuple) -> bool {
        let (source, orig) = (flow.dst.addr(), flow.inverse());
        self.sweep_list(source);
        let old = self.entry(flow).and_then(|entry| entry.state());
        match old {
            Some(TcpState::Close | TcpState::TimeWait) => self.remove_entry(flow),
            // Ignored by conntrack; what TCP makes of it without a socket is left out.
            Some(_) => return false,
            None => {}
        }
        if self.limiter.borrow().lists[&source].len() >= self.limit {
            return false;
        }
        if self.socket(flow).is_some() {
            // TCP answers with a challenge.
            let opening =
                Entry { status: Some(Status::FRESH), ..entry(flow, TcpState::SynSent, 120) };
            if self.insert(opening) {
                self.count(source, orig);
            }
            return false;
        }
        let state = TcpState::Established;
        if !self.insert(entry(flow, state, timeout(state))) {
            return false;
        }
        self.count(source, orig);
        self.cookies += 1;
        let (local, remote) = (flow.src.to_string(), flow.dst.to_string());
        let socket = played::socket(&local, &remote, State::Established, self.cookies);
        self.host.borrow_mut().sockets.push(socket);
        true
    }

    /// A FIN of the peer; behind a hole TCP does not take it.
    pub fn fin(&mut self, flow: FourTuple, hole: bool) {
        let Some(socket) = self.socket(flow) else { return };
        let mut is_first = false;
        if socket.state == State::Established && !hole {
            is_first = true;
            let mut host = self.host.borrow_mut();
            let socket = host.sockets.iter_mut().find(|s| s.connection().sent() == flow).unwrap();
            socket.state = State::CloseWait;
        }
        if self.hidden(flow).is_some() {
            return;
        }
        let next = match self.entry(flow).and_then(|entry| entry.state()) {
            // The server's ACK follows.
            Some(TcpState::Established) if is_first => TcpState::CloseWait,
            Some(TcpState::Established | TcpState::SynRecv) => TcpState::FinWait,
            Some(TcpState::FinWait | TcpState::CloseWait) => TcpState::LastAck,
            Some(TcpState::LastAck) => TcpState::TimeWait,
            _ => return,
        };
        self.set_state(flow, next);
        self.told.push(flow);
    }

    pub fn rst(&mut self, flow: FourTuple, rst: Rst) {
        if self.socket(flow).is_none() {
            return;
        }
        if rst == Rst::Exact {
            self.host.borrow_mut().sockets.retain(|socket| socket.connection().sent() != flow);
        }
        if self.hidden(flow) == Some(Hidden::FinsAndRsts) {
            return;
        }
        let state = self.entry(flow).and_then(|entry| entry.state());
        match (state, rst) {
            (None | Some(TcpState::None), _) => return,
            (Some(TcpState::Established), Rst::Stale) => {
                if self.limiter.borrow().sealed.contains(&flow.inverse()) {
                    self.set_entry(flow, |entry| entry.timeout = Some(Duration::from_secs(300)));
                }
                return;
            }
            _ => self.set_state(flow, TcpState::Close),
        }
        self.told.push(flow);
    }

    /// Data of the server, which its client does not answer.
    pub fn server_sends(&mut self, flow: FourTuple) {
        if self.socket(flow).is_none() {
            return;
        }
        match self.entry(flow).and_then(|entry| entry.state()) {
            // Loose pick-up takes the server for the client.
            None => {
                let entry = reversed_entry(flow, TcpState::Established, 300);
                self.insert(entry);
            }
            Some(TcpState::Established) => self.set_state(flow, TcpState::Established),
            Some(_) => {}
        }
    }

    /// The application closes.
    pub fn close(&mut self, flow: FourTuple) {
        if self.socket(flow).is_none() {
            return;
        }
        self.host.borrow_mut().sockets.retain(|socket| socket.connection().sent() != flow);
        match self.entry(flow).and_then(|entry| entry.state()) {
            Some(TcpState::Established) => self.set_state(flow, TcpState::FinWait),
            Some(TcpState::CloseWait | TcpState::FinWait) => {
                self.set_state(flow, TcpState::LastAck);
            }
            _ => {}
        }
    }

    /// Somebody deletes the entry, or a full table loses it.
    pub fn evict(&mut self, flow: FourTuple) {
        self.remove_entry(flow);
        self.told.push(flow);
    }

    /// Entries of handshakes that never end.
    pub fn flood(&mut self, count: u16) {
        for port in 0..count {
            let flow = flow(&format!("{SERVER}:{PORT}"), &format!("203.0.113.9:{}", 2000 + port));
            if self.entry(flow).is_none() {
                let opening = entry(flow, TcpState::SynRecv, 60);
                self.insert(Entry { status: Some(Status::FRESH), ..opening });
            }
        }
    }

    pub fn pass(&mut self, seconds: u64) {
        let mut host = self.host.borrow_mut();
        for entry in &mut host.entries {
            let left = entry.timeout.unwrap_or_default();
            entry.timeout = Some(left.saturating_sub(Duration::from_secs(seconds)));
        }
        host.entries.retain(|entry| entry.timeout != Some(Duration::ZERO));
    }

    /// They belong to the process.
    pub fn drop_hidden(&mut self, instance: usize) {
        self.limiter.borrow_mut().hidden.retain(|(of, _), _| *of != instance);
    }

    /// How many connections the server holds open for a source.
    pub fn held_by(&self, source: u8) -> usize {
        let of = |socket: &&Socket| socket.remote.addr() == Self::flow(source, 1).dst.addr();
        self.host.borrow().sockets.iter().filter(of).count()
    }
}

fn is_assured(entry: &Entry) -> bool {
    entry.status.is_some_and(Status::is_assured)
}

/// A connection that is none of ctkeep's business: a port that is not guarded, or one that this
/// host opened.
pub fn bystanders() -> (Vec<Socket>, Vec<Entry>) {
    let elsewhere = flow(&format!("{SERVER}:22"), "198.51.100.77:4000");
    let outgoing = flow(&format!("{SERVER}:{PORT}"), "198.51.100.77:4001");
    let flows = [elsewhere, outgoing];
    let sockets = flows.iter().zip(1 << 40..).map(|(flow, cookie)| {
        played::socket(&flow.src.to_string(), &flow.dst.to_string(), State::CloseWait, cookie)
    });
    let closed = entry(elsewhere, TcpState::Close, 1_000_000);
    let plain = Entry::plain(outgoing, Zone::default());
    let opened = Entry { status: closed.status, timeout: closed.timeout, tcp: closed.tcp, ..plain };
    (sockets.collect(), vec![closed, opened])
}

/// The server's endpoint.
pub fn server() -> Endpoint {
    played::endpoint(&format!("{SERVER}:{PORT}"))
}
