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
mod recounter;
mod reply_filter;

use std::fmt;
use std::time::Instant;

use crate::conntrack::Entry;
use crate::error::Result;
use crate::flow::FourTuple;

pub use recounter::Recounter;

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

/// What makes limits count a connection again. [`Recounter`] does it with packets; a model of a
/// limiter can take its place where there is no kernel.
pub trait Recount {
    /// Whether the connection of `entry` may be nudged now; counts as one nudge.
    fn admit(&mut self, entry: &Entry, now: Instant) -> bool;

    /// Sends one nudge for the connection of `entry`, which a look-up has just shown to be alive.
    ///
    /// # Errors
    /// No route reaches the rules for this connection; the last one's reason.
    fn nudge(&mut self, entry: &Entry, now: Instant) -> Result<Route>;

    /// Whether entries can be sealed.
    fn can_seal(&self) -> bool;

    /// Shows conntrack one ACK of the server, so that stale RSTs leave the entry alone.
    ///
    /// # Errors
    /// There is no filter that keeps it on this host, or the send failed.
    fn seal(&mut self, entry: &Entry, now: Instant) -> Result<()>;

    /// Keeps conntrack from seeing what could fool it again, of these tuples seen from the peer.
    ///
    /// # Errors
    /// The sets are full, or the kernel refuses.
    fn notrack(&mut self, wanted: &[(FourTuple, Notrack)], now: Instant) -> Result<()>;

    /// Keeps in the notrack sets only what is held, by its original tuples, and takes away what
    /// nothing needs any longer.
    ///
    /// # Errors
    /// The kernel refuses; what could not be taken out is tried again at the next call.
    fn narrow_notrack(&mut self, held: impl Iterator<Item = FourTuple>, now: Instant)
    -> Result<()>;

    /// Forgets what the kernel can be asked for again: how addresses are reached.
    fn refresh(&mut self, now: Instant);
}
