//! What else the host tells: routes, sysctls, network namespaces.

pub mod instance;
pub mod netns;
pub mod route;
pub mod ruleset;
pub mod sysctl;
