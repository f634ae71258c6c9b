//! Sources that hold more sockets than the administrator wants: who they are, and since when they are
//! in a set for rules of his. Pure: time is an argument.
//!
//! [`sets`] puts them into nftables sets.

pub mod sets;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::sockdiag::{Socket, States};

/// Sources of one overload that are in a set at once: as many as fit into a usual set. The others
/// wait.
const MOST: usize = 65_535;
/// An element is renewed when this share of its time has passed: it is there for at least the rest
/// after its source was last seen over.
const RENEW: u32 = 10;

/// An nftables set.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// `inet`, `ip`, `ip6`, ...
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its name.
    pub set: String,
}

/// How much is too much, and where it is written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overload {
    /// Local ports whose sockets count together; empty: all that are guarded.
    pub ports: BTreeSet<u16>,
    /// A source may hold so many.
    pub above: u64,
    /// Sockets in these states count.
    pub states: States,
    /// Prefix length of IPv4 sources.
    pub mask: u8,
    /// Prefix length of IPv6 sources.
    pub mask6: u8,
    /// A source stays in the set for so long after it was last seen over.
    pub time: Duration,
    /// Sets that it is put into, each for its family; empty: `over4` and `over6` of `inet ctkeep`.
    pub sets: Vec<Place>,
}

/// A source over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over {
    /// The source.
    pub net: IpNet,
    /// The port at which it holds most.
    pub port: u16,
    /// The sockets that it holds.
    pub open: u64,
}

impl Overload {
    /// The sources over it among these sockets, as far as `counts` admits the socket.
    pub fn over(&self, sockets: &[Socket], counts: impl Fn(&Socket) -> bool) -> Vec<Over> {
        let mut sources: HashMap<IpNet, HashMap<u16, u64>> = HashMap::new();
        let is_of_it = |socket: &&Socket| {
            let port = socket.local.port();
            self.states.contains(socket.state)
                && socket.takes_a_slot()
                && (self.ports.is_empty() || self.ports.contains(&port))
                && counts(socket)
        };
        for socket in sockets.iter().filter(is_of_it) {
            let ports = sources.entry(self.net(socket.remote.addr())).or_default();
            *ports.entry(socket.local.port()).or_default() += 1;
        }
        let over = |(net, ports): (IpNet, HashMap<u16, u64>)| {
            let open = ports.values().sum();
            let (port, _) = ports.into_iter().max_by_key(|(port, open)| (*open, *port))?;
            (open > self.above).then_some(Over { net, port, open })
        };
        let mut all: Vec<_> = sources.into_iter().filter_map(over).collect();
        all.sort_by_key(|over| (std::cmp::Reverse(over.open), over.net));
        all
    }

    fn net(&self, addr: IpAddr) -> IpNet {
        let mask = if addr.is_ipv4() { self.mask } else { self.mask6 };
        IpNet::new(addr, mask).unwrap_or_else(|_| IpNet::from(addr)).trunc()
    }

    /// Whether it puts whole networks of this family into its sets.
    pub fn is_of_networks(&self, is_ipv4: bool) -> bool {
        if is_ipv4 { self.mask < 32 } else { self.mask6 < 128 }
    }
}

/// The sources of one overload that are in its sets, and until when.
#[derive(Clone, Debug, Default)]
pub struct Marked(HashMap<IpNet, Instant>);

/// Changes that are due in the sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// New there.
    pub enter: Vec<Over>,
    /// There for longer.
    pub renew: Vec<IpNet>,
    /// Not there any more.
    pub leave: Vec<IpNet>,
}

