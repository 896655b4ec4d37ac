//! Progress bars.

use indicatif::ProgressStyle;

/// Returns the style of all progress bars: message, bar, position, elapsed and remaining time.
pub(crate) fn progress_style() -> ProgressStyle {
    ProgressStyle::with_template("{msg:44} {wide_bar} {pos}/{len} [{elapsed_precise} < {eta_precise}]")
        .unwrap_or_else(|_e| ProgressStyle::default_bar())
}
