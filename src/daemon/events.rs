//! Where a worker learns at once that a connection needs a look.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::SystemTime;

use super::{EventSource, Settings};
use crate::conntrack::{Entry, Event, EventKind, Listener, TcpState};
use crate::error::Result;
use crate::flow::FourTuple;
use crate::nflog::{self, Watch};
use crate::nftables::Hook;

/// Datagrams read before what they tell is repaired.
const DRAIN: usize = 4096;

/// The event source in force.
#[derive(Debug)]
pub(super) enum Events {
    /// Packets that our own nft table logs.
    Nflog(Box<Watch>),
    /// Conntrack's own events; those that the socket with this port causes are ours.
    Ctnetlink(Listener),
    /// The sweep alone.
    Off,
}

/// A connection that needs a look.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspect {
    /// Seen from the server.
    pub flow: FourTuple,
    /// What conntrack said of it last, where that is all that is left.
    pub destroyed: Option<Entry>,
    /// When the kernel saw what happened, where it tells.
    pub at: Option<SystemTime>,
}

/// What came, and what was lost on the way.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Drained {
    /// Packets that our table logged.
    pub logged: u64,
    /// Conntrack's events of entries that changed.
    pub updates: u64,
    /// Conntrack's events of entries that ended.
    pub destroys: u64,
    /// The kernel dropped some.
    pub overrun: bool,
    /// Some could not be read.
    pub malformed: u32,
    /// The source cannot tell of all, for now.
    pub full: bool,
}

impl Events {
    /// Opens the source that is wanted; `auto` takes the cheapest that works, and says which.
    pub(super) fn open(
        settings: &Settings,
        name: &str,
        hook: Hook,
        ports: &HashSet<u16>,
    ) -> Result<Self> {
        let group = settings.nflog_group;
        // The next sweep takes note of connections that stay half-closed.
        let memory = settings.sweep_interval;
        let nflog = || Watch::open(name, group, hook, ports, nflog::CLOSING, memory);
        let events = match settings.events {
            EventSource::Off => Self::Off,
            EventSource::Ctnetlink => Self::Ctnetlink(Listener::open()?),
            EventSource::Nflog => Self::Nflog(Box::new(nflog()?)),
            EventSource::Auto => match nflog() {
                Ok(watch) => Self::Nflog(Box::new(watch)),
                Err(error) => {
                    tracing::warn!(%error, "no packet log, taking conntrack events instead");
                    Self::Ctnetlink(Listener::open()?)
                }
            },
        };
        let (source, receive_buffer) = events.receive_buffer();
        tracing::info!(source, receive_buffer, "listening");
        Ok(events)
    }

    /// The name of the source, and its receive buffer in bytes, as granted.
    pub(super) fn receive_buffer(&self) -> (&'static str, usize) {
        match self {
            Self::Nflog(watch) => ("nflog", watch.receive_buffer()),
            Self::Ctnetlink(listener) => ("ctnetlink", listener.receive_buffer()),
            Self::Off => ("off", 0),
        }
    }

    /// What to poll.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Nflog(watch) => Some(watch.as_fd()),
            Self::Ctnetlink(listener) => Some(listener.as_fd()),
            Self::Off => None,
        }
    }

    /// Hands what is queued to `take`; events caused by requests of netlink port `own` are left out.
    pub(super) fn drain(&mut self, own: u32, mut take: impl FnMut(Suspect)) -> Result<Drained> {
        let mut all = Drained::default();
        match self {
            Self::Off => {}
            Self::Nflog(watch) => {
                let drained = watch.drain(DRAIN, |flow, at| {
                    all.logged += 1;
                    take(Suspect { flow, destroyed: None, at });
                })?;
                (all.overrun, all.malformed) = (drained.overrun, drained.malformed);
                all.full = drained.full;
            }
            Self::Ctnetlink(listener) => {
                let drained = listener.drain(DRAIN, |event| {
                    match event.kind {
                        EventKind::Update => all.updates += 1,
                        EventKind::Destroy => all.destroys += 1,
                    }
                    if event.port != own && is_suspicious(&event) {
                        let gone = event.kind == EventKind::Destroy;
                        // Reversed, the server's side is in the other tuple.
                        for flow in [event.entry.reply, event.entry.orig] {
                            take(Suspect {
                                flow,
                                destroyed: gone.then_some(event.entry),
                                at: None,
                            });
                        }
                    }
                })?;
                (all.overrun, all.malformed) = (drained.overrun, drained.malformed);
            }
        }
        Ok(all)
    }

    /// Watches these ports, and these half-closed connections for as long as they are.
    pub(super) fn follow(
        &mut self,
        ports: &HashSet<u16>,
        half_closed: HashSet<FourTuple>,
    ) -> Result<()> {
        match self {
            Self::Nflog(watch) => {
                watch.set_ports(ports)?;
                watch.set_held(half_closed)
            }
            Self::Ctnetlink(_) | Self::Off => Ok(()),
        }
    }
}

/// Whether an event can mean that conntrack has been fooled.
fn is_suspicious(event: &Event) -> bool {
    event.kind == EventKind::Destroy || event.entry.state().is_some_and(TcpState::is_closing)
}
