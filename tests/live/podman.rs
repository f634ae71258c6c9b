//! Containers of the real podman, of root and of a user: `make containers-test`. It wants podman's
//! packages unpacked in the folder that `CTKEEP_PODMAN` names, python3 for the server in the container,
//! and busybox.

use crate::lab;
use crate::lab::guests;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::guests::{LIMIT, SERVER, gain_of};
use crate::lab::{Lab, Namespace, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(60);

/// Whose containers they are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum User {
    Root,
    /// Of no privilege, and with no range of user ids of its own.
    Nobody,
}

/// podman in a network and mount namespace of its own, with its own folders.
struct Podman<'l> {
    host: &'l Namespace,
    user: User,
    root: PathBuf,
    folder: tempfile::TempDir,
    /// Keeps the mount namespace, in which /run is its own.
    holder: Child,
}

impl<'l> Podman<'l> {
    fn start(lab: &'l Lab, user: User, root: PathBuf) -> Self {
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
                 helper_binaries_dir = [\"{from}/usr/lib/podman\", \"{from}/usr/bin\"]\n\
                 [engine.runtimes]\nrunc = [\"{from}/usr/sbin/runc\"]\n\
                 [network]\nnetwork_backend = \"netavark\"\n\
                 network_config_dir = \"{path}/networks\"\n"
            ),
        );
        let image = folder.path().join("image");
        for name in ["bin", "dev", "proc", "sys", "tmp", "host", "etc", "run"] {
            std::fs::create_dir_all(image.join(name)).expect("a folder");
        }
        std::fs::copy("/usr/bin/busybox", image.join("bin/busybox")).expect("busybox");
        // /dev/net/tun may be root's alone here, and so may what root's podman has left in /etc.
        let for_user = match user {
            User::Root => String::new(),
            User::Nobody => format!(
                "mkdir {path}/dev {path}/own && mount -t tmpfs tmpfs {path}/dev && \
                 mknod -m 666 {path}/dev/tun c 10 200 && mount --bind {path}/dev/tun /dev/net/tun && \
                 {{ ! [ -d /etc/containers ] || mount -t tmpfs -o mode=755 tmpfs /etc/containers; }} && \
                 chown -R nobody {path}/own {path}/image && chown nobody {path} && chmod 755 {path} && "
            ),
        };
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]).arg(format!(
            "mount -t tmpfs -o mode=755 tmpfs /run && {for_user} touch {path}/ready && \
             exec sleep infinity"
        ));
        let holder = lab.server.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        });
        let holder = holder.expect("a mount namespace");
        wait_for("a mount namespace", SOON, || folder.path().join("ready").exists());
        Self { host: &lab.server, user, root, folder, holder }
    }

    fn run(&self, line: &str) -> String {
        let (root, folder) = (self.root.display(), self.folder.path().display());
        let user = match self.user {
            User::Root => String::new(),
            User::Nobody => format!(
                "HOME={folder} XDG_RUNTIME_DIR={folder}/own \
                 setpriv --reuid nobody --regid nogroup --clear-groups"
            ),
        };
        self.host.output(&format!(
            "nsenter --target {} --mount env PATH={root}/usr/bin:{root}/usr/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
             LD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu CONTAINERS_CONF={folder}/containers.conf \
             {user} {root}/usr/bin/podman --root {folder}/storage --runroot {folder}/state \
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
        // Keeps a user's namespace for the next call.
        let pause = self.folder.path().join("own/libpod/tmp/pause.pid");
        if let Ok(pid) = std::fs::read_to_string(pause) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Where podman's programs are.
fn programs() -> Option<PathBuf> {
    let root = PathBuf::from(std::env::var("CTKEEP_PODMAN").unwrap_or_default());
    if !Path::new(&root).join("usr/bin/podman").exists() {
        lab::skip_rare("no podman: make containers-test");
        return None;
    }
    Some(root)
}

#[test]
fn containers_of_podman_are_guarded_over_restarts_and_beside_others() {
    let Some(lab) = Lab::new() else { return };
    let Some(root) = programs() else { return };
    guests::limit(&lab);
    let podman = Podman::start(&lab, User::Root, root);
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
    assert_eq!(gain("198.51.100.6", false), LIMIT, "the control: so it is without ctkeep");
    // Rules that change all the while are a warning.
    assert!(status.success() && !log.contains("ERROR"), "{log}");
}

/// Without root a proxy takes the connections (rootlessport): its sockets are the host's, with the
/// clients' own addresses, and there the limit stands. In the container all clients are one.
#[test]
fn what_the_proxy_of_a_user_takes_is_guarded_on_the_host() {
    let Some(lab) = Lab::new() else { return };
    let Some(root) = programs() else { return };
    lab.server.sysctl("net/ipv4/ip_unprivileged_port_start", "80");
    lab.connlimit(80, u32::try_from(LIMIT).expect("a limit"));
    let podman = Podman::start(&lab, User::Nobody, root);
    podman.serve("web", 80);
    let gain = |source: &str, with_ctkeep| gain_of(&lab, source, with_ctkeep);
    assert_eq!(gain("198.51.100.1", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain("198.51.100.2", true), 0, "{}", daemon.log());
    podman.run("restart --time 0 web");
    assert_eq!(gain("198.51.100.3", true), 0, "after a restart: {}", daemon.log());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    assert!(out.contains("rootlessport"), "{out}{err}");
    assert!(!out.contains("an address of this host"), "{out}{err}");

    let pid = podman.run("inspect --format {{.State.Pid}} web");
    let inside = format!("/proc/{}/ns/net", pid.trim());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all", "--limit", "3", "--netns", &inside]);
    assert!(
        out.contains("to port 8080 come from 10.0.2.100, an address of this host"),
        "{out}{err}"
    );
    assert!(out.contains("before the proxy"), "{out}");
    let (status, log) = daemon.term();
    assert!(status.success() && !log.contains("ERROR"), "{log}");
}

/// pasta hands the clients' addresses on, and takes the connections like any proxy.
#[test]
fn what_pasta_takes_is_guarded_on_the_host() {
    let Some(lab) = Lab::new() else { return };
    let Some(root) = programs() else { return };
    lab.server.sysctl("net/ipv4/ip_unprivileged_port_start", "80");
    lab.server.run("ip route add default via 192.0.2.2");
    lab.connlimit(80, u32::try_from(LIMIT).expect("a limit"));
    let podman = Podman::start(&lab, User::Nobody, root);
    let (root, folder) = (podman.root.display(), podman.folder.path().display());
    let server = SERVER.replace("8080", "80");
    std::fs::write(podman.folder.path().join("server.py"), server).expect("a script");
    let mut command = Command::new("nsenter");
    command.args(["--target", &podman.holder.id().to_string(), "--mount"]);
    command.args(["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]);
    command.arg(format!("{root}/usr/bin/pasta")).args([
        "-f",
        "-q",
        "-t",
        "80",
        "--config-net",
        "--",
    ]);
    // The server ends with pasta.
    command.args(["setpriv", "--pdeathsig", "KILL", "/usr/bin/python3"]);
    command.arg(format!("{folder}/server.py"));
    let child = lab.server.spawn_with(&command, |command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    });
    let mut pasta = child.expect("pasta");
    let gain = |source: &str, with_ctkeep| gain_of(&lab, source, with_ctkeep);
    assert_eq!(gain("198.51.100.1", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain("198.51.100.2", true), 0, "{}", daemon.log());
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    // The program has a name for each kind of processor.
    assert!(out.contains("/passt") || out.contains("/pasta"), "{out}{err}");
    let _ = pasta.kill();
    let _ = pasta.wait();
}
