//! What else the host tells and permits: routes, devices, rules, settings, counters, network
//! namespaces, privileges, randomness.

pub mod counters;
pub mod instance;
pub mod link;
pub mod netns;
pub mod privileges;
pub mod random;
pub mod route;
pub mod ruleset;
pub mod sysctl;
pub mod unit;
