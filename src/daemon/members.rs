//! The namespaces whose sockets the worker of the own table asks about: a thread of its own enters
//! them, so that no worker ever waits for one or keeps a dead one alive.

use std::collections::{BTreeMap, HashSet};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use super::control::{Control, Lead, Wake};
use super::inside::Inside;
use super::threads;
use crate::containers::{Member, find};
use crate::error::Result;
use crate::host::netns::Namespace;
use crate::host::privileges;
use crate::rtnetlink::changes::Listener;
use crate::sockdiag::SockDiag;

/// For so long the first sweep waits for the first look.
const FIRST_LOOK: Duration = Duration::from_secs(10);

#[derive(Debug)]
enum Change {
    Join(Box<Member>),
    Leave(u64),
    /// All that was there at the first look has joined.
    Looked,
}

/// What the worker hears of namespaces that come and go.
#[derive(Debug)]
pub(super) struct Members {
    changes: Mutex<Receiver<Change>>,
    pub(super) wake: Arc<Wake>,
    are_looked_for: Arc<AtomicBool>,
}

impl Members {
    /// Whether containers are found without being named.
    pub(super) fn are_looked_for(&self) -> bool {
        self.are_looked_for.load(Ordering::Relaxed)
    }

    /// Waits for the first look.
    pub(super) fn begin(&self, sockets: &mut SockDiag) {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(change) = changes.recv_timeout(FIRST_LOOK) {
            match change {
                Change::Looked => break,
                other => apply_change(sockets, other),
            }
        }
    }

    /// Takes up what has changed.
    pub(super) fn follow(&self, sockets: &mut SockDiag) {
        self.wake.settle();
        let before = sockets.members().len();
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.try_iter().for_each(|change| apply_change(sockets, change));
        let now = sockets.members().len();
        if now != before {
            tracing::debug!(namespaces = now, "namespaces whose sockets are asked about");
        }
    }
}

fn apply_change(sockets: &mut SockDiag, change: Change) {
    match change {
        Change::Join(member) => sockets.join(member.id, member.sockets, member.addresses),
        Change::Leave(id) => sockets.leave(id),
        Change::Looked => {}
    }
}

/// Looks for namespaces until told to stop.
pub(super) struct Finder {
    control: Arc<Control>,
    changes: Sender<Change>,
    wake: Arc<Wake>,
    are_looked_for: Arc<AtomicBool>,
    joined: BTreeMap<u64, Namespace>,
    /// Those that could not be entered: said once for each.
    refused: HashSet<u64>,
    /// Of containers, by their inodes.
    found: BTreeMap<u64, Namespace>,
    /// Of those, the ones with limits of their own.
    inside: Inside,
    /// A device of this namespace may lead to a new one: a container gets one before it runs.
    devices: Listener,
    /// From then on all processes may be looked through again; before `restless` they are.
    free_at: Instant,
    restless: Instant,
    scanned: Option<Instant>,
    is_refused: Option<bool>,
    has_said_too_many: bool,
}

/// From look to look at the names of namespaces.
const LOOK: Duration = Duration::from_secs(1);
/// For so long after a device has come the processes are looked through every [`SOON`]: its namespace
/// has no address yet, or no process.
const RESTLESS: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_millis(200);
/// And every so often without a sign.
const SELDOM: Duration = Duration::from_secs(10);
/// What looking through all processes costs is rested this many times: a twentieth of a core, while
/// devices come and go. With 5 000 processes it takes some 20 ms.
const SHARE: u32 = 20;

impl Finder {
    pub(super) fn new(control: Arc<Control>) -> Result<(Self, Members)> {
        let (changes, heard) = mpsc::channel();
        let wake = Arc::new(Wake::new()?);
        let members = Members {
            changes: Mutex::new(heard),
            wake: wake.clone(),
            are_looked_for: Arc::default(),
        };
        let are_looked_for = members.are_looked_for.clone();
        let now = Instant::now();
        let finder = Self {
            control,
            changes,
            wake,
            are_looked_for,
            joined: BTreeMap::new(),
            refused: HashSet::new(),
            found: BTreeMap::new(),
            inside: Inside::new(now),
            devices: Listener::open()?,
            free_at: now,
            restless: now,
            scanned: None,
            is_refused: None,
            has_said_too_many: false,
        };
        Ok((finder, members))
    }

