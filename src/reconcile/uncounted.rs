//! Open connections that limits do not count, since their lists are new: found, and waiting for
//! their turn to be shown to the limit. Pure.
//!
//! Sockets and entries of such connections agree, so no sweep would find them: what is known comes
//! from the rules (docs/reloads.md).

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;

use super::snapshot::View;
use crate::conntrack::Entry;
use crate::firewall::Hook;
use crate::firewall::limits::LimitRule;
use crate::firewall::lists::{Anew, Loss};
use crate::flow::Connection;
use crate::sockdiag::{Lookup, Socket};

/// A list of more connections is long: the kernel walks it at each nudge that meets an entry, and beyond
/// this for half a second in all.
const LONG: usize = 2048;

/// Limits whose lists are new, and what is open of theirs.
#[derive(Clone, Debug, Default)]
pub struct Uncounted {
    /// Not gone through yet.
    new: Vec<Anew>,
    /// Whose connections are waiting.
    current: Vec<Anew>,
    /// As many as there are open sockets at most.
    waiting: VecDeque<Lookup>,
    /// Of which of `current` the list of which sources gets long; `None` are all sources together.
    long: HashSet<(usize, Option<IpNet>)>,
    /// Lists were made anew while others were shown what is open: they have got some of it.
    is_begun: bool,
}

impl Uncounted {
    /// The lists of these limits are new. One of the same place takes the place of the one before:
    /// many reloads in a row are no more than one.
    pub fn add(&mut self, anew: impl IntoIterator<Item = Anew>) {
        self.is_begun |= !self.waiting.is_empty();
        for one in anew {
            let is_same = |known: &Anew| {
                known.rule.place() == one.rule.place() && known.rule.matches == one.rule.matches
            };
            match self.new.iter_mut().find(|known| is_same(known)) {
                Some(known) => *known = one,
                None => self.new.push(one),
            }
        }
    }

    /// Whether there are limits that have not been gone through.
    pub fn is_new(&self) -> bool {
        !self.new.is_empty()
    }

    /// Whether connections are waiting.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Goes through these open sockets: those that one of the new limits may be for are handed to
    /// `found`, and wait.
    pub fn find(&mut self, sockets: &[Socket], mut found: impl FnMut(&Socket, Loss)) {
        self.current = std::mem::take(&mut self.new);
        let mut lists: HashMap<_, usize> = HashMap::new();
        // As they were accepted, or came: so their entries stand in memory, more or less, and the kernel
        // walks through a list the faster for it.
        let mut in_order: Vec<_> = sockets.iter().collect();
        in_order.sort_by_key(|socket| (socket.inode, socket.remote.port()));
        for socket in in_order {
            let current = self.current.iter().enumerate();
            let mut meant = current.filter(|(_, one)| may_be_for(&one.rule, socket)).peekable();
            if let Some((_, Anew { loss, .. })) = meant.peek() {
                found(socket, *loss);
                self.waiting.push_back(Lookup::from(socket));
            }
            for (index, one) in meant {
                *lists.entry((index, net(&one.rule, socket.remote.addr()))).or_default() += 1;
            }
        }
        let is_begun = std::mem::take(&mut self.is_begun);
        lists.retain(|_, held| *held > LONG && !is_begun);
        self.long = lists.into_keys().collect();
    }

    /// Whether a list that has nothing yet gets long, and this peer's connections with it.
    pub fn is_list_long(&self, peer: IpAddr) -> bool {
        !self.long.is_empty()
            && self
                .current
                .iter()
                .enumerate()
                .any(|(index, one)| self.long.contains(&(index, net(&one.rule, peer))))
    }

    /// This limit does not count these, though it was shown them.
    pub fn again(&mut self, rule: &LimitRule, sockets: &[Socket]) {
        if !self.current.iter().any(|one| one.rule == *rule) {
            if self.waiting.is_empty() {
                self.current.clear();
                self.long.clear();
            }
            self.current.push(Anew { rule: rule.clone(), loss: Loss::Unknown });
        }
        self.waiting.extend(sockets.iter().map(Lookup::from));
    }

    /// The next ones in turn, at most so many.
    pub fn next(&mut self, most: usize) -> Vec<Lookup> {
        let most = most.min(self.waiting.len());
        self.waiting.drain(..most).collect()
    }

    /// The next ones in turn, at most so many, and one of each source.
    pub fn next_of_each(&mut self, most: usize) -> Vec<Lookup> {
        let mut sources = HashSet::new();
        let mut taken = Vec::new();
        for _ in 0..most.min(self.waiting.len()) {
            let Some(lookup) = self.waiting.pop_front() else { break };
            if sources.insert(lookup.connection.remote.addr()) {
                taken.push(lookup);
            } else {
                self.waiting.push_back(lookup);
            }
        }
        taken
    }

