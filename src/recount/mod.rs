//! Makes the limiter take a connection back that it has thrown out, and keeps it there.
//!
//! connlimit and `ct count` keep lists of tuples; a tuple gets onto a list only when a packet of
//! an entry that is not yet assured reaches the rule. So a repaired entry is first inserted
//! unassured, then a *nudge* passes the rules: a SYN of the connection's own tuple that TCP drops
//! in silence. A *seal* then shows conntrack one packet of the server, after which stale RSTs leave
//! an ESTABLISHED entry alone. docs/recount.md draws the paths.

mod budget;
mod ingress;
mod jiffy;
mod loopback;
mod pace;
mod packet;
mod probe;
mod recounter;
mod reply_filter;
mod through;
mod trace;
mod trial;

use std::fmt;
use std::net::IpAddr;
use std::time::Instant;

use crate::conntrack::Entry;
use crate::error::{Cause, Error, Op, Result};
use crate::flow::{Endpoint, FourTuple};

pub use ingress::tap;
pub use probe::{Asked, Question, Room};
pub use recounter::Recounter;
pub use through::Through;
pub use trace::{Step, Trace};

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

/// How an entry is made one that the limiter takes at the nudge. Which of them does it depends on
/// the kernel and is found by trial (docs/limiter.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recipe {
    /// Delete and insert in one send, not assured; nudge; assure. The connection is without an
    /// entry for some microseconds.
    Replace,
    /// Delete; nudge, which finds no entry; insert. Every kernel counts that, but a packet of the
    /// connection that comes in between is seen as one without an entry.
    Fresh,
}

impl Recipe {
    /// The gentler one first.
    pub const ALL: [Self; 2] = [Self::Replace, Self::Fresh];

    /// The recipe's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Replace => "replace",
            Self::Fresh => "fresh",
        }
    }
}

/// What a trial showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The route.
    pub route: Route,
    /// The recipe.
    pub recipe: Recipe,
    /// Whether a limit of our own counted it.
    pub verdict: Verdict,
}

/// Whether a limit counted the connection of a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It did.
    Counted,
    /// The nudge arrived and was not counted.
    NotCounted,
    /// The nudge did not arrive: the host's own rules may have dropped it.
    Unseen,
}

/// A way to be counted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// How the nudge travels.
    pub route: Route,
    /// How its entry is changed.
    pub recipe: Recipe,
}

/// Where a program may hold nudges up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeldUp {
    /// Nowhere.
    #[default]
    Nowhere,
    /// Before conntrack: they meet the entry as it is then.
    BeforeConntrack,
    /// Behind it: they bring the entry that they met, or one of their own.
    BehindConntrack,
}

/// Which packets of a peer conntrack takes for ACKs, so that they cannot fool it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hidden {
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

    /// How the connection of `entry` can be counted again; asked before its entry is touched.
    ///
    /// # Errors
    /// No way reaches the rules for this connection, or the kernel counts by none; the last one's
    /// reason.
    fn way(&mut self, entry: &Entry, now: Instant) -> Result<Way>;

    /// Whether a limit that is shown two connections of one source within a jiffy may put one that it has
    /// on its list already there twice.
    fn doubles(&self) -> bool {
        false
    }

    /// Sends one nudge by `route` for the connection of `entry`, which a look-up has just shown to
    /// be alive.
    ///
    /// # Errors
    /// The route is broken.
    fn nudge(&mut self, entry: &Entry, route: Route, now: Instant) -> Result<()>;

    /// Rules hand packets to programs (NFQUEUE), or do not: a nudge may get to the limits later.
    fn expect_queues(&mut self, held_up: HeldUp) {
        let _ = held_up;
    }

    /// Whether nudges must be seen to have passed before their entries are made ordinary ones.
    fn is_held_up_before_conntrack(&self) -> bool {
        false
    }

    /// Sends one nudge by ingress, and sees whether it gets behind all rules.
    ///
    /// # Errors
    /// The route is broken, or nothing can be seen.
    fn show(&mut self, entry: &Entry, now: Instant) -> Result<Asked> {
        self.nudge(entry, Route::Ingress, now).map(|()| Asked::LetIn)
    }

    /// Waits until limits look at the whole of their lists again: for the next jiffy.
    fn await_sweep(&mut self) {}

    /// Whether entries can be sealed.
    fn can_seal(&self) -> bool;

    /// Shows conntrack one ACK of the server, so that stale RSTs leave the entry alone.
    ///
    /// # Errors
    /// There is no filter that keeps it on this host, or the send failed.
    fn seal(&mut self, entry: &Entry, now: Instant) -> Result<()>;

    /// Hides from conntrack what could fool it again, of these tuples seen from the peer: it takes
    /// these packets for ACKs, and TCP gets them as they came.
    ///
    /// # Errors
    /// The sets are full, or the kernel refuses.
    fn hide(&mut self, wanted: &[(FourTuple, Hidden)], now: Instant) -> Result<()>;

    /// Hides no more than what is held, by its tuples of both directions, and takes away what
    /// nothing needs any longer.
    ///
    /// # Errors
    /// The kernel refuses; what could not be taken out is tried again at the next call.
    fn narrow_hidden(&mut self, held: impl Iterator<Item = FourTuple>, now: Instant) -> Result<()>;

    /// Takes notice of the mark of a connection, by which routing may choose the way of its answers.
    fn know_mark(&mut self, entry: &Entry) {
        let _ = entry;
    }

    /// Takes notice of the device that the socket of this client's connection is bound to: that of a link-local
    /// client always is, and no route tells which of several devices its address belongs to.
    fn know_device(&mut self, client: IpAddr, server: IpAddr, device: u32) {
        let _ = (client, server, device);
    }

    /// The name and number of the device that packets of this client come in by, where that is known.
    ///
    /// # Errors
    /// A broken conversation.
    fn interface(&mut self, client: IpAddr, server: IpAddr) -> Result<Option<(String, u32)>> {
        let _ = (client, server);
        Ok(None)
    }

    /// Asks whether one more connection would be let in, by a probe.
    ///
    /// # Errors
    /// It cannot be asked, or a conversation broke.
    fn ask(&mut self, question: Question, now: Instant) -> Result<Asked> {
        let _ = now;
        Err(unasked(question))
    }

    /// Asks how many more would be let in, at most `most`.
    ///
    /// # Errors
    /// It cannot be asked, or a conversation broke.
    fn room(&mut self, question: Question, most: u32, now: Instant) -> Result<Room> {
        let _ = (most, now);
        Err(unasked(question))
    }

    /// Forgets what the kernel can be asked for again: how addresses are reached.
    fn refresh(&mut self, now: Instant);
}

fn unasked(question: Question) -> Error {
    let op =
        Op::on("ask the limit", FourTuple::new(Endpoint::new(question.client, 0), question.server));
    op.failed(Cause::Unavailable("nothing here asks".to_owned()))
}
