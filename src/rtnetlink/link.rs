//! The network devices, by rtnetlink.

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket, Request};

pub(super) const RTM_GETLINK: u16 = 18;

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
    let message = LinkMessage::default();
    let mut body = vec![0; message.buffer_len()];
    message.emit(&mut body);
    let request = Request { op, kind: RTM_GETLINK, flags: 0, body, joined: false };
    let mut conversation = Conversation::new(KernelSocket::open(op, NETLINK_ROUTE)?);
    conversation.dump(&request, |all: &mut Vec<Link>, frame| {
        let message = LinkMessage::parse(frame.payload).map_err(|error| op.malformed(error))?;
        let is_loopback = message.header.flags.contains(LinkFlags::Loopback);
        let mut link = Link { index: message.header.index, is_loopback, ..Link::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::LinkNetNsId(number) => link.peer_namespace = Some(number),
                LinkAttribute::LinkInfo(infos) => {
                    let kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.to_string()),
                        _ => None,
                    });
                    link.kind = kind.unwrap_or_default();
                }
                _ => {}
            }
        }
        all.push(link);
        Ok(())
    })
}
