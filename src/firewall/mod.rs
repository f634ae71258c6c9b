//! The firewall's rules, as far as they bear on connection limits: read, never changed.
//!
//! nf_tables is asked by netlink, iptables-nft rules with it (their matches stand there as xt
//! blobs, which `nft list ruleset` cannot show). Rules of the older iptables-legacy come from its
//! own save program where the kernel has such tables. What cannot be read is said.

mod iptables_save;
pub mod limits;
pub mod lists;
mod nft;
mod ports;
mod rule;
mod xt;

use std::fs;
use std::process::{Command, Stdio};

pub use iptables_save::parse as parse_saved;
pub use nft::chains as nft_chains;
pub use ports::Ports;
pub use rule::{
    Base, Chain, Family, Key, Limit, Match, Outcome, Rule, STATE_ESTABLISHED, STATE_NEW,
};

pub use crate::nftables::Hook;

/// All that could be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Chains with their rules, in the order of the kernel.
    pub chains: Vec<Chain>,
    /// What could not be read and why, one sentence each.
    pub unread: Vec<String>,
}

impl Ruleset {
    /// Reads the rules of the network namespace that the calling thread is in.
    pub fn read() -> Self {
        let mut all = Self::default();
        match nft::read() {
            Ok(chains) => all.chains = chains,
            Err(error) => all.unread.push(format!("nftables rules: {error}")),
        }
        all.read_legacy("/proc/thread-self/net/ip_tables_names", "iptables", Family::Ip);
        all.read_legacy("/proc/thread-self/net/ip6_tables_names", "ip6tables", Family::Ip6);
        all
    }

    /// The save program reads only tables that exist, so it makes none.
    fn read_legacy(&mut self, names: &str, tool: &str, family: Family) {
        let tables = fs::read_to_string(names).unwrap_or_default();
        if tables.trim().is_empty() {
            return;
        }
        let program = format!("{tool}-legacy-save");
        match Command::new(&program).stdin(Stdio::null()).stderr(Stdio::null()).output() {
            Ok(output) if output.status.success() => {
                self.chains.extend(parse_saved(&String::from_utf8_lossy(&output.stdout), family));
            }
            Ok(output) => self.unread.push(format!("legacy rules: {program}: {}", output.status)),
            Err(error) => self.unread.push(format!(
                "legacy rules in table {}: {program}: {error}; install iptables",
                tables.split_whitespace().collect::<Vec<_>>().join(", ")
            )),
        }
    }
}
