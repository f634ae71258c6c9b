//! What can be typed behind `ctkeep history`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ipnet::IpNet;

use super::Output;
use super::values::{duration, network, port};

/// What sources held, minute by minute, and what the daemon did: from the files that `ctkeep run
/// --history` keeps.
#[derive(Debug, Args)]
pub(crate) struct History {
    /// So far back
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub since: Duration,

    /// Only peers in this network (repeatable)
    #[arg(long = "source", value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub sources: Vec<IpNet>,

    /// Only this local port (repeatable)
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',', value_parser = port)]
    pub ports: Vec<u16>,

    /// Of each minute those N that held most
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub top: usize,

    /// The folder that it is kept in
    #[arg(long, value_name = "PATH", default_value = "/var/lib/ctkeep")]
    pub dir: PathBuf,

    #[command(flatten)]
    pub output: Output,
}

/// Where the daemon keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kept {
    /// Where systemd says, if it does.
    Auto,
    /// Nowhere.
    Off,
    /// In this folder.
    In(PathBuf),
}

impl Kept {
    /// The folder.
    pub(crate) fn dir(&self) -> Option<PathBuf> {
        match self {
            // systemd.exec(5): the folders of the unit, the first of them.
            Self::Auto => std::env::var("STATE_DIRECTORY")
                .ok()
                .and_then(|dirs| dirs.split(':').next().map(PathBuf::from)),
            Self::Off => None,
            Self::In(dir) => Some(dir.clone()),
        }
    }
}

#[allow(clippy::unnecessary_wraps, reason = "clap wants a result")]
pub(super) fn kept(text: &str) -> Result<Kept, String> {
    Ok(match text {
        "auto" => Kept::Auto,
        "off" => Kept::Off,
        path => Kept::In(path.into()),
    })
}

/// `64MB`, `1GB`, at least a megabyte.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let text = text.to_ascii_uppercase();
    let (digits, unit) = match text.strip_suffix("GB") {
        Some(digits) => (digits, 1_000_000_000),
        None => (text.strip_suffix("MB").unwrap_or_default(), 1_000_000),
    };
    let size: Option<u64> = digits.trim().parse().ok();
    size.and_then(|size| size.checked_mul(unit))
        .filter(|size| *size > 0)
        .ok_or_else(|| "expected 64MB, 1GB or the like".to_owned())
}
