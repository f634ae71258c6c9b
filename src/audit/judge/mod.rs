//! Judges figures, rules and sockets. Pure: the thresholds stand here and in docs/doctor.md.

pub mod figures;
pub mod limits;
pub mod reach;
pub mod sockets;
