//! One daemon for each network namespace.
//!
//! An abstract socket address belongs to the network namespace and is free again when the process
//! ends, however that happens: no file, no stale lock. The audit asks by the same socket how long
//! connections have been held; only administrators are answered, and only they are believed.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

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
            return if is_held_by_another(name) {
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

/// Whether somebody listens at `name` who is trusted. A queue that is kept full blocks nobody.
fn is_held_by_another(name: &str) -> bool {
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).ok()?;
        socket.connect(&SockAddr::unix(format!("\0{name}")).ok()?).ok()?;
        Some(UnixStream::from(OwnedFd::from(socket)))
    };
    connect().is_some_and(|stream| is_trusted(&stream))
}

/// Longest that either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);

/// Answers one question, where there is one: for each socket cookie the seconds that it has been
/// held. Whoever asks and does not read keeps nobody waiting.
pub fn answer(listener: &UnixListener, ages: impl Iterator<Item = (u64, u64)>) {
    let Ok((mut stream, _)) = listener.accept() else { return };
    if !is_trusted(&stream) {
        return;
    }
    let text: String = ages.map(|(cookie, age)| format!("{cookie:x} {age}\n")).collect();
    let answer = move || {
        let _ = stream.set_write_timeout(Some(PATIENCE));
        let _ = stream.write_all(text.as_bytes());
    };
    drop(thread::Builder::new().name("answer".to_owned()).spawn(answer));
}

/// Asks the daemon that has claimed `name` in the network namespace of the calling thread; empty
/// where there is none.
pub fn ages(name: &str) -> HashMap<u64, u64> {
    let ask = || {
        let address = SocketAddr::from_abstract_name(name).ok()?;
        let mut stream = UnixStream::connect_addr(&address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut text = String::new();
        // Cut short by the time, it still tells what it tells.
        let _ = is_trusted(&stream).then(|| stream.read_to_string(&mut text));
        Some(text)
    };
    let line = |line: &str| {
        let (cookie, age) = line.split_once(' ')?;
        Some((u64::from_str_radix(cookie, 16).ok()?, age.parse().ok()?))
    };
    ask().unwrap_or_default().lines().filter_map(line).collect()
}

/// Whether the other end belongs to root, to the same user, or to somebody who may change the
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