    /// What has become of the list of this limit, if it is one of those gone through.
    pub fn loss(&self, rule: &LimitRule) -> Option<Loss> {
        self.current.iter().find(|one| one.rule == *rule).map(|one| one.loss)
    }

    /// Whether a list may have some of what is waiting already.
    pub fn may_be_known(&self) -> bool {
        self.current.iter().any(|one| matches!(one.loss, Loss::Unknown | Loss::Wider))
    }

    /// Whether one of the limits gone through is for this connection, as its entry shows.
    pub fn concerns(&self, view: &View) -> bool {
        let Some(entry) = view.entry else { return false };
        self.current.iter().any(|one| is_for(&one.rule, view.connection, &entry))
    }
}

/// The sources that a limit counts together with this one at most; `None` are all.
pub(super) fn net(rule: &LimitRule, source: IpAddr) -> Option<IpNet> {
    let bits = rule.source_prefix()?.min(if source.is_ipv4() { 32 } else { 128 });
    IpNet::new(source, bits).ok().map(|net| net.trunc())
}

/// As far as the socket shows: rules before address translation see another port, and rules for what is
/// forwarded another client than the socket of a container where a masquerade is behind them.
pub(super) fn may_be_for(rule: &LimitRule, socket: &Socket) -> bool {
    let (peer, port) = (socket.remote.addr(), socket.local.port());
    let is_forwarded = rule.hook == Hook::Forward && rule.matches.ports.contains(port);
    rule.family.covers(peer.is_ipv4()) && (rule.is_before_nat() || is_forwarded)
        || rule.covers(peer, port)
}

