//! One daemon for each network namespace.
//!
//! An abstract socket address belongs to the network namespace and is free again when the process
//! ends, however that happens: no file, no stale lock. The audit asks by the same socket how long
//! connections have been held, and what the shield covers; only administrators are answered, and
//! only they are believed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use caps::{CapSet, Capability};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Uid;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::error::{Cause, Op, Result};

/// Claims `name` in the network namespace of the calling thread for as long as the value lives.
///
/// `None` where somebody has it who could not run ctkeep: any user can take any abstract address,
/// and keeps no daemon from its work by it.
///
/// # Errors
/// Another ctkeep has it.
pub fn claim(name: &str) -> Result<Option<UnixListener>> {
    let op = Op::new("claim network namespace");
    let address = SocketAddr::from_abstract_name(name).map_err(|error| op.io(error))?;
    let listener = match UnixListener::bind_addr(&address) {
        Ok(listener) => listener,
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            return if holder(name) == Some(Holder::Ctkeep) {
                let what = "another ctkeep guards this namespace already".to_owned();
                Err(op.failed(Cause::Unavailable(what)))
            } else {
                Ok(None)
            };
        }
        Err(error) => return Err(op.io(error)),
    };
    listener.set_nonblocking(true).map_err(|error| op.io(error))?;
    Ok(Some(listener))
}

/// Who has claimed a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process that may run ctkeep.
    Ctkeep,
    /// Any other user's process, or one that lets no connection in.
    Stranger,
}

/// Who listens at `name` in the network namespace of the calling thread. Claims nothing, and does not
/// wait.
pub fn holder(name: &str) -> Option<Holder> {
    match connect(name) {
        Ok(stream) if is_trusted(&stream) => Some(Holder::Ctkeep),
        Ok(_) => Some(Holder::Stranger),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Some(Holder::Stranger),
        Err(_) => None,
    }
}

/// A stream to the listener at `name`. It does not wait: any user can listen there, and let the queue
/// be full for ever ([`ErrorKind::WouldBlock`]).
fn connect(name: &str) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(format!("\0{name}"))?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// Longest that either side waits for the other, from the connection to the last byte.
const PATIENCE: Duration = Duration::from_secs(2);
/// From try to try while the queue of the listener is full.
const QUEUE_FULL: Duration = Duration::from_millis(50);

/// What the shield of a daemon covers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shielded {
    /// Local ports.
    pub ports: HashSet<u16>,
    /// Whether it is at every device that packets come in by.
    pub is_whole: bool,
}

/// What a daemon reports of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DaemonStatus {
    /// For each socket cookie the seconds that it has been held.
    pub ages: HashMap<u64, u64>,
    /// For each socket cookie the seconds that it is known to be half-closed.
    pub half_closed: HashMap<u64, u64>,
    /// Its shield, where it is up.
    pub shield: Option<Shielded>,
    /// Repairs of the last minute, by peer.
    pub repairs: HashMap<IpAddr, u64>,
    /// Its defence level.
    pub level: Option<u64>,
    /// Whether it looks at the sockets of containers, where it says so.
    pub containers: Option<bool>,
    /// Where it looks after outgoing connections: how many it has, how many of their entries it keeps
    /// beyond the kernel's time, and how many are lost.
    pub outgoing: Option<[usize; 3]>,
}

/// A line that says for how long a socket has been half-closed begins with this.
const HALF_CLOSED: &str = "half-closed";
/// A line that says how often connections of a peer were repaired begins with this.
const REPAIRS: &str = "repairs";
/// The line of the defence level.
const LEVEL: &str = "level";
/// The line that says whether containers are looked at.
const CONTAINERS: &str = "containers";
const YES: &str = "yes";
/// The line about outgoing connections begins with this.
const OUTGOING: &str = "outgoing";
/// The line about a shield begins with this.
const SHIELD: &str = "shield";
const WHOLE: &str = "whole";
const PARTLY: &str = "partly";

/// What a daemon says of itself: as [`DaemonStatus`].
pub struct Said<'s> {
    /// Cookies, and the seconds that they have been held.
    pub ages: &'s mut dyn Iterator<Item = (u64, u64)>,
    /// Cookies, and the seconds that they are known to be half-closed.
    pub half_closed: &'s mut dyn Iterator<Item = (u64, u64)>,
    /// Peers, and the repairs of the last minute.
    pub repairs: &'s mut dyn Iterator<Item = (IpAddr, u64)>,
    /// The defence level.
    pub level: u64,
    /// The shield.
    pub shield: Option<&'s Shielded>,
    /// Whether containers are looked at.
    pub containers: Option<bool>,
    /// Outgoing connections.
    pub outgoing: Option<[usize; 3]>,
}

