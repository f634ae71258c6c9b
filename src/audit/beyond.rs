//! How those fare who exceed a limit: refused, let in all the same, or by a rate. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::families::stranger;
use super::guests::{Guests, asked};
use crate::firewall::Hook;
use crate::firewall::limits::LimitRule;
use crate::firewall::packet::{Interface, Syn};
use crate::firewall::play::{Certainty, Hit, Player};
use crate::firewall::published::Published;
use crate::firewall::value::Answer;
use crate::flow::Endpoint;
use crate::sockdiag::Socket;

/// More ports than these that may lead to a container are not told apart.
const PORTS: usize = 64;

/// How clients fare that no rule knows, and that exceed a limit: at ports that are listened at.
#[derive(Clone, Debug, Default)]
pub struct Beyond {
    /// They get in all the same.
    pub open: BTreeSet<u16>,
    /// At some port a rate lets in some.
    pub is_rated: bool,
    /// At some it cannot be told: a mark, a set that is not known.
    pub is_unclear: bool,
    /// At some they are refused.
    pub is_refused: bool,
}

impl Beyond {
    /// Plays them. Where another limit counts who exceeds this one nothing is known of the port.
    /// `published` are ports of IPv4 and of IPv6 that rules lead elsewhere; `None` where they are not known.
    pub fn of(
        rule: &LimitRule,
        player: &Player<'_>,
        listeners: &[Socket],
        guests: &Guests,
        published: &[Option<Published>; 2],
    ) -> Self {
        let mut this = Self::default();
        // Another rule bans by what it writes to a set.
        if rule.remembers {
            return this;
        }
        let own = listeners.iter().filter(|socket| !guests.have(socket));
        let own = own.filter_map(|socket| syn(rule, socket.local));
        for syn in own.chain(forwarded(rule, guests, published)) {
            let played = player.exceeding(&syn, rule.at);
            if played.hits.is_empty() || played.hits.iter().any(|hit| hit.at != rule.at) {
                continue;
            }
            // Whom rules stop in any case the limit need not refuse.
            if player.play(&syn, &mut |_| Some(false)).refused == Answer::Yes {
                continue;
            }
            match played.refused {
                Answer::No => {
                    this.open.insert(syn.destination.port());
                }
                Answer::Sometimes => this.is_rated = true,
                // What may not come to the limit at all says nothing of what is behind.
                Answer::Unknown => {
                    let comes = |hit: &Hit| hit.certainty > Certainty::Perhaps;
                    this.is_unclear |= played.hits.iter().any(comes);
                }
                Answer::Yes => this.is_refused = true,
            }
        }
        this
    }

    /// Whether nobody is refused, as far as they were played; `None` where none was.
    pub fn refuses_nobody(&self) -> Option<bool> {
        let others = self.is_rated || self.is_unclear || self.is_refused;
        (others || !self.open.is_empty()).then_some(!others)
    }

    /// Who gets in though the limit is exceeded, or may, in words.
    pub fn words(&self) -> Vec<String> {
        let mut words = Vec::new();
        if self.refuses_nobody() == Some(false) && !self.open.is_empty() {
            let ports: Vec<_> = self.open.iter().map(u16::to_string).collect();
            words.push(format!("what goes to port {}", ports.join(", ")));
        }
        if self.is_rated {
            words.push("as much as a rate beside it lets in".to_owned());
        }
        if self.is_unclear {
            words.push("perhaps some, by what a rule behind it looks at".to_owned());
        }
        words
    }
}

/// The SYNs of clients that come to containers, and that the limit counts: by the ports that rules lead there, or may,
/// and without translation.
fn forwarded<'g>(
    rule: &'g LimitRule,
    guests: &'g Guests,
    published: &'g [Option<Published>; 2],
) -> impl Iterator<Item = Syn> + 'g {
    let of_place = move |(local, leaves): (&'g Endpoint, &'g Interface)| {
        let source = source(rule, local.addr().is_ipv4());
        let [ipv4, ipv6] = published;
        let published = if source.is_ipv4() { ipv4 } else { ipv6 }.as_ref();
        let is_for = |to: &Endpoint| rule.matches.asked.contains(to.port());
        let asked = published.map(|all| asked(all, *local).filter(is_for).take(PORTS + 1));
        let asked: Option<Vec<_>> =
            asked.map(Iterator::collect).filter(|all: &Vec<_>| all.len() <= PORTS);
        let ways = match asked {
            None => vec![None],
            Some(all) => all.into_iter().chain([*local]).map(Some).collect(),
        };
        let seen = move |asked: &Option<Endpoint>| match asked {
            Some(asked) if rule.is_before_nat() => asked.port(),
            _ => local.port(),
        };
        let ways = ways.into_iter().filter(move |asked| rule.covers(source, seen(asked)));
        ways.map(move |asked| Syn { asked, ..guests.syn(source, *local, leaves) })
    };
    // None of them passes INPUT.
    let guests = guests.served.iter().filter(|_| rule.hook != Hook::Input);
    guests.flat_map(of_place)
}

/// A client that the limit counts, as far as it names some, else one that no rule knows.
fn source(rule: &LimitRule, ipv4: bool) -> IpAddr {
    let named = rule.matches.sources.iter().filter(|(_, inside)| *inside);
    let mut named = named.map(|(net, _)| net.addr()).filter(|addr| addr.is_ipv4() == ipv4);
    named.next().unwrap_or_else(|| stranger(ipv4))
}

/// The SYN of a client that the limit counts.
fn syn(rule: &LimitRule, local: Endpoint) -> Option<Syn> {
    let families = [true, false].into_iter().filter(|ipv4| rule.is_of(*ipv4));
    let of_family = |ipv4: bool| {
        let source = source(rule, ipv4);
        let is_served = local.addr().is_ipv4() == ipv4 || local.addr().is_unspecified();
        let is_it = is_served && rule.covers(source, local.port());
        let any = if ipv4 { [0; 4].into() } else { IpAddr::from([0_u16; 8]) };
        let to = if local.addr().is_ipv4() == ipv4 { local.addr() } else { any };
        is_it.then(|| Syn::new(source, Endpoint::new(to, local.port())))
    };
    families.filter(|_| !local.addr().is_loopback()).find_map(of_family)
}
