//! ctkeep keeps half-closed TCP connections counted.
//!
//! connlimit and `ct count` count *conntrack entries*; what a server pays for are *sockets*. A
//! client that half-closes leaves the server's socket in CLOSE_WAIT for as long as the application
//! likes, while conntrack forgets the connection at a stray RST, a repeated FIN, or a timeout. This
//! program reads both tables and makes conntrack follow the sockets: during, and only during, the
//! life of the socket.
//!
//! From the bottom up (imports only ever go down):
//!
//! - [`flow`] and [`Error`]: endpoints, four-tuples, and the one error.
//! - [`netlink`]: bytes to and from the kernel; a list is whole or an error.
//! - [`conntrack`], [`sockdiag`]: the two tables, one typed request for each thing asked; [`host`]:
//!   routes, settings, namespaces.
//! - [`nflog`], [`shield`]: what can fool conntrack, told by a table of ours or kept from it.
//! - [`reconcile`]: observe, plan (pure), confirm by exact look-up, apply, recount; the ledger of
//!   what is held.
//! - [`audit`]: the report of one look.
//! - [`metrics`]: what the daemon publishes, and how.
//! - [`daemon`] and [`cli`]: a worker for each namespace, and the commands.

pub mod audit;
pub mod cli;
pub mod conntrack;
pub mod daemon;
mod error;
pub mod flow;
pub mod host;
pub mod metrics;
pub mod netlink;
pub mod nflog;
pub mod nftables;
pub mod reconcile;
pub mod shield;
pub mod sockdiag;

pub use error::{Cause, Error, Op, Result};
