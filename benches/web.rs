//! What ctkeep costs a real server and a real load generator: nginx and ab, one request a connection,
//! forty at once. `make bench` skips it where the two are missing (Debian: nginx-light, apache2-utils).

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lab::{Daemon, Lab, RawConn, wait_for};
use report::Target;
use traffic::CTKEEP;

const ROUNDS: usize = 31;
const REQUESTS: &str = "1500";

/// One host with its server, and ctkeep or none.
struct Arm {
    name: &'static str,
    target: Target,
    rates: Vec<f64>,
    daemon: Option<Daemon>,
    /// Held, so that the ends of sockets are listened to.
    held: Vec<RawConn>,
    nginx: Child,
    lab: Lab,
}

impl Drop for Arm {
    fn drop(&mut self) {
        self.nginx.kill().expect("a running nginx");
        self.nginx.wait().expect("the end of nginx");
    }
}

impl Arm {
    fn new(
        name: &'static str,
        args: Option<&[&str]>,
        held: usize,
        target: Target,
        folder: &Path,
    ) -> Option<Self> {
        let lab = Lab::new()?;
        lab.connlimit(80, 10_000);
        traffic::widen_ports(&lab);
        let folder = folder.join(name.replace([' ', ','], "-"));
        fs::create_dir_all(&folder).expect("a folder");
        let configuration = "daemon off; master_process off; error_log stderr; pid nginx.pid;
            events { worker_connections 4096; }
            http { access_log off; keepalive_timeout 0;
                   server { listen 80 backlog=4096; return 200 ok; } }";
        fs::write(folder.join("nginx.conf"), configuration).expect("a configuration");
        let mut command = Command::new("nginx");
        command.arg("-p").arg(&folder).args(["-c", "nginx.conf"]);
        let nginx = lab.server.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        });
        let nginx = nginx.expect("nginx");
        wait_for("nginx", Duration::from_secs(5), || {
            lab.server.output("ss -Hltn sport = :80").contains(":80")
        });
        let daemon = args.map(|args| lab.daemon(CTKEEP, args));
        let mut this =
            Self { name, target, rates: Vec::new(), daemon, held: Vec::new(), nginx, lab };
        if held > 0 {
            this.hold(held);
        }
        Some(this)
    }

    /// Half-closes connections to another server of the host.
    fn hold(&mut self, count: usize) {
        let _ = Box::leak(Box::new(self.lab.serve("0.0.0.0:81")));
        let peer = self.lab.peer("198.51.100.9");
        for _ in 0..count {
            let mut conn = peer.connect(81).expect("a connection");
            self.lab.half_close(&mut conn);
            conn.rst(-5);
            self.held.push(conn);
        }
        std::thread::sleep(Duration::from_secs(1));
    }

    fn run(&mut self) {
        let line = format!("ab -q -n {REQUESTS} -c 40 http://{}/", lab::SERVER_V4);
        let text = self.lab.client.output(&line);
        let rate = text.lines().find_map(|line| line.strip_prefix("Requests per second:"));
        let rate = rate.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        self.rates.push(rate.expect("a rate"));
    }
}

fn main() {
    lab::serve_if_asked();
    let is_there = |program| Command::new(program).arg("-V").output().is_ok();
    if !is_there("nginx") || !is_there("ab") {
        eprintln!("no nginx or no ab: apt-get install nginx-light apache2-utils");
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let new = |name, args, held, target| Arm::new(name, args, held, target, folder.path());
    let most = Target::AtLeast(0.98);
    let Some(stock) = new("stock", None, 0, Target::None) else { return };
    let mut arms = vec![stock];
    arms.extend(new("ctkeep", Some(&[]), 0, most));
    arms.extend(new("ctkeep, ten held", Some(&[]), 10, most));
    arms.extend(new("shield auto, in peace", Some(&["--shield", "auto"]), 0, most));
    arms.extend(new("shield on", Some(&["--shield", "on"]), 0, Target::AtLeast(0.97)));
    for arm in &mut arms {
        arm.run();
        arm.rates.clear();
    }
    for round in 0..ROUNDS {
        // Each round begins with another one: what drifts meets all of them alike.
        arms.rotate_left(round % 2 + 1);
        for arm in &mut arms {
            arm.run();
        }
    }
    report::heading("nginx and ab, one request a connection, 40 at once; ratio to stock");
    let stock = arms.iter().find(|arm| arm.daemon.is_none()).expect("stock").rates.clone();
    for arm in &arms {
        let median = report::median(&arm.rates);
        let ratio = report::paired(&arm.rates, &stock);
        match arm.daemon {
            Some(_) => report::ratio(arm.name, median, "/s", ratio, arm.target),
            None => report::figure(arm.name, median, "/s", Target::None),
        }
    }
}
