//! Entries of which the text of the sockets has neither a socket nor a listener: what `ss -4` leaves out. Pure.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use crate::conntrack::{Entry, TcpState};
use crate::flow::FourTuple;
use crate::sockdiag::Socket;

/// Says which open entries are not looked at since no socket of the text is of their port, or of their family.
///
/// `-4` leaves out IPv4 clients of a listener for both families too: their sockets are of IPv6.
pub(super) fn unlisted(
    entries: &[Entry],
    sockets: &[Socket],
    homes: &HashSet<IpAddr>,
    is_in_scope: impl Fn(u16) -> bool,
) -> Vec<String> {
    let known: HashSet<FourTuple> = sockets.iter().map(|it| it.connection().sent()).collect();
    let families: HashSet<bool> = sockets.iter().flat_map(families).collect();
    let is_open = |entry: &&Entry| {
        matches!(entry.state(), Some(TcpState::Established | TcpState::CloseWait))
            && !homes.contains(&entry.orig.src.addr())
            && !known.contains(&entry.reply)
    };
    let (mut ports, mut of_ports) = (BTreeSet::new(), 0usize);
    let mut of_families = [0usize; 2];
    for entry in entries.iter().filter(is_open) {
        let local = entry.reply.src;
        let is_ipv4 = local.addr().is_ipv4();
        if !families.contains(&is_ipv4) {
            let [four, six] = &mut of_families;
            *if is_ipv4 { four } else { six } += 1;
        } else if homes.contains(&local.addr()) && !is_in_scope(local.port()) {
            of_ports += 1;
            ports.insert(local.port());
        }
    }
    let mut notes = Vec::new();
    if of_ports > 0 {
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        notes.push(format!(
            "{of_ports} entries are of connections to port {} of this host, of which the text has neither a listener \
             nor a socket (ss -6, or -4, which leaves out IPv4 clients of a listener for both families, too): they are \
             left out",
            ports.join(", ")
        ));
    }
    for (count, family) in of_families.into_iter().zip(["ipv4", "ipv6"]).filter(|it| it.0 > 0) {
        notes.push(format!(
            "not one socket of {family} in the text (ss -4, ss -6): {count} entries of that family are left out"
        ));
    }
    notes
}

/// Those that a socket shows to be in the text: a listener on every address of IPv6 may take both.
fn families(socket: &Socket) -> impl Iterator<Item = bool> {
    let addr = socket.local.addr();
    let other = addr == IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED);
    [addr.is_ipv4()].into_iter().chain(other.then_some(true))
}
