//! A container behind the server's address, and what it dials.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::lab::{Daemon, Entry, Lab, Namespace, Server, holds_within, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
pub const SOON: Duration = Duration::from_secs(20);
pub const FAR: &str = "192.0.2.2:443";
/// In which a connection comes about, or data arrives.
const PATIENCE: Duration = Duration::from_secs(3);
/// In place of the kernel's minute.
pub const CLOSE_WAIT: Duration = Duration::from_secs(5);
pub const EXTEND: &[&str] = &["--outgoing", "extend"];

/// A container behind the server's address, and what it dials.
pub struct Scene {
    pub lab: Lab,
    pub container: Namespace,
    /// Where it dials, which may be translated.
    pub dials: SocketAddr,
    far: TcpListener,
    _process: Server,
}

/// Both ends of a connection.
pub struct Dialled {
    pub near: TcpStream,
    pub far: TcpStream,
}

/// The same steps without ctkeep's care, and with it; `None` where this machine cannot.
pub fn both<T: Send>(play: impl Fn(bool) -> Option<T> + Sync) -> Option<(T, T)> {
    thread::scope(|scope| {
        let kept = scope.spawn(|| play(true));
        let without = play(false);
        let kept = kept.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        without.zip(kept)
    })
}

/// The command that puts a rule into nat's POSTROUTING.
pub fn leaving(rule: &str) -> String {
    format!("iptables -t nat -A POSTROUTING -o eth0 -p tcp {rule}")
}

impl Scene {
    /// A container whose connections are translated by this rule.
    pub fn new(rule: &str) -> Option<Self> {
        Self::of(FAR, &[&leaving(rule)])
    }

    /// After these commands, with this far side.
    pub fn of(far: &str, commands: &[&str]) -> Option<Self> {
        let lab = Lab::new()?;
        let seconds = CLOSE_WAIT.as_secs().to_string();
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", &seconds);
        let container = lab.container();
        let process = Server::start(&container, "127.0.0.1:8080");
        commands.iter().for_each(|command| lab.server.run(command));
        let dials = far.parse().expect("an address");
        let far = lab.client.within(|| TcpListener::bind(dials)).expect("the far side");
        Some(Self { lab, container, dials, far, _process: process })
    }

    pub fn daemon(&self, args: &[&str]) -> Daemon {
        let daemon = self.lab.daemon(CTKEEP, args);
        wait_for("the container", SOON, || daemon.logged("namespaces=1"));
        daemon
    }

    pub fn dial_from(&self, namespace: &Namespace) -> Option<Dialled> {
        let near = namespace.within(|| TcpStream::connect_timeout(&self.dials, PATIENCE)).ok()?;
        let (far, _) = self.far.accept().expect("a connection");
        for end in [&near, &far] {
            end.set_read_timeout(Some(SOON)).expect("a timeout");
        }
        Some(Dialled { near, far })
    }

    /// One that the far side has half-closed.
    pub fn dial(&self) -> Dialled {
        self.half_closed_from(&self.container)
    }

    pub fn half_closed_from(&self, namespace: &Namespace) -> Dialled {
        let dialled = self.dial_from(namespace).expect("a connection");
        dialled.far.shutdown(Shutdown::Write).expect("a FIN");
        wait_for("CLOSE_WAIT", SOON, || {
            self.entry(&dialled).is_some_and(|entry| entry.state == "CLOSE_WAIT")
        });
        dialled
    }

    pub fn entry(&self, dialled: &Dialled) -> Option<Entry> {
        let local = dialled.near.local_addr().expect("an address");
        self.lab.entries().into_iter().find(|entry| entry.orig.0 == local)
    }

    pub fn is_extended(&self, dialled: &Dialled) -> bool {
        self.entry(dialled).is_some_and(|entry| entry.timeout > CLOSE_WAIT.as_secs())
    }

    /// Both tuples of the entry of each.
    pub fn tuples(&self, all: &[Dialled]) -> Vec<Option<[(SocketAddr, SocketAddr); 2]>> {
        let tuples = |entry: Entry| [entry.orig, entry.reply];
        all.iter().map(|one| self.entry(one).map(tuples)).collect()
    }

    pub fn outlive_lease(&self, dialled: &Dialled) {
        wait_for("a lease", SOON, || self.is_extended(dialled));
    }

    /// The kernel's time is over twice.
    pub fn outlive(&self, dialled: &Dialled, is_kept: bool) {
        match is_kept {
            true => self.outlive_lease(dialled),
            false => wait_for("the end", SOON, || self.entry(dialled).is_none()),
        }
        thread::sleep(CLOSE_WAIT * 2);
    }
}

impl Dialled {
    /// Whether what is written now arrives; else it is answered by an RST, or not at all.
    pub fn delivers(&mut self) -> bool {
        self.near.write_all(b"late").expect("a socket that is open");
        self.arrives(PATIENCE)
    }

    /// Whether what was written arrives in this time, and no RST before.
    pub fn arrives(&mut self, time: Duration) -> bool {
        self.far.set_nonblocking(true).expect("a socket that is open");
        let mut late = [0; 4];
        let mut arrived = false;
        holds_within(time, || {
            arrived = self.far.read(&mut late).is_ok_and(|length| length > 0);
            // An error of a socket is told once.
            arrived || self.near.take_error().expect("an answer").is_some()
        });
        arrived && late == *b"late"
    }
}
