//! The two files of the history: the newer grows to half of the room, then takes the place of the
//! older.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::record::{Record, records, whole};

const NEWER: &str = "history";
const OLDER: &str = "history.old";

/// A history that is being written.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    file: File,
    /// Bytes of the newer file that are whole.
    length: u64,
    room: u64,
}

impl Store {
    /// Opens the history of a folder, which is made where it is missing. What was torn off at the end
    /// of the last one is cut.
    ///
    /// # Errors
    /// Of the file system; [`io::ErrorKind::WouldBlock`] where another process writes there.
    pub fn open(dir: &Path, room: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut file = private().create(true).truncate(false).open(dir.join(NEWER))?;
        file.try_lock()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let length = whole(&bytes) as u64;
        file.set_len(length)?;
        file.seek(SeekFrom::Start(length))?;
        Ok(Self { dir: dir.to_owned(), file, length, room })
    }

    /// Adds a record.
    ///
    /// # Errors
    /// Of the file system: a full disk. Nothing of the record is left then.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        let line = record.encode();
        if self.length > 0 && self.length + line.len() as u64 > self.room / 2 {
            self.turn()?;
        }
        match self.file.write_all(line.as_bytes()) {
            Ok(()) => {
                self.length += line.len() as u64;
                Ok(())
            }
            Err(error) => {
                self.file.set_len(self.length)?;
                self.file.seek(SeekFrom::Start(self.length))?;
                Err(error)
            }
        }
    }

    /// The newer file becomes the older one.
    fn turn(&mut self) -> io::Result<()> {
        let path = self.dir.join(NEWER);
        fs::rename(&path, self.dir.join(OLDER))?;
        let file = private().create_new(true).open(path)?;
        file.try_lock()?;
        (self.file, self.length) = (file, 0);
        Ok(())
    }
}

/// All records of a folder, in the order in which they were written, and how many lines are damaged.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn read(dir: &Path) -> io::Result<(Vec<Record>, usize)> {
    let mut all = Vec::new();
    let mut damaged = 0;
    let mut found = Err(io::Error::from(io::ErrorKind::NotFound));
    for name in [OLDER, NEWER] {
        match fs::read(dir.join(name)) {
            Ok(bytes) => {
                // The end may be under way.
                let (mut part, lost) = records(bytes.get(..whole(&bytes)).unwrap_or_default());
                all.append(&mut part);
                damaged += lost;
                found = Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    found.map(|()| (all, damaged))
}

/// A file that addresses of peers are in.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn it_keeps_to_its_room_and_loses_the_oldest_first() {
        let dir = std::env::temp_dir().join(format!("ctkeep-history-{}", std::process::id()));
        let reload = |at| Record::Reload { at, well: true };
        {
            let mut store = Store::open(&dir, 4096).unwrap();
            assert!(Store::open(&dir, 4096).is_err(), "one writer");
            (0..1000).for_each(|at| store.append(&reload(at)).unwrap());
        }
        let size: u64 =
            [NEWER, OLDER].map(|name| fs::metadata(dir.join(name)).unwrap().len()).iter().sum();
        assert!(size <= 4096, "{size}");
        let mode = fs::metadata(dir.join(NEWER)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "it is readable to others");
        // Torn in the middle of the last line.
        let file = OpenOptions::new().write(true).open(dir.join(NEWER)).unwrap();
        file.set_len(file.metadata().unwrap().len() - 3).unwrap();
        drop(Store::open(&dir, 4096).map(|mut store| store.append(&reload(1000)).unwrap()));
        let (all, damaged) = read(&dir).unwrap();
        let ats: Vec<_> = all.iter().map(Record::at).collect();
        assert_eq!((ats.last(), damaged), (Some(&1000), 0));
        assert_eq!(ats[ats.len() - 2], 998, "only the torn one is lost");
        assert!(ats.windows(2).all(|pair| pair[0] < pair[1]) && ats.len() > 40, "{ats:?}");
        fs::remove_dir_all(dir).unwrap();
    }
}
