//! The status page in a real browser, Debian's Chromium: its figures with and without the script,
//! its refresh, its policy, its looks.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::lab;
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::lab::{Namespace, http, wait_for};
use crate::scene::{LIMIT, Limiter, SOON, Scene};

const DAEMON: &str = "127.0.0.1:9815";
const PROXY: &str = "127.0.0.1:8015";
/// Put into a page, it would do this if the policy let it.
const INJECTED: &str = "<script>document.title = \"injected\"</script>";

/// Stands between browser and daemon.
#[derive(Default)]
struct Proxy {
    /// Status pages asked for.
    pages: AtomicUsize,
    /// So many of them are answered; the others wait.
    allowed: AtomicUsize,
    /// Adds a script of somebody else.
    injects: AtomicBool,
    /// Has scripts disabled, as a visitor may.
    unscripted: AtomicBool,
    ended: AtomicBool,
}

impl Proxy {
    fn serve(&self, namespace: &Namespace, listener: &TcpListener) {
        thread::scope(|scope| {
            for stream in listener.incoming().map_while(Result::ok) {
                if self.ended.load(Ordering::SeqCst) {
                    break;
                }
                scope.spawn(|| self.answer(namespace, stream));
            }
        });
    }

    /// A browser may connect and say nothing.
    fn answer(&self, namespace: &Namespace, mut stream: TcpStream) {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let Some(Ok(first)) = lines.next() else { return };
        let request = first.trim_end_matches(" HTTP/1.1");
        if request == "GET /" {
            let earlier = self.pages.fetch_add(1, Ordering::SeqCst);
            wait_for("leave", SOON, || earlier < self.allowed.load(Ordering::SeqCst));
        }
        let mut answer = http::ask(namespace, DAEMON, request, "").expect("a daemon");
        // A body of HTTP/1.0 may end with the connection.
        let mut head = answer.head.replace("content-length:", "x-length:");
        if self.injects.load(Ordering::SeqCst) {
            answer.body = answer.body.replace("</body>", &format!("{INJECTED}</body>"));
        }
        if self.unscripted.load(Ordering::SeqCst) {
            head.push_str("\r\ncontent-security-policy: sandbox");
        }
        let _ = write!(stream, "{head}\r\n\r\n{}", answer.body);
    }
}

/// Ends the proxy, also when the test fails.
struct End<'t>(&'t Proxy, &'t Namespace);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
        self.0.allowed.store(usize::MAX, Ordering::SeqCst);
        drop(http::connect(self.1, PROXY));
    }
}

/// What the browser has made of the page, and what its console says.
struct View {
    document: String,
    console: String,
}

impl View {
    /// The text of an element.
    fn text(&self, id: &str) -> &str {
        let (_, rest) = self.document.split_once(&format!(" id=\"{id}\"")).expect("an element");
        rest.split_once('>').and_then(|(_, rest)| rest.split_once('<')).expect("its text").0
    }

    fn number(&self, id: &str) -> f64 {
        let word = self.text(id).split(' ').next().expect("a word");
        word.parse().unwrap_or_else(|_| panic!("{id}: {word}"))
    }

    fn assert_shows(&self, metrics: &HashMap<String, f64>) {
        let sum = |name: &str| -> f64 {
            metrics.iter().filter(|(key, _)| key.starts_with(name)).map(|(_, value)| value).sum()
        };
        let mismatches = sum("ctkeep_mismatches{") - metrics["ctkeep_mismatches{class=\"agree\"}"];
        for (id, value) in [
            ("held", sum("ctkeep_held_connections{")),
            ("sources", sum("ctkeep_held_sources{")),
            ("mismatches", mismatches),
            ("late", metrics["ctkeep_late_repairs_total"]),
            ("overruns", metrics["ctkeep_event_overruns_total"]),
            ("sweep-errors", metrics["ctkeep_sweep_errors_total"]),
            ("defence", metrics["ctkeep_defence_level"]),
        ] {
            assert_eq!(self.number(id), value, "{id}");
        }
        let limit = metrics["ctkeep_conntrack_table_entries_limit"];
        assert!(self.text("table").contains(&format!(" of {limit} (")), "{}", self.text("table"));
        assert_eq!(self.text("state"), "guarding");
    }
}

