//! The firewall's rules, as far as they bear on connection limits: read, never changed.
//!
//! nf_tables is asked by netlink, iptables-nft rules with it (their matches stand there as xt
//! blobs, which `nft list ruleset` cannot show). Rules of the older iptables-legacy come from its
//! own save program where the kernel has such tables. What cannot be read is said.
//!
//! Two questions are asked of them. [`limits`] lists the limits and what can be said of each.
//! [`play`] takes one connection and plays its SYN through all rules: which limits count it.

mod ask;
mod iptables_save;
pub mod limits;
pub mod lists;
mod matches;
mod nft;
pub mod packet;
pub mod play;
mod ports;
pub mod published;
pub mod rule;
mod save_program;
pub mod set;
pub mod timeouts;
pub mod tracking;
pub mod value;
mod xt;

pub use iptables_save::parse as parse_saved;
pub use limits::Key;
pub use matches::{Match, STATE_ESTABLISHED, STATE_NEW};
pub use nft::chains as nft_chains;
pub use ports::Ports;
pub use rule::{Base, Chain, Family, Outcome, Rule, Step, Test};
pub use save_program::read as read_legacy;

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
        let mut unread = Vec::new();
        let nft = nft::read().unwrap_or_else(|error| {
            unread.push(format!("nftables rules: {error}"));
            Vec::new()
        });
        let mut legacy = Vec::new();
        for family in [Family::Ip, Family::Ip6] {
            match save_program::read(family, &[]) {
                Ok(text) => legacy.extend(text.iter().flat_map(|t| parse_saved(t, family))),
                Err(what) => unread.push(what),
            }
        }
        Self { chains: joined(nft, legacy), unread }
    }

    /// A rule by the numbers of its chain and of itself: `ip filter INPUT rule 3`.
    pub fn place(&self, chain: usize, rule: usize) -> Option<String> {
        let chain = self.chains.get(chain)?;
        Some(chain.place(chain.rules.get(rule)?))
    }
}

/// The chains of nf_tables and those of iptables-legacy. Where both have a table of one name, as beside
/// iptables-nft, the other's is called `filter (legacy)`: a jump ends in its own table, and a rule has a
/// name of its own.
fn joined(nft: Vec<Chain>, mut legacy: Vec<Chain>) -> Vec<Chain> {
    for chain in &mut legacy {
        let has_its_name = |it: &Chain| (it.family, &it.table) == (chain.family, &chain.table);
        if nft.iter().any(has_its_name) {
            chain.table.push_str(" (legacy)");
        }
    }
    nft.into_iter().chain(legacy).collect()
}
