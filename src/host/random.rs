//! Numbers that cannot be guessed.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};

/// 64 random bits: the standard library seeds its hashers from the kernel's random numbers.
pub fn bits() -> u64 {
    RandomState::new().build_hasher().finish()
}
