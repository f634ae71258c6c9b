//! The alert rules, the dashboard, and an attack as Debian's Prometheus sees it.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

pub mod server;

use crate::lab;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::process::Command;

use crate::lab::{Lab, guests, wait_for};
use crate::scene::{LIMIT, Limiter, SOON, Scene};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use server::Prometheus;

const RULES: &str = "packaging/prometheus/ctkeep.rules.yml";
const RULES_TESTS: &str = "packaging/prometheus/ctkeep.rules.test.yml";
const DASHBOARD: &str = "packaging/grafana/ctkeep.json";
const MANUAL: &str = "docs/operations.md";

const ALERTS: [&str; 13] = [
    "CtkeepRecountNotCounted",
    "CtkeepRecountUnavailable",
    "CtkeepDriftNotRepaired",
    "CtkeepLateRepairsRising",
    "CtkeepEventOverruns",
    "CtkeepSweepStale",
    "CtkeepTableFull",
    "CtkeepTcpLoose",
    "CtkeepHeldTooLong",
    "CtkeepReloadFailed",
    "CtkeepShieldMissing",
    "CtkeepConnectionsUncounted",
    "CtkeepOutgoingLost",
];

fn dashboard() -> Value {
    serde_json::from_str(&fs::read_to_string(DASHBOARD).unwrap()).expect("JSON")
}

fn panels(dashboard: &Value) -> &[Value] {
    dashboard["panels"].as_array().expect("panels")
}

fn targets(panel: &Value) -> &[Value] {
    panel["targets"].as_array().expect("targets")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

/// The words of a text that begin like this.
fn words<'t>(text: &'t str, beginning: &str) -> HashSet<&'t str> {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '_')
        .filter(|word| word.starts_with(beginning))
        .collect()
}

#[test]
fn every_alert_fires_when_it_must_and_only_then() {
    for args in [["check", "rules", RULES], ["test", "rules", RULES_TESTS]] {
        let output = Command::new("promtool").args(args).output();
        let output = output.expect("promtool (Debian: prometheus); make test installs it");
        let said = String::from_utf8_lossy(&output.stdout);
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}{complained}");
    }
    let tests = fs::read_to_string(RULES_TESTS).unwrap();
    for alert in ALERTS {
        let cases: Vec<_> =
            tests.split("- alertname: ").filter(|case| case.starts_with(alert)).collect();
        let quiet = cases.iter().filter(|case| case.contains("exp_alerts: []")).count();
        assert!(quiet > 0 && quiet < cases.len(), "{alert}: {quiet} of {}", cases.len());
    }
}

#[test]
fn the_dashboard_is_one_that_can_be_shown() {
    let dashboard = dashboard();
    let (mut ids, mut taken) = (HashSet::new(), HashSet::new());
    for panel in panels(&dashboard) {
        let title = text(&panel["title"]);
        assert!(ids.insert(&panel["id"]), "{title}: its id is taken");
        let [x, y, w, h] =
            ["x", "y", "w", "h"].map(|side| panel["gridPos"][side].as_u64().expect("a number"));
        assert!(x + w <= 24 && w > 0 && h > 0, "{title}: out of the grid");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{title}: over another panel at {cell:?}");
        }
        let mut references = HashSet::new();
        assert!(!targets(panel).is_empty(), "{title}: no query");
        for target in targets(panel) {
            assert!(references.insert(text(&target["refId"])), "{title}: {target}");
            assert!(text(&target["expr"]).contains("instance=~\"$instance\""), "{title}: {target}");
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}: {target}");
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        for alert in words(text(&panel["description"]), "Ctkeep") {
            assert!(ALERTS.contains(&alert), "{title}: no alert {alert}");
        }
    }
    let names: Vec<_> = dashboard["templating"]["list"]
        .as_array()
        .expect("variables")
        .iter()
        .map(|variable| (text(&variable["name"]), text(&variable["type"])))
        .collect();
    assert_eq!(names, [("datasource", "datasource"), ("instance", "query")]);
}

