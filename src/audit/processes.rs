//! Which processes hold a socket, by procfs.

use std::collections::{HashMap, HashSet};

use procfs::process::{FDTarget, all_processes};

/// The process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The lowest process id of those that hold it.
    pub pid: i32,
    /// Its command name, at most 15 bytes (`/proc/PID/comm`).
    pub command: String,
    /// How many processes hold it.
    pub processes: usize,
}

/// The holders of these inodes. Processes that may not be looked into are passed over.
pub fn holders(inodes: &HashSet<u32>) -> HashMap<u32, Holder> {
    let mut found: HashMap<u32, Holder> = HashMap::new();
    if inodes.is_empty() {
        return found;
    }
    let Ok(processes) = all_processes() else { return found };
    for process in processes.flatten() {
        let Ok(descriptors) = process.fd() else { continue };
        let mut mine: HashSet<u32> = HashSet::new();
        for descriptor in descriptors.flatten() {
            if let FDTarget::Socket(inode) = descriptor.target
                && let Ok(inode) = u32::try_from(inode)
                && inodes.contains(&inode)
            {
                mine.insert(inode);
            }
        }
        if mine.is_empty() {
            continue;
        }
        let command = process.stat().map(|stat| stat.comm).unwrap_or_default();
        for inode in mine {
            let holder = found.entry(inode).or_insert_with(|| Holder {
                pid: process.pid,
                command: command.clone(),
                processes: 0,
            });
            holder.processes += 1;
            if process.pid < holder.pid {
                holder.pid = process.pid;
                holder.command.clone_from(&command);
            }
        }
    }
    found
}
