//! The ingress route: in by the very interface that the client's packets come in by.
//!
//! A TAP device of our own takes the frame; its ingress filter hands it to the interface's
//! ingress. Nothing is attached to anybody else's interface, and the device is gone with the
//! process, however that ends.

use std::collections::HashSet;

use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use crate::error::{Cause, Op, Result};
use crate::rtnetlink::tc::TrafficControl;

/// Our side of each frame; the last four bytes name the interface that it goes to, and the
/// filters go by them. Locally administered.
const SOURCE_MAC: [u8; 2] = [0x02, 0xc7];
/// The device's own address: a frame to it is for this host.
const DEVICE_MAC: [u8; 6] = [0x02, 0xc7, 0x6b, 0x65, 0x65, 0x70];

/// The device with its filters.
pub(super) struct Ingress {
    device: SyncDevice,
    index: u32,
    traffic: TrafficControl,
    targets: HashSet<u32>,
}

impl std::fmt::Debug for Ingress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingress").field("index", &self.index).finish_non_exhaustive()
    }
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
        let device = DeviceBuilder::new()
            .name(name)
            .layer(Layer::L2)
            .mac_addr(DEVICE_MAC)
            .enable(true)
            .build_sync()
            .map_err(|error| {
                unavailable(format!(
                    "{name}: {error}; is the name taken (ip link show {name}), or the module \
                     missing (modprobe tun), or /dev/net/tun not permitted?"
                ))
            })?;
        let index = device.if_index().map_err(|error| op.io(error))?;
        device.set_nonblocking(true).map_err(|error| op.io(error))?;
        let mut traffic = TrafficControl::open()?;
        traffic.add_ingress(index).map_err(|error| {
            unavailable(format!("{name}: {error}; is the module missing (modprobe sch_ingress)?"))
        })?;
        Ok(Self { device, index, traffic, targets: HashSet::new() })
    }

    /// Hands a whole IP packet to the ingress of interface `target`.
    ///
    /// # Errors
    /// The interface is gone, or the kernel lacks u32 or mirred, or the write failed.
    pub(super) fn send(&mut self, op: Op, packet: &[u8], target: u32) -> Result<()> {
        if !self.targets.contains(&target) {
            self.traffic.redirect(self.index, target)?;
            self.targets.insert(target);
        }
        let protocol: [u8; 2] = match packet.first().map(|byte| byte >> 4) {
            Some(6) => [0x86, 0xdd],
            _ => [0x08, 0x00],
        };
        let mut frame = Vec::with_capacity(14 + packet.len());
        frame.extend(DEVICE_MAC);
        frame.extend(SOURCE_MAC);
        frame.extend(target.to_be_bytes());
        frame.extend(protocol);
        frame.extend(packet);
        self.device.send(&frame).map(drop).map_err(|error| op.io(error))
    }
}
