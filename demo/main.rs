//! `make demo`: what a connection limit is worth without ctkeep, and with it.
//!
//! Two throw-away hosts, one real `iptables -m connlimit` rule, a server that keeps half-closed
//! sockets, and a client that wants more than its share. Exits with 0 when everything went as
//! promised, 1 when it did not, and leaves nothing behind, also on Ctrl-C: the hosts are network
//! namespaces that exist only as long as this process.

#[path = "../tests/lab/mod.rs"]
mod lab;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use lab::{Lab, Peer, RawConn, Server, holds_within};

const LIMIT: usize = 3;
const TRIES: usize = 10;

/// Between two tries, so that the demonstration shows steady behaviour and not a race.
const PACE: Duration = Duration::from_millis(100);

/// How soon after the server's close its entries must be given back.
const PATIENCE: Duration = Duration::from_secs(2);

const STORY: &str = "\
Two throw-away hosts. The server allows each address 3 connections:

    iptables -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 ... -j DROP

A client tries 10 times. Each time it connects, says that it is done (FIN) and sends a stale
RST. The server's TCP ignores that RST: the socket stays open, in CLOSE_WAIT, until the
application closes it. The firewall's connection tracking believes it, and stops counting.
";

fn main() -> ExitCode {
    lab::serve_if_asked();
    if !nix::unistd::geteuid().is_root() {
        return become_root();
    }
    let ctkeep = match ctkeep() {
        Ok(path) => path,
        Err(missing) => return fail(&missing),
    };
    println!("{STORY}");
    println!("{:<26}{:>10}{:>14}{:>20}", "", "admitted", "sockets open", "conntrack entries");
    let kept = [without(), with(&ctkeep)];
    match kept {
        [Some(true), Some(true)] => {
            println!(
                "\nAs promised: the limit of {LIMIT} holds exactly as long as the sockets do."
            );
            ExitCode::SUCCESS
        }
        [None, _] | [_, None] => fail("this machine cannot make the two hosts"),
        _ => fail("not as promised: see the rows marked with `!`"),
    }
}

/// The stock kernel: every try gets in.
fn without() -> Option<bool> {
    let mut stage = Stage::new()?;
    let admitted = stage.attack().len();
    let row = stage.row("without ctkeep", admitted);
    explain("Each stale RST frees a place in the limit, while the socket stays open.");
    Some(row.is(TRIES, TRIES, 0))
}

/// The same with the daemon beside the rule; then the server closes.
fn with(ctkeep: &str) -> Option<bool> {
    let mut stage = Stage::new()?;
    let daemon = stage.lab.daemon(ctkeep, &["--port", "80"]);
    let mut admitted = stage.attack();
    let row = stage.row("with `ctkeep run`", admitted.len());
    explain("ctkeep sees the open sockets and makes conntrack and the limit remember them.");
    let held = row.is(LIMIT, LIMIT, LIMIT);

    stage.close(&mut admitted);
    let row = stage.row("the server has closed", 0);
    explain("The sockets are gone, so ctkeep gives their places back at once.");
    let released = row.is(0, 0, 0);

    let again = stage.peer.admitted(80, TRIES);
    let row = stage.row("the client comes again", again);
    explain("It is admitted again, up to its limit.");
    let welcome = row.is(LIMIT, LIMIT, LIMIT);

    let (status, log) = daemon.term();
    if !status.success() {
        println!("! ctkeep ended with {status}:\n{log}");
    }
    Some(held && released && welcome && status.success())
}

/// The two hosts, the rule, the server and the client.
struct Stage {
    lab: Lab,
    server: Server,
    peer: Peer,
}

impl Stage {
    fn new() -> Option<Self> {
        let lab = Lab::new()?;
        lab.connlimit(80, 3);
        let server = lab.serve("[::]:80");
        let peer = lab.peer("198.51.100.7");
        Some(Self { lab, server, peer })
    }

    /// Ten tries in a row; returns the connections that were admitted.
    fn attack(&self) -> Vec<RawConn> {
        let mut admitted = Vec::new();
        for _ in 0..TRIES {
            if let Some(mut conn) = self.peer.connect(80) {
                self.lab.half_close(&mut conn);
                conn.rst(-5);
                admitted.push(conn);
            }
            thread::sleep(PACE);
        }
        admitted
    }

    /// Lets the server close, and the client agree, until nothing of it is left.
    fn close(&mut self, conns: &mut [RawConn]) {
        self.server.close_all();
        for conn in conns {
            conn.await_fin();
            conn.ack_all();
        }
        holds_within(PATIENCE, || self.open() == 0 && self.counted() == 0);
    }

    fn row(&mut self, step: &str, admitted: usize) -> Row {
        let row = Row { admitted, open: self.open(), counted: self.counted() };
        let tries = if admitted == 0 { String::new() } else { format!("{admitted} of {TRIES}") };
        println!("{step:<26}{tries:>10}{:>14}{:>20}", row.open, row.counted);
        row
    }

    /// Sockets that cost the server something.
    fn open(&self) -> usize {
        self.lab.sockets("established") + self.lab.sockets("close-wait")
    }

    /// Entries in a state that connlimit counts: it throws out those in CLOSE and TIME_WAIT. The
    /// proof that it does count them is what it admits.
    fn counted(&self) -> usize {
        let entries = self.lab.entries();
        let forgotten = ["CLOSE", "TIME_WAIT"];
        entries.iter().filter(|entry| !forgotten.contains(&entry.state.as_str())).count()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Row {
    admitted: usize,
    open: usize,
    counted: usize,
}

impl Row {
    fn is(&self, admitted: usize, open: usize, counted: usize) -> bool {
        let promised = Self { admitted, open, counted };
        if *self != promised {
            println!("! promised: {promised:?}, found: {self:?}");
        }
        *self == promised
    }
}

fn explain(step: &str) {
    println!("    {step}");
}

/// The program beside this one, or the one that `CTKEEP` names.
fn ctkeep() -> Result<String, String> {
    let beside = || {
        let own = std::env::current_exe().ok()?;
        Some(own.parent()?.join("ctkeep"))
    };
    let path = std::env::var_os("CTKEEP").map(PathBuf::from).or_else(beside);
    let path = path.filter(|path| path.exists());
    path.map(|path| path.display().to_string())
        .ok_or_else(|| "no ctkeep beside this program: run `make demo`".into())
}

/// A user namespace of one's own is enough to make network namespaces, where the kernel allows it.
fn become_root() -> ExitCode {
    let Ok(own) = std::env::current_exe() else {
        return fail("cannot find this program");
    };
    let error = Command::new("unshare").args(["--user", "--map-root-user"]).arg(own).exec();
    fail(&format!("not root, and no user namespace: {error}"))
}

fn fail(reason: &str) -> ExitCode {
    eprintln!("demo: {reason}");
    ExitCode::FAILURE
}
