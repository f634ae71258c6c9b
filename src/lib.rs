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
//! - [`flow`] and [`Error`]: endpoints, four-tuples of packets, connections of sockets, and the one error.
//! - [`netlink`]: bytes to and from the kernel; a list is whole or an error.
//! - [`conntrack`], [`sockdiag`]: the two tables, one typed request for each thing asked;
//!   [`nftables`]: tables of our own, lists of all; [`rtnetlink`]: devices and routes; [`host`]: settings,
//!   namespaces, privileges.
//! - [`firewall`]: the host's rules and the limits in them. [`watch`]: where the daemon learns that
//!   an entry changed. [`shield`]: the packet program that keeps conntrack from being fooled.
//! - [`recount`]: what makes the limiter count a connection again. [`containers`]: other namespaces
//!   whose connections pass through this one's conntrack table.
//! - [`reconcile`]: observe, plan (pure), confirm by exact look-up, apply; the ledger of what is
//!   held.
//! - [`audit`]: the report of one look. [`doctor`]: whether this host is set up so that limits work.
//! - [`history`]: what sources held, minute by minute, in a file.
//! - [`report`]: one file for a bug report, and how it is read again.
//! - [`top`]: the live table of who holds what.
//! - [`overload`]: sets of sources that hold too much. [`kill`]: closes sockets that the administrator names.
//! - [`metrics`]: what the daemon publishes, and how.
//! - [`daemon`] and [`cli`]: a worker for each namespace, and the commands.
//!
//! Where to look for what (a second look, a limit, a setting, a metric) is in docs/architecture.md; our
//! own words are in docs/glossary.md.

pub mod audit;
pub mod cli;
pub mod conntrack;
pub mod containers;
pub mod daemon;
pub mod doctor;
mod error;
pub mod firewall;
pub mod flow;
pub mod history;
pub mod host;
pub mod kill;
pub mod metrics;
pub mod netlink;
pub mod nftables;
pub mod overload;
pub mod reconcile;
pub mod recount;
pub mod report;
pub mod rtnetlink;
pub mod shield;
pub mod sockdiag;
pub mod top;
pub mod watch;

pub use error::{Cause, Error, Op, Result};
