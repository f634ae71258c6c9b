//! By what the packets of clients reach the server.

use super::{Lab, client_at, server_at, skip_rare};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the cable itself.
    Cable,
    /// In a VLAN. Its tag comes beside the packet, as a card hands it over.
    Vlan,
    /// Its tag comes in the frame, as from a card that does nothing for VLANs.
    VlanInFrame,
    /// In a VLAN within a provider's (802.1ad): one tag beside the packet, one in the frame.
    VlanInVlan,
    /// By the cable, which is a port of a VRF.
    Vrf,
}

impl Lab {
    /// Moves all addresses to where this way ends; says on stderr why this kernel has none such
    /// and returns false.
    ///
    /// # Panics
    /// When it has none and `CTKEEP_REQUIRE_KERNEL=all`.
    pub fn go_by(&self, way: Way) -> bool {
        let (links, device, vrf) = match way {
            Way::Cable => return true,
            Way::Vlan | Way::VlanInFrame => {
                ("link add link eth0 name v7 type vlan id 7\n", "v7", "")
            }
            Way::VlanInVlan => (
                "link add link eth0 name outer type vlan proto 802.1ad id 8\n\
                 link set outer up\n\
                 link add link outer name v7 type vlan id 7\n",
                "v7",
                "",
            ),
            Way::Vrf => ("link add red type vrf table 10\nlink set red up\n", "eth0", "vrf red"),
        };
        if let Err(reason) = self.server.try_feed("ip -batch -", links) {
            let reason = reason.lines().next().unwrap_or_default();
            skip_rare(&format!("no {way:?} on this kernel: {reason}"));
            return false;
        }
        for end in [&self.server, &self.client] {
            end.run("ip addr flush dev eth0");
        }
        if way == Way::Vrf {
            self.server.run("ip link set eth0 master red");
            // Else only a listener of the VRF's own is asked.
            self.server.sysctl("net/ipv4/tcp_l3mdev_accept", "1");
        } else {
            self.client.feed("ip -batch -", links);
        }
        if way == Way::VlanInFrame {
            self.client.run("ethtool -K eth0 txvlan off");
        }
        self.server.feed("ip -batch -", &server_at(device, vrf));
        self.client.feed("ip -batch -", &client_at(device));
        true
    }
}
