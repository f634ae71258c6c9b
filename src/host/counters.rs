//! The kernel's TCP counters of the namespace that the calling thread is in.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use super::sysctl;

/// A SYN cookie is good for one or two minutes (`MAX_SYNCOOKIE_AGE`).
const COOKIE_AGE: Duration = Duration::from_secs(120);
/// To read the counters takes some 30 to 300 us. Of the very first cookies of an overflow this much may pass
/// unnoticed.
const COOKIE_LOOK: Duration = Duration::from_millis(10);
/// What `tcp_syncookies` says where each handshake has one, of both families.
const ALWAYS: u64 = 2;

/// `TcpExt` counters by their names in `/proc/net/netstat` (`ListenOverflows`); what `nstat` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(HashMap<String, u64>);

impl Counters {
    /// Reads them; empty where `/proc` does not have them.
    pub fn read() -> Self {
        Self::parse(&fs::read_to_string("/proc/thread-self/net/netstat").unwrap_or_default())
    }

    /// Pairs of lines: names, then values, both behind the name of the group.
    fn parse(text: &str) -> Self {
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:"));
        let names = lines.next().unwrap_or_default().split_whitespace().map(str::to_owned);
        let values = lines.next().unwrap_or_default().split_whitespace();
        Self(
            names
                .zip(values)
                .filter_map(|(name, value)| Some((name, value.parse().ok()?)))
                .collect(),
        )
    }

    /// The counter, 0 where this kernel has none of that name.
    pub fn value(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// Whether the server sends SYN cookies: it keeps nothing of these handshakes.
#[derive(Clone, Copy, Debug)]
pub struct Cookies {
    sent: u64,
    last: Option<Instant>,
    looked: Instant,
}

impl Cookies {
    /// Knows of those that are sent from now on.
    pub fn new(now: Instant) -> Self {
        let sent = Self::sent();
        Self { sent, last: (sent > 0).then_some(now), looked: now }
    }

    /// Whether one may be good still.
    pub fn may_be_out(&mut self, now: Instant) -> bool {
        if sysctl::number("net.ipv4.tcp_syncookies") == Some(ALWAYS) {
            self.last = Some(now);
            return true;
        }
        if now.saturating_duration_since(self.looked) >= COOKIE_LOOK {
            self.looked = now;
            let sent = Self::sent();
            if sent != std::mem::replace(&mut self.sent, sent) {
                self.last = Some(now);
            }
        }
        self.last.is_some_and(|last| now.saturating_duration_since(last) < COOKIE_AGE)
    }

    fn sent() -> u64 {
        Counters::read().value("SyncookiesSent")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_stand_in_two_lines() {
        let text = "TcpExt: SyncookiesSent ListenDrops\nTcpExt: 7 9\nIpExt: InOctets\nIpExt: 1\n";
        let counters = Counters::parse(text);
        assert_eq!((counters.value("SyncookiesSent"), counters.value("ListenDrops")), (7, 9));
        assert_eq!(counters.value("InOctets"), 0);
    }
}
