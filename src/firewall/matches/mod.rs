//! Which opening packets a rule, or a path of rules, is for: what can be said of it in words. Pure.

mod asked;
pub(super) mod words;

use std::fmt;

use ipnet::IpNet;

use super::Ports;

/// `ct state` bits, the same in nft and in xt's conntrack and state matches.
pub const STATE_ESTABLISHED: u32 = 1 << 1;
/// See [`STATE_ESTABLISHED`].
pub const STATE_NEW: u32 = 1 << 3;

/// Which packets a rule, or a path of rules, is for. Empty: for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    /// IPv4 only (`true`) or IPv6 only (`false`).
    pub ipv4: Option<bool>,
    /// Destination ports, as the rule sees them.
    pub ports: Ports,
    /// Destination ports as the client asked for them.
    pub asked: Ports,
    /// Names of incoming interfaces; empty: any.
    pub interfaces: Vec<String>,
    /// TCP alone, by name: what opens a connection is taken for TCP in any case.
    pub tcp: bool,
    /// `ct state`: one of these bits.
    pub states: Option<u32>,
    /// Or, whatever its state, of a connection that is translated (`--ctstate DNAT`).
    pub or_translated: bool,
    /// Packets with SYN only (`--syn`, `tcp flags syn`).
    pub syn: bool,
    /// All packets without SYN and no others (`! --syn`).
    pub without_syn: bool,
    /// Source networks: inside, or (`false`) outside of it; all must hold.
    pub sources: Vec<(IpNet, bool)>,
    /// Destination networks likewise.
    pub destinations: Vec<(IpNet, bool)>,
    /// What else it is asked, in words.
    pub others: Vec<String>,
    /// A rate or a quota: only some of those packets.
    pub is_rated: bool,
    /// No SYN of TCP.
    pub never: bool,
}

/// What a chain leaves to its rules behind one that sends some packets back.
const SENT_BACK: &str = "not sent back before";

impl Match {
    /// Packets that pass both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let both = |a: Option<u32>, b: Option<u32>| match (a, b) {
            (Some(a), Some(b)) => Some(a & b),
            (one, another) => one.or(another),
        };
        let join = |a: &[(IpNet, bool)], b: &[(IpNet, bool)]| {
            let mut all = a.to_vec();
            all.extend(b.iter().filter(|net| !a.contains(net)));
            all
        };
        let mut others = self.others.clone();
        others.extend(other.others.iter().filter(|what| !self.others.contains(what)).cloned());
        let interfaces = common(&self.interfaces, &other.interfaces);
        let ports = self.ports.and(&other.ports);
        let asked = self.asked.and(&other.asked);
        let (states, or_translated) = match (self.or_translated, other.or_translated) {
            (true, false) if other.states.is_none() => (self.states, true),
            (false, true) if self.states.is_none() => (other.states, true),
            // Of those in the one's states some may be translated.
            (true, false) | (false, true) => {
                others.push("translated".to_owned());
                (if self.or_translated { other.states } else { self.states }, false)
            }
            (is, _) => (both(self.states, other.states), is),
        };
        let sources = join(&self.sources, &other.sources);
        let destinations = join(&self.destinations, &other.destinations);
        let families = matches!((self.ipv4, other.ipv4), (Some(a), Some(b)) if a != b);
        let never = self.never
            || other.never
            || families
            || self.syn && other.without_syn
            || self.without_syn && other.syn
            || ports.is_empty()
            || asked.is_empty()
            || states == Some(0) && !or_translated
            || interfaces.is_none()
            || is_empty(&sources)
            || is_empty(&destinations);
        Self {
            ipv4: self.ipv4.or(other.ipv4),
            ports,
            asked,
            interfaces: interfaces.unwrap_or_default(),
            tcp: self.tcp || other.tcp,
            states,
            or_translated,
            syn: self.syn || other.syn,
            without_syn: self.without_syn || other.without_syn,
            sources,
            destinations,
            others,
            is_rated: self.is_rated || other.is_rated,
            never,
        }
    }

    /// Whether packets of other protocols than TCP pass it, too.
    pub fn is_for_all_protocols(&self) -> bool {
        !self.tcp && !self.syn && !self.without_syn
    }

    /// Whether it is for the same TCP packets.
    pub fn is_same_of_tcp(&self, other: &Self) -> bool {
        *self == Self { tcp: self.tcp, ..other.clone() }
    }

    /// Whether all packets of the other pass it, but for their states.
    pub fn covers(&self, other: &Self) -> bool {
        !self.never
            && !self.or_translated
            && !self.is_rated
            && self.ipv4.is_none_or(|ipv4| other.ipv4 == Some(ipv4))
            && self.ports.and(&other.ports) == other.ports
            && self.asked.and(&other.asked) == other.asked
            && (self.interfaces.is_empty() || self.interfaces == other.interfaces)
            && self.sources.iter().all(|net| other.sources.contains(net))
            && self.destinations.iter().all(|net| other.destinations.contains(net))
            && self.others.iter().all(|what| other.others.contains(what))
    }

    /// Packets that pass it and not the other, of those that open connections.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        if self.and(other).never || !other.may_open() {
            return self.clone();
        }
        let mut left = self.clone();
        let any_port = Self { ports: Ports::default(), ..other.clone() };
        let any_source = Self { sources: Vec::new(), ..other.clone() };
        match other.sources.as_slice() {
            _ if any_port.covers(self) => left.ports = left.ports.and(&other.ports.not()),
            [(net, true)] if any_source.covers(self) => left.sources.push((*net, false)),
            _ if left.others.iter().any(|what| what == SENT_BACK) => {}
            _ => left.others.push(SENT_BACK.to_owned()),
        }
        left
    }

    /// Whether something else narrows it further.
    pub fn is_narrowed(&self) -> bool {
        !self.others.is_empty() || self.or_translated
    }

    /// Whether it is for nothing but packets that come in by the loopback device.
    pub fn is_loopback(&self) -> bool {
        !self.interfaces.is_empty() && self.interfaces.iter().all(|name| name == "lo")
    }

    /// Whether packets of established connections pass it, and opening ones do not.
    pub fn is_established(&self) -> bool {
        self.without_syn
            || self
                .states
                .is_some_and(|bits| bits & STATE_ESTABLISHED != 0 && bits & STATE_NEW == 0)
    }

    /// Whether packets of open connections pass it: a stale RST is one.
    pub fn is_for_all(&self) -> bool {
        !self.syn && self.states.is_none_or(|bits| bits & STATE_ESTABLISHED != 0)
    }

    /// Whether a packet that opens a tracked connection may pass it.
    pub fn may_open(&self) -> bool {
        !self.without_syn
            && (self.or_translated || self.states.is_none_or(|bits| bits & STATE_NEW != 0))
    }

    /// Whether no client, destination and interface is left out.
    pub fn is_for_everybody(&self) -> bool {
        !self.is_narrowed()
            && !self.never
            && self.interfaces.is_empty()
            && self.sources.is_empty()
            && self.destinations.is_empty()
    }

    /// What its words tell of it.
    #[must_use]
    pub fn told(&self) -> Self {
        Self {
            states: None,
            tcp: false,
            syn: false,
            without_syn: false,
            is_rated: false,
            ipv4: None,
            ..self.clone()
        }
    }

    /// Ports as clients know them.
    pub fn shown_ports(&self) -> &Ports {
        if self.asked.is_all() { &self.ports } else { &self.asked }
    }
}

