//! What a report has of its host beside looks that other commands take: whole tables, rules as their
//! own programs print them, settings, the daemon's flags.

use std::collections::HashSet;
use std::fmt::Write;
use std::process::{Command, Stdio};
use std::{env, fs};

use super::tables::{self, Beside};
use crate::audit::processes::{Holder, Owners};
use crate::conntrack::{Conntrack, Entry, Filter};
use crate::containers;
use crate::error::Result;
use crate::firewall::{Family, read_legacy};
use crate::flow::{AF_INET, AF_INET6};
use crate::host::sysctl;
use crate::sockdiag::{SockDiag, States};

/// Connections of each table that a report has at most: some 8 MB. Of more each so-manieth.
pub const CONNECTIONS: usize = 20_000;

/// Settings of TCP that bear on what is open; `tcp_fastopen_key` is a secret.
const TCP: [&str; 9] = [
    "net.core.somaxconn",
    "net.ipv4.ip_forward",
    "net.ipv4.tcp_abort_on_overflow",
    "net.ipv4.tcp_fastopen",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_retries2",
    "net.ipv4.tcp_synack_retries",
    "net.ipv4.tcp_syncookies",
];

/// Both tables of the namespace that the calling thread is in.
#[derive(Debug)]
pub struct Tables {
    /// A line for each socket.
    pub sockets: String,
    /// A line for each entry.
    pub entries: String,
    /// What neither ss nor conntrack prints of them.
    pub beside: String,
    /// One of so many connections is in them; 1 where all are.
    pub one_of: usize,
}

impl Tables {
    /// Reads both. Of more than `most` connections the same ones are left out of both.
    ///
    /// # Errors
    /// A missing privilege or module; a lost or malformed answer.
    pub fn read(most: usize) -> Result<Self> {
        let mut diag = SockDiag::open()?;
        containers::join(&mut diag)?;
        let mut conntrack = Conntrack::open()?;
        let listeners = diag.listeners()?;
        let sockets = diag.sockets(States::connected())?;
        let entries = usize::try_from(conntrack.size()?.entries).unwrap_or(usize::MAX);
        let one_of = sockets.len().max(entries) / most.max(1) + 1;
        let all: HashSet<_> = sockets.iter().map(|it| it.connection().sent()).collect();
        let kept: Vec<_> = sockets.into_iter().step_by(one_of).collect();
        let flows: HashSet<_> = kept.iter().map(|it| it.connection().sent()).collect();
        let mut chosen: Vec<Entry> = Vec::new();
        let mut count = 0usize;
        for family in [AF_INET, AF_INET6] {
            // A dump that was interrupted begins anew.
            let (part, seen) = conntrack.entries(
                family,
                Filter::Tcp,
                |(part, seen): &mut (Vec<Entry>, usize), entry| {
                    *seen += 1;
                    let ends = [entry.orig, entry.reply];
                    let is_of = |flows: &HashSet<_>| ends.iter().any(|flow| flows.contains(flow));
                    if is_of(&flows) || !is_of(&all) && *seen % one_of == 0 {
                        part.push(*entry);
                    }
                },
            )?;
            chosen.extend(part);
            count += seen;
        }
        let owners = Owners::look(kept.iter().copied(), &listeners);
        let mut beside = String::new();
        let mut lines = String::from("State Recv-Q Send-Q Local Address:Port Peer Address:Port\n");
        for socket in listeners.iter().chain(&kept) {
            let holder = owners.holder(socket);
            let _ = writeln!(lines, "{}", tables::socket(socket, holder));
            if let Some(Holder { processes, container, .. }) = holder
                && (*processes > 1 || container.is_some())
            {
                let holder = Beside::Holder(socket.cookie, *processes, container.clone());
                let _ = writeln!(beside, "{}", tables::beside_line(&holder));
            }
        }
        let mut entries: String =
            chosen.iter().map(|entry| format!("{}\n", tables::entry(entry))).collect();
        // As the tool ends its list: of an empty table that line alone shows that it was read.
        let _ = writeln!(entries, "conntrack v1 (ctkeep): {count} flow entries have been shown.");
        for entry in chosen.iter().filter(|entry| entry.is_picked_up() || entry.is_ours()) {
            let flags = entry.tcp.map(|tcp| tcp.flags).unwrap_or_default();
            let flags = tables::beside_line(&Beside::Flags(entry.key(), flags));
            let _ = writeln!(beside, "{flags}");
        }
        Ok(Self { sockets: lines, entries, beside, one_of })
    }
}

/// The rules of nf_tables, and those of iptables for nf_tables, as their programs print them.
///
/// # Errors
/// Why not.
pub fn printed(program: &str, arguments: &[&str]) -> std::result::Result<String, String> {
    // A user's own PATH may leave these out.
    let path = env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin"))
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}", error.lines().next().unwrap_or("it failed")))
}

/// The rules of iptables-legacy; nothing where the kernel has none.
///
/// # Errors
/// Why not.
pub fn legacy(family: Family) -> std::result::Result<String, String> {
    read_legacy(family, &[]).map(Option::unwrap_or_default)
}

/// Settings of conntrack and TCP, a line for each.
pub fn sysctls() -> String {
    let names = fs::read_dir("/proc/sys/net/netfilter").into_iter().flatten().flatten();
    let mut all: Vec<_> = names
        .filter_map(|file| file.file_name().into_string().ok())
        .filter(|name| name.starts_with("nf_conntrack"))
        .map(|name| format!("net.netfilter.{name}"))
        .chain(TCP.map(str::to_owned))
        .collect();
    all.sort();
    let line = |name: String| Some(format!("{name} = {}\n", sysctl::number(&name)?));
    all.into_iter().filter_map(line).collect()
}

/// A file of settings without its comments, which may hold anything.
///
/// # Errors
/// Of the file.
pub fn without_comments(path: &std::path::Path) -> std::result::Result<String, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let is_setting = |line: &&str| !line.is_empty() && !line.starts_with('#');
    let lines: String =
        text.lines().map(str::trim).filter(is_setting).map(|line| format!("{line}\n")).collect();
    Ok(format!("file {}\n{lines}", path.display()))
}

/// The command lines of daemons that run here.
pub fn daemons() -> String {
    let Ok(all) = procfs::process::all_processes() else { return String::new() };
    let mut out = String::new();
    for process in all.flatten() {
        let Ok(words) = process.cmdline() else { continue };
        let mut words = words.into_iter();
        let program = words.next().unwrap_or_default();
        if program.rsplit('/').next() == Some("ctkeep") {
            let words: Vec<_> = words.collect();
            if words.first().is_some_and(|word| word == "run") {
                let _ = writeln!(out, "process {}: ctkeep {}", process.pid, words.join(" "));
            }
        }
    }
    out
}
