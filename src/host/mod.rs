//! What else the host tells and permits: routes, devices, rules, settings, counters, network
//! namespaces, privileges.

pub mod counters;
pub mod instance;
pub mod link;
pub mod netns;
pub mod privileges;
pub mod route;
pub mod ruleset;
pub mod sysctl;
pub mod unit;
