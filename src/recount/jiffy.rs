//! The kernel's tick, by the clock that moves with it.

use std::thread;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_getres, clock_gettime};

/// Much shorter than a jiffy (1 to 10 ms).
const PAUSE: Duration = Duration::from_micros(50);
/// The longest jiffy is 10 ms; a clock that stands still must not hold us.
const PAUSES: u32 = 1000;

/// Differs from one jiffy to the next. `CLOCK_MONOTONIC_COARSE` is the time of the last tick.
pub(super) fn now() -> Duration {
    duration(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE))
}

/// How long a jiffy is: that clock's resolution (`TICK_NSEC`, `1 / CONFIG_HZ`).
pub(super) fn length() -> Duration {
    duration(clock_getres(ClockId::CLOCK_MONOTONIC_COARSE))
}

/// Every Linux has this clock.
fn duration(read: nix::Result<TimeSpec>) -> Duration {
    read.map(Duration::from).unwrap_or_default()
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
