//! One file for a bug report: the tables, the rules, the settings, in sections that a person reads
//! and that `ctkeep audit --report` reads again.
//!
//! [`mod@file`] is its form, [`tables`] the lines of the two tables, [`anonymous`] what replaces
//! addresses; all of them pure. [`host`] asks the host.

pub mod anonymous;
pub mod file;
pub mod host;
pub mod tables;

use crate::audit::saved::{Host, Refusal, Saved};
use crate::firewall::limits::Limiter;
use crate::firewall::{Family, Ruleset, parse_saved};
use crate::reconcile::policy::Policy;
use file::{ARRIVALS, ENTRIES, File, IP6TABLES, IPTABLES, LEGACY, LEGACY6, NFT, SOCKETS};

/// The host that a report is of, as saved tables show it, with the rules that the file has.
///
/// # Errors
/// A table is missing, or cannot be read.
pub fn read(file: &File, policy: &Policy) -> Result<Host, Refusal> {
    let section = |name| file.section(name).unwrap_or_default();
    let saved = Saved::read(section(SOCKETS).as_bytes(), section(ENTRIES).as_bytes(), None)?;
    let mut host = saved.join(policy)?;
    host.notes.extend(file.notes().map(str::to_owned));
    let mut rules = Ruleset::default();
    for (name, family) in [
        (IPTABLES, Family::Ip),
        (IP6TABLES, Family::Ip6),
        (LEGACY, Family::Ip),
        (LEGACY6, Family::Ip6),
    ] {
        rules.chains.extend(parse_saved(section(name), family));
        // Without that program: its tables stand in the text of nft, where there are any.
        let is_told_by_nft = name == IPTABLES || name == IP6TABLES;
        let is_there = file.section(name).is_some();
        rules.unread.extend(file.failure(name).filter(|_| is_there || !is_told_by_nft));
    }
    rules.unread.extend(file.failure(NFT));
    let tables = native_tables(section(NFT), !section(IPTABLES).is_empty());
    if !tables.is_empty() {
        rules.unread.push(format!(
            "nft rules of a report are for people to read: table {}; --limit names a limit",
            tables.join(", ")
        ));
    }
    let seen = &mut host.seen;
    seen.limiter = Limiter::of(&rules);
    seen.rules = rules;
    seen.arrivals = section(ARRIVALS).lines().filter_map(tables::arrival).collect();
    "report".clone_into(&mut seen.netns);
    file.value("kernel").unwrap_or_default().clone_into(&mut seen.kernel);
    Ok(host)
}

/// Tables of nft that no other section holds, and that are not ours.
fn native_tables(text: &str, has_iptables: bool) -> Vec<String> {
    let mut tables = Vec::new();
    let mut is_of_iptables = false;
    for line in text.lines() {
        if line.starts_with("# Warning:") && line.contains("managed by iptables") {
            is_of_iptables = true;
        } else if let Some(table) = line.strip_prefix("table ") {
            let name = table.split(['{', '#']).next().unwrap_or(table).trim();
            if !(name.starts_with("inet ctkeep") || is_of_iptables && has_iptables) {
                tables.push(name.to_owned());
            }
            is_of_iptables = false;
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_that_another_section_holds_or_that_are_ours_are_not_left_open() {
        let text = "# Warning: table ip filter is managed by iptables-nft, do not touch!\n\
            table ip filter {\n}\ntable inet ctkeep-watch { # progname ctkeep\n}\n\
            table inet filter {\n}\n";
        assert_eq!(native_tables(text, true), ["inet filter"]);
        assert_eq!(native_tables(text, false), ["ip filter", "inet filter"]);
    }
}
