//! Which processes hold a socket, by procfs.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

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
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let mut mine = sockets(&process.path());
        mine.retain(|inode| inodes.contains(inode));
        if mine.is_empty() {
            continue;
        }
        let command = command(&process.path());
        for inode in mine {
            let holder = found.entry(inode).or_insert_with(|| Holder {
                pid,
                command: command.clone(),
                processes: 0,
            });
            holder.processes += 1;
            if pid < holder.pid {
                holder.pid = pid;
                holder.command.clone_from(&command);
            }
        }
    }
    found
}

/// Inodes of the sockets that a process holds. A link is read for each descriptor and nothing else:
/// servers have many.
fn sockets(process: &Path) -> HashSet<u32> {
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let inode = |link: &Path| {
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u32>().ok()
    };
    descriptors.filter_map(|descriptor| inode(&fs::read_link(descriptor.path()).ok()?)).collect()
}

/// A process may give itself any name, also one that a terminal obeys.
fn command(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    name.trim_end_matches('\n').replace(|letter: char| letter.is_control(), "?")
}
