//! What ctkeep answers for: the scope, and how long a lease lasts.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::conntrack::Entry;
use crate::firewall::Ruleset;
use crate::firewall::published::is_published;
use crate::flow::{Connection, Endpoint};
use crate::sockdiag::{Socket, States};

/// The administrator's wishes.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Ports in scope, of sockets or as clients use them; empty: every port that has a listener.
    pub ports: HashSet<u16>,
    /// Socket states that are guarded, as far as an application has the socket.
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
    /// A port of our own that is not guarded for its listener alone.
    pub own_port: Option<u16>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            ports: HashSet::new(),
            states: States::open(),
            sources: Vec::new(),
            exempt: Vec::new(),
            lease: Duration::from_secs(60),
            force: false,
            zone: 0,
            reap: None,
            own_port: None,
        }
    }
}

impl Policy {
    /// The scope on a host where these sockets listen, as far as that shows it: what the named ports
    /// lead to, entries show ([`Scope::learn`]).
    pub fn scope(&self, listeners: &[Socket]) -> Scope {
        let ports = if self.ports.is_empty() {
            let ports = listeners.iter().map(|socket| socket.local.port());
            ports.filter(|port| Some(*port) != self.own_port).collect()
        } else {
            self.ports.clone()
        };
        Scope { ports, published: HashMap::new() }
    }

    /// Named ports that nothing listens on and that nothing leads elsewhere.
    pub fn unheard(&self, listeners: &[Socket], scope: &Scope, rules: &Ruleset) -> Vec<u16> {
        let is_heard = |port: u16| {
            listeners.iter().any(|socket| socket.local.port() == port)
                || scope.published.values().any(|asked| *asked == port)
                || is_published(rules, port)
        };
        let mut unheard: Vec<_> = self.ports.iter().copied().filter(|it| !is_heard(*it)).collect();
        unheard.sort_unstable();
        unheard
    }

    /// Whether connections of this peer are in scope.
    pub fn admits(&self, peer: IpAddr) -> bool {
        let within = |nets: &[IpNet]| nets.iter().any(|net| net.contains(&peer));
        let wanted =
            if self.sources.is_empty() { !peer.is_loopback() } else { within(&self.sources) };
        wanted && !within(&self.exempt)
    }

    /// Whether a socket is in a guarded state and takes a slot.
    pub fn guards(&self, socket: &Socket) -> bool {
        self.states.contains(socket.state) && socket.takes_a_slot()
    }

    /// A lease of which less than this is left is renewed.
    pub fn renew_below(&self) -> Duration {
        self.lease / 2
    }
}

/// Endpoints behind published ports that are known: those of all containers of a large host.
const PUBLISHED: usize = 65_536;

/// The ports and sockets in scope, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Ports of guarded sockets.
    pub ports: HashSet<u16>,
    /// Endpoints of guarded sockets that have another port, and the named one that clients use.
    pub published: HashMap<Endpoint, u16>,
}

impl Scope {
    /// Whether a connection is in scope.
    pub fn contains(&self, policy: &Policy, connection: Connection) -> bool {
        (self.ports.contains(&connection.local.port())
            || self.published.contains_key(&connection.local))
            && policy.admits(connection.remote.addr())
    }

    /// Whether sockets of this port are in scope, at some address at least.
    pub fn has_port(&self, port: u16) -> bool {
        self.ports.contains(&port) || self.published.keys().any(|local| local.port() == port)
    }

    /// Which endpoint a named port leads to, by an entry, where that has another port.
    pub fn led(&self, policy: &Policy, entry: &Entry) -> Option<(Endpoint, u16)> {
        let (asked, local) = (entry.orig.dst, entry.reply.src);
        let is_led = policy.ports.contains(&asked.port()) && !self.ports.contains(&local.port());
        is_led.then_some((local, asked.port()))
    }

    /// Learns it.
    pub fn learn(&mut self, policy: &Policy, entry: &Entry) {
        if self.published.len() < PUBLISHED {
            self.published.extend(self.led(policy, entry));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::flow::Endpoint;
    use crate::sockdiag::{Cookie, State};

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
    fn our_own_port_is_in_scope_only_when_named() {
        let listener = |port| Socket {
            local: Endpoint::new(Ipv4Addr::LOCALHOST.into(), port),
            remote: Endpoint::new(Ipv4Addr::UNSPECIFIED.into(), 0),
            state: State::Listen,
            inode: 1,
            uid: 0,
            cookie: Cookie(u64::from(port)),
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        };
        let listeners = [listener(80), listener(9815)];
        let policy = Policy { own_port: Some(9815), ..Policy::default() };
        assert_eq!(policy.scope(&listeners).ports, HashSet::from([80]));
        let named = Policy { ports: HashSet::from([9815]), ..policy };
        assert_eq!(named.scope(&listeners).ports, HashSet::from([9815]));
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
