//! The shield: conntrack never sees a FIN or RST that TCP does not act on.
//!
//! A packet program at the ingress of every device looks at the FINs and RSTs of guarded ports,
//! asks the kernel's own socket what TCP will make of them, and marks those that TCP will not act
//! on. An nftables table of our own takes the mark away, and has conntrack see an ACK. So the limiter never
//! forgets, not even within one batch of packets, where a repair comes too late by nature. What it
//! does not cover (docs/shield.md) stays the reconciler's.

mod layout;
#[cfg_attr(not(shield), path = "absent.rs")]
mod program;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::protocols::NETLINK_ROUTE;

use crate::error::{Op, Result};
use crate::host::sysctl;
use crate::netlink::{KernelSocket, drain};
use crate::nftables::{Table, TableSpec};
use crate::rtnetlink::link::{Link, links};
use program::Attached;
pub(crate) use program::Program;

/// Whether this program was built with a shield.
pub const IS_BUILT_IN: bool = cfg!(shield);

/// What becomes of a packet that the shield looks at, as metrics call it, in the order of
/// `enum decision` in shield.bpf.c.
pub const DECISIONS: [&str; 8] = [
    "fin_learned",
    "fin_hidden",
    "rst_shown",
    "rst_hidden",
    "delayed",
    "fragment_dropped",
    "not_learned",
    "not_read",
];

/// `RTMGRP_LINK` as a group number: devices come, go and change.
const RTNLGRP_LINK: u32 = 1;
/// Messages about devices that are read at once.
const DRAIN: usize = 1024;

/// The program at the devices of one network namespace, and the table that goes with it.
#[derive(Debug)]
pub(crate) struct Shield<'p> {
    program: &'p mut Program,
    /// While it is up.
    table: Option<Table>,
    /// Our own helper device: nothing comes in by it but what recount sends.
    own: String,
    mark: u32,
    monitor: KernelSocket,
    datagram: Vec<u8>,
    attached: BTreeMap<u32, (String, Attached)>,
    ports: HashSet<u16>,
    refused: HashSet<u32>,
    left_out: BTreeSet<String>,
    /// Devices have changed since the last look at them.
    is_stale: bool,
}

impl<'p> Shield<'p> {
    /// One over these local ports in the network namespace of the calling thread, for every device
    /// that TCP packets come in by but for `own`, which gives the table its name. It is down: a
    /// program that is loaded and not attached costs nothing.
    ///
    /// # Errors
    /// The kernel refuses to say which devices come and go.
    pub(crate) fn open(
        program: &'p mut Program,
        own: &str,
        mark: u32,
        ports: &HashSet<u16>,
    ) -> Result<Self> {
        let op = Op::new("watch network devices");
        let monitor = KernelSocket::open(op, NETLINK_ROUTE)?;
        monitor.set_non_blocking().map_err(|error| op.io(error))?;
        monitor.join(RTNLGRP_LINK).map_err(|error| op.io(error))?;
        program.set_ports(ports)?;
        Ok(Self {
            program,
            table: None,
            own: own.to_owned(),
            mark,
            monitor,
            datagram: Vec::new(),
            attached: BTreeMap::new(),
            ports: ports.clone(),
            refused: HashSet::new(),
            left_out: BTreeSet::new(),
            is_stale: true,
        })
    }

    /// Whether it is up.
    pub(crate) fn is_up(&self) -> bool {
        self.table.is_some()
    }

    /// Puts the program at every device.
    ///
    /// # Errors
    /// nf_tables is missing, or another process owns a table of this name. A device that refuses
    /// the program is a log line.
    pub(crate) fn raise(&mut self) -> Result<()> {
        if self.table.is_none() {
            // The table first: no rule of others is to see a mark.
            let layout = layout::layout(self.mark, Vec::new());
            self.table = Some(Table::create(&table_name(&self.own), &layout)?);
        }
        self.attach_all()
    }

    /// Takes it off all devices.
    pub(crate) fn lower(&mut self) {
        // The program before the table, for the same reason.
        for (_, attached) in std::mem::take(&mut self.attached).into_values() {
            self.program.detach(attached);
        }
        self.refused.clear();
        self.table = None;
    }

    /// Guards exactly these local ports from now on, and makes sure that the table is still there.
    ///
    /// # Errors
    /// The kernel refuses the change.
    pub(crate) fn follow(&mut self, ports: &HashSet<u16>) -> Result<()> {
        if *ports != self.ports {
            self.program.set_ports(ports)?;
            self.ports.clone_from(ports);
        }
        self.confirm_table()
    }

    /// Takes note of devices that came, went or changed.
    ///
    /// # Errors
    /// The list of devices cannot be had.
    pub(crate) fn follow_devices(&mut self) -> Result<()> {
        let op = Op::new("watch network devices");
        let is_stale = &mut self.is_stale;
        let drained = drain(&mut self.monitor, &mut self.datagram, DRAIN, op, |_| {
            *is_stale = true;
            Ok(())
        })?;
        self.is_stale |= drained.overrun || drained.malformed > 0;
        if self.is_stale { self.attach_all() } else { Ok(()) }
    }

    /// How often it decided what, in the order of [`DECISIONS`].
    ///
    /// # Errors
    /// The kernel refuses to answer.
    pub(crate) fn counts(&self) -> Result<[u64; DECISIONS.len()]> {
        self.program.counts()
    }

    /// At how many devices it is.
    pub(crate) fn devices(&self) -> usize {
        self.attached.len()
    }

    /// Whether it is everywhere that it could be wanted: no device has refused it, and none was
    /// left out.
    pub(crate) fn is_whole(&self) -> bool {
        !self.is_refused() && self.left_out.is_empty()
    }

