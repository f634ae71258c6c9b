//! Other network namespaces whose connections pass through the conntrack table of this one: those of
//! containers and pods, and those that the administrator names.
//!
//! [`find`] finds them, a [`Member`] is one whose sockets are asked about beside this one's.

pub mod find;
pub mod name;

use std::collections::HashSet;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;

use crate::error::{Op, Result};
use crate::host::netns::Namespace;
use crate::host::privileges;
use crate::sockdiag::SockDiag;

/// A namespace whose sockets are asked about. It stays alive as long as this.
#[derive(Debug)]
pub struct Member {
    /// The inode of the namespace.
    pub id: u64,
    /// Its sockets.
    pub sockets: SockDiag,
    /// The addresses that it had when it was opened.
    pub addresses: HashSet<IpAddr>,
}

impl Member {
    /// Opens what asks about the sockets of the namespace with the inode `id`.
    ///
    /// # Errors
    /// It is gone, or another one has its name, or it may not be entered.
    pub fn open(namespace: &Namespace, id: u64) -> Result<Self> {
        namespace.run(|| {
            // One that is named can be another by now.
            if Namespace::Own.identity().map(|(_, inode)| inode) != Some(id) {
                return Err(Op::new("enter network namespace").malformed("it has changed"));
            }
            Ok(Self { id, sockets: SockDiag::open()?, addresses: addresses()? })
        })
    }
}

/// Asks about the sockets of all namespaces behind that of the calling thread, too, from now on;
/// returns how many could not be looked into for want of privileges.
///
/// # Errors
/// The kernel does not list its devices.
pub fn join(sockets: &mut SockDiag) -> Result<usize> {
    let found = find::behind()?;
    let mut unread = found.hidden;
    for (id, path) in found.behind {
        let opened = path.to_str().map(|path| Member::open(&Namespace::Named(path.to_owned()), id));
        match opened {
            Some(Ok(member)) => sockets.join(member.id, member.sockets, member.addresses),
            _ => unread += 1,
        }
    }
    // One that has ended meanwhile, or that a mount alone keeps, has no sockets to be looked at.
    let may_enter_all = privileges::lacking(&privileges::ELSEWHERE).is_empty();
    Ok(if may_enter_all { 0 } else { unread })
}

/// The addresses of the interfaces of the calling thread's namespace, but for loopback's, which all
/// namespaces have.
///
/// # Errors
/// The kernel does not list them.
pub fn addresses() -> Result<HashSet<IpAddr>> {
    let op = Op::new("list of addresses");
    let all = getifaddrs().map_err(|errno| op.io(errno.into()))?;
    let addr = |storage: nix::sys::socket::SockaddrStorage| {
        let v4 = storage.as_sockaddr_in().map(|addr| IpAddr::V4(addr.ip()));
        v4.or_else(|| storage.as_sockaddr_in6().map(|addr| IpAddr::V6(addr.ip())))
    };
    Ok(all
        .filter_map(|one| one.address.and_then(addr))
        .filter(|addr| !addr.is_loopback())
        .collect())
}
