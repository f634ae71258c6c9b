//! The records of the history: a line each, its checksum before it. Pure.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Sources of a minute, those that hold most: a record stays below 64 KiB.
pub const SOURCES: usize = 256;

/// Something that was so, or was done. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Record {
    /// What sources held at a minute.
    Minute {
        /// When.
        at: u64,
        /// The namespace; empty for the one that ctkeep was started in.
        netns: String,
        /// Those that held most.
        sources: Vec<Source>,
        /// How many more there were.
        left_out: usize,
    },
    /// An entry was put right, or given back.
    Action {
        /// When.
        at: u64,
        /// The namespace.
        netns: String,
        /// `revive`, `reinsert`, ...
        action: String,
        /// Why.
        reason: String,
        /// The peer.
        source: IpAddr,
        /// The server's port.
        port: u16,
    },
    /// The settings were read anew.
    Reload {
        /// When.
        at: u64,
        /// Whether they are in force.
        well: bool,
    },
    /// A limit has lost its list: rules have changed.
    Limit {
        /// When.
        at: u64,
        /// The namespace.
        netns: String,
        /// Which: `ip filter INPUT rule 3`.
        limit: String,
        /// `new`, `replaced`, ...
        loss: String,
    },
    /// The defence level has changed.
    Level {
        /// When.
        at: u64,
        /// The namespace.
        netns: String,
        /// Before.
        from: u8,
        /// After.
        to: u8,
    },
}

/// What one source held at one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// The source.
    pub source: IpAddr,
    /// The server's port.
    pub port: u16,
    /// Open sockets.
    pub open: u64,
    /// Those of them that are half-closed.
    pub half_closed: u64,
    /// Entries that a limiter counts.
    pub counted: u64,
    /// Open sockets without a counted entry.
    pub uncounted: u64,
    /// The smallest limit that surely counts them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// The network whose connections that limit counts together, where it is more than the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<IpNet>,
}

impl Record {
    /// When it was.
    pub fn at(&self) -> u64 {
        match self {
            Self::Minute { at, .. }
            | Self::Action { at, .. }
            | Self::Reload { at, .. }
            | Self::Limit { at, .. }
            | Self::Level { at, .. } => *at,
        }
    }

    /// Its line.
    pub fn encode(&self) -> String {
        let text = serde_json::to_string(self).unwrap_or_default();
        format!("{:08x} {text}\n", crc32fast::hash(text.as_bytes()))
    }

    /// The record of a line without its end; `None` where the checksum is not its own.
    pub fn decode(line: &[u8]) -> Option<Self> {
        let (sum, text) = line.split_at_checked(8)?;
        let text = text.strip_prefix(b" ")?;
        let sum = u32::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
        (sum == crc32fast::hash(text)).then(|| serde_json::from_slice(text).ok())?
    }
}

/// How many bytes of a file are whole: up to the end of its last good line. What is damaged before
/// that stays, and is passed over when it is read.
pub fn whole(bytes: &[u8]) -> usize {
    let mut end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    while end > 0 {
        let lines = bytes.get(..end - 1).unwrap_or_default();
        let start = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        if Record::decode(lines.get(start..).unwrap_or_default()).is_some() {
            break;
        }
        end = start;
    }
    end
}

/// The records of a file, and how many lines are damaged.
pub fn records(bytes: &[u8]) -> (Vec<Record>, usize) {
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let (mut records, mut damaged) = (Vec::new(), 0);
    for line in lines {
        match Record::decode(line) {
            Some(record) => records.push(record),
            None => damaged += 1,
        }
    }
    (records, damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minute(at: u64) -> Record {
        let source = Source {
            source: "198.51.100.7".parse().unwrap(),
            port: 80,
            open: 3,
            half_closed: 2,
            counted: 1,
            uncounted: 2,
            limit: Some(3),
            net: None,
        };
        Record::Minute { at, netns: String::new(), sources: vec![source], left_out: 0 }
    }

    #[test]
    fn wherever_a_file_is_torn_only_the_last_line_is_lost() {
        let lines: Vec<_> = (0..3).map(|at| minute(at).encode()).collect();
        let all = lines.concat();
        let ends: Vec<_> = (0..=3).map(|n| lines[..n].concat().len()).collect();
        for cut in 0..=all.len() {
            let torn = &all.as_bytes()[..cut];
            let wanted = *ends.iter().rev().find(|end| **end <= cut).unwrap();
            assert_eq!(whole(torn), wanted, "{cut}");
            let (read, _) = records(&torn[..whole(torn)]);
            assert_eq!(read.len(), ends.iter().position(|end| *end == wanted).unwrap());
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed_and_costs_its_own_line_alone() {
        let mut all = [minute(1).encode(), minute(2).encode()].concat().into_bytes();
        let first = minute(1).encode().len();
        for place in 0..first {
            for bit in 0..8 {
                all[place] ^= 1 << bit;
                let (read, _) = records(&all);
                assert!(!read.contains(&minute(1)) || read.len() == 2, "{place} {bit}");
                // Upper and lower case of a digit of the checksum are the same number.
                assert!(read.contains(&minute(2)) || place == first - 1, "{place} {bit}");
                // Without its end it is one line with the other, and neither can be read.
                assert!(whole(&all) == all.len() || place == first - 1, "{place} {bit}");
                all[place] ^= 1 << bit;
            }
        }
    }
}
