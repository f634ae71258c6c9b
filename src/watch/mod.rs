//! Where a worker learns at once that a connection needs a look.

pub mod ctnetlink;
mod headers;
pub mod nflog;
mod nflog_table;
pub mod rules;
pub mod syns;
mod tracking;

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant, SystemTime};

use self::ctnetlink::{Event, EventKind, Listener};
use self::nflog::Watch;
use crate::conntrack::{Entry, TcpState};
use crate::error::Result;
use crate::flow::Connection;
use crate::netlink;

/// Datagrams read before what they tell is repaired.
const DRAIN: usize = 4096;

/// Where the fast path learns that an entry has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EventSource {
    /// The cheapest source that works.
    #[default]
    Auto,
    /// FINs and RSTs of half-closed connections, logged by an nftables table of our own.
    Nflog,
    /// Conntrack's own events.
    Ctnetlink,
    /// None: the sweep alone.
    Off,
}

/// What an event source is opened with.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The source.
    pub source: EventSource,
    /// Name of the nftables table.
    pub name: &'a str,
    /// NFLOG group.
    pub group: u16,
    /// The local ports of the scope.
    pub ports: &'a HashSet<u16>,
    /// Which FINs are remembered.
    pub memory: Memory,
}

/// The FINs that are remembered beside those of entries that have labels: of connections that were there
/// before the watch, and where the kernel has no labels, of all.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// So many of each family.
    pub most: u32,
    /// For so long: until a deep sweep has found those that TCP has not taken.
    pub time: Duration,
}

/// The event source in force.
#[derive(Debug)]
pub enum Events {
    /// Packets that our own nft table logs.
    Nflog(Box<Watch>),
    /// Conntrack's own events, and, where it can be had, the packet log beside them: no event
    /// reports a packet that conntrack has acted upon and that is dropped behind it.
    Ctnetlink(Listener, Option<Box<Watch>>),
    /// The sweep alone.
    Off,
}

/// A connection that needs a look.
#[derive(Clone, Copy, Debug)]
pub struct Suspect {
    /// The server's.
    pub connection: Connection,
    /// The device that its packet came in by, 0 where that is not known. A socket can be bound to
    /// it, and that of a link-local peer is.
    pub interface: u32,
    /// As its packet was on the wire: its socket has other addresses or ports.
    pub is_translated: bool,
    /// Its packet came in and says to be the server's own: no honest one does.
    pub is_spoofed: bool,
    /// Its packet is an RST of the server that answers an ACK.
    pub is_answered: bool,
    /// Its packet has waited for others, and most of these are of connections that have ended.
    pub has_waited: bool,
    /// What conntrack said of it last, where that is all that is left.
    pub destroyed: Option<Entry>,
    /// When the kernel saw what happened, where it says so.
    pub at: Option<SystemTime>,
}

/// What came, and what was lost on the way.
#[derive(Clone, Debug, Default)]
pub struct Drained {
    /// Packets that our table logged.
    pub logged: u64,
    /// Conntrack's events of entries that changed.
    pub updates: u64,
    /// Conntrack's events of entries that ended.
    pub destroys: u64,
    /// The kernel dropped some.
    pub overrun: bool,
    /// Messages of the kernel that could not be read.
    pub malformed: u32,
    /// Packets without a TCP header in what was logged of them. Any client can send one, so they are
    /// no reason to look at anything.
    pub unreadable: u64,
    /// The source cannot report all, for now.
    pub full: bool,
    /// Connections that have begun to close, of those that are told.
    pub closing: Vec<Suspect>,
    /// Sources of half-closed connections, and peers of ports whose SYNs are wanted, that open another.
    pub opening: Vec<IpAddr>,
}

impl Suspect {
    /// The same connection, seen again: a later event knows better what has become of its entry,
    /// and not by which device its packets come in, nor when the first of them did.
    pub fn and_then(self, later: Self) -> Self {
        let interface = if later.interface == 0 { self.interface } else { later.interface };
        let is_spoofed = self.is_spoofed || later.is_spoofed;
        let is_answered = self.is_answered || later.is_answered;
        let has_waited = self.has_waited && later.has_waited;
        Self { interface, is_spoofed, is_answered, has_waited, at: self.at, ..later }
    }
}

impl Drained {
    /// What netlink has lost besides.
    fn add(&mut self, lost: netlink::Drained) {
        self.overrun |= lost.overrun;
        self.malformed += lost.malformed;
    }
}

impl Events {
    /// Opens the source that is wanted; `auto` takes the cheapest that works, and says which.
    ///
    /// # Errors
    /// The source that was named cannot be had.
    pub fn open(wanted: Wanted<'_>) -> Result<Self> {
        let Wanted { source, name, group, ports, memory } = wanted;
        let nflog = || Watch::open(name, group, ports, memory);
        let alone = |error| {
            let what = "no packet log, conntrack events alone: what is dropped behind conntrack is \
                        left to the deep sweeps";
            tracing::warn!(%error, "{what}");
            Ok(Self::Ctnetlink(Listener::open()?, None))
        };
        let events = match source {
            EventSource::Off => Self::Off,
            EventSource::Ctnetlink => match nflog() {
                Ok(watch) => Self::Ctnetlink(Listener::open()?, Some(Box::new(watch))),
                Err(error) => alone(error)?,
            },
            EventSource::Nflog => Self::Nflog(Box::new(nflog()?)),
            EventSource::Auto => match nflog() {
                Ok(watch) => Self::Nflog(Box::new(watch)),
                Err(error) => alone(error)?,
            },
        };
        let (source, receive_buffer) = events.receive_buffer();
        tracing::info!(source, receive_buffer, "listening");
        Ok(events)
    }

