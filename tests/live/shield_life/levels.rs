//! The shield by itself: raised and lowered with the defence level.

use super::*;

/// A hundred connections fooled at once: that is an attack.
fn attack(lab: &Lab) -> Vec<RawConn> {
    let peers = ["198.51.100.7", "198.51.100.8", "198.51.100.9"].map(|source| lab.peer(source));
    let mut conns: Vec<_> = peers.iter().flat_map(|peer| peer.open(80, 50)).collect();
    for conn in &mut conns {
        lab.half_close(conn);
    }
    for conn in &mut conns {
        conn.rst(-5);
    }
    conns
}

/// What is at the device, and whether the table is there.
fn is_up(lab: &Lab) -> bool {
    let is_at_device = programs(&lab.server, "eth0").iter().any(|it| it == PROGRAM);
    let has_table = lab.server.output("nft list tables").contains("ctkeep0-shield");
    assert_eq!(is_at_device, has_table);
    is_at_device
}

/// In peace a program that is loaded costs nothing. `on` is always.
#[test]
fn by_itself_it_is_raised_with_the_first_defence_level() {
    let Some(lab) = lab() else { return };
    lab.connlimit(80, 100);
    let _server = lab.serve("0.0.0.0:80");
    let always = shielded(&lab);
    assert!(is_up(&lab));
    drop(always);
    let args = ["--port", "80", "--shield", "auto", "--metrics-listen", METRICS];
    let daemon = lab.daemon(CTKEEP, &args);
    assert!(!is_up(&lab), "{}", daemon.log());
    assert!(holds_within(SOON, || samples(&lab).get("ctkeep_shield_missing") == Some(&0.0)));
    let mut conns = attack(&lab);
    assert!(holds_within(SOON, || daemon.logged("shield raised")), "{}", daemon.log());
    assert!(is_up(&lab));
    // From now on conntrack does not even see what TCP does not act on.
    let hidden =
        || samples(&lab).get(r#"ctkeep_shield_packets_total{decision="rst_hidden"}"#).copied();
    assert!(holds_within(SOON, || hidden().is_some()));
    let before = hidden().unwrap_or_default();
    for conn in &mut conns {
        conn.rst(-5);
    }
    assert!(holds_within(SOON, || hidden().is_some_and(|now| now >= before + 100.0)), "{before}");
}

/// The level stays for a minute: `cargo test --test live shield_life:: -- --ignored`.
#[test]
#[ignore = "takes 75 seconds"]
fn by_itself_it_is_lowered_with_the_defence_level() {
    let Some(lab) = lab() else { return };
    lab.connlimit(80, 100);
    let _server = lab.serve("0.0.0.0:80");
    let daemon = lab.daemon(CTKEEP, &["--port", "80", "--shield", "auto"]);
    let conns = attack(&lab);
    assert!(holds_within(SOON, || daemon.logged("shield raised")), "{}", daemon.log());
    let lowered = || daemon.logged("shield lowered");
    assert!(holds_within(Duration::from_secs(90), lowered), "{}", daemon.log());
    assert!(!is_up(&lab));
    drop(conns);
}
