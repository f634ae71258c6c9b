//! Slowloris from one address against the real Apache (prefork): `make apache-test`. It wants Debian's
//! Apache, unpacked in the folder that `CTKEEP_APACHE` names.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Lab, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(60);
const ATTACKER: &str = "198.51.100.7";
const HONEST: &str = "198.51.100.8";
/// Slots of the server.
const WORKERS: usize = 20;
/// Connections that the attacker keeps open, or tries to: twice as many.
const ATTACK: usize = 40;
/// For so long Apache waits for the next byte of a request.
const TIMEOUT: u64 = 5;
/// For so long the honest client waits for its answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Tries of the honest client, one after another.
const TRIES: usize = 20;

/// The rule that the administrator adds: packets of sources in the set are dropped.
const RULE: &str = "table inet ctkeep {
    chain input {
        type filter hook input priority 0;
        ip saddr @over4 drop
    }
}";

struct Apache {
    process: Child,
    /// As long as it runs.
    _folder: tempfile::TempDir,
}

impl Apache {
    fn start(lab: &Lab, root: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().display();
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), open).expect("a readable folder");
        fs::write(folder.path().join("index.html"), "served\n").expect("a page");
        let settings = format!(
            "ServerRoot {path}\nDefaultRuntimeDir {path}\nPidFile {path}/pid\nErrorLog {path}/log\n\
             LoadModule mpm_prefork_module {root}/usr/lib/apache2/modules/mod_mpm_prefork.so\n\
             LoadModule authz_core_module {root}/usr/lib/apache2/modules/mod_authz_core.so\n\
             LoadModule dir_module {root}/usr/lib/apache2/modules/mod_dir.so\n\
             Listen 80\nServerName localhost\nUser nobody\nGroup nogroup\nDocumentRoot {path}\n\
             StartServers {WORKERS}\nServerLimit {WORKERS}\nMaxRequestWorkers {WORKERS}\n\
             Timeout {TIMEOUT}\nKeepAlive off\n"
        );
        let file = folder.path().join("conf");
        fs::write(&file, settings).expect("a file");
        let mut command = Command::new("env");
        command
            .arg(format!("LD_LIBRARY_PATH={root}/usr/lib/x86_64-linux-gnu"))
            .arg(format!("{root}/usr/sbin/apache2"))
            .args(["-D", "FOREGROUND", "-f"])
            .arg(&file);
        let process = lab.server.spawn_with(&command, |command| {
            // At its end it ends its whole process group.
            command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        });
        let this = Self { process: process.expect("Apache"), _folder: folder };
        wait_for("Apache", SOON, || is_served(lab));
        this
    }
}

impl Drop for Apache {
    fn drop(&mut self) {
        // Its children end with it.
        let id = i32::try_from(self.process.id()).expect("a process id");
        kill(Pid::from_raw(id), Signal::SIGTERM).expect("a running Apache");
        let _ = self.process.wait();
    }
}

fn connect(source: &str, patience: Duration) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).ok()?;
    let from: SocketAddr = format!("{source}:0").parse().expect("an address");
    let to: SocketAddr = "192.0.2.1:80".parse().expect("an address");
    socket.bind(&from.into()).expect("an address of the client");
    socket.connect_timeout(&to.into(), patience).ok()?;
    Some(socket.into())
}

/// Whether the honest client gets its page.
fn is_served(lab: &Lab) -> bool {
    lab.client.within(|| {
        let began = Instant::now();
        let Some(mut stream) = connect(HONEST, PATIENCE) else { return false };
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut answer = String::new();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_ok()
            && stream.read_to_string(&mut answer).is_ok()
            && answer.ends_with("served\n")
            && began.elapsed() < 2 * PATIENCE
    })
}

/// Keeps requests open that never end, as many as it can, until told to stop.
fn slowloris(ended: &AtomicBool) {
    let mut open: Vec<TcpStream> = Vec::new();
    while !ended.load(Ordering::SeqCst) {
        let mut refused = 0;
        while open.len() < ATTACK && refused < 3 {
            match connect(ATTACKER, Duration::from_millis(100)) {
                Some(mut stream) => {
                    let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n");
                    open.push(stream);
                }
                None => refused += 1,
            }
        }
        open.retain_mut(|stream| stream.write_all(b"X-a: b\r\n").is_ok());
        thread::sleep(Duration::from_millis(500));
    }
}

struct End<'e>(&'e AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// How the honest client fares while the other attacks, try by try.
fn fared(lab: &Lab) -> Vec<bool> {
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        // A test that fails ends the attack, too.
        let _end = End(&ended);
        scope.spawn(|| lab.client.within(|| slowloris(&ended)));
        let busy = || lab.server.output("ss -Htn state established sport = :80");
        wait_for("an attack", SOON, || busy().lines().count() >= WORKERS);
        (0..TRIES)
            .map(|_| {
                let is = is_served(lab);
                thread::sleep(Duration::from_millis(500));
                is
            })
            .collect()
    })
}

#[test]
#[ignore = "wants Apache: make apache-test"]
fn with_nothing_but_the_set_the_honest_client_is_served() {
    let root = std::env::var("CTKEEP_APACHE").expect("CTKEEP_APACHE");
    let Some(lab) = Lab::new() else { return };
    for source in [ATTACKER, HONEST] {
        lab.client.run(&format!("ip addr add {source}/32 dev lo"));
    }
    let control = {
        let _apache = Apache::start(&lab, &root);
        fared(&lab)
    };
    println!("without: {control:?}");
    assert!(!control.contains(&true), "the attack is none");

    let _apache = Apache::start(&lab, &root);
    let daemon = lab.daemon(CTKEEP, &["--overload", "ports=80 above=10"]);
    wait_for("the set", SOON, || lab.server.try_run("nft list set inet ctkeep over4").is_ok());
    lab.server.feed("nft -f -", RULE);
    let with = fared(&lab);
    println!("with the set: {with:?}");
    assert!(daemon.logged(&format!("overload source={ATTACKER}")), "{}", daemon.log());
    assert!(!daemon.logged(&format!("overload source={HONEST}")));
    // Slots are taken until Apache has waited for the next byte of each: twice, for twice its slots.
    assert!(with.ends_with(&[true; TRIES / 2]), "{with:?}\n{}", daemon.log());
}
