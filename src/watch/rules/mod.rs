//! Hears that the firewall's rules change, and with them the lists that limits keep.
//!
//! A limit's list belongs to its rule, or to the element of a set, and is gone with it. nf_tables
//! says on a multicast group what changes; iptables-legacy says nothing, but each of its runs opens
//! a lock file. What a change means is not decided here: docs/reloads.md.

mod legacy;
mod nft;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

pub use self::legacy::Lock;
pub use self::nft::Listener;
use crate::error::{Op, Result};

/// Changes heard of since the last time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Tables, chains, rules or sets came or went: so many messages.
    pub rules: u64,
    /// Rules that went: family (`NFPROTO_*`), table and number.
    pub deleted: BTreeSet<(u8, String, u64)>,
    /// Sets that lost elements, and the lists in them: family, table and name.
    pub emptied: BTreeSet<(u8, String, String)>,
    /// Sets that gained elements: a limit may be for more connections than before.
    pub grown: BTreeSet<(u8, String, String)>,
    /// Runs of iptables-legacy that have let go of its lock.
    pub legacy: u64,
    /// Something was lost or unreadable: anything may have changed.
    pub lost: bool,
}

impl Heard {
    /// Whether a list can have been lost.
    pub fn is_loss(&self) -> bool {
        !self.leaves_rules() || self.legacy > 0
    }

    /// Whether rules of nf_tables may be others than before, or be for other packets.
    pub fn is_of_nft(&self) -> bool {
        !self.leaves_rules() || !self.grown.is_empty()
    }

    /// Whether rules of nf_tables are the same as before, but for elements that sets have gained.
    pub fn leaves_rules(&self) -> bool {
        self.rules == 0 && self.emptied.is_empty() && !self.lost
    }

    /// Whether there is nothing to look at.
    pub fn is_nothing(&self) -> bool {
        !self.is_loss() && self.grown.is_empty()
    }

    /// Adds what was heard later.
    pub fn add(&mut self, later: Self) {
        self.rules += later.rules;
        self.deleted.extend(later.deleted);
        self.emptied.extend(later.emptied);
        self.grown.extend(later.grown);
        self.legacy += later.legacy;
        self.lost |= later.lost;
    }
}

/// All that can be listened to in one network namespace.
#[derive(Debug)]
pub struct RuleEvents {
    nft: Option<Listener>,
    lock: Option<Lock>,
    /// Both, for the one who waits.
    epoll: Epoll,
    /// What cannot be listened to, in words, by its name.
    shortfalls: BTreeMap<&'static str, String>,
}

impl RuleEvents {
    /// Listens in the network and mount namespace of the calling thread.
    ///
    /// # Errors
    /// No descriptors are left. That one of the sources cannot be had is a shortfall.
    pub fn open() -> Result<Self> {
        let op = Op::new("listen to rule changes");
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| op.io(errno.into()))?;
        let mut this = Self { nft: None, lock: None, epoll, shortfalls: BTreeMap::new() };
        let watch = |epoll: &Epoll, fd: BorrowedFd<'_>| {
            epoll
                .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, 0))
                .map_err(|errno| op.io(errno.into()))
        };
        match Listener::open() {
            Ok(listener) => {
                watch(&this.epoll, listener.as_fd())?;
                this.nft = Some(listener);
            }
            Err(error) => drop(this.shortfalls.insert("nftables", error.to_string())),
        }
        match Lock::watch() {
            Ok(lock) => {
                watch(&this.epoll, lock.as_fd())?;
                this.lock = Some(lock);
            }
            Err(error) => drop(this.shortfalls.insert("iptables-legacy", error.to_string())),
        }
        Ok(this)
    }

    /// What cannot be listened to, and why.
    pub fn shortfalls(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.shortfalls.iter().map(|(name, why)| (*name, why.as_str()))
    }

    /// Whether changes of nf_tables' rules are heard of.
    pub fn hears_nft(&self) -> bool {
        self.nft.is_some()
    }

    /// Receive buffer of the nftables socket in bytes, as granted.
    pub fn receive_buffer(&self) -> usize {
        self.nft.as_ref().map_or(0, Listener::receive_buffer)
    }

    /// All that is queued. Changes of tables whose name begins with `own` are left out.
    ///
    /// # Errors
    /// A source is broken.
    pub fn drain(&mut self, own: &str) -> Result<Heard> {
        let mut heard = Heard::default();
        if let Some(nft) = &mut self.nft {
            nft.drain(own, &mut heard)?;
        }
        if let Some(lock) = &mut self.lock {
            heard.legacy = lock.drain()?;
        }
        Ok(heard)
    }
}

impl AsFd for RuleEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}
