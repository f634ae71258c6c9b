//! A container behind the server's address, and what it dials.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::lab::guests::Guest;
use crate::lab::{Daemon, Entry, Lab, Namespace, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
pub const SOON: Duration = Duration::from_secs(20);
pub const FAR: &str = "192.0.2.2:443";
/// In place of the kernel's minute.
pub const CLOSE_WAIT: Duration = Duration::from_secs(5);
pub const EXTEND: &[&str] = &["--outgoing", "extend"];

/// A container behind the server's address, and what it dials.
pub struct Scene {
    pub lab: Lab,
    pub guest: Guest,
    far: TcpListener,
}

/// Both ends of a connection.
pub struct Dialled {
    pub near: TcpStream,
    pub far: TcpStream,
}

impl Scene {
    /// By this rule of nat.
    pub fn new(rule: &str) -> Option<Self> {
        let lab = Lab::new()?;
        lab.server.sysctl("net/ipv4/ip_forward", "1");
        let seconds = CLOSE_WAIT.as_secs().to_string();
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", &seconds);
        let guest = Guest::start(&lab, 1);
        if !rule.is_empty() {
            lab.server.run(&format!("iptables -t nat -A POSTROUTING -o eth0 -p tcp {rule}"));
        } else {
            // Nothing is translated: the table is in use all the same.
            lab.server.run("iptables -A INPUT -m conntrack --ctstate INVALID -j DROP");
        }
        let far = lab.client.within(|| TcpListener::bind(FAR)).expect("the far side");
        Some(Self { lab, guest, far })
    }

    pub fn daemon(&self, args: &[&str]) -> Daemon {
        let daemon = self.lab.daemon(CTKEEP, args);
        wait_for("the container", SOON, || daemon.logged("namespaces=1"));
        daemon
    }

    pub fn dial_from(&self, namespace: &Namespace) -> Option<Dialled> {
        let address: SocketAddr = FAR.parse().expect("an address");
        let patience = Duration::from_secs(3);
        let near = namespace.within(|| TcpStream::connect_timeout(&address, patience)).ok()?;
        let (far, _) = self.far.accept().expect("a connection");
        for end in [&near, &far] {
            end.set_read_timeout(Some(SOON)).expect("a timeout");
        }
        Some(Dialled { near, far })
    }

    /// One that the far side has half-closed.
    pub fn dial(&self) -> Dialled {
        self.half_closed_from(&self.guest.namespace)
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

    pub fn outlive_lease(&self, dialled: &Dialled) {
        wait_for("a lease", SOON, || self.is_extended(dialled));
    }

    /// The kernel's time is over twice.
    pub fn outlive(&self, dialled: &Dialled, is_kept: bool) {
        match is_kept {
            true => wait_for("a lease", SOON, || self.is_extended(dialled)),
            false => wait_for("the end", SOON, || self.entry(dialled).is_none()),
        }
        thread::sleep(CLOSE_WAIT * 2);
    }
}

impl Dialled {
    /// Whether what is written now arrives; else the far side resets.
    pub fn delivers(&mut self) -> bool {
        self.near.write_all(b"late").expect("a socket that is open");
        let mut late = [0; 4];
        match self.far.read_exact(&mut late) {
            Ok(()) => late == *b"late",
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
                false
            }
        }
    }

    /// The far side's RST has come.
    pub fn is_reset(&mut self) -> bool {
        self.near.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
        thread::sleep(Duration::from_millis(300));
        // An error of a socket is told once.
        self.near.take_error().expect("an answer").is_some_and(|error| {
            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
        })
    }
}
