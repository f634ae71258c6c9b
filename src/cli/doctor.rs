//! `ctkeep doctor`: is this host set up so that limits work?

use std::time::{Instant, SystemTime};

use serde_json::json;

use super::Exit;
use super::args::{Doctor, Format};
use super::output;
use crate::audit::finding::Verdict;
use crate::doctor::examine;
use crate::error::Result;

pub(super) fn run(args: &Doctor) -> Result<Exit> {
    let policy = args.scope.policy();
    #[allow(clippy::disallowed_methods, reason = "a command may read the clock")]
    let clock = SystemTime::now();
    let diagnosis =
        args.scope.namespace()?.run(|| Ok(examine(&policy, args.ask, Instant::now(), clock)))?;
    match args.output.format {
        Format::Json => output::line(&json!({"schema": 1, "findings": diagnosis.findings}))?,
        Format::Table => {
            output::text(&output::findings(&diagnosis.findings, args.output.no_header))?;
        }
    }
    let is_bad = diagnosis.findings.iter().any(|finding| finding.verdict == Verdict::Bad);
    Ok(match (diagnosis.is_unavailable, is_bad) {
        (true, _) => Exit::Unavailable,
        (false, true) => Exit::Disagreement,
        (false, false) => Exit::Done,
    })
}
