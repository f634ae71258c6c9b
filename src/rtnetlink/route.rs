//! Asks the kernel's routing tables by rtnetlink.

use std::net::IpAddr;

use netlink_sys::protocols::NETLINK_ROUTE;
use nix::errno::Errno;
use nix::libc;

use super::{address, body, split};
use crate::error::{Op, Result};
use crate::netlink::attribute::nla;
use crate::netlink::{Conversation, KernelSocket, Request, Transport};

const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MARK: u16 = 16;
const RTA_VIA: u16 = 18;
/// Words of `struct rtmsg { u8 family, dst_len, src_len, tos, table, protocol, scope, type, unsigned flags }`.
const HEAD: usize = 3;

/// The routing tables of one network namespace.
#[derive(Debug)]
pub struct Routes<T = KernelSocket> {
    pub(super) conversation: Conversation<T>,
}

impl Routes<KernelSocket> {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The process may not open sockets.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open route netlink"), NETLINK_ROUTE)?;
        Ok(Self { conversation: Conversation::new(socket) })
    }
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// They are delivered on this host.
    Local,
    /// They leave this host.
    Interface {
        /// Number of the interface that they leave by.
        index: u32,
        /// The router that they go to; `None` where the address is on the link.
        gateway: Option<IpAddr>,
    },
    /// There is no way, or it is forbidden.
    Unreachable,
}

impl<T: Transport> Routes<T> {
    /// Where packets to `addr` go, from the address `from` where rules ask for the source, and with this mark, of
    /// which 0 is none. Equivalent: `ip route get ADDR from FROM mark MARK`.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn destination(
        &mut self,
        addr: IpAddr,
        from: Option<IpAddr>,
        mark: u32,
    ) -> Result<Destination> {
        match self.ask(addr, from, mark) {
            // A source that is no address of this host is refused: the first destination of a
            // translated connection, the address of a transparent proxy's socket. With EINVAL;
            // since 6.18 with ENETUNREACH (seen there, guarded by
            // `a_source_that_is_not_ours_does_not_hide_the_way`).
            Err(error)
                if from.is_some()
                    && matches!(error.errno(), Some(Errno::EINVAL | Errno::ENETUNREACH)) =>
            {
                self.destination(addr, None, mark)
            }
            Err(error)
                if matches!(
                    error.errno(),
                    Some(
                        Errno::ENETUNREACH
                            | Errno::EHOSTUNREACH
                            | Errno::EACCES
                            | Errno::EINVAL
                            | Errno::ENETDOWN
                    )
                ) =>
            {
                Ok(Destination::Unreachable)
            }
            answer => answer,
        }
    }

    /// Whether packets to `addr` are delivered on this host.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn is_local(&mut self, addr: IpAddr) -> Result<bool> {
        Ok(self.destination(addr, None, 0)? == Destination::Local)
    }

    fn ask(&mut self, addr: IpAddr, from: Option<IpAddr>, mark: u32) -> Result<Destination> {
        let request = query(addr, from, mark);
        let mut destination = Destination::Unreachable;
        self.conversation.ask(&request, |frame| {
            let ([_, second, _], attributes) = split::<HEAD>(request.op, frame.payload)?;
            let [_, _, _, kind] = second.to_ne_bytes();
            // struct rtvia { u16 family, u8 address[] }
            let via = || attributes.value(RTA_VIA)?.get(2..);
            let gateway = attributes.value(RTA_GATEWAY).or_else(via).and_then(ip);
            destination = match (kind, attributes.native(RTA_OIF)) {
                (libc::RTN_LOCAL, _) => Destination::Local,
                (libc::RTN_UNICAST, Some(index)) => Destination::Interface { index, gateway },
                _ => Destination::Unreachable,
            };
            Ok(())
        })?;
        Ok(destination)
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}

fn query(addr: IpAddr, from: Option<IpAddr>, mark: u32) -> Request {
    let prefix = if addr.is_ipv4() { 32 } else { 128 };
    let (family, destination) = address(RTA_DST, addr);
    let source = from.map(|from| address(RTA_SRC, from).1);
    let mark = (mark != 0).then(|| nla(RTA_MARK, &mark.to_ne_bytes()));
    let of_source = if source.is_some() { prefix } else { 0 };
    let head = [u32::from_ne_bytes([family, prefix, of_source, 0]), 0, 0];
    let attributes: Vec<_> = [destination].into_iter().chain(source).chain(mark).collect();
    let body = body(head, &attributes);
    Request { op: Op::new("route look-up"), kind: RTM_GETROUTE, flags: 0, body, joined: false }
}
