//! Who has opened a connection, as TCP's own counters show it.

use super::State;

/// Which end of a connection sent its SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Opener {
    /// The socket was accepted.
    Peer,
    /// The socket was connected from here.
    Here,
}

/// The octets that TCP has counted of a socket: `tcpi_*` of `struct tcp_info`, since Linux 4.19.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Octets {
    /// Sequence numbers that the peer has acknowledged, those of SYN and FIN among them.
    pub acked: u64,
    /// Octets of data that were sent, each as often as it was.
    pub sent: u64,
    /// Those that were sent again.
    pub sent_again: u64,
    /// Sequence numbers that wait to be sent for the first time.
    pub unsent: u64,
    /// Sequence numbers that are not acknowledged: sent or not.
    pub queued: u64,
}

impl Opener {
    /// What the counters say; `None` where they do not add up.
    ///
    /// The SYN of a socket that connects is acknowledged like data, and counted with it; that of one
    /// that was accepted was another's, the request's.
    pub(super) fn of(state: State, octets: Octets) -> Option<Self> {
        let Octets { acked, sent, sent_again, unsent, queued } = octets;
        // An own FIN is acknowledged in this state alone; in others it is queued.
        let fin = u64::from(state == State::FinWait2);
        let data = (sent + unsent).checked_sub(sent_again + queued)?;
        match acked.checked_sub(data + fin)? {
            0 => Some(Self::Peer),
            1 => Some(Self::Here),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_octet_more_than_the_data_was_a_syn() {
        let sent = Octets { acked: 100, sent: 150, sent_again: 30, unsent: 5, queued: 25 };
        assert_eq!(Opener::of(State::Established, sent), Some(Opener::Peer));
        let own = Octets { acked: 101, ..sent };
        assert_eq!(Opener::of(State::CloseWait, own), Some(Opener::Here));
        assert_eq!(Opener::of(State::FinWait2, own), Some(Opener::Peer));
        assert_eq!(Opener::of(State::Established, Octets { acked: 99, ..sent }), None);
        assert_eq!(Opener::of(State::Established, Octets { acked: 102, ..sent }), None);
        let silent = Octets::default();
        assert_eq!(Opener::of(State::Established, silent), Some(Opener::Peer));
        assert_eq!(Opener::of(State::Established, Octets { queued: 1, ..silent }), None);
    }
}
