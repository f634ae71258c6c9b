//! iptables-legacy replaces a whole table at each change and says nothing; but each of its runs
//! opens a lock file and locks it until its end, and inotify tells of that.
//!
//! It tells of listings too (`-L`, `-S`), and of runs in other network namespaces: whether a table
//! is another one must be found out by looking.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::error::{Op, Result};

/// Where iptables has its lock, unless this variable names another place.
const LOCK_FILE: &str = "/run/xtables.lock";
const LOCK_VARIABLE: &str = "XTABLES_LOCKFILE";

/// The lock file of iptables-legacy.
#[derive(Debug)]
pub struct Lock {
    inotify: Inotify,
    directory: PathBuf,
    name: OsString,
    /// The file, where there is one.
    file: Option<WatchDescriptor>,
}

impl Lock {
    /// Watches the lock file of the mount namespace that the calling thread is in. It may be made
    /// later.
    ///
    /// # Errors
    /// Its directory is missing, or no watches are left (`fs.inotify.max_user_watches`).
    pub fn watch() -> Result<Self> {
        let path = std::env::var_os(LOCK_VARIABLE).unwrap_or_else(|| LOCK_FILE.into());
        Self::watch_at(Path::new(&path))
    }

    fn watch_at(path: &Path) -> Result<Self> {
        let op = Op::new("watch the lock of iptables-legacy");
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(op.malformed(format!("{} is no file", path.display())));
        };
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
            .map_err(|errno| op.io(errno.into()))?;
        let made = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        inotify.add_watch(directory, made).map_err(|errno| op.io(errno.into()))?;
        let mut this =
            Self { inotify, directory: directory.to_owned(), name: name.to_owned(), file: None };
        this.find()?;
        Ok(this)
    }

    /// Watches the file itself if it is there; whether it is.
    fn find(&mut self) -> Result<bool> {
        // By its end the table has been replaced.
        let ended = AddWatchFlags::IN_CLOSE | AddWatchFlags::IN_DELETE_SELF;
        match self.inotify.add_watch(&self.directory.join(&self.name), ended) {
            Ok(file) => self.file = Some(file),
            Err(Errno::ENOENT) => self.file = None,
            Err(errno) => {
                return Err(Op::new("watch the lock of iptables-legacy").io(errno.into()));
            }
        }
        Ok(self.file.is_some())
    }

    /// How many runs have ended since the last time, as far as it can be told.
    ///
    /// # Errors
    /// The watch is broken.
    pub fn drain(&mut self) -> Result<u64> {
        let mut runs = 0;
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return Ok(runs),
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    return Err(Op::new("watch the lock of iptables-legacy").io(errno.into()));
                }
            };
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    runs += 1;
                } else if Some(event.wd) == self.file {
                    if event.mask.intersects(AddWatchFlags::IN_CLOSE) {
                        runs += 1;
                    } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                        self.find()?;
                    }
                } else if event.name.as_ref() == Some(&self.name) && self.find()? {
                    // Its first run may have ended before it was watched.
                    runs += 1;
                }
            }
        }
    }
}

impl AsFd for Lock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn each_run_that_ends_is_heard_of_and_the_file_may_come_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("xtables.lock");
        let mut lock = Lock::watch_at(&path).unwrap();
        assert_eq!(lock.drain().unwrap(), 0);
        drop(File::create(&path).unwrap());
        assert!(lock.drain().unwrap() >= 1, "the first run makes the file");
        let held = File::open(&path).unwrap();
        assert_eq!(lock.drain().unwrap(), 0, "it may not have changed anything yet");
        drop(held);
        drop(File::open(&path).unwrap());
        // The kernel makes one event of two equal ones.
        assert!(lock.drain().unwrap() >= 1);
        fs::write(directory.path().join("another"), "").unwrap();
        assert_eq!(lock.drain().unwrap(), 0);
        fs::remove_file(&path).unwrap();
        lock.drain().unwrap();
        drop(File::create(&path).unwrap());
        assert!(lock.drain().unwrap() >= 1, "made anew");
        drop(File::open(&path).unwrap());
        assert!(lock.drain().unwrap() >= 1);
    }

    #[test]
    fn a_missing_directory_is_said() {
        assert!(Lock::watch_at(Path::new("/nowhere-at-all/xtables.lock")).is_err());
    }
}
