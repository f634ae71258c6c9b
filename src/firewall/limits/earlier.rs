//! What leaves a chain before a limit, so that the limit never sees it. Pure.

use std::fmt;

use crate::firewall::{Match, Ports};

/// What a rule before a limit takes away from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EarlierAccept {
    /// What comes in by the loopback device.
    Loopback,
    /// Packets of established connections.
    Established,
    /// All packets to these ports: the limit never sees them.
    Ports(Ports),
    /// Certain packets: for sure, or as far as can be told from outside.
    Some {
        /// Which, as its words tell.
        of: Box<Match>,
        /// Only those that stay within a limit.
        within: Option<u32>,
        /// All of them pass.
        is_sure: bool,
    },
    /// Packets that conntrack does not see: a limit has no entry to count.
    Untracked {
        /// Which, as its words tell.
        of: Box<Match>,
        /// All of them go untracked.
        is_sure: bool,
    },
}

impl EarlierAccept {
    /// The same packets of these ports, too, where only ports tell the two apart.
    pub(super) fn or(&self, other: &Self) -> Option<Self> {
        match (self, other) {
            (Self::Ports(one), Self::Ports(two)) => Some(Self::Ports(one.or(two))),
            (
                Self::Some { of, within, is_sure },
                Self::Some { of: other, within: also, is_sure: is_also },
            ) => {
                let is_one = **of == Match { ports: of.ports.clone(), ..(**other).clone() };
                let ports = of.ports.or(&other.ports);
                let of = Box::new(Match { ports, ..(**of).clone() });
                let (within, is_sure) = (*within, *is_sure);
                (is_one && (within, is_sure) == (*also, *is_also)).then_some(Self::Some {
                    of,
                    within,
                    is_sure,
                })
            }
            _ => (self == other).then(|| self.clone()),
        }
    }

    /// Whether all that it names passes.
    pub fn is_sure(&self) -> bool {
        !matches!(self, Self::Some { is_sure: false, .. } | Self::Untracked { is_sure: false, .. })
    }

    /// Its name in JSON, where it has one: other packets are there in words alone.
    pub fn name(&self) -> Option<&'static str> {
        match self {
            Self::Loopback => Some("loopback"),
            Self::Established => Some("established"),
            Self::Ports(_) => Some("ports"),
            Self::Some { .. } | Self::Untracked { .. } => None,
        }
    }
}

impl fmt::Display for EarlierAccept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("what comes in by lo"),
            Self::Established => f.write_str("packets of established connections"),
            Self::Ports(ports) => write!(f, "everything to port {ports}"),
            Self::Some { of, within: None, .. } => write!(f, "what goes{of}"),
            Self::Some { of, within: Some(count), .. } => {
                write!(f, "what goes{of} within {count} connections")
            }
            Self::Untracked { of, .. } => write!(f, "what goes untracked{of}"),
        }
    }
}

/// A rule that takes packets off the path.
pub(super) struct Earlier {
    pub(super) matches: Match,
    /// Only those that stay within a limit.
    pub(super) within: Option<u32>,
}

/// What leaves before a limit, of the packets that it would be for.
pub(super) fn earlier(all: &[Earlier], matches: &Match) -> Vec<EarlierAccept> {
    let mut before: Vec<EarlierAccept> = Vec::new();
    for Earlier { matches: earlier, within } in all {
        if earlier.and(matches).never && !earlier.is_established() {
            continue;
        }
        let is_sure = is_of_all(earlier);
        let kind = if within.is_some() || !is_sure {
            if earlier.is_established() {
                // Packets that open a translated connection may pass, too.
                let alone = Match { or_translated: false, ..earlier.clone() };
                if !earlier.or_translated || within.is_some() || earlier.is_rated {
                    continue;
                }
                if alone.covers(matches) && !before.contains(&EarlierAccept::Established) {
                    before.push(EarlierAccept::Established);
                }
            }
            let of = Box::new(earlier.told());
            EarlierAccept::Some { of, within: *within, is_sure: is_sure && within.is_some() }
        } else if earlier.is_loopback() {
            EarlierAccept::Loopback
        } else if earlier.is_established() && earlier.covers(matches) {
            EarlierAccept::Established
        } else if !earlier.may_open() {
            continue;
        } else if earlier.is_for_everybody()
            && earlier.asked.is_all()
            && earlier.ipv4.is_none_or(|ipv4| matches.ipv4 == Some(ipv4))
        {
            EarlierAccept::Ports(earlier.ports.and(&matches.ports))
        } else {
            EarlierAccept::Some { of: Box::new(earlier.told()), within: None, is_sure: true }
        };
        if !before.contains(&kind) {
            before.push(kind);
        }
    }
    before
}

/// What a limit does not see of the packets that it would be for, where they go untracked.
pub(super) fn untracked(all: &Match, matches: &Match) -> Option<EarlierAccept> {
    if all.and(matches).never {
        return None;
    }
    // Of SYNs alone: conntrack may take the connection up at its next packet.
    let is_sure = is_of_all(all) && !all.syn;
    Some(EarlierAccept::Untracked { of: Box::new(all.told()), is_sure })
}

/// Whether it is so of all packets that its words name.
fn is_of_all(matches: &Match) -> bool {
    !matches.is_narrowed() && !matches.is_rated
}
