//! Devices, routes and traffic control by rtnetlink.

pub mod bridge;
pub mod changes;
pub mod link;
pub mod neighbour;
pub mod nsid;
pub mod route;
pub mod tc;
