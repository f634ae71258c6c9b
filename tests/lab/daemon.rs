//! The program under test as a process: started, watched, stopped, killed.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use super::namespace::Namespace;
use super::{holds_within, wait_for};

/// Both are matters of milliseconds; the rest is for an overloaded machine.
const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(20);

/// A running `ctkeep run`. Dropping it kills it.
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    /// Ends with the program's stderr.
    reader: Option<JoinHandle<()>>,
}

impl Daemon {
    pub fn start(
        namespace: &Namespace,
        program: &str,
        args: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let mut command = Command::new(program);
        // Tests read the log: as text, and every line of it.
        command.args(["run", "--log-format", "text"]).args(args);
        command.env("CTKEEP_LOG", "info,ctkeep::withheld=debug");
        command.envs(environment.iter().copied());
        let mut child = namespace
            .spawn_with(&command, |command| {
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            })
            .expect("daemon process");
        let (log, reader) = collect(child.stderr.take().expect("a piped stderr"));
        let mut daemon = Self { child, log, reader: Some(reader) };
        let ready = holds_within(START, || daemon.is_ready() || daemon.has_ended());
        assert!(
            ready && daemon.is_ready(),
            "{program} run {args:?} is not ready:\n{}",
            daemon.log()
        );
        daemon
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to stderr so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("no panic while logging").clone()
    }

    pub fn logged(&self, text: &str) -> bool {
        self.log.lock().expect("no panic while logging").contains(text)
    }

    /// Freezes it; returns when none of its threads runs any more.
    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        waitpid(self.id(), Some(WaitPidFlag::WUNTRACED)).expect("a stopped daemon");
    }

    /// Lets it run on after [`Self::stop`].
    pub fn cont(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Ends it with SIGKILL: it has no chance to tidy up.
    pub fn kill(mut self) {
        self.end();
    }

    /// Ends it with SIGTERM and returns how it ended, and its whole log.
    pub fn term(mut self) -> (ExitStatus, String) {
        self.signal(Signal::SIGTERM);
        wait_for("end of the daemon", END, || self.has_ended());
        let status = self.child.wait().expect("the daemon's status");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("no panic while logging");
        }
        (status, self.log())
    }

    /// A word of its own: "already" says something else.
    fn is_ready(&self) -> bool {
        let log = self.log();
        log.split(|letter: char| !letter.is_alphanumeric()).any(|word| word == "ready")
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the daemon's status").is_some()
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.id(), signal).expect("a running daemon");
    }

    fn id(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"))
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end();
        if thread::panicking() {
            eprintln!("log of the daemon:\n{}", self.log());
        }
    }
}

/// Reads the daemon's stderr to its end, on a thread of its own so that the pipe never fills.
fn collect(stderr: ChildStderr) -> (Arc<Mutex<String>>, JoinHandle<()>) {
    let log = Arc::new(Mutex::new(String::new()));
    let sink = Arc::clone(&log);
    let reader = thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let mut log = sink.lock().expect("no panic while logging");
            log.push_str(&line);
            log.push('\n');
        }
    });
    (log, reader)
}

/// Runs a program to its end.
pub fn run_to_end(namespace: &Namespace, program: &str, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(program);
    command.args(args);
    let child = namespace
        .spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        })
        .expect("program starts");
    let output = child.wait_with_output().expect("program ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap_or(-1);
    (code, text(&output.stdout), text(&output.stderr))
}