    /// `limited` is told when others than before have limits of their own.
    pub(super) fn run(mut self, lead: &Lead, limited: impl Fn()) -> Result<()> {
        while !lead.is_stopping() {
            lead.beat();
            let is_first = self.scanned.is_none();
            self.look(Instant::now());
            if is_first {
                drop(self.changes.send(Change::Looked));
                self.wake.rouse();
            }
            if self.control.set_limited(self.inside.look(&self.found, Instant::now())) {
                limited();
            }
            self.wait(lead)?;
        }
        Ok(())
    }

    /// Until there is something to look at.
    fn wait(&mut self, lead: &Lead) -> Result<()> {
        let now = Instant::now();
        if now < self.restless {
            return threads::sleep(lead, SOON);
        }
        let mut fds =
            [lead.as_fd(), self.devices.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        threads::wait_for(&mut fds, LOOK)?;
        let has_changed = self.devices.changes().is_ok_and(|it| it.any || it.unknown);
        if has_changed {
            self.restless = Instant::now() + RESTLESS;
        }
        Ok(())
    }

    /// Lets those go that have gone, and opens those that have come.
    fn look(&mut self, now: Instant) {
        self.scan(now);
        let wanted = self.wanted();
        let gone: Vec<_> =
            self.joined.keys().filter(|id| !wanted.contains_key(id)).copied().collect();
        let mut has_changed = !gone.is_empty();
        for id in gone {
            self.joined.remove(&id);
            drop(self.changes.send(Change::Leave(id)));
        }
        self.refused.retain(|id| wanted.contains_key(id));
        for (id, namespace) in wanted {
            if self.joined.contains_key(&id) {
                continue;
            }
            match Member::open(&namespace, id) {
                // Its addresses are not there yet: it joins when they are.
                Ok(member) if member.addresses.is_empty() && now < self.restless => {}
                Ok(member) => {
                    drop(self.changes.send(Change::Join(Box::new(member))));
                    self.joined.insert(id, namespace);
                    has_changed = true;
                }
                // One whose last process has just ended is no news.
                Err(_) if namespace.identity().is_none() => {}
                Err(error) if self.refused.insert(id) => {
                    let netns = namespace.name();
                    tracing::warn!(netns, %error, "sockets of this namespace are not asked about");
                }
                Err(_) => {}
            }
        }
        if has_changed {
            self.wake.rouse();
        }
    }

    /// Those that are there now, by their inodes.
    fn wanted(&self) -> BTreeMap<u64, Namespace> {
        let named = self.control.live().namespaces.clone();
        let named = named.into_iter();
        let mut wanted = self.found.clone();
        wanted.extend(named.filter_map(|it| Some((it.identity()?.1, it))));
        if let Some((_, own)) = self.control.own {
            wanted.remove(&own);
        }
        wanted
    }

    /// Looks through all processes, where a sign calls for it or it is time.
    fn scan(&mut self, now: Instant) {
        let may_look = self.may_look();
        let were_looked_for = self.are_looked_for.swap(may_look, Ordering::Relaxed);
        if may_look && !were_looked_for && self.scanned.is_some() {
            // A reload has turned it on.
            self.restless = now + RESTLESS;
        }
        if !may_look {
            self.found.clear();
            self.scanned = Some(now);
            return;
        }
        // One that ends takes its device with it, which is a sign, too.
        let is_late = self.scanned.is_none_or(|scanned| now >= scanned + SELDOM);
        if !(is_late || now < self.restless) || now < self.free_at {
            return;
        }
        let worked = threads::cpu_time();
        match find::behind() {
            Ok(found) => {
                if found.too_many && !std::mem::replace(&mut self.has_said_too_many, true) {
                    tracing::warn!(
                        guarded = found.behind.len(),
                        "more containers than are guarded"
                    );
                }
                let found = found.behind.into_iter();
                let named = found.filter_map(|(inode, path)| {
                    let path = path.to_str()?.to_owned();
                    Some((inode, Namespace::Found { path, inode }))
                });
                self.found = named.collect();
            }
            Err(error) => tracing::debug!(%error, "containers are not looked for"),
        }
        self.scanned = Some(now);
        self.free_at = now + threads::cpu_time().saturating_sub(worked) * SHARE;
    }

    /// Whether containers are wanted and can be looked into; says once why not.
    fn may_look(&mut self) -> bool {
        if !self.control.live().containers {
            return false;
        }
        !*self.is_refused.get_or_insert_with(|| {
            let lacking = privileges::lacking(&privileges::ELSEWHERE);
            if !lacking.is_empty() {
                tracing::info!(
                    lacking = lacking.join(" "),
                    "connections of containers are not guarded"
                );
            }
            !lacking.is_empty()
        })
    }
}
