//! Bytes to and from the kernel: framing, request and acknowledgement, dumps, batches.
//!
//! This layer knows nothing of conntrack or sockets; it knows sequence numbers, `NLM_F_*` flags,
//! extended acknowledgements and every way in which an answer can go missing. A list that it
//! returns is whole, or it is an error.

pub mod attribute;
mod conn;
mod drain;
mod frame;
mod nfgen;
pub mod script;
mod transport;

pub use attribute::Attributes;
pub use conn::{Conversation, Request};
pub use drain::{Drained, drain};
pub use frame::{Frame, frames};
pub use nfgen::{NFGENMSG_LEN, nfgenmsg};
pub use transport::{KernelSocket, Transport};
