//! Other people's tools and our tables: what `nft list ruleset` prints while ctkeep runs can be
//! loaded again, and a copy does nothing.

mod lab;
#[path = "lab/scene.rs"]
mod scene;

use std::time::Duration;

use lab::{Namespace, wait_for};
use scene::{CLIENT, Limiter, Scene};

/// All tables of ours are up: the watch, the shield, the reply filter.
fn guarded() -> Option<Scene> {
    let mut scene = Scene::with_source(Limiter::NftSet, CLIENT)?;
    scene.guard(&["--shield", "on"]);
    // Entries that somebody takes away make a repair, and with it the table of the reply filter.
    scene.half_closed();
    scene.lab.server.run("conntrack -D -p tcp --dport 80");
    wait_for("tables of ours", Duration::from_secs(20), || {
        scene.lab.server.output("nft list tables").matches("inet ctkeep").count() == 3
    });
    Some(scene)
}

#[test]
fn a_saved_ruleset_with_our_tables_is_loaded_without_a_syntax_error() {
    let Some(scene) = guarded() else { return };
    let saved = scene.lab.server.output("nft list ruleset");
    let ours = saved.lines().filter(|line| line.starts_with("table inet ctkeep")).count();
    assert_eq!(ours, 3, "tables of ours are missing:\n{saved}");
    let fresh = Namespace::new().expect("namespace");
    // Fails the test where nft fails.
    fresh.feed("nft -f -", &saved);
    // At boot nothing of ours is left once nft has ended: the tables have owners.
    let left = fresh.output("nft list ruleset");
    assert!(!left.contains("ctkeep"), "a copy of our tables lives on:\n{left}");
}
