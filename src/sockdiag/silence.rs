//! For how long a connection has been silent, and what that proves of its age.

use std::time::Duration;

use super::{Socket, State};

/// A socket, and for how long it has been silent, where TCP says so.
pub type SocketSilence = (Socket, Option<Silence>);

/// Times since something last happened: `tcpi_last_*` of `struct tcp_info`. Each begins with the
/// connection, so a connection is at least as old as any of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// Since data was last sent.
    pub sent: Duration,
    /// Since data last came.
    pub received: Duration,
    /// Since the peer last acknowledged anything; its FIN does so, too.
    pub acked: Duration,
}

impl Silence {
    /// For at least so long a socket has been half-closed (CLOSE_WAIT), or else open.
    ///
    /// Nothing has come since the last acknowledgement, so the FIN came no later.
    pub fn least_age(&self, state: State) -> Duration {
        match state {
            State::CloseWait => self.acked,
            // With TCP Fast Open nothing may have been acknowledged yet, and then `acked` is not set.
            State::SynRecv => self.sent.max(self.received),
            _ => self.sent.max(self.received).max(self.acked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_last_is_the_least_age_of_a_half_close_and_what_came_first_that_of_a_connection() {
        let [sent, received, acked] = [30, 600, 5].map(Duration::from_secs);
        let silence = Silence { sent, received, acked };
        assert_eq!(silence.least_age(State::CloseWait), acked);
        assert_eq!(silence.least_age(State::Established), received);
        let acked = Duration::MAX;
        assert_eq!(Silence { acked, ..silence }.least_age(State::SynRecv), received);
    }
}
