//! Puts sources into nftables sets: those of our own table `inet ctkeep`, which is made where it is
//! missing and never taken away, since rules of the administrator name its sets; or sets of his.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::Place;
use crate::error::{Op, Result};
use crate::netlink::{Conversation, KernelSocket};
use crate::nftables::Field;
use crate::nftables::shared::{self, Element, Shape, SharedSet};

/// Our own table and its sets.
const TABLE: &str = "ctkeep";
const OVER4: &str = "over4";
const OVER6: &str = "over6";

/// The conversation about sets of one network namespace.
#[derive(Debug)]
pub struct Sets {
    conversation: Conversation<KernelSocket>,
}

/// Our own set for a family of addresses.
pub fn own(is_ipv4: bool) -> Place {
    let set = if is_ipv4 { OVER4 } else { OVER6 };
    Place { family: "inet".to_owned(), table: TABLE.to_owned(), set: set.to_owned() }
}

impl Sets {
    /// In the network namespace of the calling thread.
    ///
    /// # Errors
    /// A missing privilege or module.
    pub fn open() -> Result<Self> {
        let socket = KernelSocket::open(Op::new("open nftables netlink"), NETLINK_NETFILTER)?;
        Ok(Self { conversation: Conversation::new(socket) })
    }

    /// Makes our own table and sets where they are missing; `of_networks` says of IPv4 and of IPv6
    /// whether networks will be put into them.
    ///
    /// # Errors
    /// nf_tables is missing, or there is something else of these names.
    pub fn make_own(&mut self, of_networks: [bool; 2]) -> Result<()> {
        let [networks, networks6] = of_networks;
        let sets = [
            SharedSet { name: OVER4, key: Field::Ipv4Addr, of_networks: networks },
            SharedSet { name: OVER6, key: Field::Ipv6Addr, of_networks: networks6 },
        ];
        match shared::make(&mut self.conversation, TABLE, &sets) {
            // There, and not as it would be made: it is taken as it is.
            Err(error) if error.is_already_there() => Ok(()),
            result => result,
        }
    }

    /// What kind of set there is at a place.
    ///
    /// # Errors
    /// There is none.
    pub fn shape(&mut self, place: &Place) -> Result<Shape> {
        shared::shape(&mut self.conversation, &place.family, &place.table, &place.set)
    }

    /// Puts a source into a set for so long, or for longer if it is there already.
    ///
    /// # Errors
    /// The set is gone, full, or cannot hold it.
    pub fn put(&mut self, place: &Place, shape: Shape, net: IpNet, time: Duration) -> Result<()> {
        let Place { family, table, set } = place;
        let element = element(net, Some(time));
        shared::put(&mut self.conversation, shape, [family, table, set], &element)
    }

    /// Takes a source out of a set; it may be gone already.
    ///
    /// # Errors
    /// A broken conversation.
    pub fn take(&mut self, place: &Place, shape: Shape, net: IpNet) -> Result<()> {
        let Place { family, table, set } = place;
        shared::take(&mut self.conversation, shape, [family, table, set], &element(net, None))
    }
}

fn element(net: IpNet, time: Option<Duration>) -> Element {
    let bytes = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    Element { first: bytes(net.network()), behind: behind(&bytes(net.broadcast())), time }
}

/// The address behind the last one of a network; `None` behind the last of all.
fn behind(last: &[u8]) -> Option<Vec<u8>> {
    let mut next = last.to_vec();
    for byte in next.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            return Some(next);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_ends_where_the_next_begins() {
        let behind = |net: &str| element(net.parse().unwrap(), None).behind;
        assert_eq!(behind("198.51.100.255/32"), Some(vec![198, 51, 101, 0]));
        assert_eq!(behind("10.0.0.0/8"), Some(vec![11, 0, 0, 0]));
        assert_eq!(behind("255.255.255.0/24"), None);
    }
}
