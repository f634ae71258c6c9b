//! ctkeep keeps conntrack in step with the kernel's sockets.
mod error;
pub mod flow;
pub mod netlink;
pub mod conntrack;
pub mod sockdiag;
pub mod reconcile;
pub mod host;
pub mod daemon;
pub use error::{Cause, Error, Op, Result};
