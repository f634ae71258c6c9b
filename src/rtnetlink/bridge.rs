//! Bridges whose packets the host's rules see, though they only pass from port to port (`br_netfilter`).

use nix::errno::Errno;

use super::link::{self, IFLA_INFO_KIND, IFLA_LINKINFO, RTM_GETLINK};
use super::route::Routes;
use super::{body, split};
use crate::error::{Op, Result};
use crate::netlink::{Request, Transport};

const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_NF_CALL_IPTABLES: u16 = 36;
const IFLA_BR_NF_CALL_IP6TABLES: u16 = 37;

impl<T: Transport> Routes<T> {
    /// Whether this bridge has a family's rules called for itself (`nf_call_iptables`); `None` of another device, and
    /// of one that is gone.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn bridge_calls(&mut self, device: u32, is_ipv4: bool) -> Result<Option<bool>> {
        let op = Op::new("look-up of a bridge");
        let body = body(link::head(device, 0), &[]);
        let request = Request { op, kind: RTM_GETLINK, flags: 0, body, joined: false };
        let option = if is_ipv4 { IFLA_BR_NF_CALL_IPTABLES } else { IFLA_BR_NF_CALL_IP6TABLES };
        let mut calls = None;
        let asked = self.conversation.query(&request, |frame| {
            let (_, attributes) = split::<{ link::HEAD }>(op, frame.payload)?;
            let info = attributes.nest(IFLA_LINKINFO);
            let is_bridge =
                info.and_then(|info| info.text(IFLA_INFO_KIND)).as_deref() == Some("bridge");
            let called = info.and_then(|info| info.nest(IFLA_INFO_DATA)?.value(option));
            calls = is_bridge.then(|| called.is_some_and(|called| called != [0]));
            Ok(())
        });
        match asked {
            // Gone with its container.
            Err(error) if error.errno() == Some(Errno::ENODEV) => Ok(None),
            asked => asked.map(|()| calls),
        }
    }
}