/// Whether a limit is for a connection with this entry.
pub fn is_for(rule: &LimitRule, connection: Connection, entry: &Entry) -> bool {
    let port = if rule.is_before_nat() { entry.orig.dst.port() } else { connection.local.port() };
    rule.covers(entry.orig.src.addr(), port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::Zone;
    use crate::firewall::{Family, parse_saved};
    use crate::firewall::{Ruleset, limits::Limiter};
    use crate::flow::FourTuple;
    use crate::sockdiag::{Cookie, State};

    fn limit(table: &str, chain: &str, port: u16) -> Anew {
        let text = format!(
            "*{table}\n:{chain} ACCEPT [0:0]\n-A {chain} -p tcp -m tcp --dport {port} \
             --tcp-flags FIN,SYN,RST,ACK SYN -m connlimit --connlimit-above 3 \
             --connlimit-mask 32 --connlimit-saddr -j DROP\nCOMMIT\n"
        );
        let chains = parse_saved(&text, Family::Ip);
        let mut found = Limiter::of(&Ruleset { chains, ..Ruleset::default() }).rules;
        Anew { rule: found.pop().unwrap(), loss: Loss::New }
    }

    fn socket(local: &str, cookie: u64) -> Socket {
        Socket {
            local: local.parse().unwrap(),
            remote: "198.51.100.7:4000".parse().unwrap(),
            state: State::Established,
            cookie: Cookie(cookie),
            inode: 1,
            uid: 0,
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        }
    }

    fn found(uncounted: &mut Uncounted, sockets: &[Socket]) -> Vec<u64> {
        let mut cookies = Vec::new();
        uncounted.find(sockets, |socket, _| cookies.push(socket.cookie.0));
        cookies
    }

    #[test]
    fn only_connections_that_the_limit_is_for_are_found() {
        let mut uncounted = Uncounted::default();
        uncounted.add([limit("filter", "INPUT", 80)]);
        let sockets = [socket("192.0.2.1:80", 1), socket("192.0.2.1:81", 2)];
        assert_eq!(found(&mut uncounted, &sockets), [1]);
        assert!(uncounted.is_waiting() && !uncounted.is_new());
        assert_eq!(uncounted.next(10).len(), 1);
        assert!(!uncounted.is_waiting());
        assert!(found(&mut uncounted, &sockets).is_empty(), "gone through");
    }

    #[test]
    fn a_limit_before_translation_is_for_the_port_that_the_client_asked_for() {
        let mut uncounted = Uncounted::default();
        uncounted.add([limit("mangle", "PREROUTING", 80)]);
        let socket = socket("10.0.0.2:8080", 1);
        assert_eq!(found(&mut uncounted, &[socket]), [1]);
        let view = |asked: &str| {
            let plain = Entry::plain(socket.connection().received(), Zone::default());
            let orig = FourTuple::new(socket.remote, asked.parse().unwrap());
            let entry = Some(Entry { orig, ..plain });
            View { connection: socket.connection(), socket: Some(socket), entry }
        };
        assert!(uncounted.concerns(&view("192.0.2.1:80")));
        assert!(!uncounted.concerns(&view("192.0.2.1:81")));
    }

    #[test]
    fn a_limit_for_what_is_forwarded_sees_the_client_before_a_masquerade() {
        let mut uncounted = Uncounted::default();
        let text = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD ! -s 198.51.100.0/24 -p tcp -m tcp \
                    --dport 8080 -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n";
        let chains = parse_saved(text, Family::Ip);
        let rule = Limiter::of(&Ruleset { chains, ..Ruleset::default() }).rules.pop().unwrap();
        uncounted.add([Anew { rule, loss: Loss::New }]);
        let sockets = [socket("10.0.0.2:8080", 1), socket("10.0.0.2:8081", 2)];
        assert_eq!(found(&mut uncounted, &sockets), [1]);
        let connection = sockets[0].connection();
        let view = |client: &str| {
            let plain = Entry::plain(connection.received(), Zone::default());
            let orig = FourTuple::new(client.parse().unwrap(), connection.local);
            let entry = Some(Entry { orig, ..plain });
            View { connection, socket: Some(sockets[0]), entry }
        };
        assert!(uncounted.concerns(&view("203.0.113.9:4000")));
        assert!(!uncounted.concerns(&view("198.51.100.7:4000")), "a client of its own network");
    }

    #[test]
    fn what_may_be_known_can_be_shown_source_by_source() {
        let mut uncounted = Uncounted::default();
        uncounted.add([limit("filter", "INPUT", 80)]);
        let remote = |octet: u8, port: u16| format!("198.51.100.{octet}:{port}").parse().unwrap();
        let of = |octet: u8, port: u16| Socket {
            remote: remote(octet, port),
            ..socket("192.0.2.1:80", u64::from(port))
        };
        let sockets = [of(7, 1), of(7, 2), of(8, 3), of(7, 4)];
        assert_eq!(found(&mut uncounted, &sockets).len(), 4);
        assert!(!uncounted.may_be_known(), "the list is new");
        let ports = |lookups: Vec<Lookup>| -> Vec<u16> {
            lookups.iter().map(|lookup| lookup.connection.remote.port()).collect()
        };
        assert_eq!(ports(uncounted.next_of_each(10)), [1, 3]);
        assert_eq!(ports(uncounted.next_of_each(10)), [2]);
        assert_eq!(ports(uncounted.next_of_each(10)), [4]);
        assert!(!uncounted.is_waiting());
    }

    #[test]
    fn a_long_list_is_that_of_one_source() {
        let mut uncounted = Uncounted::default();
        uncounted.add([limit("filter", "INPUT", 80)]);
        let of = |octet: u8, port: u16| Socket {
            remote: format!("198.51.100.{octet}:{port}").parse().unwrap(),
            ..socket("192.0.2.1:80", u64::from(octet) << 16 | u64::from(port))
        };
        let many = (1..=2049).map(|port| of(7, port));
        let few = (1..=2048).map(|port| of(8, port));
        let sockets: Vec<_> = many.chain(few).collect();
        assert_eq!(found(&mut uncounted, &sockets).len(), 4097);
        let is_long = |octet: u8| uncounted.is_list_long(of(octet, 1).remote.addr());
        assert_eq!((is_long(7), is_long(8)), (true, false));
    }

    #[test]
    fn they_are_shown_as_they_came() {
        let mut uncounted = Uncounted::default();
        uncounted.add([limit("filter", "INPUT", 80)]);
        let of = |inode: u32, port: u16| Socket {
            remote: format!("198.51.100.7:{port}").parse().unwrap(),
            inode,
            ..socket("192.0.2.1:80", u64::from(inode) << 16 | u64::from(port))
        };
        let sockets = [of(9, 1), of(7, 3), of(0, 5), of(0, 4), of(8, 2)];
        assert_eq!(found(&mut uncounted, &sockets).len(), 5);
        let ports = uncounted.next(5).into_iter().map(|lookup| lookup.connection.remote.port());
        assert_eq!(ports.collect::<Vec<_>>(), [4, 5, 3, 2, 1]);
    }

    #[test]
    fn many_reloads_in_a_row_are_one() {
        let mut uncounted = Uncounted::default();
        for _ in 0..100 {
            uncounted.add([limit("filter", "INPUT", 80), limit("filter", "INPUT", 443)]);
        }
        assert_eq!(uncounted.new.len(), 2);
    }
}
