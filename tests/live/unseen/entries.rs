//! Entries that are not where a packet says: in a zone without a connection so far, or of another source.

use super::{ATTACKER, ATTACKER6, Attack, Dropped, assert_bounded, contrast};
use crate::lab::Lab;

/// The attacker's connections are in a zone of their own.
fn zone(lab: &Lab) {
    let chain = |name: &str, hook: &str, side: &str| {
        format!(
            "chain {name} {{ type filter hook {hook} priority raw; \
                ip {side} {ATTACKER} ct zone set 5; ip6 {side} {ATTACKER6} ct zone set 5; }}\n"
        )
    };
    let (pre, out) = (chain("pre", "prerouting", "saddr"), chain("out", "output", "daddr"));
    lab.server.feed("nft -f -", &format!("table inet zones {{\n{pre}{out}}}\n"));
}

/// A look at the whole table, which shows zones, is half a minute off.
#[test]
fn in_a_zone_without_a_connection_so_far_no_rst_frees_a_slot() {
    for (source, dropped) in [(ATTACKER, Dropped::SourceRoute), (ATTACKER6, Dropped::UnknownOption)]
    {
        let attack = Attack { dropped, half_closed: false, source, limit: 3 };
        let counts = contrast(source, zone, 24, 8, |scene| scene.burst(attack));
        assert_bounded("a new zone", &counts, 24);
    }
}

/// The socket has another peer than the packets (nat INPUT).
#[test]
fn where_sources_are_translated_on_their_way_in_no_rst_frees_a_slot() {
    for (source, seen, dropped) in [
        (ATTACKER, "198.51.100.99", Dropped::SourceRoute),
        (ATTACKER6, "2001:db8:1::99", Dropped::UnknownOption),
    ] {
        let translate = |lab: &Lab| {
            let family = if source == ATTACKER { "ip" } else { "ip6" };
            let chain = "type nat hook input priority 100;";
            let rule = format!("{family} saddr {source} snat to {seen}");
            let table = format!("table {family} aside {{ chain in {{ {chain} {rule}; }}\n}}\n");
            lab.server.feed("nft -f -", &table);
        };
        let attack = Attack { dropped, half_closed: false, source, limit: 3 };
        let counts = contrast(source, translate, 24, 8, |scene| {
            scene.source = seen;
            scene.burst(attack);
        });
        assert_bounded("a translated source", &counts, 24);
    }
}