impl fmt::Display for Match {
    /// ` to port 80 of 192.0.2.1/32, from 203.0.113.0/24, by eth0, if mark`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shown_ports() {
            ports if ports.is_all() => f.write_str(" to any port")?,
            ports => write!(f, " to port {ports}")?,
        }
        let list = |f: &mut fmt::Formatter<'_>, nets: &[(IpNet, bool)], inside: &str| {
            nets.iter().try_for_each(|(net, is)| {
                write!(f, "{}{net}", if *is { inside } else { ", not of " })
            })
        };
        list(f, &self.destinations, " of ")?;
        let outside = |(net, is): &(IpNet, bool)| (*net, *is);
        for (net, is) in self.sources.iter().map(outside) {
            write!(f, "{}{net}", if is { ", from " } else { ", not from " })?;
        }
        if !self.interfaces.is_empty() {
            write!(f, ", by {}", self.interfaces.join(" or "))?;
        }
        if !self.others.is_empty() {
            write!(f, ", if {}", self.others.join(" and "))?;
        }
        if self.or_translated {
            f.write_str(", if translated")?;
        }
        Ok(())
    }
}

/// Interfaces that both lists have; empty lists have all, `None` is none.
fn common(one: &[String], other: &[String]) -> Option<Vec<String>> {
    if one.is_empty() || other.is_empty() {
        return Some([one, other].concat());
    }
    let begins = |name: &str, pattern: &str| {
        pattern.strip_suffix('*').is_some_and(|start| name.trim_end_matches('*').starts_with(start))
    };
    let both = |a: &String, b: &String| match () {
        () if a == b || begins(a, b) => Some(a.clone()),
        () if begins(b, a) => Some(b.clone()),
        () => None,
    };
    let all: Vec<String> =
        one.iter().flat_map(|a| other.iter().filter_map(move |b| both(a, b))).collect();
    (!all.is_empty()).then_some(all)
}

/// Whether no address can meet all of these.
fn is_empty(nets: &[(IpNet, bool)]) -> bool {
    nets.iter().any(|(net, is)| {
        nets.iter().any(|(other, also)| match (is, also) {
            (true, true) => !net.contains(other) && !other.contains(net),
            (true, false) => other.contains(net),
            _ => false,
        })
    })
}
