//! What can be typed behind `ctkeep report`.

use clap::Args;

use super::Scope;

/// Writes to stdout what a bug report needs, as text that can be read before it is sent: both tables,
/// the rules, the settings, what audit and doctor say, the last hour of the history. `ctkeep audit
/// --report FILE` reads it. Names of processes, containers, chains and devices are in it; passwords
/// are not.
#[derive(Debug, Args)]
pub(crate) struct Report {
    #[command(flatten)]
    pub scope: Scope,

    /// Replace addresses, one for one and the same everywhere: networks stay networks, so that
    /// rules and limits still fit
    #[arg(long)]
    pub anonymous: bool,

    /// The folder that the history is in
    #[arg(long, value_name = "PATH", default_value = "/var/lib/ctkeep")]
    pub dir: std::path::PathBuf,
}