#[test]
fn an_attack_is_seen_in_prometheus() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "1");
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(config.path(), "[[overload]]\nports = [80]\nabove = 100\n").unwrap();
    let path = config.path().to_str().unwrap();
    let eager = ["--sweep-interval", "100ms", "--deep-interval", "200ms", "--config", path];
    scene.guard(&eager);
    let prometheus = Prometheus::start(&scene.lab.server, RULES);
    prometheus.await_value("up", |up| up == 1.0);
    prometheus.await_value("sum(ctkeep_held_connections)", |held| held == 0.0);

    let conns = scene.half_closed();
    // Behind a SYN the limit is to be shown them.
    scene.freeze();
    for conn in &conns {
        conn.rst(-5);
    }
    scene.peer.syn_only(80).rst(0);
    scene.thaw();
    scene.await_repair("revive", &conns);
    assert_eq!(scene.admitted(), 0);
    let count = LIMIT as f64;
    prometheus.await_value("sum(ctkeep_held_connections)", |held| held == count);
    for expression in [
        "sum(ctkeep_actions_total{action=\"revive\"})",
        "sum(ctkeep_recounts_total)",
        "sum(ctkeep_reaction_seconds_count)",
    ] {
        prometheus.await_value(expression, |value| value >= count);
    }
    for expression in [
        "sum(rate(ctkeep_actions_total{action=\"revive\"}[1m]))",
        "histogram_quantile(0.99, sum by (le) (rate(ctkeep_reaction_seconds_bucket[1m])))",
    ] {
        prometheus.await_value(expression, |value| value > 0.0);
    }

    // OpenMetrics: only there a counter's family has no suffix, and a unit of its own.
    let metadata = prometheus.api("metadata");
    assert_eq!(metadata["ctkeep_actions"][0]["type"], "counter");
    assert_eq!(metadata["ctkeep_reaction_seconds"][0]["unit"], "seconds");
    let targets = prometheus.api("targets");
    let target = &targets["activeTargets"][0];
    assert_eq!((&target["health"], &target["lastError"]), (&"up".into(), &"".into()), "{target}");
    assert_eq!(prometheus.value("min_over_time(up[1m])"), Some(1.0), "no scrape has failed");

    fs::write(path, "lease = \"never\"\n").unwrap();
    kill(Pid::from_raw(scene.daemon().pid().try_into().unwrap()), Signal::SIGHUP).unwrap();
    let firing = ["CtkeepTcpLoose", "CtkeepReloadFailed"];
    wait_for("alerts", SOON, || {
        let rules = alerts(&prometheus);
        ALERTS.iter().all(|alert| (rules[*alert]["state"] == "firing") == firing.contains(alert))
    });
    every_rule_is_sound(&prometheus);

    scene.end(&conns);
    prometheus.await_value("sum(ctkeep_close_wait_age_seconds_count)", |ended| ended == count);
    every_query_has_data(&prometheus);
}

/// A container whose client is at its limit, half-closed and not, and a daemon that guards it.
#[test]
fn no_alert_fires_beside_a_healthy_container() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
    let guest = guests::Guest::start(&lab, 1);
    let _conns = guest.half_closed(&lab.peer("198.51.100.7"));
    let _open = lab.peer("198.51.100.8").hold(guest.port, 2);
    let eager = ["--sweep-interval", "100ms", "--deep-interval", "200ms", "--shield", "off"];
    let daemon = lab.daemon(env!("CARGO_BIN_EXE_ctkeep"), &eager);
    let prometheus = Prometheus::start(&lab.server, RULES);
    // It is the container's connections that it looks at.
    prometheus.await_value("sum(ctkeep_held_connections)", |held| held == 3.0);
    let sweeps = "sum(ctkeep_sweeps_total)";
    let before = prometheus.value(sweeps).unwrap();
    prometheus.await_value(sweeps, |now| now > before + 20.0);
    // Not even one that waits for its time.
    for (alert, rule) in alerts(&prometheus) {
        assert_eq!(rule["state"], "inactive", "{alert}: {rule:#}\n{}", daemon.log());
        let all: Vec<_> = prometheus.query(text(&rule["query"]));
        assert!(all.is_empty(), "{alert}: {all:?}");
    }
}

