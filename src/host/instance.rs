//! One daemon for each network namespace.
//!
//! An abstract socket address belongs to the network namespace and is free again when the process
//! ends, however that happens: no file, no stale lock.

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::error::{Cause, Op, Result};

/// Claims `name` in the network namespace of the calling thread for as long as the value lives.
///
/// # Errors
/// Another process has it.
pub fn claim(name: &str) -> Result<UnixListener> {
    let op = Op::new("claim network namespace");
    let address = SocketAddr::from_abstract_name(name).map_err(|error| op.io(error))?;
    UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => {
            op.failed(Cause::Unavailable("another ctkeep guards this namespace already".to_owned()))
        }
        _ => op.io(error),
    })
}
