//! What sources held, minute by minute, and what was done: an append-only file with checksums, in
//! bounded room.

pub mod record;
pub mod store;

use std::time::{SystemTime, UNIX_EPOCH};

/// The time that records have: seconds since 1970 by the clock of the wall.
#[allow(clippy::disallowed_methods, reason = "the past is told by the wall's clock")]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
