//! Whether conntrack tracks anything in a namespace: expressions that ask it would switch it on in
//! one that lives without.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use crate::host::sysctl;

/// Looks at the number of entries in the network namespace of the calling thread; where there is
/// none, again after a datagram of our own that never leaves this host.
pub(super) fn is_on() -> bool {
    has_entries() || {
        knock(Ipv4Addr::LOCALHOST.into());
        knock(Ipv6Addr::LOCALHOST.into());
        has_entries()
    }
}

fn has_entries() -> bool {
    // Where the kernel does not say, events are wanted all the same.
    sysctl::conntrack("nf_conntrack_count") != Some(0)
}

/// Sends a datagram to the very socket that it comes from.
fn knock(address: IpAddr) {
    let knocked = UdpSocket::bind((address, 0)).and_then(|socket| {
        let to = socket.local_addr()?;
        socket.send_to(&[], to)
    });
    if let Err(error) = knocked {
        tracing::debug!(%address, %error, "no look whether conntrack is on");
    }
}
