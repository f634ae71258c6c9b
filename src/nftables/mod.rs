//! nf_tables over netlink: tables of our own are built, those of others are listed, none of theirs
//! is changed. What rules mean is the [`firewall`](crate::firewall)'s.

pub mod dump;
mod expr;
pub(crate) mod hidden;
pub(crate) mod key;
pub mod shared;
mod table;
pub(crate) mod uapi;

use serde::{Deserialize, Serialize};

pub(crate) use dump::time_left;
pub use expr::{Expr, Header};
pub use key::Field;
pub use table::{ChainSpec, RegularSpec, SetSpec, Table, TableSpec};

/// The comment of every table that is ours as long as a process lives, by which all of them are
/// known, whatever name the helper device gives them; `nft list` prints it. A copy that was saved
/// and loaded has it, too, and does nothing.
pub(crate) const COMMENT: &str = "of a running ctkeep";

/// Where packets meet chains (`enum nf_inet_hooks`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u32)]
pub enum Hook {
    /// Packets from the wire, before routing.
    Prerouting = 0,
    /// Packets for this host's own sockets.
    Input = 1,
    /// Packets that this host passes on.
    Forward = 2,
    /// Packets that this host sends.
    Output = 3,
    /// All that leaves.
    Postrouting = 4,
    /// Packets of one device, before everything else.
    Ingress = 5,
}

impl Hook {
    /// By the kernel's number.
    pub fn from_kernel(number: u32) -> Option<Self> {
        [Self::Prerouting, Self::Input, Self::Forward, Self::Output, Self::Postrouting]
            .into_iter()
            .chain([Self::Ingress])
            .nth(usize::try_from(number).ok()?)
    }
}
