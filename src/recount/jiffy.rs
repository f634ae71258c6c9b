//! The kernel's tick, by the clock that moves with it.

use std::thread;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

/// Much shorter than a jiffy (1 to 10 ms).
const PAUSE: Duration = Duration::from_micros(50);
/// The longest jiffy is 10 ms; a clock that stands still must not hold us.
const PAUSES: u32 = 1000;

/// Differs from one jiffy to the next. `CLOCK_MONOTONIC_COARSE` is the time of the last tick.
pub(super) fn now() -> Option<TimeSpec> {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).ok()
}

/// Returns when the next jiffy has just begun.
pub(super) fn await_next() {
    let begun = now();
    for _ in 0..PAUSES {
        if now() != begun {
            return;
        }
        thread::sleep(PAUSE);
    }
}
