//! `ctkeep run` as a service: what it tells systemd, what it keeps of root's privileges, for whom
//! it writes its log, and the unit itself.

use crate::lab;
use crate::scene;
use std::fs::{self, File};
use std::os::linux::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::lab::process::{NET_ADMIN_AND_RAW, capabilities, status};
use crate::lab::{Lab, wait_for};
use crate::scene::{CTKEEP, LIMIT, Limiter, SOON, Scene};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

const SYS_ADMIN: u64 = 1 << 21;
const SYS_NICE: u64 = 1 << 23;

/// Drop-ins, and the overall exposure with them that docs/operations.md states, times ten.
const EXPOSURES: [(&[&str], &str); 3] =
    [(&[], "16"), (&["containers.conf"], "31"), (&["realtime.conf"], "19")];

#[test]
fn root_keeps_only_what_repairs_need_and_repairs() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&["--containers", "off"]);
    let pid = scene.daemon().pid();
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(capabilities(pid, set), NET_ADMIN_AND_RAW, "{set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(capabilities(pid, set), 0, "{set}");
    }
    assert_eq!(status(pid)["NoNewPrivs"], "1");
    for task in fs::read_dir(format!("/proc/{pid}/task")).expect("its threads") {
        let task = task.expect("a thread").file_name().into_string().expect("a number");
        assert_eq!(capabilities(task.parse().expect("a number"), "CapEff"), NET_ADMIN_AND_RAW);
    }

    let admitted = scene.attack(|scene, conn| {
        conn.rst(-5);
        scene.await_repair("revive", std::slice::from_ref(conn));
    });
    assert_eq!(admitted.len(), LIMIT, "{}", scene.daemon().log());
    assert!(scene.daemon().logged("recount=[\"ingress\", \"loopback\"] seal=true"));
}

#[test]
fn namespaces_and_real_time_priority_keep_what_they_need() {
    let Some(lab) = Lab::new() else { return };
    let path = lab.client.path();
    let daemon = lab.daemon(CTKEEP, &["--containers", "off", "--netns", &path, "--realtime"]);
    let kept = capabilities(daemon.pid(), "CapEff");
    let needed = NET_ADMIN_AND_RAW | SYS_ADMIN | SYS_NICE;
    assert_eq!(kept & needed, needed, "{kept:x}");
    assert!(kept.count_ones() < 8, "{kept:x}");
}

/// systemd hands the unit's capabilities over in every set, and root means nothing to it.
#[test]
fn started_as_the_unit_is_it_leaves_nothing_to_inherit() {
    let Some(lab) = Lab::new() else { return };
    let may = "-all,+net_admin,+net_raw";
    let mut command = Command::new("setpriv");
    command.args(["--securebits", "+noroot,+noroot_locked"]);
    for set in ["--inh-caps", "--ambient-caps", "--bounding-set"] {
        command.args([set, may]);
    }
    command.args(["--", CTKEEP, "run"]);
    let file = tempfile::NamedTempFile::new().expect("a file");
    let daemon = Bare::execute(&lab, command, &[], file.reopen().expect("the file"));
    let log = || fs::read_to_string(file.path()).expect("its text");
    wait_for("ready", SOON, || log().contains("ready"));
    let pid = daemon.0.id();
    for task in fs::read_dir(format!("/proc/{pid}/task")).expect("its threads") {
        let task = task.expect("a thread").file_name().into_string().expect("a number");
        let task = task.parse().expect("a number");
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(capabilities(task, set), NET_ADMIN_AND_RAW, "{set}: {}", log());
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(capabilities(task, set), 0, "{set}: {}", log());
        }
    }
}

/// `ctkeep run` in the lab, with an environment and a stderr of the test's own.
struct Bare(Child);

impl Bare {
    fn start(lab: &Lab, environment: &[(&str, &str)], args: &[&str], stderr: File) -> Self {
        let mut command = Command::new(CTKEEP);
        command.arg("run").args(args);
        Self::execute(lab, command, environment, stderr)
    }

