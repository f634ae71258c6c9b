//! When a source's last SYN came: sets of the watch table note every packet with SYN.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::time::{ClockId, clock_getres};

use super::nflog_table::{MISSED, MISSED_KEY, PORTS, SYN_MEMORY, SYNS4, SYNS6, port_key};
use crate::error::{Op, Result};
use crate::flow::Connection;
use crate::netlink::{Conversation, KernelSocket};
use crate::nftables::time_left;

/// The clock of the packet log is read a moment before or after that of the set, and the latter goes
/// by jiffies: so many of them are in doubt.
const DOUBT: u32 = 2;

/// Reads the sets in one network namespace.
#[derive(Debug)]
pub struct Syns {
    conversation: Conversation<KernelSocket>,
    table: String,
    jiffy: Duration,
}

impl Syns {
    /// `table` is the name of the watch table.
    ///
    /// # Errors
    /// No socket is to be had.
    pub fn open(table: &str) -> Result<Self> {
        let op = Op::new("open nftables netlink");
        let conversation = Conversation::new(KernelSocket::open(op, NETLINK_NETFILTER)?);
        // The clock of the last tick moves by one jiffy.
        let jiffy = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE);
        let jiffy = jiffy.map_or(Duration::from_millis(10), Duration::from);
        Ok(Self { conversation, table: table.to_owned(), jiffy })
    }

    /// Of each connection: whether surely no packet with SYN has come from its
    /// source since that time.
    ///
    /// # Errors
    /// The table is gone, or a broken conversation.
    pub fn are_quiet(&mut self, asked: &[(Connection, Instant)]) -> Result<Vec<bool>> {
        let missed = [MISSED_KEY.to_vec()];
        let is_full = time_left(&mut self.conversation, &self.table, MISSED, &missed)?;
        if is_full.iter().any(Option::is_some) {
            return Ok(vec![false; asked.len()]);
        }
        let mut all = Vec::with_capacity(asked.len());
        for (connection, since) in asked {
            // Where the table is gone, this is absent too.
            let port = [port_key(connection.local.port())];
            let is_watched = time_left(&mut self.conversation, &self.table, PORTS, &port)?;
            let (set, key) = match connection.remote.addr() {
                IpAddr::V4(addr) => (SYNS4, addr.octets().to_vec()),
                IpAddr::V6(addr) => (SYNS6, addr.octets().to_vec()),
            };
            let left = time_left(&mut self.conversation, &self.table, set, &[key])?;
            let is_watched = is_watched.iter().all(Option::is_some);
            let passed = since.elapsed() + self.jiffy * DOUBT;
            let is_quiet = match left.first() {
                Some(Some(left)) => SYN_MEMORY.saturating_sub(*left) > passed,
                _ => passed < SYN_MEMORY,
            };
            all.push(is_watched && is_quiet);
        }
        Ok(all)
    }
}
