//! The same connections, added up for each source as a limiter would see them.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::report::Request;
use crate::reconcile::snapshot::View;
use crate::sockdiag::State;

/// One source network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The network, by the mask asked for.
    pub net: IpNet,
    /// Sockets of the server's side by state.
    pub sockets: BTreeMap<State, usize>,
    /// Sockets that are open on the server's side: ESTABLISHED or CLOSE_WAIT.
    pub held: usize,
    /// Entries that a limiter counts.
    pub counted: usize,
    /// Open sockets without a counted entry.
    pub uncounted: usize,
    /// Counted entries without a socket.
    pub stale: usize,
    /// More sockets are held than the limit allows.
    pub over_limit: bool,
}

/// Sources of these connections, those that hurt most first.
pub fn sources(views: impl IntoIterator<Item = View>, request: Request) -> Vec<Source> {
    let mut by_net: BTreeMap<IpNet, Source> = BTreeMap::new();
    for view in views {
        let net = net(view.flow.dst.addr(), request);
        let source = by_net.entry(net).or_insert_with(|| Source {
            net,
            sockets: BTreeMap::new(),
            held: 0,
            counted: 0,
            uncounted: 0,
            stale: 0,
            over_limit: false,
        });
        let counted = view.is_counted();
        source.counted += usize::from(counted);
        match view.socket {
            Some(socket) => {
                *source.sockets.entry(socket.state).or_default() += 1;
                let open = matches!(socket.state, State::Established | State::CloseWait);
                source.held += usize::from(open);
                source.uncounted += usize::from(open && !counted);
            }
            None => source.stale += usize::from(counted),
        }
    }
    let mut all: Vec<_> = by_net.into_values().collect();
    for source in &mut all {
        source.over_limit =
            request.limit.is_some_and(|limit| source.held > usize::try_from(limit).unwrap_or(0));
    }
    all.sort_by_key(|source| {
        (Reverse(source.over_limit), Reverse(source.uncounted), Reverse(source.held), source.net)
    });
    all
}

fn net(addr: IpAddr, request: Request) -> IpNet {
    let bits = if addr.is_ipv4() { request.mask } else { request.mask6 };
    IpNet::new(addr, bits).unwrap_or_else(|_| IpNet::from(addr)).trunc()
}
