//! The metrics as a file for node_exporter.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Metrics;
use crate::error::{Error, Result};

/// The name that the file has while it is written: node_exporter reads `*.prom` alone.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".tmp");
    name.into()
}

/// Tries whether the file can be written.
///
/// # Errors
/// It cannot: a usage error that names it.
pub(crate) fn check(path: &Path) -> Result<()> {
    let beside = beside(path);
    let tried = fs::File::create(&beside).and_then(|_| fs::remove_file(&beside));
    tried.map_err(|error| {
        Error::usage("--metrics-textfile", format!("cannot write {}: {error}", beside.display()))
    })
}

/// Writes the file anew; readers see the old one or the new one, never a part.
pub(crate) fn write(metrics: &Metrics, path: &Path) -> io::Result<()> {
    let beside = beside(path);
    fs::write(&beside, metrics.written().text)?;
    fs::rename(&beside, path)
}
