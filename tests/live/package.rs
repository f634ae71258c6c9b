//! The package in a Debian of its own, under its own systemd, in the lab's server: installed,
//! started, attacked, watched by Prometheus, upgraded, removed and purged. `make package-test`
//! prepares that Debian.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::lab::{Namespace, holds_within, http, wait_for};
use crate::prometheus::server::Prometheus;
use crate::scene::{LIMIT, Limiter, SOON, Scene, TRIES};

/// Boots the Debian; a machine whose control groups are those of version 1 shows it version 2.
const BOOT: &str = "\
    test -e /sys/fs/cgroup/cgroup.procs \
        || { umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; }
    systemd-nspawn --quiet --boot --console=pipe --register=no --keep-unit \
        --machine=ctkeep-package-test --resolv-conf=off --timezone=off --link-journal=no \
        --capability=CAP_NET_ADMIN,CAP_BPF,CAP_PERFMON --system-call-filter=bpf \
        --network-namespace-path=/proc/self/ns/net --directory=\"$1\"";

/// A booted Debian; dropping it ends it.
struct Machine {
    unshare: Child,
    root: PathBuf,
}

impl Machine {
    fn boot(namespace: &Namespace, root: &Path) -> Self {
        let mut command = Command::new("unshare");
        // A process namespace around it all: what is inside dies with it, however that ends.
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["sh", "-euc", BOOT, "sh"]);
        command.arg(root);
        let unshare = namespace.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        });
        let this = Self { unshare: unshare.unwrap(), root: root.to_owned() };
        let is_up = || {
            let (_, state) = this.try_run("systemctl is-system-running");
            matches!(state.trim(), "running" | "degraded")
        };
        wait_for("a running system", SOON, is_up);
        // As udev's rules make it (50-udev-default.rules), which a container has none of.
        this.run("chmod 0666 /dev/net/tun");
        this
    }

    /// Its process 1: the child of systemd-nspawn, in the shell, in unshare.
    fn init(&self) -> Option<String> {
        let mut pid = self.unshare.id().to_string();
        for _ in 0..3 {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            pid = children.split_whitespace().next()?.to_owned();
        }
        Some(pid)
    }

    /// Runs a shell script in it: whether it succeeded, and what it wrote.
    fn try_run(&self, script: &str) -> (bool, String) {
        let Some(init) = self.init() else { return (false, "no machine".to_owned()) };
        let mut command = Command::new("nsenter");
        command.args(["--target", &init, "--mount", "--uts", "--ipc", "--net", "--pid"]);
        command.args(["--cgroup", "--root", "--wd", "--", "sh", "-c", script]);
        command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
        let output = command.stdin(Stdio::null()).output().unwrap();
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.success(), text)
    }

    fn run(&self, script: &str) -> String {
        let (done, text) = self.try_run(script);
        assert!(done, "{script}:\n{text}\n{}", self.journal());
        text
    }

    fn journal(&self) -> String {
        self.try_run("journalctl --no-pager --unit ctkeep").1
    }

    fn show(&self, property: &str) -> String {
        self.run(&format!("systemctl show -P {property} ctkeep")).trim().to_owned()
    }

    fn configure(&self, text: &str) {
        fs::write(self.root.join("etc/ctkeep/ctkeep.toml"), text).unwrap();
    }

    /// Every file that the package or its service may have left.
    fn traces(&self) -> String {
        self.run(
            "find / -xdev -name '*ctkeep*' -not -path '/proc/*' -not -path '/sys/*'; \
             grep -rls ctkeep /etc /var/lib --exclude-dir=apt --exclude=status-old || :",
        )
    }

    /// What a unit writes is in the journal a moment later.
    fn await_journal(&self, text: &str) {
        let is_there = holds_within(SOON, || self.journal().contains(text));
        assert!(is_there, "no {text:?}: {}", self.journal());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// How many of ten connections are admitted, each half-closed and followed by a stale RST. Ends
/// them by RSTs that the server accepts.
fn attack(scene: &Scene) -> usize {
    attack_and(scene, || ())
}

/// The same; `meanwhile` is done before they end.
fn attack_and(scene: &Scene, meanwhile: impl FnOnce()) -> usize {
    let admitted = scene.attack(|_, conn| {
        conn.rst(-5);
        // Not a race: whoever repairs has the time to.
        thread::sleep(Duration::from_millis(200));
    });
    let count = admitted.len();
    meanwhile();
    scene.end(&admitted);
    count
}

#[test]
#[ignore = "needs the Debian that make package-test prepares"]
fn the_package_installs_guards_upgrades_and_leaves_nothing() {
    let root = std::env::var_os("CTKEEP_PACKAGE_ROOT").expect("run by make package-test");
    let Some(scene) = Scene::new(Limiter::Connlimit) else { return };
    let machine = Machine::boot(&scene.lab.server, Path::new(&root));
    assert_eq!(attack(&scene), TRIES, "the positive control");

    machine.run("dpkg -i /old.deb");
    for page in ["man8/ctkeep.8.gz", "man5/ctkeep.toml.5.gz"] {
        machine.run(&format!("gzip -t /usr/share/man/{page}"));
    }
    assert_eq!(machine.try_run("systemctl is-enabled ctkeep").1.trim(), "disabled");
    machine.run("systemd-analyze verify --man=no ctkeep.service");
    machine.run("systemctl enable --now ctkeep");
    machine.await_journal("recount=[\"ingress\", \"loopback\"] seal=true");
    let status = machine.run(&format!("cat /proc/{}/status", machine.show("MainPID")));
    for line in
        ["CapEff:\t0000000000003000", "CapBnd:\t0000000000003000", "NoNewPrivs:\t1", "Seccomp:\t2"]
    {
        assert!(status.contains(line), "{line}:\n{status}");
    }
    assert!(!status.contains("Uid:\t0\t"), "a user of its own: {status}");
    assert_eq!(attack(&scene), LIMIT, "{}", machine.journal());
    machine.await_journal("acted action=\"revive\"");

    machine.run("systemctl reload ctkeep");
    machine.await_journal("configuration reloaded");
    machine.run(
        "cp /etc/ctkeep/ctkeep.toml /root/good && echo 'frobnicate = 1' >>/etc/ctkeep/ctkeep.toml",
    );
    assert!(!machine.try_run("systemctl reload ctkeep").0, "a faulty file fails the reload");
    machine.await_journal("frobnicate");
    machine.run("cat /root/good >/etc/ctkeep/ctkeep.toml && systemctl reload ctkeep");
    a_hung_daemon_is_replaced(&machine);
    drop_ins_suffice(&machine);

    machine.configure("lease = \"90s\"\n");
    machine.run("systemctl restart ctkeep");
    let before = machine.show("MainPID");
    machine.run("dpkg -i /new.deb");
    assert!(
        machine.run("cat /etc/ctkeep/ctkeep.toml").contains("90s"),
        "the configuration is kept"
    );
    assert_ne!(machine.show("MainPID"), before, "started anew");
    assert_eq!(machine.show("ActiveState"), "active");
    is_seen_in_prometheus(&scene, Path::new(&root), |meanwhile| {
        assert_eq!(
            attack_and(&scene, meanwhile),
            LIMIT,
            "after the upgrade: {}",
            machine.journal()
        );
    });

    machine.run("dpkg --remove ctkeep");
    assert!(!machine.try_run("systemctl is-active ctkeep").0, "stopped");
    machine.run("test -e /etc/ctkeep/ctkeep.toml");
    assert_eq!(scene.lab.server.output("ip -o link show type tun"), "", "no device is left");
    assert_eq!(attack(&scene), TRIES, "nobody repairs any more");
    machine.run("dpkg --purge ctkeep");
    assert_eq!(machine.traces(), "");
}

/// What the service serves, what Prometheus makes of it with the rules of the package, and that
/// both see the attack.
fn is_seen_in_prometheus(scene: &Scene, root: &Path, attack: impl FnOnce(&dyn Fn())) {
    let server = &scene.lab.server;
    let get = |path| http::ask(server, "127.0.0.1:9815", path, "").expect("the service listens");
    wait_for("health", SOON, || get("GET /healthz").status == 200);
    let revives =
        || http::samples(&get("GET /metrics").body)["ctkeep_actions_total{action=\"revive\"}"];
    assert_eq!(revives(), 0.0);
    let rules = root.join("usr/share/ctkeep/prometheus/ctkeep.rules.yml");
    let prometheus = Prometheus::start(server, rules.to_str().unwrap());
    prometheus.await_value("up", |up| up == 1.0);
    prometheus.await_value("sum(ctkeep_actions_total{action=\"revive\"})", |count| count == 0.0);
    attack(&|| prometheus.await_value("sum(ctkeep_held_connections)", |held| held >= 1.0));
    let count = LIMIT as f64;
    assert!(revives() >= count);
    for (expression, least) in [
        ("sum(ctkeep_actions_total{action=\"revive\"})", count),
        ("sum(ctkeep_reaction_seconds_count)", count),
        ("sum(rate(ctkeep_actions_total{action=\"revive\"}[1m])) > bool 0", 1.0),
        ("count(ALERTS{alertname=\"CtkeepTcpLoose\", alertstate=\"firing\"})", 1.0),
    ] {
        prometheus.await_value(expression, |value| value >= least);
    }
}

fn a_hung_daemon_is_replaced(machine: &Machine) {
    machine.run(
        "mkdir -p /etc/systemd/system/ctkeep.service.d && cd /etc/systemd/system/ctkeep.service.d \
         && printf '[Service]\\nWatchdogSec=1s\\n' >watchdog.conf \
         && systemctl daemon-reload && systemctl restart ctkeep",
    );
    let hung = machine.show("MainPID");
    machine.run(&format!("kill -STOP {hung}"));
    let replaced = || machine.show("ActiveState") == "active" && machine.show("MainPID") != hung;
    assert!(holds_within(SOON, replaced), "{}", machine.journal());
    machine.run("rm /etc/systemd/system/ctkeep.service.d/watchdog.conf");
}

/// The documented drop-ins give what their options take.
fn drop_ins_suffice(machine: &Machine) {
    machine.run("cp /usr/share/doc/ctkeep/examples/*.conf /etc/systemd/system/ctkeep.service.d");
    machine.configure("netns = [\"blue\"]\nrealtime = true\nshield = \"on\"\n");
    let (started, _) = machine.try_run("systemctl daemon-reload && systemctl restart ctkeep");
    assert!(started, "its own namespace is guarded, and the other waited for");
    let entered = || machine.journal().matches("ready ports").count();
    let before = entered();
    machine.run("ip netns add blue");
    assert!(holds_within(SOON, || entered() > before), "entered: {}", machine.journal());
    let before = entered();
    machine.run("ip netns del blue && ip netns add blue");
    assert!(holds_within(SOON, || entered() > before), "again: {}", machine.journal());
    let journal = machine.journal();
    assert!(!journal.contains("no real-time priority"), "{journal}");
    assert!(journal.contains("shield raised"), "{journal}");
    machine.run(
        "ip netns del blue && rm -r /etc/systemd/system/ctkeep.service.d \
         && systemctl daemon-reload",
    );
    machine.configure("");
    machine.run("systemctl restart ctkeep");
}
