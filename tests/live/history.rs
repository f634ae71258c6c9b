//! The history: what was so is found again, whatever becomes of the daemon, its disk and its clock.

use crate::lab;
use crate::lab::wait_for;
use crate::scene;
use crate::scene::{Limiter, SOON, Scene};
use ctkeep::history::record::{Record, Source};
use ctkeep::history::store::{self, Store};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn history(scene: &Scene, dir: &str, args: &[&str]) -> Value {
    let all = [&["history", "--dir", dir, "--format", "json"], args].concat();
    let (code, out, err) = scene.ctkeep(&all);
    assert_eq!(code, 0, "{out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

fn records(report: &Value) -> Vec<Value> {
    report["records"].as_array().expect("records").clone()
}

#[test]
fn what_a_source_held_and_what_was_done_is_found_after_a_kill() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("kept");
    let dir = dir.to_str().expect("a path").to_owned();
    let conns = scene.half_closed();
    scene.guard(&["--history", &dir, "--deep-interval", "500ms"]);
    let is_there =
        |what: &str| records(&history(&scene, &dir, &[])).iter().any(|it| it["what"] == what);
    wait_for("files", SOON, || Path::new(&dir).join("history").exists());
    wait_for("a minute", SOON, || is_there("held"));
    conns.iter().for_each(lab::RawConn::stale_rst);
    wait_for("repairs", SOON, || is_there("revive"));
    scene.daemon().signal(Signal::SIGHUP);
    wait_for("a reload", SOON, || is_there("reload"));
    let held = records(&history(&scene, &dir, &["--source", "198.51.100.7", "--port", "80"]));
    let first = held.iter().find(|it| it["what"] == "held").expect("a minute");
    for (key, value) in
        [("open", 3), ("half_closed", 3), ("counted", 3), ("uncounted", 0), ("limit", 3)]
    {
        assert_eq!(first[key], value, "{key}: {first}");
    }
    assert!(records(&history(&scene, &dir, &["--source", "203.0.113.0/24"])).is_empty());
    scene.lab.connlimit(80, 50);
    wait_for("a new limit", SOON, || is_there("limit"));
    let before = records(&history(&scene, &dir, &[]));
    scene.daemon.take().expect("a daemon").kill();
    // What it did about the new limit may have come after the look.
    let after = records(&history(&scene, &dir, &[]));
    assert!(before.iter().all(|record| after.contains(record)), "lost: {before:#?}\n{after:#?}");
    let (code, out, err) = scene.ctkeep(&["top", "--at", "2099-01-01T00:00:00Z", "--dir", &dir]);
    assert!(code == 0 && out.contains("198.51.100.7/32"), "{out}{err}");
    let row = out.lines().find(|line| line.starts_with("198.51.100.7/32")).unwrap_or_default();
    assert!(
        row.split_whitespace().filter(|word| *word == "3").count() >= 4,
        "with its limit: {out}"
    );
    // The next goes on where the last was cut off.
    scene.guard(&["--history", &dir, "--deep-interval", "500ms"]);
    wait_for("the next minute", SOON, || {
        records(&history(&scene, &dir, &[])).iter().filter(|it| it["what"] == "held").count() > 1
    });
    let (code, _, err) = scene.ctkeep(&["history", "--dir", "/nowhere"]);
    assert!(code == 2 && err.contains("/nowhere"), "{err}");
}

/// A full disk stops the history and nothing else: a file system of 64 KiB.
#[test]
fn a_full_disk_stops_the_history_and_not_the_guarding() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().to_str().expect("a path").to_owned();
    let _mounted = Mounted::at(&dir);
    fs::write(folder.path().join("ballast"), vec![0; 128 * 1024]).expect_err("it is full");
    let conns = scene.half_closed();
    scene.guard(&["--history", &dir, "--deep-interval", "500ms"]);
    wait_for("a full disk", SOON, || scene.daemon().logged("no history for now"));
    conns.iter().for_each(lab::RawConn::stale_rst);
    wait_for("guarded", SOON, || conns.iter().all(|conn| scene.is_counted(conn)));
    assert_eq!(scene.admitted(), 0);
}

/// A file system of 64 KiB, as long as this lives.
struct Mounted(String);

impl Mounted {
    fn at(dir: &str) -> Self {
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "none", dir]).status();
        assert!(mounted.expect("mount").success());
        Self(dir.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", &self.0]).status();
    }
}

/// The daemon at its work, killed at a random moment of it, again and again: what could be read before
/// is there afterwards, no line is damaged, and the next goes on behind it.
fn killed(times: u64) {
    let Some(mut scene) = Scene::new(Limiter::Nothing) else { return };
    scene.lab.connlimit(80, 1000);
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().to_str().expect("a path").to_owned();
    let (mut before, mut acted, mut moments) = (Vec::new(), 0, std::process::id().into());
    let mut all = Vec::new();
    for _ in 0..times {
        let mut conns = scene.peer.hold(80, 8);
        conns.iter_mut().for_each(|conn| scene.lab.half_close(conn));
        scene.guard(&["--history", &dir, "--deep-interval", "500ms"]);
        conns.iter().for_each(lab::RawConn::stale_rst);
        std::thread::sleep(Duration::from_micros(random(&mut moments) % 15_000));
        // A folder without files is none: the first record may be under way.
        let look = || store::read(folder.path()).unwrap_or_default();
        let (read, _) = look();
        assert!(read.starts_with(&before), "what was read before is gone");
        let daemon = scene.daemon.take().expect("a daemon");
        acted += daemon.log().matches(": acted").count();
        daemon.kill();
        let (after, damaged) = look();
        assert!(damaged == 0 && after.starts_with(&read), "{damaged}");
        before = after;
        all.extend(conns);
    }
    let kept = before.iter().filter(|it| matches!(it, Record::Action { .. })).count();
    println!("{times} kills: {acted} actions were logged before, {kept} are kept");
    assert!(acted > 0 && kept > 0, "no kill came while there was work");
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    *seed >> 33
}

