//! The kernel's TCP sockets by `sock_diag` netlink: dumps by state, and exact look-ups.
//!
//! A dump finds candidates; only an exact look-up proves that a socket is there or gone: under
//! churn a dump of long hash chains skips live sockets and says nothing of it.

mod decode;
pub mod ends;
mod listener;
mod members;
mod mptcp;
mod namespace;
mod opener;
mod request;
mod silence;
mod socket;

use std::collections::HashSet;
use std::net::IpAddr;
use std::ops::Range;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use self::members::Members;
use self::namespace::Sockets;
use crate::error::{Op, Result};
use crate::flow::Connection;
use crate::netlink::{KernelSocket, Transport};

pub use opener::Opener;
pub use silence::{Silence, SocketSilence};
pub use socket::{Cookie, Socket, State, States, UnknownState};

/// Asks the kernel about TCP sockets of one network namespace, and of others that share its conntrack
/// table: containers behind a host's address translation.
#[derive(Debug)]
pub struct SockDiag<T = KernelSocket> {
    own: Sockets<T>,
    members: Members<T>,
}

impl SockDiag<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel has no `sock_diag`.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open sock_diag netlink"), NETLINK_SOCK_DIAG)?;
        let mut this = Self::new(socket);
        this.own.ask_listeners();
        Ok(this)
    }
}

/// An exact look-up: the connection as the server sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lookup {
    /// The socket's.
    pub connection: Connection,
    /// The device that the socket is bound to, or that its packets come in by; 0 where neither is
    /// known. The kernel compares it with that of a bound socket: with 0 it finds no bound one, with
    /// a device those that are bound to it and those that are not bound.
    pub interface: u32,
}

impl From<&Socket> for Lookup {
    fn from(socket: &Socket) -> Self {
        Self { connection: socket.connection(), interface: socket.interface }
    }
}

impl<T: Transport> SockDiag<T> {
    /// A conversation over any transport.
    pub fn new(transport: T) -> Self {
        Self { own: Sockets::new(transport), members: Members::default() }
    }

    /// Asks another namespace too, from now on. `id` is the inode of the namespace, `addresses` are
    /// those that it had a moment ago.
    pub fn join(&mut self, id: u64, member: Self, addresses: HashSet<IpAddr>) {
        self.members.join(id, member.own, addresses);
    }

    /// Asks that namespace no more.
    pub fn leave(&mut self, id: u64) {
        self.members.leave(id);
    }

    /// The other namespaces that are asked.
    pub fn members(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.members.ids()
    }

    /// The addresses that they are known to have.
    pub fn addresses_of_members(&self) -> HashSet<IpAddr> {
        self.members.addresses().collect()
    }

    /// Takes these for the addresses of other namespaces, which others ask about.
    pub fn know_addresses(&mut self, addresses: HashSet<IpAddr>) {
        self.members.know(addresses);
    }

