//! Debian's Prometheus in a namespace, with the alert rules of the packages, asked over its API.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::lab::{Namespace, http, wait_for};

const ADDRESS: &str = "127.0.0.1:9090";

/// One that scrapes a daemon on its usual address. Dropping it kills it.
pub struct Prometheus<'n> {
    namespace: &'n Namespace,
    child: Child,
    _folder: TempDir,
}

impl<'n> Prometheus<'n> {
    /// Starts it; the rules are those at this path.
    pub fn start(namespace: &'n Namespace, rules: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name| folder.path().join(name).to_str().expect("a path").to_owned();
        let rules = fs::canonicalize(rules).expect("rules");
        let text = format!(
            "global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}\n\
             rule_files: [{rules:?}]\n\
             scrape_configs: [{{job_name: ctkeep, static_configs: [{{targets: [\"127.0.0.1:9815\"]}}]}}]\n"
        );
        fs::write(path("prometheus.yml"), text).expect("a configuration");
        let mut command = Command::new("prometheus");
        command.args(["--log.level=error", "--web.listen-address", ADDRESS]);
        command.args(["--config.file", &path("prometheus.yml")]);
        command.args(["--storage.tsdb.path", &path("data")]);
        let child = namespace
            .spawn_with(&command, |command| {
                command.stdin(Stdio::null()).stdout(Stdio::null());
            })
            .expect("prometheus; make test installs it");
        let this = Self { namespace, child, _folder: folder };
        wait_for("Prometheus", Duration::from_secs(60), || {
            http::ask(namespace, ADDRESS, "GET /-/ready", "")
                .is_some_and(|ready| ready.status == 200)
        });
        this
    }

    /// The data of an answer of its API.
    ///
    /// # Panics
    /// When it answers with an error or a warning.
    pub fn api(&self, path: &str) -> Value {
        let request = format!("GET /api/v1/{path}");
        let answer = http::ask(self.namespace, ADDRESS, &request, "").expect("Prometheus listens");
        let mut value: Value = serde_json::from_str(&answer.body).expect("JSON");
        assert!(value["status"] == "success" && value["warnings"].is_null(), "{path}: {value}");
        value["data"].take()
    }

    /// The values of an expression of PromQL, each with its labels.
    pub fn query(&self, expression: &str) -> Vec<(Value, f64)> {
        let encoded: String = expression.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let mut data = self.api(&format!("query?query={encoded}"));
        let results = data["result"].as_array_mut().expect("a vector");
        let number =
            |result: &Value| result["value"][1].as_str().and_then(|text| text.parse().ok());
        results
            .iter_mut()
            .map(|result| (result["metric"].take(), number(result).expect("a number")))
            .collect()
    }

    /// The only value of an expression; `None` when there is none yet.
    pub fn value(&self, expression: &str) -> Option<f64> {
        let found = self.query(expression);
        assert!(found.len() < 2, "{expression}: {found:?}");
        found.first().map(|(_, value)| *value)
    }

    /// Waits until the only value of an expression satisfies `is`.
    pub fn await_value(&self, expression: &str, is: impl Fn(f64) -> bool) {
        wait_for(expression, Duration::from_secs(60), || self.value(expression).is_some_and(&is));
    }
}

impl Drop for Prometheus<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