/// What the shield keeps from conntrack moves each of its panels.
#[test]
fn a_shield_at_work_is_seen_in_prometheus() {
    if !ctkeep::shield::IS_BUILT_IN {
        lab::skip("ctkeep was built without clang, hence without the shield");
        return;
    }
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&["--shield", "on"]);
    let prometheus = Prometheus::start(&scene.lab.server, RULES);
    prometheus.await_value("ctkeep_shield_devices", |devices| devices >= 1.0);
    prometheus.await_value("sum(ctkeep_shield_packets_total)", |count| count == 0.0);

    for conn in &scene.half_closed() {
        conn.rst(-5);
    }
    assert_eq!(scene.admitted(), 0);
    let count = LIMIT as f64;
    for decision in ["fin_learned", "rst_hidden"] {
        let asked = format!("ctkeep_shield_packets_total{{decision=\"{decision}\"}}");
        prometheus.await_value(&asked, |value| value == count);
    }
    assert_eq!(prometheus.value("ctkeep_shield_missing"), Some(0.0));
    let dashboard = dashboard();
    let queries = panels(&dashboard).iter().flat_map(targets).map(|target| text(&target["expr"]));
    let shields: Vec<_> = queries
        .filter(|query| {
            query.contains("ctkeep_shield_") && !query.contains("ctkeep_shield_missing")
        })
        .map(asked)
        .collect();
    assert_eq!(shields.len(), 3, "{shields:?}");
    for query in shields {
        prometheus.await_value(&format!("sum({query})"), |value| value > 0.0);
    }
}

/// The rules as they were evaluated last, by alert.
fn alerts(prometheus: &Prometheus<'_>) -> HashMap<String, Value> {
    let mut rules = prometheus.api("rules");
    let rules = rules["groups"][0]["rules"].as_array_mut().expect("rules");
    rules.iter_mut().map(|rule| (text(&rule["name"]).to_owned(), rule.take())).collect()
}

fn every_rule_is_sound(prometheus: &Prometheus<'_>) {
    let manual = fs::read_to_string(MANUAL).unwrap();
    let rules = alerts(prometheus);
    assert_eq!(rules.len(), ALERTS.len());
    for (alert, rule) in &rules {
        assert_eq!(rule["health"], "ok", "{rule}");
        assert!(["info", "warning", "critical"].contains(&text(&rule["labels"]["severity"])));
        let annotations = &rule["annotations"];
        assert!(!text(&annotations["summary"]).is_empty());
        assert!(!text(&annotations["description"]).is_empty());
        let runbook = format!("{MANUAL}#{}", alert.to_lowercase());
        assert_eq!(annotations["runbook_url"], runbook);
        assert!(manual.contains(&format!("\n### {alert}\n")), "{alert} is not in {MANUAL}");
        for metric in words(text(&rule["query"]), "ctkeep_") {
            assert!(!prometheus.query(metric).is_empty(), "{alert}: no {metric}");
        }
    }
}

/// A query of the dashboard as it is sent for all hosts.
fn asked(query: &str) -> String {
    let asked = query.replace("$__rate_interval", "1m").replace("$instance", ".*");
    assert!(!asked.contains('$'), "{asked}");
    asked
}

fn every_query_has_data(prometheus: &Prometheus<'_>) {
    // Empty until something fails.
    let quiet = ["ctkeep_action_errors_total"];
    let dashboard = dashboard();
    let mut missing = Vec::new();
    for target in panels(&dashboard).iter().flat_map(targets) {
        let expression = text(&target["expr"]);
        let asked = asked(expression);
        let has_data = prometheus.query(&asked).iter().any(|(_, value)| value.is_finite());
        if !has_data && !quiet.iter().any(|metric| expression.contains(metric)) {
            missing.push(asked);
        }
    }
    assert!(missing.is_empty(), "without data: {missing:#?}");
    let hosts = text(&dashboard["templating"]["list"][1]["query"]["query"]);
    assert_eq!(hosts, "label_values(ctkeep_build_info, instance)");
    let hosts = prometheus.api("label/instance/values?match[]=ctkeep_build_info");
    assert_eq!(hosts, serde_json::json!(["127.0.0.1:9815"]));
}