    fn execute(
        lab: &Lab,
        mut command: Command,
        environment: &[(&str, &str)],
        stderr: File,
    ) -> Self {
        command.envs(environment.iter().copied());
        let child = lab.server.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        });
        Self(child.expect("ctkeep starts"))
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).expect("a process id"));
        kill(pid, signal).expect("a running daemon");
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn systemd_is_told_of_every_stage() {
    let Some(lab) = Lab::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(SOON)).expect("a timeout");
    // Watchdog's words come between all others.
    let next = |but: &str| loop {
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).expect("a word for systemd");
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        if but.is_empty() || !text.contains(but) {
            return text;
        }
    };

    let path = path.to_str().expect("a path of text");
    let environment = [("NOTIFY_SOCKET", path), ("WATCHDOG_USEC", "200000")];
    let log = tempfile::tempfile().expect("a file");
    let mut daemon = Bare::start(&lab, &environment, &[], log);
    let only = "WATCHDOG=1";
    assert!(next(only).contains("READY=1\n"));
    for _ in 0..3 {
        assert!(next("READY").contains(only), "a sign of life");
    }

    daemon.signal(Signal::SIGHUP);
    let reloading = next(only);
    let since = reloading.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
    assert!(reloading.contains("RELOADING=1\n"), "{reloading}");
    assert!(since.is_some_and(|time| time.parse::<u64>().is_ok()), "{reloading}");
    assert!(next(only).contains("READY=1\n"));

    daemon.signal(Signal::SIGTERM);
    assert!(next(only).contains("STOPPING=1\n"));
    assert!(daemon.0.wait().expect("its end").success());
}

/// As on a network file system whose server is gone: whoever opens a FIFO waits for the other end.
#[test]
fn files_that_hang_hold_up_neither_the_watchdog_nor_the_end() {
    let Some(lab) = Lab::new() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let text = |name: &str| path(name).to_str().expect("a path of text").to_owned();
    let fifo = |name: &str| mkfifo(&path(name), Mode::S_IRWXU);
    let socket = UnixDatagram::bind(path("notify")).expect("a socket");
    socket.set_read_timeout(Some(SOON)).expect("a timeout");
    let await_word = |word: &str| loop {
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("no {word}: {error}"));
        if String::from_utf8_lossy(&buffer[..length]).contains(word) {
            return;
        }
    };

    fifo("ctkeep.toml").expect("a FIFO");
    let notify = text("notify");
    let environment = [("NOTIFY_SOCKET", notify.as_str()), ("WATCHDOG_USEC", "200000")];
    let args = ["--config", &text("ctkeep.toml"), "--metrics-textfile", &text("x.prom")];
    let log = tempfile::tempfile().expect("a file");
    let mut daemon = Bare::start(&lab, &environment, &args, log);
    fs::write(path("ctkeep.toml"), "metrics-listen = \"off\"\n")
        .expect("its configuration is read");
    await_word("READY=1");
    wait_for("metrics", SOON, || path("x.prom").exists());
    // In place of what the next write, five seconds later at most, would begin with.
    wait_for("no write under way", SOON, || fifo("x.prom.tmp").is_ok());
    thread::sleep(Duration::from_secs(6));
    daemon.signal(Signal::SIGHUP);
    await_word("RELOADING=1");
    socket.set_nonblocking(true).expect("a socket");
    while socket.recv(&mut [0; 4096]).is_ok() {}
    socket.set_nonblocking(false).expect("a socket");
    for _ in 0..3 {
        await_word("WATCHDOG=1");
    }
    daemon.signal(Signal::SIGTERM);
    await_word("STOPPING=1");
    let has_ended = || daemon.0.try_wait().expect("its status").is_some();
    wait_for("its end", SOON, has_ended);
}

/// What it writes to a stderr that is a file, until it is ready.
fn log_of(lab: &Lab, named: bool, args: &[&str]) -> String {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let place = file.as_file().metadata().expect("its place");
    let stream = format!("{}:{}", place.st_dev(), place.st_ino() + u64::from(!named));
    let stderr = file.reopen().expect("the file");
    let _daemon = Bare::start(lab, &[("JOURNAL_STREAM", &stream)], args, stderr);
    let log = || fs::read_to_string(file.path()).expect("its text");
    wait_for("ready", SOON, || log().contains("ready"));
    log()
}

#[test]
fn the_log_is_written_for_whoever_reads_it() {
    let Some(lab) = Lab::new() else { return };
    let journal = log_of(&lab, true, &[]);
    assert!(journal.lines().all(|line| line.starts_with("<6>")), "{journal}");
    assert!(journal.contains("\n<6>guard{"), "{journal}");
    let json = log_of(&lab, false, &[]);
    for line in json.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert_eq!(line["level"], "INFO", "{line}");
    }
    let asked = log_of(&lab, false, &["--log-format", "journald"]);
    assert!(asked.lines().all(|line| line.starts_with("<6>")), "{asked}");
    let asked = log_of(&lab, true, &["--log-format", "text"]);
    assert!(asked.lines().all(|line| line.contains(" INFO ")), "{asked}");
}