/// Answers one question, where there is one: as [`DaemonStatus`]. A client that asks and does not
/// read keeps no worker waiting.
pub fn answer(listener: &UnixListener, said: Said<'_>) {
    let Ok((mut stream, _)) = listener.accept() else { return };
    if !is_trusted(&stream) {
        return;
    }
    let Said { ages, half_closed, repairs, level, shield, containers, outgoing } = said;
    let mut text: String = ages.map(|(cookie, age)| format!("{cookie:x} {age}\n")).collect();
    text.extend(half_closed.map(|(cookie, age)| format!("{HALF_CLOSED} {cookie:x} {age}\n")));
    text.extend(repairs.map(|(peer, count)| format!("{REPAIRS} {peer} {count}\n")));
    text.push_str(&format!("{LEVEL} {level}\n"));
    if let Some(shield) = shield {
        let how = if shield.is_whole { WHOLE } else { PARTLY };
        let ports: Vec<_> = shield.ports.iter().map(u16::to_string).collect();
        text.push_str(&format!("{SHIELD} {how} {}\n", ports.join(" ")));
    }
    if let Some(are_looked_at) = containers {
        let how = if are_looked_at { YES } else { "no" };
        text.push_str(&format!("{CONTAINERS} {how}\n"));
    }
    if let Some([all, held, lost]) = outgoing {
        text.push_str(&format!("{OUTGOING} {all} {held} {lost}\n"));
    }
    let answer = move || {
        let _ = stream.set_write_timeout(Some(PATIENCE));
        let _ = stream.write_all(text.as_bytes());
    };
    drop(thread::Builder::new().name("answer".to_owned()).spawn(answer));
}

/// Asks the daemon that has claimed `name` in the network namespace of the calling thread; empty
/// where there is none.
pub fn ask(name: &str) -> DaemonStatus {
    let began = Instant::now();
    let left = || PATIENCE.checked_sub(began.elapsed()).filter(|left| !left.is_zero());
    let stream = loop {
        match connect(name) {
            Err(error) if error.kind() == ErrorKind::WouldBlock && left().is_some() => {
                thread::sleep(QUEUE_FULL);
            }
            other => break other,
        }
    };
    let mut text = Vec::new();
    if let Ok(mut stream) = stream
        && is_trusted(&stream)
        && stream.set_nonblocking(false).is_ok()
    {
        // Cut short by the time, what has come still counts.
        while let Some(left) = left() {
            let mut part = [0; 4096];
            if stream.set_read_timeout(Some(left)).is_err() {
                break;
            }
            match stream.read(&mut part) {
                Ok(0) | Err(_) => break,
                Ok(length) => text.extend(part.iter().take(length)),
            }
        }
    }
    told(&String::from_utf8_lossy(&text))
}

fn told(text: &str) -> DaemonStatus {
    let mut told = DaemonStatus::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some(SHIELD), how) => {
                let ports = words.filter_map(|port| port.parse().ok()).collect();
                told.shield = Some(Shielded { ports, is_whole: how == Some(WHOLE) });
            }
            (Some(REPAIRS), Some(peer)) => {
                let count = words.next().and_then(|count| count.parse::<u64>().ok());
                told.repairs.extend(peer.parse().ok().zip(count));
            }
            (Some(LEVEL), Some(level)) => told.level = level.parse().ok(),
            (Some(CONTAINERS), how) => told.containers = Some(how == Some(YES)),
            (Some(OUTGOING), all) => {
                let numbers = all.into_iter().chain(words).map(str::parse);
                let numbers: Option<Vec<usize>> = numbers.map(std::result::Result::ok).collect();
                told.outgoing = numbers.and_then(|numbers| numbers.try_into().ok());
            }
            (Some(HALF_CLOSED), Some(cookie)) => {
                told.half_closed.extend(words.next().and_then(|age| age_of(cookie, age)));
            }
            (Some(cookie), Some(age)) => told.ages.extend(age_of(cookie, age)),
            _ => {}
        }
    }
    told
}

fn age_of(cookie: &str, age: &str) -> Option<(u64, u64)> {
    u64::from_str_radix(cookie, 16).ok().zip(age.parse().ok())
}

/// Whether the other end belongs to root, to the same user, or to a process that may change the
/// table anyway: the service runs under a user of its own.
fn is_trusted(stream: &UnixStream) -> bool {
    getsockopt(stream, sockopt::PeerCredentials).is_ok_and(|peer| {
        let uid = Uid::from_raw(peer.uid());
        uid.is_root() || uid == Uid::effective() || may_change_tables(peer.pid())
    })
}

/// Whether a process has `CAP_NET_ADMIN`, and not just in a user namespace that it made itself.
fn may_change_tables(pid: i32) -> bool {
    let user_namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/user")).ok();
    let theirs = user_namespace(&pid.to_string());
    theirs.is_some()
        && theirs == user_namespace("self")
        && caps::has_cap(Some(pid), CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_line_by_line() {
        let shield = Some(Shielded { ports: [80, 443].into(), is_whole: true });
        let text = "1f 20\nhalf-closed 20 7\nrepairs 198.51.100.7 2\nlevel 1\nshield whole 80 443\ncontainers yes\noutgoing 5 4 1\nnonsense\n";
        let (ages, half_closed) = ([(31, 20)].into(), [(32, 7)].into());
        let repairs = [("198.51.100.7".parse().unwrap(), 2)].into();
        let (level, containers, outgoing) = (Some(1), Some(true), Some([5, 4, 1]));
        assert_eq!(
            told(text),
            DaemonStatus { ages, half_closed, repairs, level, shield, containers, outgoing }
        );
    }
}