    /// The sockets of some of them, by their numbers.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn sockets_of_members(
        &mut self,
        states: States,
        part: Range<usize>,
    ) -> Result<Vec<Socket>> {
        self.members.sockets(states, part)
    }

    /// Whether one of the other namespaces is known to have this address.
    pub fn is_of_member(&self, addr: IpAddr) -> bool {
        self.members.have(addr)
    }

    /// Every TCP socket of both families that is in one of `states`, each once.
    ///
    /// The kernel filters by state. Equivalent: `ss -Htan state ...`.
    ///
    /// # Errors
    /// The kernel refused, or a message was lost or malformed.
    pub fn sockets(&mut self, states: States) -> Result<Vec<Socket>> {
        let own = self.own.dump(states)?;
        Ok(each_once(own, self.members.sockets(states, 0..usize::MAX)?))
    }

    /// Those of the own namespace alone, without connections of Multipath TCP that have no TCP socket.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn own_sockets(&mut self, states: States) -> Result<Vec<Socket>> {
        self.own.dump_tcp(states)
    }

    /// The same as of late: of other namespaces only some are listed at one call, in turn, and of the
    /// rest those sockets are looked up that were in such a state when it was their turn.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn sockets_lately(&mut self, states: States) -> Result<Vec<Socket>> {
        let own = self.own.dump(states)?;
        Ok(each_once(own, self.members.sockets_lately(states)?))
    }

    /// The listening TCP sockets.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn listeners(&mut self) -> Result<Vec<Socket>> {
        self.sockets(States::from_iter([State::Listen]))
    }

    /// What listens in the other namespaces, with the addresses that each is known to have.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn served_by_members(&mut self) -> Result<Vec<(Socket, Vec<IpAddr>)>> {
        self.members.served()
    }

    /// The same as of late: of other namespaces that have been there for a while only some are asked at
    /// one call, in turn.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn listeners_lately(&mut self) -> Result<Vec<Socket>> {
        let own = self.own.dump(States::from_iter([State::Listen]))?;
        Ok(each_once(own, self.members.listeners_lately()?))
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
        self.own.look_up(lookups, &mut found)?;
        self.members.ask(lookups, &mut found, Sockets::look_up)?;
        Ok(found)
    }

    /// Whether there is a listener or a connection of Multipath TCP, as of the last dump: such a
    /// connection can lose its TCP socket and stay with its application, without an event.
    pub fn uses_mptcp(&self) -> bool {
        self.own.uses_mptcp() || self.members.use_mptcp()
    }

    /// Ports of listeners of the own namespace that take what is for other hosts (TPROXY), as of the last
    /// dump. Kernels before 5.10 do not say.
    pub fn proxies(&self) -> &HashSet<u16> {
        self.own.proxies()
    }

    /// The open sockets of the own namespace that took what was for other hosts, or may say to be others.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn transparent(&mut self) -> Result<Vec<Socket>> {
        self.own.transparent()
    }

    /// Ports of the own namespace with a listener of Multipath TCP.
    pub fn mptcp_ports(&self) -> HashSet<u16> {
        self.own.mptcp_ports()
    }

    /// The connections of Multipath TCP in the own namespace that have no TCP socket.
    ///
    /// # Errors
    /// As [`SockDiag::sockets`].
    pub fn without_tcp(&mut self) -> Result<Vec<Socket>> {
        self.own.without_tcp()
    }

    /// Who has opened each of these connections, by what TCP has counted of its socket; `None` where
    /// that cannot be told, or the socket is gone.
    ///
    /// # Errors
    /// As [`SockDiag::lookup`].
    pub fn openers(&mut self, lookups: &[Lookup]) -> Result<Vec<Option<Opener>>> {
        let mut openers = vec![None; lookups.len()];
        self.own.openers(lookups, &mut openers)?;
        self.members.ask(lookups, &mut openers, Sockets::openers)?;
        Ok(openers)
    }

    /// Exactly these connections as [`SockDiag::lookup`], with what TCP knows of their silence.
    ///
    /// # Errors
    /// As [`SockDiag::lookup`].
    pub fn silences(&mut self, lookups: &[Lookup]) -> Result<Vec<Option<SocketSilence>>> {
        let mut silences = vec![None; lookups.len()];
        self.own.silences(lookups, &mut silences)?;
        self.members.ask(lookups, &mut silences, Sockets::silences)?;
        Ok(silences)
    }

    /// Closes exactly this socket (`ss -K`): the kernel compares the cookie, so another one that has
    /// taken its tuple meanwhile is left alone. False where it is gone already.
    ///
    /// Its process gets ECONNABORTED. The peer gets an RST, unless both sides have said FIN
    /// (`tcp_abort()`). Equivalent: `ss -K`.
    ///
    /// # Errors
    /// The kernel refused, or cannot: it was built without `CONFIG_INET_DIAG_DESTROY`.
    pub fn destroy(&mut self, socket: &Socket) -> Result<bool> {
        if self.own.destroy(socket)? {
            return Ok(true);
        }
        let mut closed = [None];
        self.members.ask(&[Lookup::from(socket)], &mut closed, |sockets, _, closed| {
            if sockets.destroy(socket)? {
                closed.fill(Some(()));
            }
            Ok(())
        })?;
        Ok(closed == [Some(())])
    }

    /// Proves that the kernel answers `tcp_diag` requests at all.
    ///
    /// # Errors
    /// Says which module is missing.
    pub fn probe(&mut self) -> Result<()> {
        self.listeners().map(drop)
    }
}

/// A socket that moves between hash chains during a dump can be reported twice.
fn each_once(mut all: Vec<Socket>, others: Vec<Socket>) -> Vec<Socket> {
    all.extend(others);
    all.sort_unstable_by_key(|socket| (socket.cookie, socket.local, socket.remote));
    all.dedup_by_key(|socket| (socket.cookie, socket.local, socket.remote));
    all
}
