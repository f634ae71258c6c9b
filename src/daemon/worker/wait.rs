//! What a worker waits for.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use super::Worker;
use crate::daemon::control::Lead;
use crate::daemon::rules::Rules;
use crate::daemon::threads::wait_for;
use crate::error::Result;

/// A worker has a turn at least so often, for its signs of life.
const TURN: Duration = Duration::from_secs(1);

/// What there is to read.
#[derive(Clone, Copy, Debug)]
pub(in crate::daemon) struct Ready {
    pub(super) events: bool,
    pub(super) devices: bool,
    pub(super) question: bool,
    pub(super) rules: bool,
    pub(super) members: bool,
    pub(super) ends: bool,
}

impl Worker<'_> {
    /// Sleeps until there is something to do.
    pub(in crate::daemon) fn wait(&self, lead: &Lead) -> Result<Ready> {
        let now = Instant::now();
        let due = self.keeper.next_timeout().into_iter();
        let due = due.chain(self.rules.as_ref().and_then(Rules::next_timeout));
        let due = due.chain(self.overloads.next_timeout());
        let due = due.chain(self.outgoing.next_timeout());
        let due = due.chain(self.ends.next_timeout(now)).min();
        let due = due.map(|due| due.saturating_duration_since(now));
        // Signs of life and the namespaces want a turn now and then.
        let time = due.unwrap_or(TURN).min(TURN);
        let [events, packets] = self.desk.events.fds();
        let sources = [
            Some(lead.as_fd()),
            events,
            packets,
            self.desk.shield.as_ref().map(AsFd::as_fd),
            self.claim.as_ref().map(AsFd::as_fd),
            self.rules.as_ref().map(AsFd::as_fd),
            self.members.map(|members| members.wake.as_fd()),
            self.ends.fd(now),
            Some(self.reader.wake.as_fd()),
        ];
        let mut fds: Vec<_> = sources
            .iter()
            .flatten()
            .map(|source| PollFd::new(*source, PollFlags::POLLIN))
            .collect();
        wait_for(&mut fds, time)?;
        let mut answers = fds.iter().map(|fd| fd.any() != Some(false));
        let [_, events, packets, devices, question, rules, members, ends, _] =
            sources.map(|source| source.is_some() && answers.next() == Some(true));
        Ok(Ready { events: events || packets, devices, question, rules, members, ends })
    }
}
