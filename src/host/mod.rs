//! What else the host tells: routes, rules, settings, counters, network namespaces.

pub mod counters;
pub mod instance;
pub mod netns;
pub mod route;
pub mod ruleset;
pub mod sysctl;