/// Under attack the log stays readable, and nothing goes uncounted.
#[test]
fn a_burst_of_repairs_is_summed_up() {
    const ALL: usize = 60;
    let Some(lab) = Lab::new() else { return };
    // Without a rule that needs it, nothing is tracked.
    lab.connlimit(80, 1000);
    let _server = lab.serve("0.0.0.0:80");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let stderr = file.reopen().expect("the file");
    let _daemon = Bare::start(&lab, &[], &["--log-format", "text", "--recount", "off"], stderr);
    let log = || fs::read_to_string(file.path()).expect("its text");
    wait_for("ready", SOON, || log().contains("ready"));

    let mut conns = lab.peer(scene::CLIENT).hold(80, ALL);
    conns.iter_mut().for_each(lab::RawConn::fin);
    wait_for("CLOSE_WAIT", SOON, || lab.sockets("close-wait") == ALL);
    conns.iter().for_each(|conn| conn.rst(-5));
    let withheld = || {
        let log = log();
        let summaries = log.split("withheld={\"revive\": ").skip(1);
        summaries
            .map(|rest| rest.split('}').next().unwrap().parse::<usize>().unwrap())
            .sum::<usize>()
    };
    // In place, or shown to the limits.
    let lines = || log().lines().filter(|line| line.contains("action=\"revive\"")).count();
    wait_for("all repairs", SOON, || lines() + withheld() >= ALL);
    assert!(withheld() >= ALL / 3, "{}", log());
}

#[test]
fn a_log_filter_that_makes_no_sense_is_a_usage_error() {
    let output = Command::new(CTKEEP).arg("audit").env("CTKEEP_LOG", "info,=loud").output();
    let output = output.expect("ctkeep runs");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{err}");
    assert!(err.contains("CTKEEP_LOG: 'info,=loud' is no filter"), "{err}");
}

/// `systemd-analyze` in a folder with the unit, which starts the binary under test, and these of
/// its drop-ins. False where there is no systemd.
fn analyze(args: &[&str], drop_ins: &[&str]) -> bool {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging");
    let folder = tempfile::tempdir().expect("a folder");
    let unit = fs::read_to_string(packaging.join("ctkeep.service")).expect("the unit");
    let unit = unit.replace("/usr/sbin/ctkeep", CTKEEP);
    fs::write(folder.path().join("ctkeep.service"), unit).expect("a copy");
    let drop_in_folder = folder.path().join("ctkeep.service.d");
    fs::create_dir(&drop_in_folder).expect("a folder");
    for name in drop_ins {
        let source = packaging.join("ctkeep.service.d").join(name);
        fs::copy(source, drop_in_folder.join(name)).expect("a copy");
    }
    let mut command = Command::new("systemd-analyze");
    command.args(args).arg("./ctkeep.service").current_dir(folder.path());
    let Ok(output) = command.output() else {
        eprintln!("SKIPPED: no systemd-analyze");
        return false;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.is_empty(), "{args:?} {drop_ins:?}: {said}{table}");
    true
}

#[test]
fn the_unit_and_its_drop_ins_are_sound() {
    let all = ["containers.conf", "realtime.conf"];
    for drop_ins in [&[][..], &all[..1], &all[1..], &all] {
        if !analyze(&["verify", "--man=no"], drop_ins) {
            return;
        }
    }
    for (drop_ins, exposure) in EXPOSURES {
        analyze(&["security", "--offline=true", "--no-pager", "--threshold", exposure], drop_ins);
    }
}

/// An administrator pastes them.
#[test]
fn the_install_lines_of_the_drop_ins_name_files_that_are_installed() {
    let makefile = fs::read_to_string("Makefile").expect("the Makefile");
    let installed = "for file in packaging/ctkeep.service.d/*.conf packaging/sysctl.conf";
    assert!(makefile.contains(installed) && makefile.contains("DOCDIR"), "installed elsewhere");
    assert!(makefile.contains("s,/usr/share/doc/ctkeep,$(DOCDIR),"), "named elsewhere");
    for drop_in in fs::read_dir("packaging/ctkeep.service.d").expect("the drop-ins") {
        let path = drop_in.expect("a file").path();
        let name = path.file_name().expect("a name").to_str().expect("UTF-8");
        let text = fs::read_to_string(&path).expect("a drop-in");
        let line = format!(
            "install -D -m 0644 /usr/share/doc/ctkeep/examples/{name} \
             /etc/systemd/system/ctkeep.service.d/{name}"
        );
        assert!(text.contains(&line), "{name} has not: {line}");
    }
}
