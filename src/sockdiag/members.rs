//! Other namespaces whose sockets are asked about: many, and most of them idle.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::ops::Range;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::namespace::Sockets;
use super::{Lookup, Socket, State, States};
use crate::error::Result;
use crate::netlink::Transport;

/// Namespaces that are listed at one look, at most. A dump of one walks the sockets of the whole machine: 0.25 ms
/// at 262 144 buckets (Linux 6.18). Listeners have a table of their own, of 20 us and the way there and back.
const LISTED: usize = 32;
/// And no further ones when these have taken so much of a processor: a hundredth of a core at a look a second.
/// Where other programs have the caches, a dump takes up to 4 ms.
const SPENT: Duration = Duration::from_millis(10);
/// So many in any case,
const LEAST: usize = 4;
/// and as many as have each of them listed once in so many looks: what half-closes there is to be known before the
/// kernel forgets it, 60 s later.
const ROUND: usize = 30;

/// So many looks a namespace is new: its servers start to listen.
const NEW: u8 = 30;

/// The other namespaces.
#[derive(Debug)]
pub(super) struct Members<T> {
    all: Vec<Member<T>>,
    /// Which of them have an address, by their ids. What is not here is asked of all.
    homes: HashMap<IpAddr, Vec<u64>>,
    /// Whose turn it is, to list what is half-closed, and listeners.
    next: [usize; 2],
}

#[derive(Debug)]
struct Member<T> {
    id: u64,
    sockets: Sockets<T>,
    /// Of the last list, as far as they were still so at the last look; `None` before the first.
    lately: Option<Vec<Lookup>>,
    /// As listed last.
    listeners: Vec<Socket>,
    /// Looks since then, as long as it is new.
    looks: u8,
}

impl<T> Default for Members<T> {
    fn default() -> Self {
        Self { all: Vec::new(), homes: HashMap::new(), next: [0; 2] }
    }
}

impl<T: Transport> Members<T> {
    pub(super) fn join(&mut self, id: u64, sockets: Sockets<T>, addresses: HashSet<IpAddr>) {
        self.leave(id);
        for addr in addresses {
            self.homes.entry(addr).or_default().push(id);
        }
        self.all.push(Member { id, sockets, lately: None, listeners: Vec::new(), looks: 0 });
    }

    pub(super) fn leave(&mut self, id: u64) {
        self.all.retain(|member| member.id != id);
        self.homes.retain(|_, ids| {
            ids.retain(|home| *home != id);
            !ids.is_empty()
        });
    }

    pub(super) fn ids(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.all.iter().map(|member| member.id)
    }

    pub(super) fn use_mptcp(&self) -> bool {
        self.all.iter().any(|member| member.sockets.uses_mptcp())
    }

    pub(super) fn have(&self, addr: IpAddr) -> bool {
        self.homes.contains_key(&addr)
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.homes.keys().copied()
    }

    pub(super) fn know(&mut self, addresses: HashSet<IpAddr>) {
        self.homes = addresses.into_iter().map(|addr| (addr, Vec::new())).collect();
    }

    /// The sockets in these states, of some members by their numbers.
    pub(super) fn sockets(&mut self, states: States, part: Range<usize>) -> Result<Vec<Socket>> {
        let mut all = Vec::new();
        let some = part.start.min(self.all.len())..part.end.min(self.all.len());
        for member in self.all.get_mut(some).unwrap_or_default() {
            let found = member.list(states)?;
            learn(&mut self.homes, member.id, &found);
            all.extend(found);
        }
        Ok(all)
    }

    /// The sockets in these states: of some by a list, of the others those that were so lately.
    pub(super) fn sockets_lately(&mut self, states: States) -> Result<Vec<Socket>> {
        let [next, _] = &mut self.next;
        let (count, began) = (self.all.len(), cpu_time());
        let first = next.checked_rem(count).unwrap_or(0);
        let least = LEAST.max(count.div_ceil(ROUND));
        let mut listed = 0;
        let mut all = vec![Vec::new(); count];
        let places = (first..count).chain(0..first);
        for (turn, place) in places.enumerate() {
            let Some(member) = self.all.get_mut(place) else { continue };
            let has_time = || turn < least || cpu_time().saturating_sub(began) < SPENT;
            let is_in_turn = turn == listed && turn < LISTED.max(least) && has_time();
            listed += usize::from(is_in_turn);
            let found = match member.lately.take() {
                Some(lookups) if !is_in_turn => {
                    let mut found = member.look_up(&lookups)?;
                    found.retain(|socket| states.contains(socket.state));
                    found
                }
                _ => member.list(states)?,
            };
            learn(&mut self.homes, member.id, &found);
            member.lately = Some(found.iter().map(Lookup::from).collect());
            if let Some(slot) = all.get_mut(place) {
                *slot = found;
            }
        }
        *next = first + listed;
        Ok(all.into_iter().flatten().collect())
    }

