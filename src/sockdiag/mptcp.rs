//! Connections of Multipath TCP (RFC 8684) that have lost their last TCP connection.
//!
//! Such a one has no TCP socket, and yet an application holds it: the kernel waits for the peer to
//! come back by another one, `net.mptcp.close_timeout` (60 s) as a rule and without end in kernels
//! before 6.6, and says nothing to the application. The peer that ends its TCP connection by an RST
//! or FIN so frees its place with the limiter, and not with the server. Servers written in Go
//! listen for these connections by default (since 1.24).
//!
//! Here it is a socket in CLOSE_WAIT under the first tuple that it had: the peer has ended it, and
//! the application not yet.

use std::collections::BTreeSet;

use netlink_packet_core::DecodeError;
use nix::errno::Errno;

use super::decode;
use super::listener::Listener;
use super::request::{INET_DIAG_SOCKID_LEN, INFO, SOCK_DIAG_BY_FAMILY};
use super::socket::{Cookie, Socket, State, States};
use crate::error::{Op, Result};
use crate::netlink::attribute::{emitted, nla};
use crate::netlink::{Conversation, Frame, Request, Transport};

/// `IPPROTO_MPTCP`, too large for the field that other protocols are named in.
const IPPROTO_MPTCP: u32 = 262;
/// `INET_DIAG_REQ_PROTOCOL`, since Linux 5.9.
const INET_DIAG_REQ_PROTOCOL: u16 = 3;

/// Offsets in `struct mptcp_info`: TCP connections but the first, and the connection's token.
const MPTCPI_SUBFLOWS: usize = 0;
const MPTCPI_TOKEN: usize = 12;

/// The token is the connection's identity. Its cookie is not: where its listener has one already, that
/// is inherited (seen on 6.18). Cookies of other sockets are counted from 1 on.
const OF_TOKEN: u64 = 1 << 63;

/// What a namespace has of Multipath TCP: a dump of its connections walks a table of the whole machine
/// (0.5 ms at 32 768 buckets), so it is asked for where somebody listens for them, or has some.
#[derive(Clone, Debug, Default)]
pub(super) struct Mptcp {
    /// The kernel says something of it.
    is_known: bool,
    /// Family and port of listeners.
    listening: BTreeSet<(u8, u16)>,
    /// Families with connections, as of the last dump.
    connected: BTreeSet<u8>,
}

impl Mptcp {
    /// Asks from now on, where the kernel answers.
    pub(super) fn begin(&mut self) {
        self.is_known = true;
    }

    /// Whether there can be connections.
    pub(super) fn is_used(&self) -> bool {
        self.is_known && !(self.listening.is_empty() && self.connected.is_empty())
    }

    /// The ports of listeners.
    pub(super) fn ports(&self) -> impl Iterator<Item = u16> {
        self.listening.iter().map(|(_, port)| *port)
    }

    /// Takes note of who listens.
    pub(super) fn follow(&mut self, listeners: &[Listener]) {
        if self.is_known {
            let of_it = listeners.iter().filter(|listener| listener.is_mptcp);
            let key = |it: &Listener| (it.family, it.socket.local.port());
            self.listening = of_it.map(key).collect();
        }
    }

    /// The connections that an application holds and that have one TCP connection at most.
    ///
    /// # Errors
    /// A broken conversation.
    pub(super) fn singles<T: Transport>(
        &mut self,
        all: &mut Conversation<T>,
    ) -> Result<Vec<Socket>> {
        let mut found = Vec::new();
        let listening = self.listening.iter().map(|(family, _)| *family);
        let families: BTreeSet<_> = listening.chain(self.connected.iter().copied()).collect();
        for family in families {
            let request = request(family);
            let dump = all.dump(&request, |(any, all): &mut (bool, Vec<Socket>), frame| {
                *any = true;
                all.extend(single(frame).map_err(|error| request.op.malformed(error))?);
                Ok(())
            });
            let (is_any, some) = match dump {
                // Without mptcp_diag.
                Err(error) if matches!(error.errno(), Some(Errno::ENOENT | Errno::EOPNOTSUPP)) => {
                    *self = Self::default();
                    return Ok(Vec::new());
                }
                dump => dump?,
            };
            if is_any {
                self.connected.insert(family);
            } else {
                self.connected.remove(&family);
            }
            found.extend(some);
        }
        Ok(found)
    }
}

fn request(family: u8) -> Request {
    // struct inet_diag_req_v2. Kernels that do not know the attribute have nothing for protocol 0.
    let mut body = vec![family, 0, INFO, 0];
    body.extend(States::open().mask().to_ne_bytes());
    body.extend([0; INET_DIAG_SOCKID_LEN]);
    body.extend(emitted(&[nla(INET_DIAG_REQ_PROTOCOL, &IPPROTO_MPTCP.to_ne_bytes())]));
    let op = Op::new("dump of MPTCP sockets");
    Request { op, kind: SOCK_DIAG_BY_FAMILY, flags: 0, body, joined: false }
}

/// The connection in a message, if an application holds it and it has one TCP connection at most.
fn single(frame: Frame<'_>) -> std::result::Result<Option<Socket>, DecodeError> {
    let Some(socket) = decode::socket(frame)? else { return Ok(None) };
    if socket.inode == 0 || !State::OPEN.contains(&socket.state) {
        return Ok(None);
    }
    let info = decode::info(frame).filter(|info| info.get(MPTCPI_SUBFLOWS) == Some(&0));
    let Some(info) = info else { return Ok(None) };
    let token = info.get(MPTCPI_TOKEN..MPTCPI_TOKEN + 4).and_then(|it| it.try_into().ok());
    Ok(token.map(u32::from_ne_bytes).map(|token| Socket {
        state: State::CloseWait,
        cookie: Cookie(OF_TOKEN | u64::from(token)),
        ..socket
    }))
}
