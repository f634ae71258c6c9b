//! A zone that no connection was in when ctkeep started.

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
    for (source, dropped) in
        [(ATTACKER, Dropped::SourceRoute), (ATTACKER6, Dropped::UnknownOption)]
    {
        let attack = Attack { dropped, half_closed: false, source, limit: 3 };
        let counts = contrast(source, zone, 24, 8, |scene| scene.burst(attack));
        assert_bounded("a new zone", &counts, 24);
    }
}
