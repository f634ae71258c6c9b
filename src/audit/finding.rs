//! What is wrong, how badly, and what to do: the same words in `audit` and `doctor`.

use std::fmt;

use serde::Serialize;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, and could be better or soon be worse.
    Warn,
    /// A limit does not hold, or connections are lost.
    Bad,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Bad => "bad",
        })
    }
}

/// One finding. Its identifier is the heading of its section in docs/doctor.md.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name for life.
    pub id: &'static str,
    /// How bad it is.
    pub verdict: Verdict,
    /// What was seen, with its figures.
    pub what: String,
    /// What to do, with the exact setting or rule; empty where there is nothing to do.
    pub advice: String,
}

impl Finding {
    /// As it should be.
    pub fn ok(id: &'static str, what: impl Into<String>) -> Self {
        Self { id, verdict: Verdict::Ok, what: what.into(), advice: String::new() }
    }

    /// Works, and could be better.
    pub fn warn(id: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { id, verdict: Verdict::Warn, what: what.into(), advice: advice.into() }
    }

    /// Does not work.
    pub fn bad(id: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { id, verdict: Verdict::Bad, what: what.into(), advice: advice.into() }
    }
}

/// The worst verdict of these; `Ok` of none.
pub fn worst<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Verdict {
    findings.into_iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}
