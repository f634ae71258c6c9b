//! The namespaces whose sockets the worker of the own table asks about: a thread of its own enters
//! them, so that no worker ever waits for one or keeps a dead one alive.

use std::collections::{BTreeMap, HashSet};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::control::{Control, Lead, Wake};
use super::worker;
use crate::containers::Member;
use crate::error::Result;
use crate::host::netns::Namespace;
use crate::sockdiag::SockDiag;

/// From look to look at the names of namespaces.
const LOOK: Duration = Duration::from_secs(1);

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
}

impl Members {
    /// Waits for the first look.
    pub(super) fn begin(&self, sockets: &mut SockDiag) {
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(change) = changes.recv_timeout(FIRST_LOOK) {
            match change {
                Change::Looked => break,
                other => take_up(sockets, other),
            }
        }
    }

    /// Takes up what has changed.
    pub(super) fn follow(&self, sockets: &mut SockDiag) {
        self.wake.settle();
        let before = sockets.members().len();
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        changes.try_iter().for_each(|change| take_up(sockets, change));
        let now = sockets.members().len();
        if now != before {
            tracing::debug!(namespaces = now, "namespaces whose sockets are asked about");
        }
    }
}

fn take_up(sockets: &mut SockDiag, change: Change) {
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
    joined: BTreeMap<u64, Namespace>,
    /// Those that could not be entered: said once for each.
    refused: HashSet<u64>,
}

impl Finder {
    pub(super) fn new(control: Arc<Control>) -> Result<(Self, Members)> {
        let (changes, heard) = mpsc::channel();
        let wake = Arc::new(Wake::new()?);
        let members = Members { changes: Mutex::new(heard), wake: wake.clone() };
        let joined = BTreeMap::new();
        Ok((Self { control, changes, wake, joined, refused: HashSet::new() }, members))
    }

    pub(super) fn run(mut self, lead: &Lead) -> Result<()> {
        let mut is_first = true;
        while !lead.is_stopping() {
            lead.beat();
            self.look();
            if std::mem::take(&mut is_first) {
                drop(self.changes.send(Change::Looked));
            }
            worker::sleep(lead, LOOK)?;
        }
        Ok(())
    }

    /// Lets those go that have gone, and opens those that have come.
    fn look(&mut self) {
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
                Ok(member) => {
                    drop(self.changes.send(Change::Join(Box::new(member))));
                    self.joined.insert(id, namespace);
                    has_changed = true;
                }
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
        let named = self.control.settings().namespaces.clone();
        let mut wanted: BTreeMap<_, _> = named
            .into_iter()
            .filter_map(|namespace| Some((namespace.identity()?.1, namespace)))
            .collect();
        if let Some((_, own)) = Namespace::Own.identity() {
            wanted.remove(&own);
        }
        wanted
    }
}
