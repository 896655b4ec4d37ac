//! Checks of `[runner]`: kept checkpoints.

use super::range::refuse;
use crate::config::{ConfigError, RunnerConfig};

/// Checks the section.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(runner: &RunnerConfig) -> Result<(), ConfigError> {
    if runner.keep_last == Some(0) {
        return Err(refuse(
            "runner.keep_last",
            "0, expected at least 1, or no such key to keep all checkpoints",
        ));
    }
    if runner.keep_best && runner.val_check_interval == 0 {
        return Err(refuse(
            "runner.keep_best",
            "true, but `runner.val_check_interval = 0` evaluates nothing during training: set an interval",
        ));
    }
    Ok(())
}
