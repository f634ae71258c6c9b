//! What can be typed behind `ctkeep top`.

use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::{Output, Scope, interval};
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
