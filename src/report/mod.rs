//! One file for a bug report: the tables, the rules, the settings, in sections that a person reads
//! and that `ctkeep audit --report` reads again.
//!
//! [`mod@file`] is its form, [`tables`] the lines of the two tables, [`rules`] those of the rules,
//! [`anonymous`] what replaces addresses; all of them pure. [`host`] asks the host.

pub mod anonymous;
pub mod file;
pub mod host;
pub mod rules;
pub mod tables;

use std::collections::HashMap;

use crate::audit::saved::{Host, Refusal, Saved};
use crate::firewall::Ruleset;
use crate::firewall::limits::Limiter;
use crate::firewall::tracking::Tracking;
use crate::reconcile::observe;
use crate::reconcile::policy::Policy;
use file::{ARRIVALS, BESIDE, ENTRIES, File, RULES, SOCKETS};
use tables::Beside;

/// The host that a report is of, as saved tables show it, with the rules that the file has.
///
/// # Errors
/// A table is missing, or cannot be read.
pub fn read(file: &File, policy: &Policy) -> Result<Host, Refusal> {
    let section = |name| file.section(name).unwrap_or_default();
    let mut saved = Saved::read(section(SOCKETS).as_bytes(), section(ENTRIES).as_bytes(), None)?;
    let beside: Vec<_> = section(BESIDE).lines().filter_map(tables::beside).collect();
    add(&mut saved, &beside);
    // A section that was too long ends with a word on it.
    saved.sockets.is_part |= file.failure(SOCKETS).is_some();
    saved.entries.is_part |= file.failure(ENTRIES).is_some();
    let mut host = saved.join(policy)?;
    host.notes.extend(file.notes().map(str::to_owned));
    let seen = &mut host.seen;
    for one in &beside {
        match one {
            Beside::OpenedHere(connection) => {
                seen.snapshot.evidence.opened_here.insert(*connection);
            }
            Beside::Behind(addr) => {
                seen.behind.insert(*addr);
            }
            Beside::Device(link) => seen.links.push(link.clone()),
            Beside::Holder(..) | Beside::Flags(..) => {}
        }
    }
    let mut rules = file.section(RULES).map_or_else(no_rules, rules::read);
    rules.unread.extend(file.failure(RULES));
    if let Some(tracking) = Tracking::of(rules.chains.clone(), |rules| Limiter::of(rules).rules) {
        observe::play(&tracking, &mut seen.snapshot, &seen.ledger);
    }
    seen.limiter = Limiter::of(&rules);
    seen.rules = rules;
    seen.arrivals = section(ARRIVALS).lines().filter_map(tables::arrival).collect();
    "report".clone_into(&mut seen.netns);
    file.value("kernel").unwrap_or_default().clone_into(&mut seen.kernel);
    Ok(host)
}

fn no_rules() -> Ruleset {
    let unread = vec!["the report has no rules".to_owned()];
    Ruleset { chains: Vec::new(), unread }
}

