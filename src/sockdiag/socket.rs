//! A TCP socket as `sock_diag` reports it, in the words of `ss`.

use std::fmt;
use std::str::FromStr;

use crate::flow::{Connection, Endpoint};

/// A TCP socket of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// This host's side.
    pub local: Endpoint,
    /// The peer.
    pub remote: Endpoint,
    /// TCP state.
    pub state: State,
    /// Inode of the socket's file, 0 when no process holds it any more.
    pub inode: u32,
    /// Numeric owner.
    pub uid: u32,
    /// The socket's name for life.
    pub cookie: Cookie,
    /// Interface index that the socket is bound to, 0 for none.
    pub interface: u32,
    /// Bytes received and not yet read; for a listener the connections that wait to be accepted.
    pub recv_queue: u32,
    /// Bytes sent and not yet acknowledged; for a listener the length of its queue.
    pub send_queue: u32,
}

impl Socket {
    /// Both ends.
    pub fn connection(&self) -> Connection {
        Connection::new(self.local, self.remote)
    }

    /// Whether an application has the socket, or will have it at its next `accept`: it costs a slot.
    ///
    /// The inode is that of the descriptor. What was closed, and what waits for the end of its
    /// handshake, has none; a socket that was not accepted yet has none either, and is ESTABLISHED
    /// or in CLOSE_WAIT. With TCP Fast Open one in SYN_RECV is accepted already.
    pub fn takes_a_slot(&self) -> bool {
        match self.state {
            State::Established | State::CloseWait => true,
            state => State::OPEN.contains(&state) && self.inode != 0,
        }
    }
}

/// The kernel's identity of a socket: never reused while the system runs, unlike its tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// TCP states of a socket (`include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum State {
    /// Data flows both ways.
    Established = 1,
    /// This host has sent a SYN.
    SynSent = 2,
    /// A SYN has come; also every request that waits for the third packet of its handshake.
    SynRecv = 3,
    /// This host has sent its FIN.
    FinWait1 = 4,
    /// The peer has acknowledged this host's FIN.
    FinWait2 = 5,
    /// Both sides are done; waits for stragglers.
    TimeWait = 6,
    /// Not connected.
    Close = 7,
    /// The peer has sent its FIN; the application has not closed yet.
    CloseWait = 8,
    /// This host has sent its FIN after the peer's.
    LastAck = 9,
    /// Accepts connections.
    Listen = 10,
    /// Both sides have sent a FIN at once.
    Closing = 11,
}

impl State {
    /// All eleven, in the order of the kernel's numbers.
    pub const ALL: [Self; 11] = [
        Self::Established,
        Self::SynSent,
        Self::SynRecv,
        Self::FinWait1,
        Self::FinWait2,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::Closing,
    ];

    /// Those in which an application can still have the socket: it has not closed it, and the
    /// connection is not over.
    pub const OPEN: [Self; 7] = [
        Self::Established,
        Self::SynRecv,
        Self::FinWait1,
        Self::FinWait2,
        Self::CloseWait,
        Self::LastAck,
        Self::Closing,
    ];

    /// The state with the kernel's number.
    pub fn from_kernel(number: u8) -> Option<Self> {
        // TCP_NEW_SYN_RECV (12): inet_diag reports it as SYN_RECV, the hash table holds it as 12.
        if number == 12 {
            return Some(Self::SynRecv);
        }
        Self::ALL.into_iter().find(|state| *state as u8 == number)
    }

    /// The name that `ss` uses in its filters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::SynSent => "syn-sent",
            Self::SynRecv => "syn-recv",
            Self::FinWait1 => "fin-wait-1",
            Self::FinWait2 => "fin-wait-2",
            Self::TimeWait => "time-wait",
            Self::Close => "closed",
            Self::CloseWait => "close-wait",
            Self::LastAck => "last-ack",
            Self::Listen => "listening",
            Self::Closing => "closing",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that is no state of `ss`.
#[derive(Debug, thiserror::Error)]
#[error("unknown socket state '{0}'; states are those of ss: {list}", list = state_names())]
pub struct UnknownState(String);

fn state_names() -> String {
    State::ALL.map(State::name).join(", ")
}

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "listen" => Ok(Self::Listen),
            "close" => Ok(Self::Close),
            _ => Self::ALL
                .into_iter()
                .find(|state| state.name() == text)
                .ok_or_else(|| UnknownState(text.to_owned())),
        }
    }
}

/// A set of states: the kernel's `idiag_states` mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct States(u32);

impl States {
    /// None at all.
    pub const NONE: Self = Self(0);

    /// The mask as `sock_diag` takes it: bit n stands for state n.
    pub fn mask(self) -> u32 {
        self.0
    }

    /// [`State::OPEN`].
    pub fn open() -> Self {
        Self::from_iter(State::OPEN)
    }

    /// Every state but LISTEN: everything that has a peer.
    pub fn connected() -> Self {
        State::ALL.into_iter().filter(|state| *state != State::Listen).collect()
    }

    /// Whether the set holds `state`.
    pub fn contains(self, state: State) -> bool {
        self.0 & (1 << state as u8) != 0
    }

    /// The states of the set, in the order of the kernel's numbers.
    pub fn iter(self) -> impl Iterator<Item = State> {
        State::ALL.into_iter().filter(move |state| self.contains(*state))
    }
}

impl FromIterator<State> for States {
    fn from_iter<I: IntoIterator<Item = State>>(states: I) -> Self {
        Self(states.into_iter().fold(0, |mask, state| mask | 1 << state as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_back_from_its_name_and_number() {
        for state in State::ALL {
            assert_eq!(state.name().parse::<State>().unwrap(), state);
            assert_eq!(State::from_kernel(state as u8), Some(state));
        }
        assert_eq!(State::from_kernel(0), None);
        assert_eq!(State::from_kernel(13), None);
    }

    #[test]
    fn an_unknown_state_is_named_with_the_choice() {
        let error = "halfclosed".parse::<State>().unwrap_err().to_string();
        assert!(error.contains("'halfclosed'") && error.contains("close-wait"), "{error}");
    }
}
