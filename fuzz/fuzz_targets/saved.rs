//! Tables and rules as text: what ss, conntrack and iptables-save print, and the report of it.

#![no_main]

use std::sync::LazyLock;
use std::time::SystemTime;

use ctkeep::audit::report::{Report, Request};
use ctkeep::audit::saved::{Host, Saved};
use ctkeep::cli::audit::text;
use ctkeep::firewall::limits::Limiter;
use ctkeep::firewall::{Chain, Family, Ruleset, parse_saved};
use ctkeep::reconcile::policy::Policy;
use ctkeep::sockdiag::State;
use ctkeep_fuzz::played_through;
use jsonschema::Validator;
use libfuzzer_sys::fuzz_target;

static SCHEMA: LazyLock<Validator> = LazyLock::new(|| {
    let schema = include_str!("../../docs/audit.schema.json");
    jsonschema::validator_for(&serde_json::from_str(schema).expect("JSON")).expect("a schema")
});

// One text for all three readers: each passes over what is not its own.
fuzz_target!(init: { LazyLock::force(&SCHEMA); }, |bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().count();
    let chains = [(Family::Ip, true), (Family::Ip6, false)].map(|(family, ipv4)| {
        let chains = parse_saved(&text, family);
        let rules = chains.iter().flat_map(|chain| chain.rules.iter());
        assert!(rules.clone().count() <= lines);
        assert!(chains.iter().all(|chain| chain.family.covers(ipv4)));
        chains
    });

    played_through(&Ruleset { chains: chains.concat(), unread: Vec::new() });

    // One text as both tables: each reader counts what is not its own, and none loses a line.
    let both = Saved::read(bytes, bytes, None);
    let sockets = Saved::read(bytes, ENTRIES, Some(State::CloseWait));
    let entries = Saved::read(SOCKETS, bytes, None);
    for saved in [both, sockets, entries].into_iter().flatten() {
        check(saved, &chains.concat());
    }
});

const SOCKETS: &[u8] = b"LISTEN 0 128 *:80 *:*\nCLOSE-WAIT 1 0 192.0.2.1:80 198.51.100.7:40000\n";
const ENTRIES: &[u8] = b"tcp 6 9 CLOSE src=198.51.100.7 dst=192.0.2.1 sport=40000 dport=80 \
    src=192.0.2.1 dst=198.51.100.7 sport=80 dport=40000\n";

fn check(saved: Saved, chains: &[Chain]) {
    let most = saved.sockets.values.len() + 2 * saved.entries.values.len();
    for holder in saved.sockets.holders.values() {
        assert!(!holder.command.contains(char::is_control), "{holder:?}");
    }
    let policy = Policy::default();
    let Ok(Host { mut seen, scope, .. }) = saved.join(&policy) else { return };
    seen.limiter = Limiter::of(&Ruleset { chains: chains.to_vec(), unread: Vec::new() });
    let request = Request { limit: None, mask: None, mask6: None, now: SystemTime::UNIX_EPOCH };
    let report = Report::of(seen, &scope, &policy, request);
    assert_eq!(report.classes().values().sum::<usize>(), report.connections.len());
    assert!(report.connections.len() <= most);
    let json = serde_json::to_value(report.to_json(true, None)).expect("names for keys");
    assert!(SCHEMA.is_valid(&json), "{json}");
    let text = text::text(&report, true, None, false);
    assert!(
        text.ends_with('\n')
            && !text.replace("\u{1b}[", "").contains(|c: char| c.is_control() && c != '\n')
    );
}
