//! Network namespaces: finding them by name or path, and working inside one.
//!
//! A namespace belongs to a thread. Work in another one gets a thread of its own, so
//! that no runtime thread ever moves.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};

use crate::error::{Cause, Error, Op, Result};

/// Where `ip netns add` keeps names.
const RUN_NETNS: &str = "/run/netns";

/// A network namespace to work in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Namespace {
    /// The one that the program was started in.
    Own,
    /// A name of `ip netns`, or a path such as `/proc/PID/ns/net`, and whatever namespace that leads to.
    Named(String),
    /// The one of this inode, and no other that its path leads to later: process ids are used again.
    Found {
        /// A path that led to it.
        path: String,
        /// Its inode.
        inode: u64,
    },
}

impl Namespace {
    /// How logs, tables and JSON call it.
    pub fn name(&self) -> &str {
        match self {
            Self::Own => "",
            Self::Named(name) | Self::Found { path: name, .. } => name,
        }
    }

    fn path(name: &str) -> PathBuf {
        if name.contains('/') { PathBuf::from(name) } else { Path::new(RUN_NETNS).join(name) }
    }

    /// Runs `work` inside the namespace and returns what it returns.
    ///
    /// # Errors
    /// The namespace does not exist (a usage error), or may not be entered.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> Result<R> + Send) -> Result<R> {
        match self {
            Self::Own => work(),
            Self::Named(_) | Self::Found { .. } => thread::scope(|scope| {
                scope
                    .spawn(|| {
                        self.enter()?;
                        work()
                    })
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }),
        }
    }

    /// Moves the calling thread, which must be the caller's own, into the namespace for good.
    ///
    /// # Errors
    /// As [`Namespace::run`].
    pub fn enter(&self) -> Result<()> {
        match self {
            Self::Own => Ok(()),
            Self::Named(name) => enter(name, &open(name)?),
            Self::Found { path, inode } => {
                let file = open(path)?;
                let found = file
                    .metadata()
                    .map_err(|error| Op::new("enter network namespace").io(error))?;
                if found.ino() != *inode {
                    return Err(Op::new("enter network namespace").malformed("it has changed"));
                }
                enter(path, &file)
            }
        }
    }

    /// What identifies the namespace, also against another one that takes its name later: device and inode of
    /// its file. `None` when there is none by this name: `ip netns add` makes an empty file first.
    pub fn identity(&self) -> Option<(u64, u64)> {
        const OWN: &str = "/proc/thread-self/ns/net";
        let path = match self {
            Self::Own => PathBuf::from(OWN),
            Self::Named(name) | Self::Found { path: name, .. } => Self::path(name),
        };
        let file = fs::metadata(path).ok()?;
        let is_it = !matches!(self, Self::Found { inode, .. } if *inode != file.ino());
        // All namespaces are files of one file system.
        (is_it && file.dev() == fs::metadata(OWN).ok()?.dev()).then(|| (file.dev(), file.ino()))
    }

    /// Checks that the namespace exists.
    ///
    /// # Errors
    /// It does not: a usage error that names it.
    pub fn check(&self) -> Result<()> {
        let Self::Named(name) = self else { return Ok(()) };
        open(name)?;
        self.identity().map(drop).ok_or_else(|| no_namespace(name))
    }
}

fn open(name: &str) -> Result<File> {
    let path = Namespace::path(name);
    File::open(&path).map_err(|error| {
        if error.kind() == io::ErrorKind::PermissionDenied {
            return not_permitted(format!("cannot open {}: {error}", path.display()));
        }
        Error::usage(
            "--netns",
            format!("unknown network namespace '{name}': cannot open {}: {error}", path.display()),
        )
    })
}

fn enter(name: &str, file: &File) -> Result<()> {
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
        Errno::EPERM => not_permitted(format!("'{name}' may not be entered")),
        Errno::EINVAL => no_namespace(name),
        _ => Op::new("enter network namespace").io(errno.into()),
    })
}

fn no_namespace(name: &str) -> Error {
    Error::usage("--netns", format!("'{name}' is no network namespace"))
}

fn not_permitted(what: String) -> Error {
    Op::new("--netns").failed(Cause::Unavailable(format!(
        "{what}; to work in another network namespace takes CAP_SYS_ADMIN"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_leads_to_another_namespace_now_is_not_followed() {
        let path = "/proc/self/ns/net".to_owned();
        let (_, inode) = Namespace::Own.identity().unwrap();
        let found = |inode| Namespace::Found { path: path.clone(), inode };
        assert_eq!(found(inode).identity(), Namespace::Own.identity());
        let other = found(inode + 1);
        assert_eq!(other.identity(), None);
        let error = other.run(|| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "enter network namespace: malformed answer: it has changed");
    }
}
