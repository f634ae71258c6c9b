//! The kernel's TCP sockets by `sock_diag` netlink: dumps by state, and exact look-ups.
//!
//! A dump finds candidates; only an exact look-up proves that a socket is there or gone: under
//! churn a dump of long hash chains skips live sockets and says nothing of it.

mod decode;
mod opener;
mod request;
mod socket;

use std::collections::BTreeSet;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use nix::errno::Errno;

use crate::error::{Cause, Error, Op, Result};
use crate::flow::FourTuple;
use crate::netlink::{Connection, KernelSocket, Transport};

pub use opener::Opener;
pub use socket::{Cookie, Socket, State, States, UnknownState};

/// Asks the kernel about TCP sockets of one network namespace, or of several that share a
/// conntrack table (containers behind a host's address translation).
#[derive(Debug)]
pub struct SockDiag<T = KernelSocket> {
    namespaces: Vec<Sockets<T>>,
}

/// The sockets of one network namespace.
#[derive(Debug)]
struct Sockets<T> {
    connection: Connection<T>,
    /// Devices that sockets of its dumps were bound to.
    bound: BTreeSet<u32>,
}

/// Devices that absent connections are asked for with, one by one: some VRFs or VLANs, as a rule
/// none. Beyond them the newest are kept.
const BOUND: usize = 64;

impl SockDiag<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no `sock_diag`.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open sock_diag netlink"), NETLINK_SOCK_DIAG)?;
        Ok(Self::new(socket))
    }
}

/// An exact look-up: the connection as the server sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lookup {
    /// From the server's endpoint to the peer's.
    pub flow: FourTuple,
    /// The device that the socket is bound to, or that its packets come in by; 0 where neither is
    /// known. The kernel compares it with that of a bound socket: with 0 it finds no bound one, with
    /// a device those that are bound to it and those that are not bound.
    pub interface: u32,
}

impl From<&Socket> for Lookup {
    fn from(socket: &Socket) -> Self {
        Self { flow: socket.flow(), interface: socket.interface }
    }
}

impl<T: Transport> SockDiag<T> {
    /// A conversation over any transport.
    pub fn new(transport: T) -> Self {
        let connection = Connection::new(transport);
        Self { namespaces: vec![Sockets { connection, bound: BTreeSet::new() }] }
    }

    /// Asks the other one's namespaces too.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.namespaces.extend(other.namespaces);
        self
    }

    /// Every TCP socket of both families that is in one of `states`, each once.
    ///
    /// The kernel filters by state. Equivalent: `ss -Htan state ...`.
    ///
    /// # Errors
    /// The kernel refused, or a message was lost or malformed.
    pub fn sockets(&mut self, states: States) -> Result<Vec<Socket>> {
        let mut all = self.dump(states)?;
        // A socket that moves between hash chains during a dump can be reported twice.
        all.sort_unstable_by_key(|socket| (socket.cookie, socket.local, socket.remote));
        all.dedup_by_key(|socket| (socket.cookie, socket.local, socket.remote));
        Ok(all)
    }

    /// The listening TCP sockets.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn listeners(&mut self) -> Result<Vec<Socket>> {
        self.sockets(States::from_iter([State::Listen]))
    }

    fn dump(&mut self, states: States) -> Result<Vec<Socket>> {
        let request = request::dump(states);
        let mut all = Vec::new();
        for Sockets { connection, bound } in &mut self.namespaces {
            let part = connection.dump(&request, |part: &mut Vec<Socket>, frame| {
                part.extend(decode::socket(frame).map_err(|error| request.op.malformed(error))?);
                Ok(())
            });
            let part = part.map_err(|error| match error.errno() {
                // Without tcp_diag, and without inet_diag below it.
                Some(Errno::ENOENT | Errno::EOPNOTSUPP) => module_missing(request.op),
                _ => error,
            })?;
            bound.extend(part.iter().map(|socket| socket.interface).filter(|bound| *bound != 0));
            while bound.len() > BOUND {
                bound.pop_first();
            }
            if all.is_empty() {
                all = part;
            } else {
                all.extend(part);
            }
        }
        Ok(all)
    }

    /// The sockets of exactly these connections, in the order asked; `None` where there is none that
    /// is bound to the interface asked, to no device, or to one that dumps have shown in use.
    ///
    /// The kernel answers an absent tuple with the *listener* of its port; that is `None` here.
    ///
    /// # Errors
    /// A broken conversation. An unanswered look-up is never `None`.
    pub fn lookup(&mut self, lookups: &[Lookup]) -> Result<Vec<Option<Socket>>> {
        let mut found = vec![None; lookups.len()];
        for Sockets { connection, bound } in &mut self.namespaces {
            look_up_missing(connection, lookups, &mut found, |lookup| Some(*lookup))?;
            for device in bound.iter() {
                let by_it = |lookup: &Lookup| Lookup { interface: *device, ..*lookup };
                look_up_missing(connection, lookups, &mut found, |lookup| {
                    (lookup.interface != *device).then(|| by_it(lookup))
                })?;
            }
        }
        Ok(found)
    }

    /// Who has opened each of these connections, by what TCP has counted of its socket; `None` where
    /// that cannot be told, or the socket is gone.
    ///
    /// # Errors
    /// As [`SockDiag::lookup`].
    pub fn openers(&mut self, lookups: &[Lookup]) -> Result<Vec<Option<Opener>>> {
        let requests: Vec<_> = lookups.iter().map(request::info).collect();
        let mut openers = vec![None; lookups.len()];
        for Sockets { connection, .. } in &mut self.namespaces {
            let outcomes = connection.look_up(&requests, |index, frame| {
                let op = requests.get(index).map_or(Op::new("socket look-up"), |r| r.op);
                let opener = decode::opener(frame).map_err(|error| op.malformed(error))?;
                if let (Some(asked), Some(slot)) = (lookups.get(index), openers.get_mut(index)) {
                    *slot = slot.or(opener.filter(|(flow, _)| *flow == asked.flow).map(|it| it.1));
                }
                Ok(())
            })?;
            let refused = outcomes.into_iter().filter_map(|outcome| outcome.err());
            if let Some(error) = refused.filter(|error| !error.is_absent()).next() {
                return Err(error);
            }
        }
        Ok(openers)
    }

    /// Proves that the kernel answers `tcp_diag` requests at all.
    ///
    /// # Errors
    /// Says which module is missing.
    pub fn probe(&mut self) -> Result<()> {
        self.listeners().map(drop)
    }
}

