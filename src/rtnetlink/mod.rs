//! Devices, routes and traffic control by rtnetlink.

pub mod link;
pub mod route;
pub mod tc;
