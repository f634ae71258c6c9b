//! Connections that a container behind the server's address has opened, and what keeps their entries,
//! beside the keepers of the other direction.

#![allow(unreachable_pub)]

use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, Tcp, TcpState};
use ctkeep::flow::{Connection, FourTuple};
use ctkeep::reconcile::keeper::Keeper;
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::outgoing::{By, Outgoing};
use ctkeep::sockdiag::{Socket, State};

use super::model::{Counting, SERVER, timeout};
use super::played::host::{Host, Shared};
use super::played::{self, Played, endpoint, entry, flow};

const FAR: &str = "203.0.113.50:443";
const PORTS: std::ops::Range<u16> = 50_000..50_004;
/// What the masquerade adds to a port.
const SHIFT: u16 = 10_000;

/// What happens to one of them.
#[derive(Clone, Copy, Debug)]
pub enum Harm {
    /// The far side's FIN comes again, and is acknowledged.
    FinAgain,
    StaleRst,
    /// The application writes.
    Packet,
    Evict,
    /// Its port goes to another connection, where it is free.
    GiveAway,
    /// The other one has ended.
    Free,
    /// Its process ends, and conntrack sees it or not.
    Close {
        is_seen: bool,
    },
}

pub struct Dialled {
    host: Shared,
    tables: Tables<Played>,
    outgoing: Outgoing,
}

fn connection(port: u16) -> Connection {
    Connection::new(endpoint(&format!("10.9.0.2:{port}")), endpoint(FAR))
}

fn translated(port: u16) -> FourTuple {
    flow(FAR, &format!("{SERVER}:{}", port + SHIFT))
}

fn masqueraded(port: u16) -> Entry {
    let entry = entry(connection(port).received(), TcpState::CloseWait, 60);
    Entry { reply: translated(port), ..entry }
}

/// Whether the entry is of one of these, or of one that has taken its port.
fn is_of_these(entry: &Entry) -> bool {
    entry.reply.src == endpoint(FAR)
}

impl Dialled {
    /// Half-closed by the far side, all of them.
    pub fn new(host: &Shared, now: Instant) -> Self {
        let tables = Host::tables(host, |played, _| played);
        let mut both = host.borrow_mut();
        both.entries.extend(PORTS.map(masqueraded));
        both.sockets.extend(PORTS.map(|port| {
            let Connection { local, remote } = connection(port);
            let cookie = (1 << 41) + u64::from(port);
            played::socket(&local.to_string(), &remote.to_string(), State::CloseWait, cookie)
        }));
        drop(both);
        Self { host: host.clone(), tables, outgoing: Outgoing::new(now) }
    }

    pub fn has(socket: &Socket) -> bool {
        socket.remote == endpoint(FAR)
    }

    /// Does what is due; nothing of any other connection is changed by it.
    pub fn turn<T: ctkeep::netlink::Transport>(
        &mut self,
        keeper: &Keeper<T, Counting>,
        now: Instant,
    ) {
        let others = |host: &Shared| -> Vec<Entry> {
            let host = host.borrow();
            host.entries.iter().filter(|entry| !is_of_these(entry)).copied().collect()
        };
        let before = others(&self.host);
        let (interval, policy) = (Duration::from_secs(1), &keeper.settings().policy);
        let of_kernel = |state| Some(Duration::from_secs(timeout(state)));
        let by = By {
            scope: keeper.scope(),
            policy,
            ledger: keeper.ledger(),
            close_wait: of_kernel(TcpState::CloseWait),
            timeout: &of_kernel,
            interval,
            dry_run: false,
        };
        self.outgoing.turn(&mut self.tables, by, now).unwrap();
        assert_eq!(others(&self.host), before, "other connections");
    }

    pub fn harm(&mut self, nth: u16, harm: Harm) {
        let port = PORTS.start + nth % (PORTS.end - PORTS.start);
        let orig = connection(port).sent();
        let set = |state: TcpState| {
            let mut host = self.host.borrow_mut();
            let entry = host.entries.iter_mut().find(|entry| entry.orig == orig);
            if let Some(entry) = entry {
                entry.timeout = Some(Duration::from_secs(timeout(state)));
                entry.tcp = entry.tcp.map(|tcp| Tcp { state, ..tcp });
            }
        };
        let is_open =
            self.host.borrow().sockets.iter().any(|it| it.connection() == connection(port));
        match harm {
            Harm::FinAgain if is_open => set(TcpState::TimeWait),
            Harm::StaleRst => set(TcpState::Close),
            Harm::Packet if is_open => {
                let mut host = self.host.borrow_mut();
                let entry = host.entries.iter_mut().find(|entry| entry.orig == orig);
                if let Some(entry) = entry {
                    let state = entry.state().unwrap_or(TcpState::CloseWait);
                    entry.timeout = Some(Duration::from_secs(timeout(state)));
                }
            }
            Harm::FinAgain | Harm::Packet => {}
            Harm::Evict => self.host.borrow_mut().entries.retain(|entry| entry.orig != orig),
            Harm::GiveAway => {
                let mut host = self.host.borrow_mut();
                if host.entries.iter().all(|entry| entry.reply != translated(port)) {
                    let other = flow(FAR, &format!("10.9.0.3:{port}"));
                    let other = entry(other, TcpState::Established, 432_000);
                    host.entries.push(Entry { reply: translated(port), ..other });
                }
            }
            Harm::Free => {
                let is_other =
                    |entry: &Entry| entry.reply == translated(port) && entry.orig != orig;
                self.host.borrow_mut().entries.retain(|entry| !is_other(entry));
            }
            Harm::Close { is_seen } => {
                let is_it = |socket: &Socket| socket.connection() == connection(port);
                self.host.borrow_mut().sockets.retain(|socket| !is_it(socket));
                if is_seen && is_open {
                    set(TcpState::TimeWait);
                }
            }
        }
    }

    /// What is wrong, one sentence each.
    pub fn disagreements(&self, is_full: bool) -> Vec<String> {
        let host = self.host.borrow();
        let mut all = Vec::new();
        for port in PORTS {
            let socket = host.sockets.iter().find(|it| it.connection() == connection(port));
            let entry = host.entries.iter().find(|it| it.orig == connection(port).sent());
            let owner = host.entries.iter().find(|it| it.reply == translated(port));
            let is_taken = owner.is_some_and(|owner| owner.orig != connection(port).sent());
            match (socket, entry) {
                (Some(_), Some(entry)) => {
                    let is_right = entry.reply == translated(port)
                        && entry.state() == Some(TcpState::CloseWait)
                        && !entry.is_ours();
                    if !is_right {
                        all.push(format!("{port}: {entry:?}"));
                    }
                }
                (Some(_), None) if !is_taken && !is_full => all.push(format!("{port} is lost")),
                (None, Some(entry)) => all.push(format!("{port} has no socket: {entry:?}")),
                _ => {}
            }
        }
        all
    }
}
