//! Which connections the rules keep out of conntrack, in which zone they keep the others, and of which
//! conntrack surely has an entry. Pure.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use super::limits::LimitRule;
use super::packet::Syn;
use super::play::Player;
use super::{Chain, Hook, Outcome, Ruleset, Step};
use crate::flow::{Connection, Endpoint};

/// What the rules say of conntrack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// Some keep connections out of it (`notrack`, `CT --notrack`), or in a zone (`ct zone set`,
    /// `CT --zone`).
    Narrowed {
        /// All rules.
        rules: Ruleset,
        /// Some set a zone.
        sets_zones: bool,
    },
    /// None does. These limits make conntrack see the packets of their families: it has an entry of each
    /// connection that they are for.
    Whole {
        /// The limits.
        limits: Vec<LimitRule>,
        /// No rule translates what comes in: the entries have the addresses of the sockets.
        is_plain: bool,
    },
}

/// A connection as its peer opened it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// From where.
    pub peer: Endpoint,
    /// The endpoint that it asked for.
    pub asked: Endpoint,
    /// The endpoint that it got to: another one after destination NAT.
    pub socket: Endpoint,
}

impl Tracking {
    /// What these rules, with these limits among them, say; `None` where they say nothing.
    pub fn of(
        chains: impl IntoIterator<Item = Chain>,
        limits: impl FnOnce(&Ruleset) -> Vec<LimitRule>,
    ) -> Option<Self> {
        let chains: Vec<_> = chains.into_iter().collect();
        // The player passes over ours, too: they keep no connection from conntrack.
        let others = || chains.iter().filter(|chain| !chain.is_ours);
        let any = |wanted: fn(&Step) -> bool| others().flat_map(steps).any(wanted);
        let has_notrack = any(|step| *step == Step::Notrack);
        let sets_zones = any(|step| matches!(step, Step::SetZone(_)));
        let rules = Ruleset { chains, unread: Vec::new() };
        if has_notrack || sets_zones {
            return Some(Self::Narrowed { rules, sets_zones });
        }
        let limits = limits(&rules);
        let is_plain = !rules.chains.iter().any(translates_what_comes_in);
        (!limits.is_empty()).then_some(Self::Whole { limits, is_plain })
    }

    /// Whether conntrack surely has, or had, an entry of this connection, and a plain one.
    pub fn is_surely_plain(&self, connection: Connection) -> bool {
        matches!(self, Self::Whole { is_plain: true, .. }) && self.is_surely_tracked(connection)
    }

    /// Whether conntrack surely has, or had, an entry of this connection, whose addresses nothing translates.
    pub fn is_surely_tracked(&self, connection: Connection) -> bool {
        let Self::Whole { limits, .. } = self else { return false };
        let Connection { local, remote } = connection;
        limits.iter().any(|limit| !limit.matches.never && limit.covers(remote.addr(), local.port()))
    }

    /// Whether conntrack has an entry of each of these connections, by their SYNs; `None` where that
    /// cannot be told.
    pub fn of_each(
        &self,
        connections: impl IntoIterator<Item = Opened>,
    ) -> impl Iterator<Item = Option<bool>> {
        // Made when there is a connection to ask for: it looks at every rule.
        let mut player = None;
        connections.into_iter().map(move |opened| {
            let Self::Narrowed { rules, .. } = self else { return Some(true) };
            let player = player.get_or_insert_with(|| Player::new(rules));
            let played = player.limits(&opened.syn());
            // Its SYN is none of conntrack's; the connection that SYNPROXY opens behind it is.
            if played.is_synproxied { Some(true) } else { played.tracked }
        })
    }

    /// The zones that rules name.
    pub fn named_zones(&self) -> BTreeSet<u16> {
        let Self::Narrowed { rules, sets_zones: true } = self else { return BTreeSet::new() };
        let named = |step: &Step| match step {
            Step::SetZone(zone) => *zone,
            _ => None,
        };
        rules.chains.iter().flat_map(steps).filter_map(named).collect()
    }

