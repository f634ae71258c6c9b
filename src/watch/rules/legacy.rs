//! iptables-legacy replaces a whole table at each change and says nothing; but each of its runs
//! opens a lock file and locks it until its end, which inotify reports.
//!
//! It reports listings too (`-L`, `-S`), and runs in other network namespaces: whether a table
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
    place: WatchDescriptor,
    /// The file, where there is one and it may be watched.
    file: Option<WatchDescriptor>,
}

/// A run of iptables has ended, and by then it has replaced the table.
const ENDED: AddWatchFlags = AddWatchFlags::IN_CLOSE;
/// The file may be new.
const MADE: AddWatchFlags = AddWatchFlags::IN_CREATE.union(AddWatchFlags::IN_MOVED_TO);

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
        let place = inotify.add_watch(directory, MADE).map_err(|errno| op.io(errno.into()))?;
        let (directory, name) = (directory.to_owned(), name.to_owned());
        let mut this = Self { inotify, directory, name, place, file: None };
        this.find().map_err(|errno| op.io(errno.into()))?;
        Ok(this)
    }

    /// Watches the file itself. Where only root may read it, as iptables makes it, all of its
    /// directory is watched: what is in there is opened some times a second at most.
    fn find(&mut self) -> nix::Result<()> {
        match self.inotify.add_watch(&self.directory.join(&self.name), ENDED) {
            Ok(file) => self.file = Some(file),
            Err(Errno::ENOENT) => self.file = None,
            Err(Errno::EACCES) => {
                self.file = None;
                self.place = self.inotify.add_watch(&self.directory, MADE | ENDED)?;
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// How many runs have ended since the last time, as far as it can be told.
    ///
    /// # Errors
    /// The watch is broken.
    pub fn drain(&mut self) -> Result<u64> {
        let op = Op::new("watch the lock of iptables-legacy");
        let mut runs = 0;
        loop {
            let events = match self.inotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => return Ok(runs),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(op.io(errno.into())),
            };
            for event in events {
                let is_named = event.wd == self.place && event.name.as_ref() == Some(&self.name);
                let is_file = Some(event.wd) == self.file;
                if is_named && event.mask.intersects(MADE) {
                    self.find().map_err(|errno| op.io(errno.into()))?;
                    // Its first run may have ended before it was watched.
                    runs += 1;
                } else if (is_named || is_file) && event.mask.intersects(ENDED)
                    || event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
                {
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
    fn a_lock_that_only_root_may_read_is_watched_by_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("xtables.lock");
        drop(File::create(&path).unwrap());
        let mut lock = Lock::watch_at(&path).unwrap();
        // As if it had been refused: the file's own watch is gone.
        lock.inotify.rm_watch(lock.file.take().unwrap()).unwrap();
        lock.place = lock.inotify.add_watch(directory.path(), MADE | ENDED).unwrap();
        drop(File::open(&path).unwrap());
        assert!(lock.drain().unwrap() >= 1);
        drop(File::create(directory.path().join("another")).unwrap());
        assert_eq!(lock.drain().unwrap(), 0);
    }

    #[test]
    fn a_missing_directory_is_said() {
        assert!(Lock::watch_at(Path::new("/nowhere-at-all/xtables.lock")).is_err());
    }
}
