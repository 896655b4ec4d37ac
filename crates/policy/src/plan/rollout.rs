//! Checks of `[rollout]`: batches, threads and queue of the engine.

use super::range::{MAX_THREADS, at_most, refuse};
use crate::config::{ConfigError, Precision, Provider, RolloutConfig, WeightMode};

/// Checks the section except `max_staleness`, which is checked with `[algorithm]`.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(rollout: &RolloutConfig) -> Result<(), ConfigError> {
    at_most("rollout.threads", rollout.threads, "the most threads", MAX_THREADS)?;
    at_most("rollout.max_batch", rollout.max_batch, "the largest batch", 65_536)?;
    at_most(
        "rollout.queue_capacity",
        rollout.queue_capacity,
        "the longest queue",
        1 << 20,
    )?;
    if let Some(rows) = rollout.fixed_batch
        && !(2..=rollout.max_batch).contains(&rows)
    {
        // a batch of one row is a matrix-vector product, which sums in another order than a matrix product
        return Err(refuse(
            "rollout.fixed_batch",
            format!(
                "{rows}, expected 2 to `rollout.max_batch` = {}, or no such key",
                rollout.max_batch
            ),
        ));
    }
    let precise = rollout.precision == Precision::F32;
    if rollout.provider != Provider::Cuda && !precise {
        return Err(refuse(
            "rollout.precision",
            "bf16, but only `rollout.provider = \"cuda\"` runs graphs in bf16: remove the key",
        ));
    }
    if rollout.provider == Provider::Cuda && rollout.fixed_batch.is_some() {
        return Err(refuse(
            "rollout.fixed_batch",
            "set, but graphs for `rollout.provider = \"cuda\"` have `rollout.max_batch` rows: remove the key",
        ));
    }
    if rollout.provider == Provider::Cuda && rollout.weights != WeightMode::Inputs {
        return Err(refuse(
            "rollout.weights",
            "constants, expected \"inputs\" with `rollout.provider = \"cuda\"`",
        ));
    }
    Ok(())
}
