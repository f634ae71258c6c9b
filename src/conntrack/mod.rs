//! The kernel's connection tracking table by ctnetlink: entries, changes, events.

pub mod decode;
mod entry;
mod request;
pub mod uapi;

use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use crate::error::{Cause, Error, Op, Result};
use crate::flow::FourTuple;
use crate::netlink::{Conversation, KernelSocket, Transport};

pub use entry::{Entry, EntryKey, HelperName, SeqAdj, Status, SynProxy, Tcp, TcpState, Zone};
pub use request::{Change, Filter, Insert};
pub use uapi::CLOSING_LABEL;

/// Reads and changes the conntrack table of one network namespace.
#[derive(Debug)]
pub struct Conntrack<T = KernelSocket> {
    conversation: Conversation<T>,
}

/// Size of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSize {
    /// Entries of this namespace.
    pub entries: u32,
    /// `nf_conntrack_max`, where the kernel reports it (since 5.17).
    pub maximum: Option<u32>,
}

/// The kernel's counters of a table, since the namespace was made. Equivalent: `conntrack -S`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counters {
    /// Packets that could not be tracked.
    pub invalid: u64,
    /// Entries refused because of a clash or a table that was too full.
    pub insert_failed: u64,
    /// Packets dropped because no entry could be made.
    pub drop: u64,
    /// Unassured entries evicted from a full table.
    pub early_drop: u64,
    /// Entries refused because their hash chain was too long (since 5.15).
    pub chain_toolong: u64,
}

impl Conntrack<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread and asks for the table's
    /// size, so that a missing privilege or module is found here.
    ///
    /// # Errors
    /// `CAP_NET_ADMIN` is missing, or the kernel has no ctnetlink.
    pub fn open() -> Result<Self> {
        let op = Op::new("open conntrack netlink");
        let socket =
            KernelSocket::open(op, NETLINK_NETFILTER).map_err(|error| match error.errno() {
                Some(Errno::EPROTONOSUPPORT) => module_missing(op, "nfnetlink"),
                _ => error,
            })?;
        let mut this = Self::new(socket);
        this.size()?;
        Ok(this)
    }

    /// Netlink port of this socket: events that its requests cause carry it.
    pub fn port(&self) -> u32 {
        self.conversation.transport().port()
    }
}

impl<T: Transport> Conntrack<T> {
    /// A conversation over any transport.
    pub fn new(transport: T) -> Self {
        Self { conversation: Conversation::new(transport) }
    }

    /// Has `alive` called at each datagram of an answer: a dump of millions takes its time.
    pub fn on_answer(&mut self, alive: impl Fn() + Send + 'static) {
        self.conversation.on_answer(alive);
    }

    /// Size of the table.
    ///
    /// # Errors
    /// As [`Conntrack::open`].
    pub fn size(&mut self) -> Result<TableSize> {
        let request = request::stats();
        let mut size = None;
        self.conversation
            .query(&request, |frame| {
                let (entries, maximum) =
                    decode::stats(frame.payload).map_err(|e| request.op.malformed(e))?;
                size = Some(TableSize { entries, maximum });
                Ok(())
            })
            .map_err(explain)?;
        size.ok_or_else(|| request.op.malformed("acknowledged without a count"))
    }

    /// The table's counters, summed over all CPUs.
    ///
    /// # Errors
    /// The kernel refused, or a message was lost or malformed.
    pub fn counters(&mut self) -> Result<Counters> {
        let request = request::counters();
        self.conversation.dump(&request, |sum, frame| {
            decode::counters(frame.payload, sum).map_err(|error| request.op.malformed(error))
        })
    }

    /// Streams the TCP entries of a family (`AF_INET`, `AF_INET6`) that pass `filter` into a
    /// fresh `A`; equivalent to `conntrack -L -f FAMILY -p tcp`.
    ///
    /// `take` must test again what it wants: kernels before 5.8 do not filter.
    ///
    /// # Errors
    /// The kernel refused, or a message was lost or malformed.
    pub fn entries<A: Default>(
        &mut self,
        family: u8,
        filter: Filter,
        mut take: impl FnMut(&mut A, &Entry),
    ) -> Result<A> {
        let request = request::dump(family, filter);
        self.conversation
            .dump(&request, |all, frame| {
                match &decode::entry(frame.payload) {
                    Ok(Some(entry)) => take(all, entry),
                    Ok(None) => {}
                    Err(error) => return Err(request.op.malformed(error)),
                }
                Ok(())
            })
            .map_err(explain)
    }

    /// The entries that have these tuples, in either direction, in the order asked; `None` where
    /// there is none. Equivalent to `conntrack -G`.
    ///
    /// # Errors
    /// A broken conversation or a refusal. An unanswered question is never `None`.
    pub fn get(&mut self, keys: &[(FourTuple, Zone)]) -> Result<Vec<Option<Entry>>> {
        let requests: Vec<_> = keys.iter().map(|(flow, zone)| request::get(*flow, *zone)).collect();
        self.conversation.find(&requests, "an entry", |index, op, frame| {
            let entry = decode::entry(frame.payload).map_err(|error| op.malformed(error))?;
            Ok(entry.filter(|entry| {
                keys.get(index).is_some_and(|(flow, _)| entry.orig == *flow || entry.reply == *flow)
            }))
        })
    }

    /// Makes changes, many in one send, and returns one result for each, in order.
    ///
    /// # Errors
    /// The outer error is a broken conversation: look at the table again.
    pub fn change(&mut self, changes: &[Change]) -> Result<Vec<Result<()>>> {
        let mut requests = Vec::with_capacity(changes.len());
        for change in changes {
            change.write(&mut requests);
        }
        let mut outcomes = self.conversation.batch(&requests, |_, _| Ok(()))?.into_iter();
        let mut results = Vec::with_capacity(changes.len());
        for change in changes {
            if matches!(change, Change::Replace { .. }) {
                // A delete that found nothing is fine, and any other failure shows in the insert.
                outcomes.next();
            }
            results.push(outcomes.next().unwrap_or(Ok(())));
        }
        Ok(results)
    }

    /// Makes one change.
    ///
    /// # Errors
    /// As [`Conntrack::change`].
    pub fn change_one(&mut self, change: Change) -> Result<Result<()>> {
        Ok(self.change(&[change])?.into_iter().next().unwrap_or(Ok(())))
    }
}

/// Turns the kernel's bare refusals into what to do about them.
fn explain(error: Error) -> Error {
    match error.errno() {
        // The answer of nfnetlink where the subsystem is not registered.
        Some(Errno::EINVAL) if error.op.verb == "conntrack stats" => {
            module_missing(error.op, "nf_conntrack_netlink")
        }
        _ => error,
    }
}

fn module_missing(op: Op, module: &str) -> Error {
    op.failed(Cause::Unavailable(format!("the kernel lacks {module}; load it: modprobe {module}")))
}
