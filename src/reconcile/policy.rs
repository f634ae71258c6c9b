//! What ctkeep answers for: the scope, and how long a lease lasts.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::flow::FourTuple;
use crate::sockdiag::{Socket, State, States};

/// The administrator's wishes.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Local ports in scope; empty: every port that has a listener.
    pub ports: HashSet<u16>,
    /// Socket states that are guarded.
    pub states: States,
    /// Peers in scope; empty: every peer but loopback.
    pub sources: Vec<IpNet>,
    /// Peers that are out of scope whatever `sources` says.
    pub exempt: Vec<IpNet>,
    /// Timeout given to held entries; they are renewed before half of it has passed.
    pub lease: Duration,
    /// Re-insert without evidence that the connection was ever tracked.
    pub force: bool,
    /// Zone of entries that were never seen and have no siblings; looked into beside the default.
    pub zone: u16,
    /// Remove entries that no socket backs, when they have been so for this long.
    pub reap: Option<Duration>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            ports: HashSet::new(),
            states: [State::CloseWait, State::Established].into_iter().collect(),
            sources: Vec::new(),
            exempt: Vec::new(),
            lease: Duration::from_secs(60),
            force: false,
            zone: 0,
            reap: None,
        }
    }
}

impl Policy {
    /// The scope on a host where these sockets listen.
    pub fn scope(&self, listeners: &[Socket]) -> Scope {
        let ports = if self.ports.is_empty() {
            listeners.iter().map(|socket| socket.local.port()).collect()
        } else {
            self.ports.clone()
        };
        Scope { ports }
    }

    /// Whether connections of this peer are in scope.
    pub fn admits(&self, peer: IpAddr) -> bool {
        let within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&peer));
        let wanted =
            if self.sources.is_empty() { !peer.is_loopback() } else { within(&self.sources) };
        wanted && !within(&self.exempt)
    }

    /// A lease of which less than this is left is renewed.
    pub fn renew_below(&self) -> Duration {
        self.lease / 2
    }
}

/// The local ports in scope, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Ports of guarded sockets.
    pub ports: HashSet<u16>,
}

impl Scope {
    /// Whether a connection, seen from the server to its peer, is in scope.
    pub fn contains(&self, policy: &Policy, flow: FourTuple) -> bool {
        self.ports.contains(&flow.src.port()) && policy.admits(flow.dst.addr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_exempt_unless_asked_for() {
        let policy = Policy::default();
        assert!(!policy.admits("127.0.0.9".parse().unwrap()));
        assert!(!policy.admits("::1".parse().unwrap()));
        assert!(policy.admits("198.51.100.7".parse().unwrap()));
        let asked = Policy { sources: vec!["127.0.0.0/8".parse().unwrap()], ..policy };
        assert!(asked.admits("127.0.0.9".parse().unwrap()));
        assert!(!asked.admits("198.51.100.7".parse().unwrap()));
    }

    #[test]
    fn exempt_wins_over_source() {
        let policy = Policy {
            sources: vec!["198.51.100.0/24".parse().unwrap()],
            exempt: vec!["198.51.100.8/32".parse().unwrap()],
            ..Policy::default()
        };
        assert!(policy.admits("198.51.100.7".parse().unwrap()));
        assert!(!policy.admits("198.51.100.8".parse().unwrap()));
    }
}
