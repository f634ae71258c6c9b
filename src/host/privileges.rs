//! What the process may do, and giving up what it does not need.

pub use caps::Capability;
use caps::errors::CapsError;
use caps::{CapSet, CapsHashSet};
use nix::sys::prctl;

use crate::error::{Cause, Op, Result};

/// What it takes to find other namespaces, and to work in them.
pub const ELSEWHERE: [Capability; 3] =
    [Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH];

/// Which of these the calling thread may not use, by their names.
pub fn lacking(wanted: &[Capability]) -> Vec<String> {
    let held = |it: &Capability| caps::has_cap(None, CapSet::Effective, *it).unwrap_or(false);
    wanted.iter().filter(|it| !held(it)).map(Capability::to_string).collect()
}

/// Gives up every capability but those in `wanted` for good, and the way to gain others by
/// executing a program: of the calling thread, and of those that it starts later.
///
/// A capability that is wanted and was not held is no error here; its user reports that.
///
/// # Errors
/// The system calls': a seccomp filter may forbid them.
pub fn keep_only(wanted: &[Capability]) -> Result<()> {
    let op = Op::new("drop privileges");
    let failed = |error: CapsError| op.failed(Cause::Unavailable(error.to_string()));
    prctl::set_no_new_privs().map_err(|errno| op.io(errno.into()))?;

    let wanted: CapsHashSet = wanted.iter().copied().collect();
    let held = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let kept: CapsHashSet = held.intersection(&wanted).copied().collect();
    // The bounding set first: to take from it is a privilege that goes, too.
    if held.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
        for capability in bounding.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(failed)?;
        }
    }
    // Also where nothing is to be given up: a unit starts its program with what it may do in these two
    // sets as well. The ambient one holds nothing that is not inheritable, and is emptied with it.
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)
}
