//! Which processes hold a socket, by procfs, or as a text has it.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::{fmt, fs};

use crate::containers::name;
use crate::host::privileges::{Capability, lacking};
use crate::sockdiag::{Cookie, Socket, State};

/// The process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The lowest process id of those that hold it.
    pub pid: i32,
    /// Its command name, at most 15 bytes (`/proc/PID/comm`).
    pub command: String,
    /// How many processes hold it.
    pub processes: usize,
    /// The container that they are in, where they are in one.
    pub container: Option<String>,
}

impl Holder {
    /// `123/apache2`
    pub fn process(&self) -> String {
        format!("{}/{}", self.pid, self.command)
    }

    /// ` in web`, where it is in a container.
    pub fn place(&self) -> String {
        place(self.container.as_deref())
    }
}

/// ` in web`, behind what is in a container.
pub(super) fn place(container: Option<&str>) -> String {
    container.map_or(String::new(), |name| format!(" in {name}"))
}

/// `123/apache2`, or `123/apache2 in web`.
impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.process(), self.place())
    }
}

/// Who has a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner<'o> {
    /// A process.
    Process(&'o Holder),
    /// The queue of its listener: the application has not accepted it yet.
    Queue,
    /// The kernel: its process has closed it, or it is a handshake.
    Kernel,
    /// No descriptor, and no queue either: a subflow of MPTCP.
    Descriptorless,
    /// A process that cannot be seen: of another user or namespace, or not in the text.
    Unseen,
}

/// Who has the sockets of one look.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    by_inode: HashMap<u32, Arc<Holder>>,
    by_cookie: HashMap<Cookie, Arc<Holder>>,
    /// Connections that wait at each listening port.
    waiting: HashMap<u16, u32>,
    /// Inode 0 says that no process has the socket. A text without inodes says nothing.
    has_inodes: bool,
    /// Why processes of this host cannot be seen.
    veil: Option<Veil>,
}

/// Why a process that holds a socket cannot be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Veil {
    /// `/proc` is mounted with `hidepid`, and does not list those of other users.
    HidePid,
    /// Those of other users are listed, and their descriptors are not shown.
    Privilege,
    /// Nothing is kept from the audit: it is in a PID namespace that `/proc` does not show, or has
    /// ended meanwhile.
    Namespace,
}

impl Veil {
    fn find() -> Self {
        if lacking(&[Capability::CAP_SYS_PTRACE]).is_empty() {
            return Self::Namespace;
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        // The last one lies above those before it.
        let proc = mounts.lines().rfind(|line| line.split(' ').nth(1) == Some("/proc"));
        let option =
            proc.and_then(|line| line.split([' ', ',']).find_map(|it| it.strip_prefix("hidepid=")));
        if option.is_none_or(|value| matches!(value, "0" | "off")) {
            return Self::Privilege;
        }
        Self::HidePid
    }
}

impl fmt::Display for Veil {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HidePid => "hidden by hidepid of /proc: CAP_SYS_PTRACE is missing",
            Self::Privilege => "of another user: CAP_SYS_PTRACE is missing",
            Self::Namespace => "in a PID namespace that /proc does not show",
        })
    }
}

impl Owners {
    /// Those of this host.
    pub fn look(sockets: impl Iterator<Item = Socket>, listeners: &[Socket]) -> Self {
        let inodes = sockets.chain(listeners.iter().copied()).map(|socket| socket.inode);
        let by_inode = holders(&inodes.filter(|inode| *inode != 0).collect());
        let (waiting, veil) = (waiting(listeners), Some(Veil::find()));
        Self { by_inode, has_inodes: true, waiting, veil, ..Self::default() }
    }

    /// Why processes cannot be seen: ` (of another user: ...)`; nothing of a text.
    pub fn why_unseen(&self) -> String {
        self.veil.map_or_else(String::new, |veil| format!(" ({veil})"))
    }

    /// Those that a text names.
    pub fn named(
        by_cookie: HashMap<Cookie, Holder>,
        has_inodes: bool,
        listeners: &[Socket],
    ) -> Self {
        let by_cookie = by_cookie.into_iter().map(|(cookie, it)| (cookie, Arc::new(it)));
        Self {
            by_cookie: by_cookie.collect(),
            has_inodes,
            waiting: waiting(listeners),
            ..Self::default()
        }
    }

    /// The owner of a socket.
    pub fn of(&self, socket: &Socket) -> Owner<'_> {
        if let Some(holder) = self.holder(socket) {
            return Owner::Process(holder);
        }
        let waits = || self.waiting.get(&socket.local.port()).is_some_and(|count| *count > 0);
        match socket.state {
            _ if socket.inode != 0 || !self.has_inodes => Owner::Unseen,
            State::Established | State::CloseWait if waits() => Owner::Queue,
            State::Established | State::CloseWait => Owner::Descriptorless,
            _ => Owner::Kernel,
        }
    }

    /// The process that has a socket, where it can be seen.
    pub fn holder(&self, socket: &Socket) -> Option<&Holder> {
        self.shared(socket).map(Arc::as_ref)
    }

    /// The same, for a hundred thousand connections without a copy for each.
    pub(super) fn shared(&self, socket: &Socket) -> Option<&Arc<Holder>> {
        self.by_cookie.get(&socket.cookie).or_else(|| self.by_inode.get(&socket.inode))
    }
}

fn waiting(listeners: &[Socket]) -> HashMap<u16, u32> {
    let mut waiting = HashMap::new();
    for listener in listeners {
        let count: &mut u32 = waiting.entry(listener.local.port()).or_default();
        *count = count.saturating_add(listener.recv_queue);
    }
    waiting
}

/// The holders of these inodes, one value for all that have the same. Processes that may not be looked
/// into are passed over.
fn holders(inodes: &HashSet<u32>) -> HashMap<u32, Arc<Holder>> {
    // The lowest process of each, and how many there are.
    let mut found: HashMap<u32, (i32, usize)> = HashMap::new();
    let mut commands: HashMap<i32, String> = HashMap::new();
    if inodes.is_empty() {
        return HashMap::new();
    }
    let Ok(processes) = fs::read_dir("/proc") else { return HashMap::new() };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let mut mine = sockets(&process.path());
        mine.retain(|inode| inodes.contains(inode));
        if !mine.is_empty() {
            commands.insert(pid, command(&process.path()));
        }
        for inode in mine {
            let (lowest, processes) = found.entry(inode).or_insert((pid, 0));
            *lowest = pid.min(*lowest);
            *processes += 1;
        }
    }
    let mut shared: HashMap<(i32, usize), Arc<Holder>> = HashMap::new();
    let holder = |(pid, processes)| {
        let command = commands.get(&pid).cloned().unwrap_or_default();
        let container = name::of(pid).as_deref().map(printable);
        Arc::new(Holder { pid, command, processes, container })
    };
    let each = found.into_iter();
    each.map(|(inode, of)| (inode, shared.entry(of).or_insert_with(|| holder(of)).clone()))
        .collect()
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

fn command(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(&name);
    printable(name.trim_end_matches('\n'))
}

/// A text without what a terminal obeys: control characters, and those that turn the direction of
/// writing. A process may give itself any name, and a file may hold anything.
pub fn printable(text: &str) -> String {
    let turns = |letter| matches!(letter, '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars()
        .map(|letter| match letter {
            '\t' => ' ',
            letter if letter.is_control() || turns(letter) => '?',
            letter => letter,
        })
        .collect()
}