    /// The listeners as of late: some namespaces are asked in turn, and new ones each time.
    pub(super) fn listeners_lately(&mut self) -> Result<Vec<Socket>> {
        let [_, next] = &mut self.next;
        let is_in_turn = turn(next, self.all.len());
        let mut all = Vec::new();
        for (place, member) in self.all.iter_mut().enumerate() {
            if member.looks < NEW || is_in_turn(place) {
                member.listeners = member.list(States::from_iter([State::Listen]))?;
                member.looks = member.looks.saturating_add(1);
            }
            all.extend(&member.listeners);
        }
        Ok(all)
    }

    /// What listens in each, with the addresses that it is known to have.
    pub(super) fn served(&mut self) -> Result<Vec<(Socket, Vec<IpAddr>)>> {
        let mut all = Vec::new();
        for member in &mut self.all {
            let found = member.list(States::from_iter([State::Listen]))?;
            let homes = self.homes.iter().filter(|(_, ids)| ids.contains(&member.id));
            let own: Vec<IpAddr> = homes.map(|(addr, _)| *addr).collect();
            all.extend(found.into_iter().map(|socket| (socket, own.clone())));
        }
        Ok(all)
    }

    /// Has those of these connections asked about of which nothing is known yet, in the namespaces
    /// that have their addresses, and in all where none is known to.
    pub(super) fn ask<A: Copy>(
        &mut self,
        lookups: &[Lookup],
        answers: &mut [Option<A>],
        mut ask: impl FnMut(&mut Sockets<T>, &[Lookup], &mut [Option<A>]) -> Result<()>,
    ) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        let mut of_some: HashMap<u64, Vec<usize>> = HashMap::new();
        let mut of_all = Vec::new();
        for (index, (lookup, answer)) in lookups.iter().zip(answers.iter()).enumerate() {
            match self.homes.get(&lookup.connection.local.addr()) {
                _ if answer.is_some() => {}
                Some(ids) => ids.iter().for_each(|id| of_some.entry(*id).or_default().push(index)),
                None => of_all.push(index),
            }
        }
        for member in &mut self.all {
            let mine = of_some.remove(&member.id).unwrap_or_default();
            let missing = |index: &usize| answers.get(*index).is_some_and(Option::is_none);
            let indices = mine.into_iter().chain(of_all.iter().copied()).filter(missing);
            let indices: Vec<usize> = indices.collect();
            if indices.is_empty() {
                continue;
            }
            let part: Vec<_> =
                indices.iter().filter_map(|index| lookups.get(*index)).copied().collect();
            let mut answered = vec![None; part.len()];
            ask(&mut member.sockets, &part, &mut answered)?;
            member.sockets.rest();
            for (index, answer) in indices.into_iter().zip(answered) {
                if let Some(slot) = answers.get_mut(index) {
                    *slot = answer;
                }
            }
        }
        Ok(())
    }
}

impl<T: Transport> Member<T> {
    fn list(&mut self, states: States) -> Result<Vec<Socket>> {
        let found = self.sockets.dump(states);
        self.sockets.rest();
        found
    }

    fn look_up(&mut self, lookups: &[Lookup]) -> Result<Vec<Socket>> {
        if lookups.is_empty() {
            return Ok(Vec::new());
        }
        let mut found = vec![None; lookups.len()];
        self.sockets.look_up(lookups, &mut found)?;
        self.sockets.rest();
        Ok(found.into_iter().flatten().collect())
    }
}

/// What the calling thread has used of a processor.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Whether it is the turn of the one at a place, of `count`.
fn turn(next: &mut usize, count: usize) -> impl Fn(usize) -> bool + use<> {
    let first = next.checked_rem(count).unwrap_or(0);
    *next = first + LISTED.min(count);
    move |place| (place + count - first) % count.max(1) < LISTED
}

/// Sockets show addresses that a namespace has been given since it joined.
fn learn<'s>(
    homes: &mut HashMap<IpAddr, Vec<u64>>,
    id: u64,
    sockets: impl IntoIterator<Item = &'s Socket>,
) {
    for socket in sockets.into_iter().filter(|socket| socket.state != State::Listen) {
        let ids = homes.entry(socket.local.addr()).or_default();
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
}