fn browse(namespace: &Namespace, address: &str, args: &[&str]) -> View {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new("timeout");
    command.args(["60", "chromium", "--headless", "--no-sandbox", "--disable-gpu"]);
    command.args(["--disable-dev-shm-usage", "--enable-logging=stderr", "--hide-scrollbars"]);
    command.arg(format!("--user-data-dir={}", folder.path().display()));
    command.args(args).arg(format!("http://{address}/"));
    let browser = namespace.spawn_with(&command, |command| {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    });
    let output = browser.unwrap().wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    let console =
        said.lines().filter(|line| line.contains(":CONSOLE")).collect::<Vec<_>>().join("\n");
    View { document: String::from_utf8_lossy(&output.stdout).into_owned(), console }
}

#[test]
fn a_browser_shows_the_figures_and_keeps_them_fresh() {
    if Command::new("chromium").arg("--version").output().is_err() {
        return lab::skip("no chromium");
    }
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&["--sweep-interval", "100ms", "--deep-interval", "200ms"]);
    let server = &scene.lab.server;
    let metrics = || http::samples(&http::ask(server, DAEMON, "GET /metrics", "").unwrap().body);
    let dump = ["--dump-dom", "--virtual-time-budget=7000"];
    let proxy = Proxy { allowed: AtomicUsize::new(1), ..Proxy::default() };
    let listener = server.within(|| TcpListener::bind(PROXY)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| proxy.serve(server, &listener));
        let _end = End(&proxy, server);

        // The page is loaded before the attack and shows it afterwards: by its script.
        let refreshed = scope.spawn(|| browse(server, PROXY, &dump));
        wait_for("a page", SOON, || proxy.pages.load(Ordering::SeqCst) > 0);
        let conns = scene.half_closed();
        for conn in &conns {
            conn.rst(-5);
        }
        scene.await_repair("revive", &conns);
        wait_for("a deep sweep after it", SOON, || {
            let now = metrics();
            now["ctkeep_held_connections{family=\"ipv4\"}"] == LIMIT as f64
                && now["ctkeep_mismatches{class=\"agree\"}"] == LIMIT as f64
        });
        proxy.allowed.store(usize::MAX, Ordering::SeqCst);
        let refreshed = refreshed.join().unwrap();
        assert_eq!(proxy.pages.swap(0, Ordering::SeqCst), 2, "the page and one refresh");
        refreshed.assert_shows(&metrics());
        assert_eq!(refreshed.console, "");

        proxy.unscripted.store(true, Ordering::SeqCst);
        let unscripted = browse(server, PROXY, &dump);
        assert_eq!(proxy.pages.load(Ordering::SeqCst), 1, "nothing refreshes it");
        assert!(unscripted.console.contains("Blocked script"), "{}", unscripted.console);
        assert_eq!(unscripted.console.lines().count(), 1, "{}", unscripted.console);
        unscripted.assert_shows(&metrics());
        assert!(unscripted.document.contains("<td>socket open, entry in close"));

        proxy.unscripted.store(false, Ordering::SeqCst);
        proxy.injects.store(true, Ordering::SeqCst);
        let injected = browse(server, PROXY, &["--dump-dom"]);
        assert!(injected.document.contains(INJECTED), "the control: {}", injected.document);
        assert!(injected.document.contains("<title>ctkeep</title>"), "the script did not run");
        assert!(injected.console.contains("Content Security Policy"), "{}", injected.console);
    });

    for scheme in ["light", "dark", "telephone"] {
        let picture =
            std::env::temp_dir().join(format!("ctkeep-{scheme}-{}.png", std::process::id()));
        let shot = format!("--screenshot={}", picture.display());
        let size = if scheme == "telephone" { "500,1600" } else { "1000,1100" };
        let size = format!("--window-size={size}");
        let mut args = vec![shot.as_str(), size.as_str()];
        if scheme == "dark" {
            args.push("--blink-settings=preferredColorScheme=0");
        }
        browse(server, DAEMON, &args);
        let bytes = fs::read(&picture).expect("a picture");
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000, "{} bytes", bytes.len());
        if let Some(folder) = std::env::var_os("CTKEEP_PICTURES") {
            fs::copy(&picture, std::path::Path::new(&folder).join(format!("{scheme}.png")))
                .unwrap();
        }
        fs::remove_file(&picture).unwrap();
    }
}
