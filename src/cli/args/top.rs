//! What can be typed behind `ctkeep top`.

use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::values::interval;
use super::{Output, Scope};
use crate::top::filter::Filter;
use crate::top::rows::{Fold, Sort};

/// Who holds what now: sources with their open sockets, what the limits count of them, how old,
/// whose. ? shows the keys. Where stdout is no terminal, one look as a plain table.
#[derive(Debug, Args)]
pub(crate) struct Top {
    #[command(flatten)]
    pub scope: Scope,

    #[command(flatten)]
    pub output: Output,

    /// Show this moment of the past (UTC) instead, from the files that `ctkeep run --history` keeps
    #[arg(long, value_name = "HH:MM|TIME", value_parser = moment)]
    pub at: Option<Moment>,

    /// The folder that they are in
    #[arg(long, value_name = "PATH", default_value = "/var/lib/ctkeep")]
    pub dir: std::path::PathBuf,

    /// Look once, print and end
    #[arg(long)]
    pub once: bool,

    /// From look to look, and longer where looks would cost more than a tenth of a core
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = interval)]
    pub interval: Duration,

    /// What a row stands for
    #[arg(long, value_name = "WHAT", default_value = "source", value_parser = fold())]
    pub fold: Fold,

    /// What rows are sorted by, the largest first
    #[arg(long, value_name = "COLUMN", default_value = "open", value_parser = sort())]
    pub sort: Sort,

    /// Only these connections, by the words of ss: state close-wait and sport = :80
    #[arg(long, value_name = "FILTER", default_value = "", hide_default_value = true,
          value_parser = filter)]
    pub filter: (String, Filter),

    /// Print only the first N rows
    #[arg(long, value_name = "N")]
    pub top: Option<usize>,
}

/// A moment: of the last day by the clock, or any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Seconds since midnight.
    Clock(u64),
    /// Seconds since 1970.
    Time(u64),
}

fn moment(text: &str) -> Result<Moment, String> {
    let wrong = || "expected 03:12, or 2026-11-29T03:12:00Z".to_owned();
    if let Some((hours, minutes)) = text.split_once(':').filter(|_| text.len() <= 5) {
        let (hours, minutes): (u64, u64) =
            hours.parse().ok().zip(minutes.parse().ok()).ok_or_else(wrong)?;
        return if hours < 24 && minutes < 60 {
            Ok(Moment::Clock(hours * 3600 + minutes * 60))
        } else {
            Err(wrong())
        };
    }
    let time = humantime::parse_rfc3339_weak(text).map_err(|_| wrong())?;
    time.duration_since(std::time::UNIX_EPOCH)
        .map(|it| Moment::Time(it.as_secs()))
        .map_err(|_| wrong())
}

fn fold() -> impl TypedValueParser<Value = Fold> {
    PossibleValuesParser::new(Fold::ALL.map(Fold::name))
        .map(|name| Fold::ALL.into_iter().find(|fold| fold.name() == name).unwrap_or_default())
}

fn sort() -> impl TypedValueParser<Value = Sort> {
    PossibleValuesParser::new(Sort::ALL.map(Sort::name))
        .map(|name| Sort::ALL.into_iter().find(|sort| sort.name() == name).unwrap_or_default())
}

fn filter(text: &str) -> Result<(String, Filter), String> {
    Filter::parse(text).map(|filter| (text.to_owned(), filter))
}
