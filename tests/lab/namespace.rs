//! A network namespace without a name, and processes and closures that run inside it.
//!
//! A thread makes the namespace and stays in it. All programs are started from that thread with a
//! parent-death signal: they die when the thread does, hence with the [`Namespace`], or with the
//! whole process, be it killed by SIGKILL. With the last of them the kernel removes the namespace.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{self, Sender};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

/// A started program, or why it did not start, goes back through the second half.
type Order = (Command, Sender<io::Result<Child>>);

pub struct Namespace {
    handle: File,
    keeper: Sender<Order>,
}

impl Namespace {
    /// # Errors
    /// What the kernel refused, in words.
    pub fn new() -> Result<Self, String> {
        let (keeper, orders) = mpsc::channel::<Order>();
        let (report, made) = mpsc::channel();
        thread::Builder::new()
            .name("namespace".into())
            .spawn(move || {
                let handle = enter_new();
                let usable = handle.is_ok();
                if report.send(handle).is_err() || !usable {
                    return;
                }
                for (mut command, started) in orders {
                    let _ = started.send(command.spawn());
                }
            })
            .map_err(|error| format!("thread: {error}"))?;
        let handle = made.recv().map_err(|error| error.to_string())??;
        Ok(Self { handle, keeper })
    }

    /// A path that names the namespace as long as this process lives, as for `ctkeep --netns`.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd())
    }

    /// Runs `action` on a thread of its own inside the namespace. Sockets that it opens stay
    /// there for good.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.handle, CloneFlags::CLONE_NEWNET).expect("setns");
                    action()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a program inside the namespace that dies with it, whatever happens to this process.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &Command) -> io::Result<Child> {
        self.spawn_with(command, |_| {})
    }

    /// The same, with `prepare` to set the standard streams, which a `Command` cannot hand over.
    pub fn spawn_with(
        &self,
        command: &Command,
        prepare: impl FnOnce(&mut Command),
    ) -> io::Result<Child> {
        let mut mortal = Command::new("setpriv");
        mortal
            .env("PATH", search_path())
            .args(["--pdeathsig", "KILL", "--"])
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => mortal.env(name, value),
                None => mortal.env_remove(name),
            };
        }
        prepare(&mut mortal);
        let (started, child) = mpsc::channel();
        self.keeper.send((mortal, started)).expect("the namespace's thread is alive");
        child.recv().expect("the namespace's thread answers")
    }

    /// Runs a command line to its end; words are split at white space, there is no quoting.
    ///
    /// # Panics
    /// When it fails, with its stderr.
    pub fn run(&self, line: &str) {
        self.output(line);
    }

    /// The same; returns what it wrote to stdout.
    pub fn output(&self, line: &str) -> String {
        self.try_run(line).unwrap_or_else(|reason| panic!("{reason}"))
    }

    /// The same, with `input` as its stdin, for example `feed("nft -f -", "table ip t { ... }")`.
    pub fn feed(&self, line: &str, input: &str) -> String {
        self.try_feed(line, input).unwrap_or_else(|reason| panic!("{reason}"))
    }

    /// Sets a sysctl of the namespace, for example `net/netfilter/nf_conntrack_tcp_loose`.
    pub fn sysctl(&self, name: &str, value: &str) {
        self.try_sysctl(name, value).unwrap_or_else(|reason| panic!("{reason}"));
    }

    pub(super) fn try_sysctl(&self, name: &str, value: &str) -> Result<(), String> {
        // /proc/sys/net shows each thread its own namespace.
        self.within(|| fs::write(format!("/proc/sys/{name}"), value))
            .map_err(|error| format!("sysctl {name}={value}: {error}"))
    }

    pub fn try_run(&self, line: &str) -> Result<String, String> {
        self.try_feed(line, "")
    }

    /// The same; an error where the command fails.
    pub fn try_feed(&self, line: &str, input: &str) -> Result<String, String> {
        let output = self.execute(line, input).map_err(|error| format!("{line}: {error}"))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(format!(
                "{line}: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ))
        }
    }

    fn execute(&self, line: &str, input: &str) -> io::Result<Output> {
        let mut words = line.split_whitespace();
        let mut command = Command::new(words.next().expect("a command"));
        command.args(words);
        let mut child = self.spawn_with(&command, |command| {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        })?;
        let mut stdin = child.stdin.take().expect("a piped stdin");
        // A program that ends without reading its input tells why by its exit status.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        child.wait_with_output()
    }
}

/// The administrator's programs are not in the PATH of everybody who may run the tests.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}

/// Moves the calling thread into a new network namespace and returns a handle of it.
fn enter_new() -> Result<File, String> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|error| {
        format!("new network namespace: {error}; be root, or try `unshare --map-root-user`")
    })?;
    File::open("/proc/thread-self/ns/net").map_err(|error| format!("namespace handle: {error}"))
}
