//! The network devices, by rtnetlink.

use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;

use super::{body, split};
use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request};

pub(super) const RTM_GETLINK: u16 = 18;
const RTM_NEWLINK: u16 = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
pub(super) const IFLA_LINKINFO: u16 = 18;
const IFLA_LINK_NETNSID: u16 = 37;
pub(super) const IFLA_INFO_KIND: u16 = 1;
const IFF_UP: u32 = libc::IFF_UP as u32;
const IFF_LOOPBACK: u32 = libc::IFF_LOOPBACK as u32;

/// Words of `struct ifinfomsg { u8 family, u8, u16 type, int index, unsigned flags, unsigned change }`.
pub(super) const HEAD: usize = 4;

/// The head of a message about the device of this number, of which these flags are to be set.
pub(super) fn head(index: u32, flags: u32) -> [u32; HEAD] {
    [0, index, flags, flags]
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What `ip -d link` calls its type: `bridge`, `bond`, `vlan`, `vrf`, ...; empty for hardware.
    pub kind: String,
    /// Number of the bridge, bond or VRF that it is a port of.
    pub master: Option<u32>,
    /// Whether packets that go out by it come in by it.
    pub is_loopback: bool,
    /// Number, in this namespace, of the one that its other end is in, where that is another one.
    pub peer_namespace: Option<i32>,
}

#[cfg(test)]
impl Link {
    /// One of this number, name, type and master.
    pub(crate) fn named(index: u32, name: &str, kind: &str, master: Option<u32>) -> Self {
        let is_loopback = name == "lo";
        let (name, kind) = (name.to_owned(), kind.to_owned());
        Self { index, name, kind, master, is_loopback, peer_namespace: None }
    }
}

/// All devices of the namespace that the calling thread is in. Equivalent: `ip -d link`.
///
/// # Errors
/// A broken conversation, or a message that cannot be read.
pub fn links() -> Result<Vec<Link>> {
    let op = Op::new("list of network devices");
    let body = body(head(0, 0), &[]);
    let request = Request { op, kind: RTM_GETLINK, flags: 0, body, joined: false };
    let mut conversation = Conversation::new(KernelSocket::open(op, NETLINK_ROUTE)?);
    conversation.dump(&request, |all: &mut Vec<Link>, frame| {
        all.push(link(op, frame.payload)?);
        Ok(())
    })
}

fn link(op: Op, payload: &[u8]) -> Result<Link> {
    let ([_, index, flags, _], attributes) = split::<HEAD>(op, payload)?;
    let info = attributes.nest(IFLA_LINKINFO);
    Ok(Link {
        index,
        name: attributes.text(IFLA_IFNAME).unwrap_or_default(),
        kind: info.and_then(|info| info.text(IFLA_INFO_KIND)).unwrap_or_default(),
        master: attributes.native(IFLA_MASTER),
        is_loopback: flags & IFF_LOOPBACK != 0,
        peer_namespace: attributes.native(IFLA_LINK_NETNSID).map(u32::cast_signed),
    })
}

/// `ip link set DEVICE up`, of its number.
///
/// # Errors
/// The kernel's refusal.
pub fn set_up(device: u32) -> Result<()> {
    let op = Op::new("set a network device up");
    let body = body(head(device, IFF_UP), &[]);
    let request = Request { op, kind: RTM_NEWLINK, flags: 0, body, joined: false };
    Conversation::new(KernelSocket::open(op, NETLINK_ROUTE)?).execute(&request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::attribute::{nested, nla, text};

    const OP: Op = Op::new("test");

    #[test]
    fn a_device_is_read_whatever_else_is_told_of_it() {
        let attributes = [
            nla(26, &[0x1f]), // IFLA_AF_SPEC, damaged
            text(IFLA_IFNAME, "br0"),
            nla(IFLA_MASTER, &7_u32.to_ne_bytes()),
            nested(IFLA_LINKINFO, &[text(IFLA_INFO_KIND, "bridge"), nla(2, b"of a later kernel")]),
            nla(IFLA_LINK_NETNSID, &3_u32.to_ne_bytes()),
        ];
        let read = link(OP, &body(head(5, IFF_LOOPBACK), &attributes)).expect("a device");
        let wanted = Link {
            is_loopback: true,
            peer_namespace: Some(3),
            ..Link::named(5, "br0", "bridge", Some(7))
        };
        assert_eq!(read, wanted);
    }

    #[test]
    fn half_a_head_is_refused() {
        assert!(link(OP, &[0; 15]).is_err());
    }
}
