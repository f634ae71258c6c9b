//! `ctkeep audit`: one look, changes nothing.

use std::time::SystemTime;

use super::Exit;
use super::args::{Audit, Format};
use crate::audit::render;
use crate::audit::report::{Report, Request, Seen};
use crate::error::Result;

pub(super) fn run(args: &Audit) -> Result<Exit> {
    let policy = args.scope.policy();
    #[allow(clippy::disallowed_methods, reason = "a command may read the clock")]
    let now = SystemTime::now();
    let request = Request {
        limit: args.limit.map(|limit| limit.get()),
        mask: args.mask,
        mask6: args.mask6,
        now,
    };
    let mut exit = Exit::Done;
    for namespace in args.scope.namespaces()? {
        let (seen, scope) = namespace.run(|| Seen::look(namespace.name(), &policy))?;
        let report = Report::of(seen, &scope, &policy, request);
        if report.has_disagreements() {
            exit = Exit::Disagreement;
        }
        match args.output.format {
            Format::Json => render::line(&report.to_json(args.all, args.top))?,
            Format::Table => {
                render::text(&render::report(&report, args.all, args.top, args.output.no_header))?;
            }
        }
    }
    Ok(exit)
}
