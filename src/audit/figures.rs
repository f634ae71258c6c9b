//! The host's own figures about conntrack and TCP, read once.

use serde::Serialize;

use crate::conntrack::Conntrack;
use crate::error::Result;
use crate::host::counters::Counters;
use crate::host::sysctl;
use crate::netlink::Transport;

/// Settings and counters of one namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Of the conntrack table.
    pub table: Table,
    /// Of TCP.
    pub tcp: Tcp,
}

/// The conntrack table. `None` where the kernel has no such setting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Entries of the conntrack table.
    pub entries: u64,
    /// `nf_conntrack_max`.
    pub maximum: Option<u64>,
    /// `nf_conntrack_buckets`.
    pub buckets: Option<u64>,
    /// Packets dropped because no entry could be made, since the namespace was made.
    pub drop: u64,
    /// Entries evicted from a full table.
    pub early_drop: u64,
    /// Entries refused.
    pub insert_failed: u64,
    /// `nf_conntrack_tcp_loose`.
    pub tcp_loose: Option<u64>,
    /// `nf_conntrack_events`.
    pub events: Option<u64>,
    /// `nf_conntrack_tcp_be_liberal`.
    pub be_liberal: Option<u64>,
    /// `nf_conntrack_tcp_timeout_established`, seconds.
    pub timeout_established: Option<u64>,
    /// `nf_conntrack_tcp_timeout_close_wait`, seconds.
    pub timeout_close_wait: Option<u64>,
    /// `nf_conntrack_tcp_timeout_close`, seconds.
    pub timeout_close: Option<u64>,
}

/// How TCP opens connections. `None` where the kernel has no such setting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tcp {
    /// `net.ipv4.tcp_syncookies`.
    pub syncookies: Option<u64>,
    /// `net.ipv4.tcp_max_syn_backlog`.
    pub max_syn_backlog: Option<u64>,
    /// `net.core.somaxconn`.
    pub somaxconn: Option<u64>,
    /// `TcpExtSyncookiesSent`.
    pub syncookies_sent: u64,
    /// `TcpExtSyncookiesFailed`.
    pub syncookies_failed: u64,
    /// `TcpExtTCPReqQFullDrop`.
    pub req_q_full_drop: u64,
    /// `TcpExtListenDrops`.
    pub listen_drops: u64,
    /// `TcpExtListenOverflows`.
    pub listen_overflows: u64,
}

impl Figures {
    /// Reads them in the namespace that the calling thread is in.
    ///
    /// # Errors
    /// The conntrack table cannot be asked.
    pub fn read<T: Transport>(conntrack: &mut Conntrack<T>) -> Result<Self> {
        let size = conntrack.size()?;
        let counters = conntrack.counters()?;
        let ext = Counters::read();
        let nf = sysctl::conntrack;
        let table = Table {
            entries: size.entries.into(),
            maximum: size.maximum.map(u64::from).or_else(|| nf("nf_conntrack_max")),
            buckets: nf("nf_conntrack_buckets"),
            drop: counters.drop,
            early_drop: counters.early_drop,
            insert_failed: counters.insert_failed,
            tcp_loose: nf("nf_conntrack_tcp_loose"),
            events: nf("nf_conntrack_events"),
            be_liberal: nf("nf_conntrack_tcp_be_liberal"),
            timeout_established: nf("nf_conntrack_tcp_timeout_established"),
            timeout_close_wait: nf("nf_conntrack_tcp_timeout_close_wait"),
            timeout_close: nf("nf_conntrack_tcp_timeout_close"),
        };
        let tcp = Tcp {
            syncookies: sysctl::number("net.ipv4.tcp_syncookies"),
            max_syn_backlog: sysctl::number("net.ipv4.tcp_max_syn_backlog"),
            somaxconn: sysctl::number("net.core.somaxconn"),
            syncookies_sent: ext.value("SyncookiesSent"),
            syncookies_failed: ext.value("SyncookiesFailed"),
            req_q_full_drop: ext.value("TCPReqQFullDrop"),
            listen_drops: ext.value("ListenDrops"),
            listen_overflows: ext.value("ListenOverflows"),
        };
        Ok(Self { table, tcp })
    }
}
