//! Closes sockets that the administrator names, each after an exact look at it (`SOCK_DESTROY`).
//!
//! [`choose`] is the decision; here are the looks at the kernel before it and after.

pub mod choose;

use std::collections::HashMap;

use self::choose::{Age, Candidate, Choice, Which};
use crate::audit::loads::{Load, overloads};
use crate::audit::look::Seen;
use crate::audit::processes::{Owner, Owners};
use crate::containers;
use crate::error::{Error, Result};
use crate::host::instance;
use crate::reconcile::policy::Policy;
use crate::sockdiag::{Lookup, SockDiag, Socket, State};

/// What became of a socket.
#[derive(Debug)]
pub enum Fate {
    /// The kernel has closed it.
    Closed,
    /// It was gone already.
    Gone,
    /// It is not any more as it was asked for, and was left alone.
    Changed(State),
    /// The kernel did not close it.
    Refused(Error),
}

/// The sockets of the namespace that the calling thread is in, and of the containers behind it.
#[derive(Debug)]
pub struct Killer {
    sockets: SockDiag,
    which: Which,
    /// Seconds that a daemon knows sockets to be half-closed, by cookie.
    half_closed: HashMap<u64, u64>,
}

/// Sockets, who holds them, and what of them is too much for a limit.
type Known = (Vec<Socket>, Owners, Vec<(Load, Vec<Socket>)>);

/// The sockets to be closed.
#[derive(Debug)]
pub struct Found {
    /// The sockets.
    pub choice: Choice,
    /// Sockets in scope whose process cannot be seen, though it was asked for.
    pub unseen: usize,
    /// Namespaces that could not be looked into.
    pub unread: usize,
}

impl Killer {
    /// Opens the conversation, and asks a running daemon for ages.
    ///
    /// # Errors
    /// The kernel has no `sock_diag`.
    pub fn open(which: Which) -> Result<Self> {
        let half_closed = instance::ask("ctkeep").half_closed;
        Ok(Self { sockets: SockDiag::open()?, which, half_closed })
    }

    /// Finds what is meant, among the connections in the policy's scope.
    ///
    /// # Errors
    /// A missing privilege or module; a lost or malformed answer.
    pub fn find(&mut self, policy: &Policy) -> Result<Found> {
        let unread = containers::join(&mut self.sockets)?;
        let (sockets, owners, overloads) =
            if self.which.over_limit { self.over_limit(policy)? } else { self.in_scope(policy)? };
        let asks_for_owner = self.which.process.is_some() || self.which.container.is_some();
        let is_unseen = |socket: &&Socket| asks_for_owner && owners.of(socket) == Owner::Unseen;
        let unseen = sockets.iter().filter(is_unseen).count();
        let lookups: Vec<_> = sockets.iter().map(Lookup::from).collect();
        let silences = self.sockets.silences(&lookups)?;
        let known = sockets.into_iter().zip(silences).filter_map(|(socket, found)| {
            // Now, and still the same.
            let (now, silence) = found.filter(|(now, _)| now.cookie == socket.cookie)?;
            let age = Age::of(&now, silence, &self.half_closed);
            Some(Candidate { socket: now, age, holder: owners.holder(&now).cloned() })
        });
        let choice = self.which.choose(known.collect(), &overloads);
        Ok(Found { choice, unseen, unread })
    }

    fn in_scope(&mut self, policy: &Policy) -> Result<Known> {
        let listeners = self.sockets.listeners()?;
        let scope = policy.scope(&listeners);
        let mut sockets = self.sockets.sockets(self.which.states)?;
        sockets.retain(|socket| scope.contains(policy, socket.connection()));
        let owners = Owners::look(sockets.iter().copied(), &listeners);
        Ok((sockets, owners, Vec::new()))
    }

    /// By the one look that shows what limits count.
    fn over_limit(&self, policy: &Policy) -> Result<Known> {
        let (seen, _) = Seen::look("", policy)?;
        // Nothing is closed for what others of its port show.
        let mut plays = seen.plays_as_seen();
        let overloads = overloads(seen.snapshot.views.iter(), &mut plays);
        let sockets = seen.snapshot.views.iter().filter_map(|view| view.socket);
        let sockets = sockets.filter(|socket| self.which.states.contains(socket.state)).collect();
        Ok((sockets, seen.owners, overloads))
    }

    /// Closes one of them, if it is still there and still as it was asked for.
    ///
    /// # Errors
    /// A privilege or kernel feature is missing, a broken conversation. The refusal of one socket is
    /// its fate.
    pub fn close(&mut self, socket: &Socket) -> Result<Fate> {
        let found = self.sockets.silences(&[Lookup::from(socket)])?.pop().flatten();
        let Some((now, silence)) = found.filter(|(now, _)| now.cookie == socket.cookie) else {
            return Ok(Fate::Gone);
        };
        if !self.which.is_still_meant(now.state, Age::of(&now, silence, &self.half_closed)) {
            return Ok(Fate::Changed(now.state));
        }
        match self.sockets.destroy(&now) {
            Ok(true) => Ok(Fate::Closed),
            Ok(false) => Ok(Fate::Gone),
            Err(error) if error.is_unavailable() => Err(error),
            Err(error) => Ok(Fate::Refused(error)),
        }
    }
}

/// Whether the peer of a socket that is closed so gets an RST, or nothing (`tcp_need_reset()`). A
/// handshake that no process has accepted is dropped in silence.
pub fn peer_gets_reset(socket: &Socket) -> bool {
    match socket.state {
        State::Established | State::CloseWait | State::FinWait1 | State::FinWait2 => true,
        State::SynRecv => socket.inode != 0,
        _ => false,
    }
}