/// Adds what neither ss nor conntrack prints.
fn add(saved: &mut Saved, beside: &[Beside]) {
    let mut flags = HashMap::new();
    for one in beside {
        match one {
            Beside::Holder(cookie, processes, container) => {
                if let Some(holder) = saved.sockets.holders.get_mut(cookie) {
                    holder.processes = *processes;
                    holder.container.clone_from(container);
                }
            }
            Beside::Flags(key, of_entry) => {
                flags.insert(*key, *of_entry);
            }
            Beside::OpenedHere(_) | Beside::Behind(_) | Beside::Device(_) => {}
        }
    }
    for entry in &mut saved.entries.values {
        let of_entry = flags.get(&entry.key()).copied().unwrap_or_default();
        if let Some(tcp) = &mut entry.tcp {
            tcp.flags = of_entry;
        }
    }
    saved.entries.is_of_report = true;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::classes::Class;
    use crate::audit::report::{Report, Request};
    use crate::flow::Connection;
    use crate::rtnetlink::link::Link;
    use std::time::SystemTime;

    fn port() -> Link {
        Link { index: 2, name: "eth0".to_owned(), master: Some(3), ..Link::default() }
    }

    /// A family without one entry has lost them all: a report leaves none out, unless it says so.
    #[test]
    fn a_family_without_an_entry_has_none() {
        let sockets = "LISTEN 0 128 *:80 *:*\n\
            ESTAB 0 0 192.0.2.1:80 198.51.100.8:20001 ino:3 sk:3\n\
            ESTAB 0 0 [2001:db8::1]:80 [2001:db8:1::9]:20002 ino:4 sk:4\n";
        let entries = "ipv4 2 tcp 6 99 ESTABLISHED src=198.51.100.8 dst=192.0.2.1 sport=20001 dport=80 \
            src=192.0.2.1 dst=198.51.100.8 sport=80 dport=20001 [ASSURED] mark=0 use=1\n";
        for (end, missing) in [("", 1), ("cut here: 3 more lines\n", 0)] {
            let mut file = File::default();
            file.add(SOCKETS, Ok(sockets.to_owned()));
            file.add(ENTRIES, Ok(format!("{entries}{end}")));
            let host = read(&file, &Policy::default()).expect("a host");
            let views = host.seen.snapshot.views.iter();
            let count = views.filter(|view| view.entry.is_none()).count();
            assert_eq!(
                (count, host.notes.is_empty()),
                (missing, end.is_empty()),
                "{:?}",
                host.notes
            );
        }
    }

    /// An entry that was picked up in its middle, one of a connection that this host opened, a worker of
    /// three in a container: as the host has it, and as the two programs print it.
    #[test]
    fn what_neither_program_prints_is_read_too() {
        let sockets = "LISTEN 0 128 192.0.2.1:80 0.0.0.0:* ino:1 sk:1\n\
            CLOSE-WAIT 1 0 192.0.2.1:80 198.51.100.7:20000 users:((\"web\",pid=9,fd=0)) ino:2 sk:2\n\
            ESTAB 0 0 192.0.2.1:80 198.51.100.8:20001 ino:3 sk:3\n\
            ESTAB 0 0 192.0.2.1:80 198.51.100.9:20002 ino:4 sk:4\n";
        let entries = "ipv4 2 tcp 6 99 ESTABLISHED src=192.0.2.1 dst=198.51.100.7 sport=80 dport=20000 \
            src=198.51.100.7 dst=192.0.2.1 sport=20000 dport=80 [ASSURED] mark=0 use=1\n\
            ipv4 2 tcp 6 99 ESTABLISHED src=198.51.100.6 dst=192.0.2.1 sport=5 dport=80 \
            src=192.0.2.1 dst=198.51.100.6 sport=80 dport=5 [ASSURED] mark=0 use=1\n";
        let mut file = File::default();
        file.add(SOCKETS, Ok(sockets.to_owned()));
        file.add(ENTRIES, Ok(entries.to_owned()));
        let report = |file: &File| {
            let host = read(file, &Policy::default()).expect("a host");
            let request =
                Request { limit: Some(9), mask: None, mask6: None, now: SystemTime::UNIX_EPOCH };
            (host.notes, Report::of(host.seen, &host.scope, &Policy::default(), request))
        };
        let class = |report: &Report, port: u16| {
            let of = |it: &&crate::audit::report::ReportedConnection| {
                it.view.connection.remote.port() == port
            };
            report.connections.iter().find(of).map(|it| (it.class, it.holder.clone()))
        };
        let (notes, plain) = report(&file);
        assert!(notes.is_empty(), "{notes:?}");
        assert_eq!(class(&plain, 20000).map(|it| it.0), Some(Class::Agree));
        let beside = [
            Beside::Holder(crate::sockdiag::Cookie(2), 3, Some("my web".to_owned())),
            Beside::Flags(
                crate::conntrack::EntryKey {
                    zone: crate::conntrack::Zone::default(),
                    orig: crate::flow::FourTuple::new(
                        "192.0.2.1:80".parse().unwrap(),
                        "198.51.100.7:20000".parse().unwrap(),
                    ),
                },
                [10, 10],
            ),
            Beside::OpenedHere(Connection::new(
                "192.0.2.1:80".parse().unwrap(),
                "198.51.100.8:20001".parse().unwrap(),
            )),
            Beside::Behind("172.17.0.2".parse().unwrap()),
            Beside::Device(port()),
        ];
        let lines: Vec<_> = beside.iter().map(tables::beside_line).collect();
        file.add(BESIDE, Ok(lines.join("\n")));
        let (_, whole) = report(&file);
        let (found, holder) = class(&whole, 20000).expect("a connection");
        let holder = holder.expect("a process");
        assert_eq!(
            (found, holder.processes, holder.container.as_deref()),
            (Class::EntryReversed, 3, Some("my web"))
        );
        let of_others = [20001, 20002].map(|port| class(&whole, port).map(|it| it.0));
        let host = read(&file, &Policy::default()).expect("a host");
        assert!(host.seen.behind.contains(&"172.17.0.2".parse().unwrap()));
        assert_eq!(host.seen.links, [port()]);
        assert_eq!(of_others, [Some(Class::Agree), Some(Class::EntryMissing)]);
    }
}
