//! Containers of the real podman, as root: `make containers-test`. It wants podman's packages unpacked
//! in the folder that `CTKEEP_PODMAN` names, python3 for the server in the container, and busybox.

use crate::lab;
use crate::lab::guests;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::guests::{LIMIT, SERVER, gain_of};
use crate::lab::{Lab, Namespace, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(60);

/// podman in a network and mount namespace of its own, with its own folders.
struct Podman<'l> {
    host: &'l Namespace,
    root: PathBuf,
    folder: tempfile::TempDir,
    /// Keeps the mount namespace, in which /run is its own.
    holder: Child,
}

impl<'l> Podman<'l> {
    fn start(lab: &'l Lab, root: PathBuf) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, from) = (folder.path().display(), root.display());
        let write = |name: &str, text: String| {
            std::fs::write(folder.path().join(name), text).expect("a file");
        };
        write("server.py", SERVER.to_owned());
        write(
            "containers.conf",
            format!(
                "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
                 [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n\
                 conmon_path = [\"{from}/usr/bin/conmon\"]\n\
                 helper_binaries_dir = [\"{from}/usr/lib/podman\"]\n\
                 [engine.runtimes]\nrunc = [\"{from}/usr/sbin/runc\"]\n\
                 [network]\nnetwork_backend = \"netavark\"\n"
            ),
        );
        let image = folder.path().join("image");
        for name in ["bin", "dev", "proc", "sys", "tmp", "host", "etc", "run"] {
            std::fs::create_dir_all(image.join(name)).expect("a folder");
        }
        std::fs::copy("/usr/bin/busybox", image.join("bin/busybox")).expect("busybox");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg(format!("mount -t tmpfs tmpfs /run && touch {path}/ready && exec sleep infinity"));
        let holder = lab.server.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        });
        let holder = holder.expect("a mount namespace");
        wait_for("a mount namespace", SOON, || folder.path().join("ready").exists());
        Self { host: &lab.server, root, folder, holder }
    }

    fn run(&self, line: &str) -> String {
        let (root, folder) = (self.root.display(), self.folder.path().display());
        self.host.output(&format!(
            "nsenter --target {} --mount env PATH={root}/usr/bin:{root}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
             LD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu CONTAINERS_CONF={folder}/containers.conf \
             {root}/usr/bin/podman --root {folder}/storage --runroot {folder}/state \
             --storage-driver vfs --log-level error {line}",
            self.holder.id()
        ))
    }

    /// A container with a server, whose port 8080 is published as `port`. Its root is the host's.
    fn serve(&self, name: &str, port: u16) {
        let folder = self.folder.path().display();
        self.run(&format!(
            "run -d --name {name} --hostname {name} -p {port}:8080 -v /:/host:ro --rootfs \
             {folder}/image /bin/busybox chroot /host /usr/bin/python3 {folder}/server.py"
        ));
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        self.run("rm --all --force --time 0");
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn containers_of_podman_are_guarded_over_restarts_and_beside_others() {
    let Some(lab) = Lab::new() else { return };
    let root = PathBuf::from(std::env::var("CTKEEP_PODMAN").unwrap_or_default());
    if !Path::new(&root).join("usr/bin/podman").exists() {
        lab::skip_rare("no podman: make containers-test");
        return;
    }
    guests::limit(&lab);
    let podman = Podman::start(&lab, root);
    podman.serve("web", 80);
    let gain = |source: &str, with_ctkeep| gain_of(&lab, source, with_ctkeep);
    assert_eq!(gain("198.51.100.1", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain("198.51.100.2", true), 0, "{}", daemon.log());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    let id: String = podman.run("ps --quiet").trim().chars().take(12).collect();
    assert!(out.contains(&format!("python3 in web (podman {id})")), "{id}: {out}{err}");
    podman.run("restart --time 0 web");
    assert_eq!(gain("198.51.100.3", true), 0, "after a restart: {}", daemon.log());
    for number in 0..3 {
        podman.serve(&format!("other{number}"), 9000 + number);
    }
    assert_eq!(gain("198.51.100.4", true), 0, "beside others: {}", daemon.log());
    podman.run("rm --force --time 0 web");
    podman.serve("web", 80);
    assert_eq!(gain("198.51.100.5", true), 0, "a new one of its name: {}", daemon.log());
    let (status, log) = daemon.term();
    // Rules that change all the while are a warning.
    assert!(status.success() && !log.contains("ERROR"), "{log}");
}