/// Asks for what is not found yet, by what `ask` makes of it.
fn look_up_missing<T: Transport>(
    connection: &mut Connection<T>,
    lookups: &[Lookup],
    found: &mut [Option<Socket>],
    ask: impl Fn(&Lookup) -> Option<Lookup>,
) -> Result<()> {
    let missing = found.iter_mut().zip(lookups).filter(|(socket, _)| socket.is_none());
    let asked = missing.filter_map(|(slot, lookup)| Some((slot, ask(lookup)?)));
    let (slots, asked): (Vec<_>, Vec<_>) = asked.unzip();
    for (slot, socket) in slots.into_iter().zip(lookup_in(connection, &asked)?) {
        *slot = socket;
    }
    Ok(())
}

/// The sockets of these connections in one namespace.
fn lookup_in<T: Transport>(
    connection: &mut Connection<T>,
    lookups: &[Lookup],
) -> Result<Vec<Option<Socket>>> {
    let requests: Vec<_> = lookups.iter().map(request::lookup).collect();
    // The outer `None`: not answered yet.
    let mut answers: Vec<Option<Option<Socket>>> = vec![None; lookups.len()];
    let outcomes = connection.look_up(&requests, |index, frame| {
        let op = requests.get(index).map_or(Op::new("socket look-up"), |r| r.op);
        let socket = decode::socket(frame).map_err(|error| op.malformed(error))?;
        if let (Some(asked), Some(answer)) = (lookups.get(index), answers.get_mut(index)) {
            *answer = Some(
                socket
                    .filter(|socket| socket.state != State::Listen && socket.flow() == asked.flow),
            );
        }
        Ok(())
    })?;
    outcomes
        .into_iter()
        .zip(answers)
        .zip(&requests)
        .map(|((outcome, answer), request)| match (outcome, answer) {
            (Ok(()), Some(socket)) => Ok(socket),
            (Ok(()), None) => Err(request.op.malformed("acknowledged without a socket")),
            (Err(error), _) if error.is_absent() => Ok(None),
            (Err(error), _) => Err(error),
        })
        .collect()
}

fn module_missing(op: Op) -> Error {
    op.failed(Cause::Unavailable(format!(
        "the kernel has no TCP socket diagnosis ({:?}); load it: modprobe tcp_diag",
        Errno::ENOENT
    )))
}
