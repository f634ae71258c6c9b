//! Finds the network namespaces that stand behind this one: a device of this one has its other end
//! in them, as the veth pair of every container has.
//!
//! A namespace is known by the processes that are in it, and by the names that `ip netns` and the
//! container runtimes give it; no runtime is asked.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::host::netns::Namespace;
use crate::rtnetlink::link::links;
use crate::rtnetlink::nsid::Numbers;

/// Where `ip netns`, CNI plugins, podman and Docker keep names of namespaces.
pub const NAMES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// Namespaces that are guarded at most: each takes a descriptor, and some 4 KiB.
const MOST: usize = 4096;

/// The namespaces behind this one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The inode of each namespace behind this one, and a path that leads to it.
    pub behind: BTreeMap<u64, PathBuf>,
    /// Namespaces behind this one of which no process may be looked into, nor a name is known.
    pub hidden: usize,
    /// There were more than are guarded.
    pub too_many: bool,
}

/// The namespaces behind that of the calling thread.
///
/// # Errors
/// The kernel does not list its devices.
pub fn behind() -> Result<Found> {
    let peers: HashSet<i32> = links()?.into_iter().filter_map(|link| link.peer_namespace).collect();
    let mut found = Found::default();
    if peers.is_empty() {
        return Ok(found);
    }
    let mut numbers = Numbers::open()?;
    let mut candidates = named();
    of_processes(&mut candidates);
    if let Some((_, own)) = Namespace::Own.identity() {
        candidates.remove(&own);
    }
    let mut known = HashSet::new();
    for (id, path) in candidates {
        let number = File::open(&path).ok().and_then(|file| numbers.of(file.as_fd()).ok()?);
        let Some(number) = number.filter(|number| peers.contains(number)) else { continue };
        known.insert(number);
        if found.behind.len() == MOST {
            found.too_many = true;
            break;
        }
        found.behind.insert(id, path);
    }
    found.hidden = peers.difference(&known).count();
    Ok(found)
}

/// Namespaces by the names that others have given them.
pub(super) fn named() -> BTreeMap<u64, PathBuf> {
    let files = NAMES.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let namespace = |path: PathBuf| {
        let named = Namespace::Named(path.to_str()?.to_owned());
        Some((named.identity()?.1, path))
    };
    files.filter_map(|file| namespace(file.path())).collect()
}

/// Adds the namespaces of all processes that may be looked into.
fn of_processes(all: &mut BTreeMap<u64, PathBuf>) {
    let Ok(processes) = fs::read_dir("/proc") else { return };
    for process in processes.flatten() {
        let name = process.file_name();
        if !name.to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
            continue;
        }
        let path = process.path().join("ns/net");
        if let Some(id) = inode(&path) {
            all.entry(id).or_insert(path);
        }
    }
}

/// The inode that the link of a process names. A process that has just ended has none, nor has one
/// that may not be looked into.
fn inode(path: &Path) -> Option<u64> {
    let link = fs::read_link(path).ok()?;
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}
