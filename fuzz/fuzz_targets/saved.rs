//! Tables and rules as text: what ss, conntrack and iptables-save print, and the report of it.

#![no_main]

use std::sync::LazyLock;
use std::time::SystemTime;

use ctkeep::audit::report::{Report, Request};
use ctkeep::audit::saved;
use ctkeep::cli::output;
use ctkeep::firewall::limits::Limiter;
use ctkeep::firewall::{Family, Ruleset, parse_saved};
use ctkeep::reconcile::policy::Policy;
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
    let (sockets, entries) = (saved::sockets(&text), saved::entries(&text));
    assert!(sockets.values.len() + sockets.malformed.len() <= lines);
    assert!(entries.values.len() + entries.malformed.len() <= lines);

    let chains = [(Family::Ip, true), (Family::Ip6, false)].map(|(family, ipv4)| {
        let chains = parse_saved(&text, family);
        let rules = chains.iter().flat_map(|chain| &chain.rules);
        assert!(rules.clone().count() <= lines);
        assert!(rules.clone().all(|rule| rule.matches.ipv4 == Some(ipv4)));
        chains
    });

    let policy = Policy::default();
    let (mut seen, scope) = saved::seen(&sockets.values, &entries.values, &policy);
    seen.limiter = Limiter::of(&Ruleset { chains: chains.concat(), unread: Vec::new() });
    let request = Request { limit: None, mask: None, mask6: None, now: SystemTime::UNIX_EPOCH };
    let report = Report::of(seen, &scope, &policy, request);
    assert_eq!(report.classes().values().sum::<usize>(), report.connections.len());
    assert!(report.connections.len() <= sockets.values.len() + entries.values.len());
    let json = report.to_json(true, None);
    assert!(SCHEMA.is_valid(&json), "{json}");
    assert!(output::report(&report, true, None, false).ends_with('\n'));
});