impl Marked {
    /// Takes in who is over now, and says what follows for the sets.
    pub fn step(&mut self, over: Vec<Over>, time: Duration, now: Instant) -> Changes {
        let mut changes = Changes::default();
        let still: HashSet<IpNet> = over.iter().map(|over| over.net).collect();
        self.0.retain(|net, until| {
            let stays = still.contains(net) || *until > now;
            if !stays {
                changes.leave.push(*net);
            }
            stays
        });
        for over in over {
            let is_new = !self.0.contains_key(&over.net);
            if is_new && self.0.len() >= MOST {
                continue;
            }
            let until = self.0.entry(over.net).or_insert(now);
            if is_new {
                *until = now + time;
                changes.enter.push(over);
            } else if *until < now + time - time / RENEW {
                *until = now + time;
                changes.renew.push(over.net);
            }
        }
        changes
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether this source is one of them.
    pub fn has(&self, net: IpNet) -> bool {
        self.0.contains_key(&net)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A source could not be put into the sets: it is new the next time.
    pub fn forget(&mut self, net: IpNet) {
        self.0.remove(&net);
    }

    /// All of them.
    pub fn into_nets(self) -> impl Iterator<Item = IpNet> {
        self.0.into_keys()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Endpoint;
    use crate::sockdiag::{Cookie, State};

    fn socket(peer: &str, local: u16, state: State) -> Socket {
        let remote: Endpoint = peer.parse().unwrap();
        Socket {
            local: Endpoint::new("192.0.2.1".parse().unwrap(), local),
            remote,
            state,
            inode: 1,
            uid: 0,
            cookie: Cookie(u64::from(remote.port())),
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        }
    }

    fn overload(above: u64) -> Overload {
        Overload {
            ports: [80, 443].into(),
            above,
            states: [State::Established, State::CloseWait].into_iter().collect(),
            mask: 32,
            mask6: 64,
            time: Duration::from_secs(100),
            sets: Vec::new(),
        }
    }

    #[test]
    fn a_source_is_over_by_its_sockets_in_these_states_at_all_ports_together() {
        let all = [
            socket("198.51.100.7:1", 80, State::Established),
            socket("198.51.100.7:2", 443, State::CloseWait),
            socket("198.51.100.7:3", 443, State::Established),
            // None of its business.
            socket("198.51.100.7:4", 443, State::FinWait2),
            socket("198.51.100.7:5", 22, State::Established),
            socket("198.51.100.8:1", 80, State::Established),
            socket("[2001:db8::1]:1", 80, State::Established),
            socket("[2001:db8::2]:2", 80, State::Established),
            socket("[2001:db8::3]:3", 80, State::Established),
        ];
        let over = overload(2).over(&all, |_| true);
        let found: Vec<_> = over.iter().map(|it| (it.net.to_string(), it.port, it.open)).collect();
        let wanted = [("198.51.100.7/32".to_owned(), 443, 3), ("2001:db8::/64".to_owned(), 80, 3)];
        assert_eq!(found, wanted);
        assert_eq!(overload(3).over(&all, |_| true), []);
        assert_eq!(overload(2).over(&all, |it| it.remote.addr().is_ipv6()).len(), 1);
    }

    #[test]
    fn a_source_leaves_when_its_time_is_over_and_its_sockets_are_gone() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let time = Duration::from_secs(100);
        let net: IpNet = "198.51.100.7/32".parse().unwrap();
        let over = vec![Over { net, port: 80, open: 11 }];
        let mut marked = Marked::default();
        let entered = marked.step(over.clone(), time, at(0));
        assert_eq!(entered, Changes { enter: over.clone(), ..Changes::default() });
        assert_eq!(marked.step(over.clone(), time, at(10)), Changes::default());
        let renewed = Changes { renew: vec![net], ..Changes::default() };
        assert_eq!(marked.step(over.clone(), time, at(11)), renewed);
        // Gone at once: it stays for its time.
        assert_eq!(marked.step(Vec::new(), time, at(110)), Changes::default());
        let left = Changes { leave: vec![net], ..Changes::default() };
        assert_eq!(marked.step(Vec::new(), time, at(112)), left);
        assert!(marked.is_empty());
        assert_eq!(marked.step(over, time, at(113)).enter.len(), 1, "it is new again");
    }
}
