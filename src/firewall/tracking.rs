//! Which connections the rules keep out of conntrack. Pure.

use super::packet::Syn;
use super::play::Player;
use super::{Chain, Outcome, Ruleset, Step};
use crate::flow::Endpoint;

/// Rules of which some keep connections out of conntrack (`notrack`, `CT --notrack`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracking(Ruleset);

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
    /// These rules, where some of them keep connections out of conntrack.
    pub fn of(chains: impl IntoIterator<Item = Chain>) -> Option<Self> {
        let chains: Vec<_> = chains.into_iter().collect();
        let is_notrack = |chain: &Chain| steps(chain).any(|step| *step == Step::Notrack);
        let has_some = chains.iter().any(is_notrack);
        has_some.then(|| Self(Ruleset { chains, unread: Vec::new() }))
    }

    /// Whether conntrack has an entry of each of these connections, by their SYNs; `None` where that
    /// cannot be told.
    pub fn of_each(
        &self,
        connections: impl IntoIterator<Item = Opened>,
    ) -> impl Iterator<Item = Option<bool>> {
        let player = Player::new(&self.0);
        connections.into_iter().map(move |Opened { peer, asked, socket }| {
            let source_port = Some(peer.port());
            let syn = Syn { source_port, asked, ..Syn::new(peer.addr(), socket) };
            let played = player.limits(&syn);
            // Its SYN is none of conntrack's; the connection that SYNPROXY opens behind it is.
            if played.is_synproxied { Some(true) } else { played.tracked }
        })
    }
}

/// Whether a chain bears on what conntrack sees.
pub(super) fn bears_on_tracking(chain: &Chain) -> bool {
    let proxies = Step::Verdict(Outcome::Synproxy);
    steps(chain).any(|step| *step == Step::Notrack || *step == proxies)
}

fn steps(chain: &Chain) -> impl Iterator<Item = &Step> {
    chain.rules.iter().flat_map(|rule| &rule.steps)
}
