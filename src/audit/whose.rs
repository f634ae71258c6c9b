//! Whose connections a limit counts together, by name. Pure.

use std::fmt;

use ipnet::IpNet;

use super::loads::Load;
use crate::firewall::limits::{Key, LimitRule};

/// Whose connections a limit counts together, as well as it can be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whose {
    /// Of this source, or of a family: of all in it, or of several.
    pub net: IpNet,
    /// Of all who come to this destination.
    pub to: Option<IpNet>,
    /// Of all.
    pub is_all: bool,
}

impl Whose {
    /// Of one load of a limit.
    pub fn of(rule: &LimitRule, load: &Load) -> Self {
        let is_all = rule.limit.key == Key::All;
        let is_by_source = rule.source_prefix().is_some() || is_all;
        let net = load.client.filter(|_| !is_by_source).map_or(load.net, IpNet::from);
        Self { net, to: load.to, is_all }
    }
}

impl From<IpNet> for Whose {
    fn from(net: IpNet) -> Self {
        Self { net, to: None, is_all: net.prefix_len() == 0 }
    }
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to {
            Some(to) => write!(f, "what goes to {to}"),
            None if self.is_all => f.write_str("all"),
            None if self.net.prefix_len() == 0 => f.write_str("several clients together"),
            None => write!(f, "{}", self.net),
        }
    }
}