#[test]
fn killed_at_any_moment_it_loses_nothing_that_could_be_read() {
    killed(4);
}

#[test]
#[ignore = "two minutes: make history-test"]
fn killed_at_a_hundred_moments_it_loses_nothing_that_could_be_read() {
    killed(100);
}

/// The clock of the wall goes years back and on again: records stand in the order of their writing, the
/// minutes go on, and what is asked for by time is found.
#[test]
fn a_clock_that_jumps_loses_nothing() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("kept");
    let clock = folder.path().join("clock");
    let set = |offset: &str| fs::write(&clock, format!("{offset}\n")).expect("a file");
    set("+0");
    let environment = lab::faketime(clock.to_str().expect("a path"));
    let dir = dir.to_str().expect("a path");
    let daemon = scene.lab.daemon_with(scene::CTKEEP, &["--history", dir], &environment);
    let reloads = || {
        let all = store::read(Path::new(dir)).map_or_else(|_| Vec::new(), |(all, _)| all);
        all.iter().filter(|it| matches!(it, Record::Reload { .. })).map(Record::at).collect()
    };
    for (index, offset) in ["+0", "-12000d", "+400d", "+0"].into_iter().enumerate() {
        set(offset);
        daemon.signal(Signal::SIGHUP);
        wait_for("a record", SOON, || {
            let all: Vec<u64> = reloads();
            all.len() > index
        });
    }
    scene.daemon = Some(daemon);
    let ats: Vec<u64> = reloads();
    let year = 365 * 86_400;
    assert_eq!(ats.len(), 4, "{ats:?}");
    assert!(ats[0] > ats[1] + 30 * year && ats[2] > ats[0] + year && ats[3] < ats[2], "{ats:?}");
    // What a clock that was set back has written is newer than what stands before it.
    let report = history(&scene, dir, &["--since", "1h"]);
    let found = records(&report).iter().filter(|it| it["what"] == "reload").count();
    assert_eq!((found, &report["damaged"]), (4, &0.into()), "{report}");
    scene.daemon.take().expect("a daemon").kill();
    assert_eq!(reloads().len(), 4, "after a kill");
}

/// A day of 200 sources in a simulated hour's room, killed at every hundredth record: the file on the
/// disk is what `kill -9` leaves, since each record is one write.
#[test]
fn a_day_torn_a_hundred_times_loses_the_torn_records_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let room = 8_000_000;
    let source = |n: u16| Source {
        source: format!("10.0.{}.{}", n / 250, n % 250 + 1).parse().expect("an address"),
        port: 80,
        open: u64::from(n),
        half_closed: 1,
        counted: 2,
        uncounted: 0,
        limit: None,
        net: None,
    };
    let sources: Vec<_> = (0..200).map(source).collect();
    let minute = |at| Record::Minute {
        at,
        netns: "own namespace".to_owned(),
        sources: sources.clone(),
        left_out: 0,
    };
    let (mut torn, mut seed) = (Vec::new(), 1_u64);
    let mut store = Some(Store::open(folder.path(), room).expect("a history"));
    for at in 0..1440 {
        // The clock goes back by a day in between: the order is that of the writing.
        let record = minute(if at < 700 { at } else { at + 86_400 - 700 });
        store.as_mut().expect("a history").append(&record).expect("written");
        if at % 14 == 13 {
            store = None;
            let file = fs::OpenOptions::new().write(true).open(folder.path().join("history"));
            let file = file.expect("the file");
            let length = file.metadata().expect("its length").len();
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let line = minute(0).encode().len() as u64;
            file.set_len(length - 1 - (seed >> 33) % (line - 1)).expect("torn");
            torn.push(at);
            // A program that another test starts has all files of this one, until it is itself.
            wait_for("the lock", SOON, || match Store::open(folder.path(), room) {
                Ok(opened) => {
                    store = Some(opened);
                    true
                }
                Err(_) => false,
            });
        }
    }
    let (all, damaged) = store::read(folder.path()).expect("what was kept");
    let kept = all.len();
    assert_eq!(damaged, 0);
    assert!(torn.len() >= 100, "{}", torn.len());
    let size: u64 = ["history", "history.old"]
        .map(|name| fs::metadata(folder.path().join(name)).map_or(0, |it| it.len()))
        .iter()
        .sum();
    assert!(size <= room, "{size}");
    // As many as fit, and none but the torn ones missing among them.
    let wanted: Vec<u64> = (0..1440)
        .filter(|at| !torn.contains(at))
        .map(|at| if at < 700 { at } else { at + 86_400 - 700 })
        .collect();
    let ats: Vec<u64> = all.iter().map(Record::at).collect();
    assert_eq!(ats[..], wanted[wanted.len() - kept..], "{kept} of {}", wanted.len());
    assert!(kept as u64 * minute(0).encode().len() as u64 > room / 2 - 100_000, "{kept}");
}
