//! What every measurement ends as: one line with its median, its ratio and its target.

// Each program uses the part it needs.
#![allow(dead_code, unreachable_pub)]

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// What a figure is held against.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// The figure must not be greater.
    AtMost(f64),
    /// The figure must not be smaller.
    AtLeast(f64),
    /// For comparison only.
    None,
}

impl Target {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Self::AtMost(bound) => figure <= bound,
            Self::AtLeast(bound) => figure >= bound,
            Self::None => true,
        }
    }

    fn shown(self) -> String {
        match self {
            Self::AtMost(bound) => format!("<= {bound}"),
            Self::AtLeast(bound) => format!(">= {bound}"),
            Self::None => "-".to_owned(),
        }
    }
}

/// Prints the heading once.
pub fn heading(title: &str) {
    println!("\n{title}");
    println!("{:<62} {:>16} {:>8} {:>10}  verdict", "", "median", "ratio", "target");
}

/// A row whose target is about the figure itself.
pub fn figure(name: &str, figure: f64, unit: &str, target: Target) {
    line(name, figure, unit, None, target, target.is_met(figure));
}

/// A row whose target is about the ratio to something else.
pub fn ratio(name: &str, figure: f64, unit: &str, ratio: f64, target: Target) {
    line(name, figure, unit, Some(ratio), target, target.is_met(ratio));
}

/// A row that has both, and a target for the figure.
pub fn figure_beside(name: &str, figure: f64, unit: &str, ratio: f64, target: Target) {
    line(name, figure, unit, Some(ratio), target, target.is_met(figure));
}

fn line(name: &str, figure: f64, unit: &str, ratio: Option<f64>, target: Target, is_met: bool) {
    let digits = if figure.abs() >= 100.0 || figure == 0.0 { 0 } else { 1 };
    let figure = format!("{figure:.digits$} {unit}");
    let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
    let verdict = match (target, is_met) {
        (Target::None, _) => "-",
        (_, true) => "ok",
        (_, false) => "MISSED",
    };
    println!("{name:<62} {figure:>16} {ratio:>8} {:>10}  {verdict}", target.shown());
}

/// The value below which this share of all lies; 0 of none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "an index into some thousand values"
    )]
    let index = ((sorted.len().saturating_sub(1)) as f64 * share).round() as usize;
    sorted.get(index).copied().unwrap_or_default()
}

/// The median.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The median of the ratios, round by round: what disturbs one round disturbs both of its halves.
pub fn paired(of: &[f64], to: &[f64]) -> f64 {
    median(&of.iter().zip(to).map(|(of, to)| of / to).collect::<Vec<_>>())
}

/// In milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// So many in this time, a second.
pub fn rate(count: usize, time: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let count = count as f64;
    count / time.as_secs_f64()
}

/// Processor time of the calling thread, the kernel's work for it included: on a machine that does
/// other things too it says what the clock on the wall would say without them.
pub fn cpu() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("clock"))
}
