//! Other people's tools and our tables: what `nft list ruleset` prints while ctkeep runs can be
//! loaded again, and a copy does nothing.

use std::time::Duration;

use crate::lab::{Namespace, wait_for};
use crate::scene::{CLIENT, Limiter, Scene};

/// The helper device of another name than the default, and with it our tables.
const DEVICE: &str = "guard7";

/// What the names of our tables end with: the reply filter, the watch, the shield, and two while a limit is asked.
const TABLES: [&str; 5] = ["", "-watch", "-shield", "-ask", "-trace"];

/// All tables of ours are up.
fn guarded() -> Option<Scene> {
    let mut scene = Scene::with_source(Limiter::NftSet, CLIENT)?;
    scene.guard(&["--shield", "on", "--device", DEVICE]);
    scene.half_closed();
    // Entries that somebody takes away make a repair, and it a question to the limit.
    scene.lab.server.run("conntrack -D -p tcp --dport 80");
    wait_for("tables of ours", Duration::from_secs(20), || {
        let tables = scene.lab.server.output("nft list tables");
        let is_there = |name: &str| tables.lines().any(|line| line.ends_with(name));
        TABLES.iter().all(|end| is_there(&format!(" {DEVICE}{end}")))
    });
    Some(scene)
}

#[test]
fn a_saved_ruleset_with_our_tables_is_loaded_without_a_syntax_error() {
    let Some(scene) = guarded() else { return };
    let saved = scene.lab.server.output("nft list ruleset");
    let ours =
        saved.lines().filter(|line| line.starts_with(&format!("table inet {DEVICE}"))).count();
    assert_eq!(ours, TABLES.len(), "tables of ours are missing:\n{saved}");
    let fresh = Namespace::new().expect("namespace");
    // Fails the test where nft fails.
    fresh.feed("nft -f -", &saved);
    // At boot nothing of ours is left once nft has ended: the tables have owners.
    let left = fresh.output("nft list ruleset");
    assert!(!left.contains(DEVICE), "a copy of our tables lives on:\n{left}");
}

/// Its rules log and remember SYNs; none of them is a rule of the host that sees ours.
#[test]
fn our_tables_are_known_by_any_name() {
    let Some(scene) = guarded() else { return };
    // By our packets, and not ours: the same words in a table of the administrator.
    scene.lab.server.run("nft add table inet guard7-own");
    scene
        .lab
        .server
        .run("nft add chain inet guard7-own in { type filter hook input priority -5; }");
    scene.lab.server.run("nft add rule inet guard7-own in tcp flags syn log");
    for command in ["audit", "doctor"] {
        let (_, out, err) = scene.ctkeep(&[command, "--format", "json"]);
        let found: Vec<_> = out.split('"').filter(|text| text.contains(DEVICE)).collect();
        let is_theirs = |text: &&str| text.starts_with("inet guard7-own in rule 1 logs SYNs");
        assert!(!found.is_empty() && found.iter().all(is_theirs), "{command}: {found:#?}{err}");
    }
}
