//! What sources held, minute by minute, and what was done: an append-only file with checksums, in
//! bounded room.

pub mod record;
pub mod store;
