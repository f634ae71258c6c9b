//! One file operation at a time, on a thread of its own: a file system that hangs (NFS, a FIFO) holds
//! up neither the watchdog nor SIGTERM.

use std::future::pending;
use std::io;

use tokio::task::{JoinHandle, spawn_blocking};

use crate::error::{Cause, Op, Result};

/// An operation that is under way, or none.
#[derive(Debug)]
pub(super) struct Aside<T>(Option<JoinHandle<T>>);

impl<T> Default for Aside<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> Aside<T> {
    /// Starts one; false where the last one has not ended, or its end has not been taken.
    pub(super) fn start(&mut self, work: impl FnOnce() -> T + Send + 'static) -> bool {
        let is_free = self.0.is_none();
        if is_free {
            self.0 = Some(spawn_blocking(work));
        }
        is_free
    }

    /// What the operation returns, once; waits for ever where none is under way.
    ///
    /// # Errors
    /// It panicked.
    pub(super) async fn ended(&mut self) -> Result<T> {
        let Some(handle) = &mut self.0 else { return pending().await };
        let result = handle.await;
        self.0 = None;
        result.map_err(|error| Op::new("file operation").failed(Cause::Io(io::Error::other(error))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_at_a_time_and_a_panic_is_an_error() {
        let mut aside = Aside::default();
        assert!(aside.start(|| 1));
        assert!(!aside.start(|| 2), "the end of the first has not been taken");
        assert_eq!(aside.ended().await.expect("the first"), 1);
        assert!(aside.start(|| panic!("as a test")));
        assert!(aside.ended().await.is_err());
        assert!(aside.start(|| 3));
    }
}
