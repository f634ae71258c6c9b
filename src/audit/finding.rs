//! Findings: what is wrong, how badly, and what to do, in the same words for `audit` and `doctor`.

use std::fmt;

use serde::Serialize;

/// Every identifier there is; docs/doctor.md has a section for each.
pub const IDENTIFIERS: [&str; 62] = [
    "kernel",
    "privilege-net-admin",
    "privilege-net-raw",
    "privilege-ptrace",
    "kernel-feature",
    "table-full",
    "table-dropped",
    "buckets-few",
    "settings-unread",
    "loose-pickup",
    "conntrack-events",
    "close-wait-timeout",
    "idle-timeout",
    "outgoing",
    "lease",
    "rules-unread",
    "no-limit",
    "limit",
    "limit-shadowed",
    "limit-translated",
    "limit-without-syn",
    "limit-forwarded",
    "limit-unseen",
    "limit-notes",
    "limit-rated",
    "limit-partial",
    "limit-unjudged",
    "limit-for-all",
    "limit-one-family",
    "limit-dormant",
    "set-full",
    "limit-interface",
    "rule-sees-nudges",
    "port-untracked",
    "port-unheard",
    "untracked",
    "tables-disagree",
    "source-over-limit",
    "limit-uncounted",
    "limit-met-twice",
    "limit-lacking",
    "saved-text",
    "clients-as-one",
    "listener-gone",
    "syncookies-off",
    "syn-backlog",
    "syncookies-sent",
    "syn-dropped",
    "listen-queue-full",
    "listen-overflows",
    "half-closed-held",
    "recount-route",
    "recount-asked",
    "recount-unreachable",
    "ingress-device",
    "seal",
    "hide",
    "receive-buffer",
    "open-files",
    "unit-limits",
    "daemon",
    "shield",
];

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
    /// The observation, with its figures.
    pub what: String,
    /// What to do, with the exact setting or rule; empty where there is nothing to do.
    pub advice: String,
}

impl Finding {
    /// As it should be.
    pub fn ok(id: &'static str, what: impl Into<String>) -> Self {
        Self::new(id, Verdict::Ok, what.into(), String::new())
    }

    /// Works, and could be better.
    pub fn warn(id: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(id, Verdict::Warn, what.into(), advice.into())
    }

    /// Does not work.
    pub fn bad(id: &'static str, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(id, Verdict::Bad, what.into(), advice.into())
    }

    /// With a verdict that has been found already.
    pub fn of(id: &'static str, verdict: Verdict, what: String, advice: Option<String>) -> Self {
        Self::new(id, verdict, what, advice.unwrap_or_default())
    }

    fn new(id: &'static str, verdict: Verdict, what: String, advice: String) -> Self {
        debug_assert!(IDENTIFIERS.contains(&id), "{id} has no section in docs/doctor.md");
        Self { id, verdict, what, advice }
    }
}

/// The worst verdict of these; `Ok` of none.
pub fn worst<'a>(findings: impl IntoIterator<Item = &'a Finding>) -> Verdict {
    findings.into_iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_identifier_has_its_section_and_no_section_lacks_one() {
        let page = include_str!("../../docs/doctor.md");
        let sections: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("## ")).collect();
        assert_eq!(sections, IDENTIFIERS);
    }
}
