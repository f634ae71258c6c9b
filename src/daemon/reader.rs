//! Reads whole tables beside a worker: a dump of millions takes seconds, and events do not wait for it.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::Duration;

use super::control::Wake;
use super::threads::{be_patient, cpu_time};
use crate::error::{Op, Result};
use crate::reconcile::observe::Tables;
use crate::reconcile::whole::{Reading, Whole};

/// A thread with sockets of its own. It ends with this, or when it has read what it is reading.
#[derive(Debug)]
pub(super) struct Reader {
    readings: Sender<Reading>,
    read: Receiver<(Result<Whole>, Duration)>,
    /// Something has been read.
    pub(super) wake: Arc<Wake>,
}

impl Reader {
    /// Opens both tables in the network namespace of the calling thread.
    ///
    /// # Errors
    /// A missing privilege or module, or no room for a thread.
    pub(super) fn open() -> Result<Self> {
        let mut tables = Tables::open()?;
        let (readings, wanted) = mpsc::channel::<Reading>();
        let (done, read) = mpsc::channel();
        let wake = Arc::new(Wake::new()?);
        let ready = wake.clone();
        let work = move || {
            be_patient();
            for reading in wanted {
                let began = cpu_time();
                let whole = tables.read(reading);
                if done.send((whole, cpu_time().saturating_sub(began))).is_err() {
                    break;
                }
                ready.rouse();
            }
        };
        let spawned = thread::Builder::new().name("reader".to_owned()).spawn(work);
        spawned.map_err(|error| Op::new("start a thread that reads").io(error))?;
        Ok(Self { readings, read, wake })
    }

    /// Has this read.
    pub(super) fn read(&self, reading: Reading) {
        // Where the thread is gone the answer says so.
        let _ = self.readings.send(reading);
    }

    /// What has been read, and what that cost.
    pub(super) fn take(&self) -> Option<(Result<Whole>, Duration)> {
        match self.read.try_recv() {
            Ok(read) => {
                self.wake.settle();
                Some(read)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                let gone = Op::new("read the tables").malformed("the thread that reads has ended");
                Some((Err(gone), Duration::ZERO))
            }
        }
    }
}
