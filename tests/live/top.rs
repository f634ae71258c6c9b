//! `ctkeep top` in a real terminal (tmux), against what ss shows.

use crate::lab;
use std::process::{Command, id};

use crate::lab::{Lab, wait_for};
use crate::scene::{CTKEEP, Limiter, SOON, Scene};
use serde_json::Value;

/// A terminal of its own server, with one pane.
struct Terminal {
    name: String,
}

impl Terminal {
    /// `None` where tmux is not installed.
    fn start(lab: &Lab, name: &str, environment: &str, args: &str) -> Option<Self> {
        let this = Self { name: format!("ctkeep-{}-{name}", id()) };
        let shell = format!(
            "nsenter --net={} env {environment} {CTKEEP} top {args}; echo ended $?; sleep 600",
            lab.server.path()
        );
        let size = ["-x", "80", "-y", "24"];
        let made = this.tmux(&[&["new-session", "-d"][..], &size, &[&shell]].concat());
        if made.is_none() {
            lab::skip("tmux is not installed");
        }
        made.map(|_| this)
    }

    fn tmux(&self, args: &[&str]) -> Option<String> {
        let mut command = Command::new("tmux");
        command.args(["-L", &self.name, "-f", "/dev/null"]).args(args);
        let output = command.env("TERM", "xterm-256color").output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn keys(&self, keys: &[&str]) {
        for key in keys {
            self.tmux(&["send-keys", key]).expect("a key");
        }
    }

    fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"]).expect("a screen")
    }

    fn shows(&self, what: &str, is_it: impl Fn(&str) -> bool) {
        let mut last = String::new();
        let is_there = lab::holds_within(SOON, || {
            last = self.screen();
            is_it(&last)
        });
        assert!(is_there, "no {what}:\n{last}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}

/// The words of the row of this name.
fn row<'s>(screen: &'s str, name: &str) -> Vec<&'s str> {
    let line = screen.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.split_whitespace().collect()
}

fn once(lab: &Lab, args: &[&str]) -> Value {
    let all = [&["top", "--format", "json"], args].concat();
    let (code, out, err) = lab.ctkeep(CTKEEP, &all);
    assert_eq!(code, 0, "{out}{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

#[test]
fn the_table_is_what_ss_and_the_rules_say_and_every_key_does_its_work() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let conns = scene.half_closed();
    let other = scene.lab.peer("198.51.100.8").hold(80, 1);
    let lab = &scene.lab;

    let report = once(lab, &[]);
    let first = &report["rows"][0];
    let wanted = [("open", 3), ("counted", 3), ("limit", 3), ("half_closed", 3), ("waiting", 0)];
    for (key, value) in wanted {
        assert_eq!(first[key], value, "{key}: {report:#}");
    }
    assert_eq!((&first["name"], &first["repairs"]), (&"198.51.100.7/32".into(), &Value::Null));
    assert_eq!(report["totals"]["open"], 4);
    let process = first["process"].as_str().expect("a process");
    assert!(process.starts_with(&format!("{}/", scene.server.pid())), "{process}");
    let filtered = once(lab, &["--filter", "state established", "--fold", "port"]);
    assert_eq!(
        (&filtered["rows"][0]["name"], &filtered["rows"][0]["open"]),
        (&":80".into(), &1.into())
    );
    let (code, out, _) = lab.ctkeep(CTKEEP, &["top"]);
    assert!(code == 0 && out.contains("SOURCE") && row(&out, "198.51.100.7/32")[1] == "3", "{out}");
    let (code, _, err) = lab.ctkeep(CTKEEP, &["top", "--filter", "state nonsense"]);
    assert!(code == 2 && err.contains("close-wait"), "{err}");

    let args = "--interval 200ms";
    let Some(terminal) = Terminal::start(lab, "top", "LANG=C.UTF-8", args) else { return };
    terminal.shows("row", |it| row(it, "198.51.100.7/32").get(1..4) == Some(&["3", "3", "3"]));
    let screen = terminal.screen();
    assert!(screen.contains("no daemon") && screen.contains("open 4, counted 4"), "{screen}");
    assert!(screen.lines().all(|line| line.chars().count() <= 80), "{screen}");

    // Alive: a new connection of the other shows by itself, unless it is paused.
    let more = lab.peer("198.51.100.8").hold(80, 1);
    terminal.shows("second", |it| row(it, "198.51.100.8/32").get(1) == Some(&"2"));
    terminal.keys(&["p"]);
    terminal.shows("pause", |it| it.contains("PAUSED"));
    terminal.keys(&["p", "f"]);
    terminal.shows("networks", |it| row(it, "198.51.100.0/24").get(1) == Some(&"5"));
    terminal.keys(&["f"]);
    terminal.shows("ports", |it| row(it, ":80").get(1) == Some(&"5"));
    terminal.keys(&["f", "f", "f", "/", "state close-wait and sport = :80", "Enter"]);
    terminal.shows("filtered", |it| {
        row(it, "198.51.100.7").len() > 3 && row(it, "198.51.100.8").is_empty()
    });
    terminal.keys(&["Enter"]);
    terminal.shows("connections", |it| it.matches("close-wait").count() >= 3);
    terminal.keys(&["e"]);
    terminal.shows("explanation", |it| it.contains("class       agree"));
    terminal.keys(&["x", "Escape", "?"]);
    terminal.shows("help", |it| it.contains("fold by source"));
    terminal.keys(&["x", "a"]);
    terminal.shows("question", |it| it.contains("ask the limits, by packets"));
    terminal.keys(&["n"]);
    terminal.shows("no", |it| it.contains("nothing was asked"));
    terminal.keys(&["a", "y"]);
    terminal.tmux(&["resize-window", "-x", "120", "-y", "30"]);
    terminal.shows("wider, with the limit's answer", |it| {
        it.contains("LISTED") && row(it, "198.51.100.7/32").get(10) == Some(&"3")
    });
    terminal.keys(&["q"]);
    terminal.shows("end", |it| it.contains("ended 0"));
    drop((conns, other, more));

    // What a daemon knows, on a terminal that shows neither colours nor more than ASCII.
    let mut conns = scene.open(1);
    scene.guard(&[]);
    conns.iter_mut().for_each(|conn| scene.lab.half_close(conn));
    let plain = "LANG=C LC_ALL=C NO_COLOR=1";
    let Some(terminal) = Terminal::start(&scene.lab, "plain", plain, args) else { return };
    terminal.shows("daemon", |it| it.contains("ctkeep run: defence 0"));
    wait_for("an age", SOON, || once(&scene.lab, &[])["rows"][0]["oldest_seconds"].is_u64());
    assert_eq!(once(&scene.lab, &[])["rows"][0]["repairs"], 0);
    let screen = terminal.tmux(&["capture-pane", "-e", "-p"]).expect("a screen");
    assert!(screen.is_ascii() && !screen.contains("\u{1b}[31m"), "{screen:?}");
    terminal.keys(&["C-c"]);
    terminal.shows("end", |it| it.contains("ended 0"));
}
