//! Connections that this host and its containers opened: kept with their translation for as long as
//! the socket is half-closed, and not longer.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::lab::guests::Guest;
use crate::lab::{Daemon, Entry, Lab, Namespace, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(20);
const FAR: &str = "192.0.2.2:443";
/// In place of the kernel's minute.
const CLOSE_WAIT: Duration = Duration::from_secs(5);
const EXTEND: &[&str] = &["--outgoing", "extend"];

/// A container behind the server's address, and what it dials.
struct Scene {
    lab: Lab,
    guest: Guest,
    far: TcpListener,
}

/// Both ends of a connection.
struct Dialled {
    near: TcpStream,
    far: TcpStream,
}

impl Scene {
    /// By this rule of nat.
    fn new(rule: &str) -> Option<Self> {
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

    fn daemon(&self, args: &[&str]) -> Daemon {
        let daemon = self.lab.daemon(CTKEEP, args);
        wait_for("the container", SOON, || daemon.logged("namespaces=1"));
        daemon
    }

    fn dial_from(&self, namespace: &Namespace) -> Option<Dialled> {
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
    fn dial(&self) -> Dialled {
        self.half_closed_from(&self.guest.namespace)
    }

    fn half_closed_from(&self, namespace: &Namespace) -> Dialled {
        let dialled = self.dial_from(namespace).expect("a connection");
        dialled.far.shutdown(Shutdown::Write).expect("a FIN");
        wait_for("CLOSE_WAIT", SOON, || {
            self.entry(&dialled).is_some_and(|entry| entry.state == "CLOSE_WAIT")
        });
        dialled
    }

    fn entry(&self, dialled: &Dialled) -> Option<Entry> {
        let local = dialled.near.local_addr().expect("an address");
        self.lab.entries().into_iter().find(|entry| entry.orig.0 == local)
    }

    fn is_extended(&self, dialled: &Dialled) -> bool {
        self.entry(dialled).is_some_and(|entry| entry.timeout > CLOSE_WAIT.as_secs())
    }

    /// The kernel's time is over twice.
    fn outlive(&self, dialled: &Dialled, is_kept: bool) {
        match is_kept {
            true => wait_for("a lease", SOON, || self.is_extended(dialled)),
            false => wait_for("the end", SOON, || self.entry(dialled).is_none()),
        }
        thread::sleep(CLOSE_WAIT * 2);
    }
}

impl Dialled {
    /// Whether what is written now arrives; else the far side resets.
    fn delivers(&mut self) -> bool {
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
    fn is_reset(&mut self) -> bool {
        self.near.set_read_timeout(Some(Duration::from_secs(3))).expect("a timeout");
        thread::sleep(Duration::from_millis(300));
        // An error of a socket is told once.
        self.near.take_error().expect("an answer").is_some_and(|error| {
            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
        })
    }
}

/// kube-proxy's and Docker's way: a port by chance.
#[test]
fn what_a_container_writes_long_after_the_far_side_has_closed_arrives() {
    let play = |is_kept: bool| {
        let scene = Scene::new("-j MASQUERADE --random-fully")?;
        let daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut dialled = scene.dial();
        let before = scene.entry(&dialled).expect("an entry");
        scene.outlive(&dialled, is_kept);
        let delivers = if is_kept {
            let after = scene.entry(&dialled).expect("an entry");
            assert_eq!((after.orig, after.reply), (before.orig, before.reply));
            dialled.delivers()
        } else {
            dialled.near.write_all(b"late").expect("a socket that is open");
            assert!(dialled.is_reset(), "the control");
            false
        };
        let local = dialled.near.local_addr().expect("an address");
        drop(dialled);
        wait_for("the end of the entry", SOON, || {
            let entries = scene.lab.entries();
            let open = |entry: &&Entry| entry.orig.0 == local && entry.state == "CLOSE_WAIT";
            entries.iter().find(open).is_none()
        });
        let (status, log) = daemon.term();
        assert!(status.success() && !log.contains("ERROR"), "{log}");
        Some(delivers)
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (false, Some(true)));
}
