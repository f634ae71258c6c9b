//! The ingress route: in by the very interface that the client's packets come in by.
//!
//! A TAP device of our own takes the frame; its ingress filter hands it to the interface's
//! ingress. Nothing is attached to an interface of the host, and the device is gone with the
//! process, however that ends.
//!
//! Which interface is said by the packet's IP identification (the flow label of IPv6): ordinary
//! packets have any, so no rule can go by it, and the Ethernet source is free to be the client's.

use std::collections::HashMap;
use std::path::Path;

use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::error::{Cause, Op, Result};
use crate::rtnetlink::changes::Listener;
use crate::rtnetlink::link::{Link, links};
use crate::rtnetlink::neighbour::Mac;
use crate::rtnetlink::tc::{Selector, TrafficControl};

/// The device's own address: a frame to it is for this host. Locally administered.
const DEVICE_MAC: Mac = [0x02, 0xc7, 0x6b, 0x65, 0x65, 0x70];
/// Where a frame comes from whose client has no Ethernet address.
const SOURCE_MAC: Mac = [0x02, 0xc7, 0x6b, 0x65, 0x65, 0x71];

/// The node that TUN and TAP devices are made by.
const TUN: &str = "/dev/net/tun";

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// Interfaces that filters are there for. Filters of interfaces that have left are taken away with
/// the whole device when there are more.
const TARGETS: u16 = 1024;

/// Interfaces whose filters are made with the device: later that would be in the middle of a first repair,
/// and wait there for the lock of all network devices, which namespaces that go were seen to hold for
/// half a second. There may be hundreds of interfaces, of which clients come in by a few.
const READY: usize = 16;

/// Where a packet is to come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entrance {
    /// Number of the interface.
    pub interface: u32,
    /// Ethernet address that the client's packets have there.
    pub mac: Option<Mac>,
    /// Whether routers stand between the client and this host.
    pub routed: bool,
}

/// What a look at the device shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Nothing has changed.
    Sound,
    /// Some other interface was set down or has left: what leads there is out of date.
    OthersLeft,
    /// The device does no longer what it was made for.
    Broken,
}

/// The device with its filters.
pub(super) struct Ingress {
    device: SyncDevice,
    index: u32,
    traffic: TrafficControl,
    listener: Listener,
    /// The identification that each interface's packets carry.
    targets: HashMap<u32, u16>,
    next: u16,
}

impl std::fmt::Debug for Ingress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingress").field("index", &self.index).finish_non_exhaustive()
    }
}

/// A TAP device to be made. Where its node is missing the builder would make that, too: nothing in
/// /dev is ours.
///
/// # Errors
/// There is no `/dev/net/tun`.
pub fn tap(op: Op, name: &str) -> Result<DeviceBuilder> {
    if !Path::new(TUN).exists() {
        let what = format!("{name}: no {TUN} here (modprobe tun)");
        return Err(op.failed(Cause::Unavailable(what)));
    }
    Ok(DeviceBuilder::new().name(name).layer(Layer::L2))
}

impl Ingress {
    /// Makes the device in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The name is taken, or the kernel lacks TUN, ingress, u32 or mirred, or `CAP_NET_ADMIN` is
    /// missing.
    pub(super) fn open(name: &str) -> Result<Self> {
        let op = Op::new("create helper device");
        let unavailable = |what: String| op.failed(Cause::Unavailable(what));
        let device =
            tap(op, name)?.mac_addr(DEVICE_MAC).enable(true).build_sync().map_err(|error| {
                unavailable(format!(
                    "{name}: {error}; is the name taken (ip link show {name}), or the module \
                     missing (modprobe tun), or /dev/net/tun not permitted?"
                ))
            })?;
        let index = device.if_index().map_err(|error| op.io(error))?;
        device.set_nonblocking(true).map_err(|error| op.io(error))?;
        let listener = Listener::open()?;
        let mut traffic = TrafficControl::open()?;
        traffic.add_ingress(index).map_err(|error| {
            unavailable(format!("{name}: {error}; is the module missing (modprobe sch_ingress)?"))
        })?;
        let mut ingress =
            Self { device, index, traffic, listener, targets: HashMap::new(), next: 1 };
        // Ports of a bridge or bond are entered by it.
        let entered =
            |link: &Link| !link.is_loopback && link.master.is_none() && link.index != index;
        for link in links()?.iter().filter(|link| entered(link)).take(READY) {
            // Tried again, and told, when a packet wants it.
            let _ = ingress.id(link.index);
        }
        Ok(ingress)
    }

    /// What others have done to the device and to interfaces since the last look. An interface
    /// that has left is forgotten, as another may get its number.
    ///
    /// # Errors
    /// The kernel's changes cannot be read.
    pub(super) fn condition(&mut self) -> Result<Condition> {
        let changes = self.listener.changes()?;
        self.targets.retain(|target, _| !changes.down.contains(target));
        let broken = [&changes.down, &changes.stripped].iter().any(|set| set.contains(&self.index));
        Ok(if broken || changes.unknown || self.next > TARGETS {
            Condition::Broken
        } else if changes.down.is_empty() {
            Condition::Sound
        } else {
            Condition::OthersLeft
        })
    }

    /// The identification that brings a packet to the ingress of `interface`.
    ///
    /// # Errors
    /// The interface is gone, or the kernel lacks u32 or mirred.
    pub(super) fn id(&mut self, interface: u32) -> Result<u16> {
        if let Some(id) = self.targets.get(&interface) {
            return Ok(*id);
        }
        let id = self.next;
        let value = u32::from(id);
        for selector in [
            // Its upper half is the identification, its lower one has flags and fragment offset.
            Selector { protocol: ETH_P_IP, offset: 4, value: value << 16, mask: 0xffff_0000 },
            // Version, traffic class and flow label.
            Selector { protocol: ETH_P_IPV6, offset: 0, value, mask: 0x0000_ffff },
        ] {
            self.traffic.redirect(self.index, selector, interface)?;
        }
        self.next = self.next.saturating_add(1);
        self.targets.insert(interface, id);
        Ok(id)
    }

    /// Hands a whole IP packet to the ingress that its identification names; to the device's own
    /// where there is none of it.
    ///
    /// # Errors
    /// The device is down or gone.
    pub(super) fn send(&self, op: Op, packet: &[u8], from: Option<Mac>) -> Result<()> {
        let protocol = match packet.first().map(|byte| byte >> 4) {
            Some(6) => ETH_P_IPV6,
            _ => ETH_P_IP,
        };
        let mut frame = Vec::with_capacity(14 + packet.len());
        frame.extend(DEVICE_MAC);
        frame.extend(from.unwrap_or(SOURCE_MAC));
        frame.extend(protocol.to_be_bytes());
        frame.extend(packet);
        self.device.send(&frame).map(drop).map_err(|error| op.io(error))
    }
}
