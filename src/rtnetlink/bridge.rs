//! Bridges whose packets the host's rules see, though they only pass from port to port (`br_netfilter`).

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};

use nix::errno::Errno;

use super::link::RTM_GETLINK;
use super::route::Routes;
use crate::error::{Op, Result};
use crate::netlink::{Request, Transport};

impl<T: Transport> Routes<T> {
    /// Whether this bridge has a family's rules called for itself (`nf_call_iptables`); `None` of another device, and
    /// of one that is gone.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn bridge_calls(&mut self, device: u32, is_ipv4: bool) -> Result<Option<bool>> {
        let mut message = LinkMessage::default();
        message.header.index = device;
        let mut body = vec![0; message.buffer_len()];
        message.emit(&mut body);
        let op = Op::new("look-up of a bridge");
        let request = Request { op, kind: RTM_GETLINK, flags: 0, body, joined: false };
        let mut calls = None;
        let asked = self.conversation.query(&request, |frame| {
            let link = LinkMessage::parse(frame.payload).map_err(|error| op.malformed(error))?;
            let infos = link.attributes.iter().filter_map(|attribute| match attribute {
                LinkAttribute::LinkInfo(infos) => Some(infos),
                _ => None,
            });
            let infos: Vec<_> = infos.flatten().collect();
            let is_bridge = infos.contains(&&LinkInfo::Kind(InfoKind::Bridge));
            let of_it = infos.iter().any(|info| match info {
                LinkInfo::Data(InfoData::Bridge(all)) => all.iter().any(|option| match option {
                    InfoBridge::NfCallIpTables(is_on) => is_ipv4 && *is_on,
                    InfoBridge::NfCallIp6Tables(is_on) => !is_ipv4 && *is_on,
                    _ => false,
                }),
                _ => false,
            });
            calls = is_bridge.then_some(of_it);
            Ok(())
        });
        match asked {
            // Gone with its container.
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
            asked => asked.map(|()| calls),
        }
    }
}