    /// The name of the source, and its receive buffer in bytes, as granted.
    pub fn receive_buffer(&self) -> (&'static str, usize) {
        match self {
            Self::Nflog(watch) => ("nflog", watch.receive_buffer()),
            Self::Ctnetlink(listener, _) => ("ctnetlink", listener.receive_buffer()),
            Self::Off => ("off", 0),
        }
    }

    /// For how long a half-closed connection that is in order can be relied upon to be so, or to be
    /// named: packets that lower the timeout of an entry cause no event of conntrack, and what is
    /// lowered is as short as `nf_conntrack_tcp_timeout_close` (10 s).
    pub fn longest_unseen(&self) -> Duration {
        match self {
            Self::Nflog(_) | Self::Ctnetlink(_, Some(_)) => Duration::MAX,
            Self::Ctnetlink(_, None) => Duration::from_secs(5),
            Self::Off => Duration::ZERO,
        }
    }

    /// What to poll.
    pub fn fds(&self) -> [Option<BorrowedFd<'_>>; 2] {
        match self {
            Self::Nflog(watch) => [Some(watch.as_fd()), None],
            Self::Ctnetlink(listener, watch) => {
                [Some(listener.as_fd()), watch.as_ref().map(|watch| watch.as_fd())]
            }
            Self::Off => [None; 2],
        }
    }

    /// Hands what is queued to `take`; events caused by requests of netlink port `own` are left out.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn drain(&mut self, own: u32, mut take: impl FnMut(Suspect)) -> Result<Drained> {
        match self {
            Self::Off => Ok(Drained::default()),
            Self::Nflog(watch) => watch.drain(DRAIN, take),
            Self::Ctnetlink(listener, watch) => {
                let mut drained = match watch {
                    Some(watch) => watch.drain(DRAIN, &mut take)?,
                    None => Drained::default(),
                };
                let lost = listener.drain(DRAIN, |event| {
                    let is_gone = event.kind == EventKind::Destroy;
                    *(if is_gone { &mut drained.destroys } else { &mut drained.updates }) += 1;
                    if event.port == own || !is_suspicious(&event) {
                        return;
                    }
                    // Reversed, the server's side is in the other tuple.
                    for flow in [event.entry.reply, event.entry.orig] {
                        let destroyed = is_gone.then_some(event.entry);
                        take(Suspect {
                            connection: Connection::of_sender(flow),
                            interface: 0,
                            is_translated: false,
                            is_spoofed: false,
                            is_answered: false,
                            has_waited: false,
                            destroyed,
                            at: None,
                        });
                    }
                })?;
                drained.add(lost);
                Ok(drained)
            }
        }
    }

    /// Reports some SYNs to these ports, where packets are logged.
    ///
    /// # Errors
    /// The table is gone.
    pub fn follow_opened(&mut self, ports: &HashSet<u16>) -> Result<()> {
        match self {
            Self::Nflog(watch) | Self::Ctnetlink(_, Some(watch)) => watch.set_opened(ports),
            Self::Ctnetlink(_, None) | Self::Off => Ok(()),
        }
    }

    /// Watches these ports, and these half-closed connections for as long as they are; `None` is as
    /// before.
    ///
    /// # Errors
    /// The table is gone, or a set is full.
    pub fn follow(
        &mut self,
        ports: &HashSet<u16>,
        half_closed: Option<HashSet<Connection>>,
    ) -> Result<()> {
        match self {
            Self::Nflog(watch) | Self::Ctnetlink(_, Some(watch)) => {
                watch.set_ports(ports)?;
                half_closed.map_or(Ok(()), |flows| watch.set_held(flows))
            }
            Self::Ctnetlink(_, None) | Self::Off => Ok(()),
        }
    }
}

/// Whether an event can mean that conntrack has been fooled.
fn is_suspicious(event: &Event) -> bool {
    event.kind == EventKind::Destroy || event.entry.state().is_some_and(TcpState::is_closing)
}

/// No event waits longer to be read.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// The time of day as the workers' clock has it; now, where it lies in the future or so long ago
/// that the time of day has been set since.
pub fn instant_of(time: SystemTime) -> Instant {
    exact_instant_of(time).unwrap_or_else(Instant::now)
}

/// The same; `None` instead of now.
pub fn exact_instant_of(time: SystemTime) -> Option<Instant> {
    let age = time_of_day().duration_since(time).ok().filter(|age| *age < LONGEST_WAIT);
    age.and_then(|age| Instant::now().checked_sub(age))
}

#[allow(clippy::disallowed_methods, reason = "the kernel stamps packets with the time of day")]
fn time_of_day() -> SystemTime {
    SystemTime::now()
}
