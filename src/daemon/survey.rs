//! What the figures of the whole tables ask the kernel: the metrics themselves ask it nothing.

use crate::audit::survey::{Kernel, Survey, SweepResult, TIMED};
use crate::error::Result;
use crate::host::sysctl;
use crate::netlink::Transport;
use crate::reconcile::observe::Tables;

/// Makes sure of what the sweep left, reads the settings.
///
/// # Errors
/// The kernel refused, or an answer was lost.
pub(super) fn finish<T: Transport>(
    tables: &mut Tables<T>,
    sweep: SweepResult<'_>,
    mut survey: Survey,
) -> Result<Survey> {
    let again = tables.exactly(survey.suspects(), sweep.ledger)?;
    survey.make_sure(sweep, &again);
    survey.kernel = Kernel {
        counters: tables.conntrack.counters()?,
        timeouts: TIMED
            .into_iter()
            .filter_map(|state| Some((state, sysctl::conntrack(&state.timeout_setting()?)?)))
            .collect(),
        tcp_loose: sysctl::conntrack("nf_conntrack_tcp_loose"),
    };
    Ok(survey)
}
