//! The rest of the host: settings, counters, network namespaces, privileges,
//! randomness.

pub mod addresses;
pub mod counters;
pub mod instance;
pub mod modules;
pub mod netns;
pub mod privileges;
pub mod random;
pub mod sysctl;