    /// Finds the zones of connections; `None` where no rule sets any.
    pub fn zones(&self) -> Option<Zones<'_>> {
        match self {
            Self::Narrowed { rules, sets_zones: true } => {
                Some(Zones { rules, player: OnceCell::new() })
            }
            _ => None,
        }
    }
}

/// Rules that set zones.
#[derive(Clone, Debug)]
pub struct Zones<'r> {
    rules: &'r Ruleset,
    /// Made at the first question: it looks at every rule.
    player: OnceCell<Player<'r>>,
}

impl Zones<'_> {
    /// The zone that conntrack keeps a connection in, seen from the client; `None` where that cannot
    /// be told.
    pub fn of(&self, opened: Opened) -> Option<u16> {
        self.player.get_or_init(|| Player::new(self.rules)).limits(&opened.syn()).zone
    }
}

impl Opened {
    fn syn(self) -> Syn {
        let Self { peer, asked, socket } = self;
        let asked = Some(asked);
        Syn { source_port: Some(peer.port()), asked, ..Syn::new(peer.addr(), socket) }
    }
}

/// Whether a chain bears on what conntrack sees.
pub(super) fn bears_on_tracking(chain: &Chain) -> bool {
    let proxies = Step::Verdict(Outcome::Synproxy);
    steps(chain).any(|it| *it == Step::Notrack || *it == proxies || matches!(it, Step::SetZone(_)))
}

/// Whether a base chain has rules that may lead a packet of the network to another address.
pub fn translates_what_comes_in(chain: &Chain) -> bool {
    let comes_in = |hook| matches!(hook, Hook::Prerouting | Hook::Input);
    let is_of_it = chain.base.as_ref().is_some_and(|base| base.is_nat && comes_in(base.hook));
    is_of_it && !chain.rules.is_empty()
}

fn steps(chain: &Chain) -> impl Iterator<Item = &Step> {
    chain.rules.iter().flat_map(|rule| &rule.steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::{Family, parse_saved};

    #[test]
    fn the_zone_is_that_of_the_first_rule_that_names_one() {
        let rules = "*raw\n:PREROUTING ACCEPT [0:0]\n\
            -A PREROUTING -s 198.51.100.9/32 -j CT --zone 7\n\
            -A PREROUTING -p tcp -m tcp --dport 80 -j CT --zone 5\n\
            -A PREROUTING -p tcp -m tcp --dport 81 -j CT --zone-reply 6\n\
            -A PREROUTING -p tcp -m tcp --dport 82 -j CT --zone mark\n\
            -A PREROUTING -i eth0 -p tcp -m tcp --dport 83 -j CT --zone 8\n\
            -A PREROUTING -j CT --zone 9\nCOMMIT\n";
        let tracking = Tracking::of(parse_saved(rules, Family::Ip), |_| Vec::new()).expect("zones");
        assert_eq!(tracking.named_zones(), [5, 7, 8, 9].into());
        let zones = tracking.zones().expect("zones");
        let of = |peer: &str, port: u16| {
            let peer = Endpoint::new(peer.parse().expect("an address"), 4000);
            let socket = Endpoint::new([192, 0, 2, 1].into(), port);
            zones.of(Opened { peer, asked: socket, socket })
        };
        assert_eq!((of("198.51.100.9", 80), of("198.51.100.7", 80)), (Some(7), Some(5)));
        assert_eq!((of("198.51.100.7", 81), of("198.51.100.7", 82)), (Some(9), None));
        assert_eq!(of("198.51.100.7", 83), None, "by which device is not known");
    }

    #[test]
    fn our_own_rules_narrow_nothing() {
        let rules = "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j CT --notrack\nCOMMIT\n";
        let theirs = parse_saved(rules, Family::Ip);
        let ours: Vec<_> =
            theirs.iter().map(|chain| Chain { is_ours: true, ..chain.clone() }).collect();
        assert!(matches!(Tracking::of(theirs, |_| Vec::new()), Some(Tracking::Narrowed { .. })));
        assert_eq!(Tracking::of(ours, |_| Vec::new()), None);
    }
}