    /// Whether a device has refused it.
    pub(crate) fn is_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    fn attach_all(&mut self) -> Result<()> {
        let Some(table) = &mut self.table else { return Ok(()) };
        let (wanted, left_out) = wanted(links()?, &self.own, bridges_filter());
        for device in left_out.difference(&self.left_out) {
            tracing::warn!(device, "no shield in this bridge or VRF, repairs go on without it");
        }
        self.left_out = left_out;
        let wanted: HashMap<u32, String> =
            wanted.into_iter().map(|link| (link.index, link.name)).collect();
        let gone: Vec<u32> =
            self.attached.keys().filter(|index| !wanted.contains_key(index)).copied().collect();
        for index in gone {
            if let Some((device, attached)) = self.attached.remove(&index) {
                self.program.detach(attached);
                table.remove(layout::DEVICES, &[layout::device_key(index)])?;
                tracing::info!(device, "shield taken off");
            }
        }
        self.refused.retain(|index| wanted.contains_key(index));
        for (index, device) in wanted {
            if self.attached.contains_key(&index) {
                continue;
            }
            // In the set before the first packet can be marked.
            table.add(layout::DEVICES, &[layout::device_key(index)])?;
            match self.program.attach(&device) {
                Ok(attached) => {
                    tracing::info!(device, how = attached.how(), "shield attached");
                    self.attached.insert(index, (device, attached));
                }
                Err(error) => {
                    table.remove(layout::DEVICES, &[layout::device_key(index)])?;
                    if self.refused.insert(index) {
                        tracing::warn!(device, %error, "no shield at this device");
                    }
                }
            }
        }
        self.is_stale = false;
        Ok(())
    }

    /// Before 5.12 tables have no owner, and any `nft flush ruleset` takes ours.
    fn confirm_table(&mut self) -> Result<()> {
        let Some(table) = &mut self.table else { return Ok(()) };
        let devices: Vec<_> =
            self.attached.keys().map(|index| layout::device_key(*index)).collect();
        if devices.is_empty() || table.add(layout::DEVICES, &devices).is_ok() {
            return Ok(());
        }
        tracing::warn!("the table of the shield is gone, making it anew");
        table.rebuild(&layout::layout(self.mark, devices))
    }
}

impl AsFd for Shield<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.monitor.as_fd()
    }
}

impl Drop for Shield<'_> {
    fn drop(&mut self) {
        self.lower();
    }
}

fn table_name(own: &str) -> String {
    format!("{own}-shield")
}

/// The devices that packets reach IP from, and the names of bridges and VRFs that are left out: where
/// `bridges_filter`, conntrack sees packets before a bridge does; and a packet program is never given
/// a socket that is bound to a VRF, as all are that it accepts. A packet must be judged once: a port
/// of a bridge or bond hands it on to that, and so do we.
fn wanted(links: Vec<Link>, own: &str, bridges_filter: bool) -> (Vec<Link>, BTreeSet<String>) {
    let (left_out, rest): (Vec<_>, Vec<_>) = links
        .into_iter()
        .partition(|link| link.kind == "vrf" || bridges_filter && link.kind == "bridge");
    let rest = rest
        .into_iter()
        .filter(|link| !link.is_loopback && link.name != own && link.master.is_none());
    (rest.collect(), left_out.into_iter().map(|link| link.name).collect())
}

/// Whether conntrack sees packets at the ports of a bridge, before the bridge itself has them.
fn bridges_filter() -> bool {
    let is_filtered = |family| sysctl::number(&format!("net.bridge.bridge-nf-call-{family}"));
    ["iptables", "ip6tables"].map(is_filtered).contains(&Some(1))
}

/// Whether the kernel takes the program, with the privileges of this process.
///
/// # Errors
/// It does not, or there is none.
pub fn try_load() -> Result<()> {
    Program::load(1).map(drop)
}

/// Takes away what a killed process left: filters, which do not end with it as links do, and before
/// 5.12 the table. `own` is as for [`Shield::raise`].
pub(crate) fn remove_leftovers(own: &str) {
    // One that is made goes with its value, and takes the place of the other.
    drop(Table::create(&table_name(own), &TableSpec::default()));
    match links() {
        Ok(links) => links.iter().for_each(|link| program::remove_leftovers(&link.name)),
        Err(error) => tracing::warn!(%error, "could not look for what another run left"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_packet_meets_the_program_once() {
        let links = vec![
            Link::named(1, "lo", "", None),
            Link::named(2, "eth0", "", Some(5)),
            Link::named(3, "eth1", "", Some(6)),
            Link::named(4, "eth2", "", None),
            Link::named(5, "bond0", "bond", None),
            Link::named(6, "red", "vrf", None),
            Link::named(7, "bond0.5", "vlan", None),
            Link::named(8, "ctkeep0", "tun", None),
            Link::named(9, "br0", "bridge", None),
            Link::named(10, "veth0", "veth", Some(9)),
        ];
        let names = |bridges_filter| {
            let (wanted, left_out) = wanted(links.clone(), "ctkeep0", bridges_filter);
            let wanted: Vec<_> = wanted.into_iter().map(|link| link.name).collect();
            (wanted.join(" "), left_out.into_iter().collect::<Vec<_>>().join(" "))
        };
        let told = |wanted: &str, left_out: &str| (wanted.to_owned(), left_out.to_owned());
        assert_eq!(names(false), told("eth2 bond0 bond0.5 br0", "red"));
        assert_eq!(names(true), told("eth2 bond0 bond0.5", "br0 red"));
    }
}
