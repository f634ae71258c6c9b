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
        let mut all = Vec::with_capacity(asked.len());
        for (connection, since) in asked {
            let (set, key) = match connection.remote.addr() {
                IpAddr::V4(addr) => (SYNS4, addr.octets().to_vec()),
                IpAddr::V6(addr) => (SYNS6, addr.octets().to_vec()),
            };
            let left = self.time_left(set, &key)?;
            let passed = since.elapsed() + self.jiffy * DOUBT;
            all.push(match left {
                Some(left) => SYN_MEMORY.saturating_sub(left) > passed,
                None => passed < SYN_MEMORY,
            });
        }
        // A source's own SYN is answer enough; that there is none must be known for certain.
        if all.contains(&true) && self.time_left(MISSED, &MISSED_KEY)?.is_some() {
            all.fill(false);
        }
        for ((connection, _), is_quiet) in asked.iter().zip(&mut all) {
            // Where the table is gone, this is absent too.
            *is_quiet =
                *is_quiet && self.time_left(PORTS, &port_key(connection.local.port()))?.is_some();
        }
        Ok(all)
    }

    /// How long the element will be there, `None` where it is not.
    fn time_left(&mut self, set: &str, key: &[u8]) -> Result<Option<Duration>> {
        time_left(&mut self.conversation, &self.table, set, key)
    }
}
