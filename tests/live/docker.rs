//! Containers of the real Docker: `make docker-test`. It wants Docker's programs in the folder that
//! `CTKEEP_DOCKER` names, python3 for the server in the container, and a cgroup file system.

use crate::lab;
use crate::lab::guests;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::guests::{LIMIT, SERVER, gain_of};
use crate::lab::{Lab, Namespace, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(60);

/// Docker in a network and mount namespace of its own, with its own data folder.
struct Docker<'l> {
    host: &'l Namespace,
    programs: String,
    folder: tempfile::TempDir,
    daemon: Child,
}

impl<'l> Docker<'l> {
    fn start(lab: &'l Lab, programs: String) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let daemon = Self::spawn(&lab.server, &programs, folder.path());
        let this = Self { host: &lab.server, programs, folder, daemon };
        wait_for("dockerd", SOON, || this.try_run("version").is_ok());
        this
    }

    /// Its containers outlive it (`live-restore`).
    fn spawn(host: &Namespace, programs: &str, folder: &Path) -> Child {
        let path = folder.display();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]).arg(format!(
            "PATH={programs}:$PATH exec dockerd --data-root {path}/data --exec-root {path}/run \
             --pidfile {path}/pid -H unix://{path}/sock --storage-driver vfs --live-restore \
             2>>{path}/log"
        ));
        let daemon = host.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        });
        daemon.expect("dockerd")
    }

    /// Ends dockerd, and waits for it; containers go on.
    fn stop(&mut self) {
        let pid = self.daemon.id().to_string();
        let _ = Command::new("kill").arg(pid).status();
        let _ = self.daemon.wait();
    }

    fn start_again(&mut self) {
        self.daemon = Self::spawn(self.host, &self.programs, self.folder.path());
        wait_for("dockerd", SOON, || self.try_run("version").is_ok());
    }

    fn try_run(&self, line: &str) -> Result<String, String> {
        let socket = self.folder.path().join("sock");
        self.host.try_run(&format!(
            "{}/docker -H unix://{} {line}",
            self.programs,
            socket.display()
        ))
    }

    fn run(&self, line: &str) -> String {
        self.try_run(line).unwrap_or_else(|reason| panic!("{reason}"))
    }

    /// A container with a server, whose port 8080 is published as `port`. Its root is the host's.
    fn serve(&self, name: &str, port: u16) {
        self.serve_in("bridge", name, port);
    }

    fn serve_in(&self, network: &str, name: &str, port: u16) {
        let script = self.folder.path().join("server.py");
        std::fs::write(&script, SERVER).expect("a script");
        self.run(&format!(
            "run -d --name {name} --hostname {name} --network {network} -p {port}:8080 -v /:/host:ro \
             nothing \
             /bin/busybox chroot /host /usr/bin/python3 {}",
            script.display()
        ));
    }

    /// An image with nothing but busybox.
    fn import(&self) {
        let root = self.folder.path().join("image");
        std::fs::create_dir_all(root.join("bin")).expect("a folder");
        std::fs::copy("/usr/bin/busybox", root.join("bin/busybox")).expect("busybox");
        let tar = self.folder.path().join("image.tar");
        let made = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&tar).arg(".").status();
        assert!(made.expect("tar").success());
        self.run(&format!("import {} nothing", tar.display()));
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        if let Ok(all) = self.try_run("ps -q") {
            all.lines().for_each(|id| drop(self.try_run(&format!("rm -f {id}"))));
        }
        // Its own child containerd ends with it.
        self.stop();
    }
}

fn docker(lab: &Lab) -> Option<Docker<'_>> {
    let programs = std::env::var("CTKEEP_DOCKER").unwrap_or_default();
    if !Path::new(&programs).join("dockerd").exists() {
        lab::skip_rare("no Docker: make docker-test");
        return None;
    }
    let docker = Docker::start(lab, programs);
    docker.import();
    Some(docker)
}

/// For the port that clients ask for, where Docker wants rules of the administrator's.
fn limit(lab: &Lab) {
    lab.server.run(&format!(
        "iptables -I DOCKER-USER -i eth0 -p tcp --syn -m conntrack --ctorigdstport 80 \
         -m connlimit --connlimit-above {LIMIT} --connlimit-mask 32 -j DROP"
    ));
}

/// Of a source whose connections the limit has forgotten: by the published port, in DOCKER-USER.
fn is_measured_by_the_port_that_clients_ask_for(lab: &Lab, source: &str) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_str(&out).expect(&err);
    let rows = |key: &str| report.get(key).and_then(|all| all.as_array()).expect(key).iter();
    let is = |row: &serde_json::Value, wanted: &[(&str, serde_json::Value)]| {
        wanted.iter().all(|(key, value)| row.get(key) == Some(value))
    };
    let over = [
        ("source", format!("{source}/32").into()),
        ("over_limit", true.into()),
        ("limit", LIMIT.into()),
        ("held", (2 * LIMIT).into()),
    ];
    assert!(code == 1 && rows("sources").any(|it| is(it, &over)), "{report:#}");
    let word = |row: &serde_json::Value, key: &str| {
        row.get(key).and_then(|it| it.as_str()).unwrap_or_default().to_owned()
    };
    let forgotten = [("class", "entry-closed".into()), ("asked", "192.0.2.1:80".into())];
    let mut its = rows("connections")
        .filter(|it| is(it, &forgotten) && word(it, "remote").starts_with(&format!("{source}:")));
    let one = its.next().unwrap_or_else(|| panic!("{report:#}"));
    for local in [word(one, "asked"), word(one, "local")] {
        let (code, out, err) = lab.ctkeep(CTKEEP, &["explain", &local, &word(one, "remote")]);
        assert!(code == 1 && out.contains("DOCKER-USER") && out.contains("revive"), "{out}{err}");
    }
}

#[test]
fn containers_of_docker_are_guarded_over_restarts_and_beside_others() {
    let Some(lab) = Lab::new() else { return };
    let Some(docker) = docker(&lab) else { return };
    docker.serve("web", 80);
    limit(&lab);
    let gain = |source: &str, with_ctkeep| gain_of(&lab, source, with_ctkeep);
    assert_eq!(gain("198.51.100.1", false), LIMIT, "the control");
    is_measured_by_the_port_that_clients_ask_for(&lab, "198.51.100.1");

    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain("198.51.100.2", true), 0, "{}", daemon.log());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    let id: String = docker.run("ps -q").trim().chars().take(12).collect();
    assert!(out.contains(&format!("python3 in web (docker {id})")), "{id}: {out}{err}");

    docker.run("restart -t 0 web");
    assert_eq!(gain("198.51.100.3", true), 0, "after a restart: {}", daemon.log());
    for number in 0..10 {
        docker.serve(&format!("other{number}"), 9000 + number);
    }
    assert_eq!(gain("198.51.100.4", true), 0, "beside others: {}", daemon.log());
    docker.run("rm -f web");
    docker.serve("web", 80);
    assert_eq!(gain("198.51.100.5", true), 0, "a new one of its name: {}", daemon.log());
    let (status, log) = daemon.term();
    assert_eq!(gain("198.51.100.6", false), LIMIT, "the control: so it is without ctkeep");
    assert!(status.success() && !log.contains("ERROR") && !log.contains("WARN"), "{log}");
}

/// `docker compose` makes a network for each project; its services are in it, one of them published.
#[test]
fn services_of_a_network_of_their_own_are_guarded_over_a_restart_of_docker() {
    let Some(lab) = Lab::new() else { return };
    let Some(mut docker) = docker(&lab) else { return };
    docker.run("network create shop");
    docker.serve_in("shop", "shop_web_1", 80);
    docker.run("run -d --name shop_db_1 --network shop nothing /bin/busybox sleep 1000");
    limit(&lab);
    assert_eq!(gain_of(&lab, "198.51.100.1", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    let gain = |source: &str, when: &str| {
        assert_eq!(gain_of(&lab, source, true), 0, "{when}: {}", daemon.log());
    };
    gain("198.51.100.2", "in a network of its own");
    docker.run("network create back");
    docker.run("network connect back shop_web_1");
    gain("198.51.100.3", "with a second network");

    docker.stop();
    gain("198.51.100.4", "without dockerd");
    docker.start_again();
    // It has made its chains anew, and left DOCKER-USER as it was.
    gain("198.51.100.5", "after a restart of dockerd");
    let (status, log) = daemon.term();
    assert_eq!(gain_of(&lab, "198.51.100.6", false), LIMIT, "the control after all of it");
    // A look at chains that dockerd makes anew can fail, and it deletes entries of a container whose
    // networks change.
    let known = ["rules could not be read", "somebody else deletes entries"];
    let mut warnings = log.lines().filter(|line| line.contains("WARN"));
    assert!(warnings.all(|line| known.iter().any(|it| line.contains(it))), "{log}");
    assert!(status.success() && !log.contains("ERROR"), "{log}");
}

#[test]
fn the_first_and_the_last_of_thirty_containers_are_guarded() {
    let Some(lab) = Lab::new() else { return };
    let Some(docker) = docker(&lab) else { return };
    docker.serve("first", 80);
    limit(&lab);
    assert_eq!(gain_of(&lab, "198.51.100.3", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    for number in 1..29 {
        docker.serve(&format!("c{number}"), 9000 + number);
    }
    assert_eq!(gain_of(&lab, "198.51.100.1", true), 0, "{}", daemon.log());
    docker.run("rm -f first");
    docker.serve("last", 80);
    assert_eq!(gain_of(&lab, "198.51.100.2", true), 0, "{}", daemon.log());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    assert!(out.contains("python3 in last (docker "), "{out}{err}");
    let (_, log) = daemon.term();
    assert!(log.lines().all(|line| line.len() < 500), "{log}");
    assert_eq!(gain_of(&lab, "198.51.100.4", false), LIMIT, "the control: the last without ctkeep");
}

/// Docker of this age translates no IPv6: its proxy takes the connection, and dials the container.
/// Its sockets are the host's, and so is the limit.
#[test]
fn what_the_proxy_takes_over_ipv6_is_counted_by_its_own_sockets() {
    let Some(lab) = Lab::new() else { return };
    let Some(docker) = docker(&lab) else { return };
    docker.serve("web", 80);
    lab.server.run(&format!(
        "ip6tables -A INPUT -i eth0 -p tcp --syn --dport 80 -m connlimit --connlimit-above {LIMIT} \
         --connlimit-mask 128 -j DROP"
    ));
    // A first connection over IPv4 says when the server is there.
    assert!(gain_of(&lab, "198.51.100.1", false) > 0);
    let gain = |source: &str, with_ctkeep| guests::gain(&lab, &lab.peer(source), 80, with_ctkeep);
    assert_eq!(gain("2001:db8:1::1", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain("2001:db8:1::2", true), 0, "{}", daemon.log());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    assert!(out.contains("docker-proxy"), "{out}{err}");
}
