//! `[algorithm]`: its numbers, and its groups against the environments.

use super::{
    range::{at_most, fraction, positive},
    refuse,
};
use crate::config::{ConfigError, RunConfig};

/// Checks the ranges of the section's numbers.
///
/// # Errors
/// Names the key and what would be right.
pub(super) fn check(config: &RunConfig) -> Result<(), ConfigError> {
    let (algorithm, envs) = (&config.algorithm, config.env.train.total_num_envs);
    at_most(
        "algorithm.group_size",
        algorithm.group_size,
        "env.train.total_num_envs",
        envs,
    )?;
    if !envs.is_multiple_of(algorithm.group_size) {
        return Err(refuse(
            "algorithm.group_size",
            format!(
                "{} does not divide `env.train.total_num_envs` = {envs}",
                algorithm.group_size
            ),
        ));
    }
    fraction("algorithm.gamma", algorithm.gamma)?;
    fraction("algorithm.gae_lambda", algorithm.gae_lambda)?;
    positive("algorithm.clip_ratio_low", algorithm.clip_ratio_low)?;
    positive("algorithm.clip_ratio_high", algorithm.clip_ratio_high)?;
    positive("algorithm.huber_delta", algorithm.huber_delta)?;
    for (key, value) in [
        ("algorithm.value_clip", algorithm.value_clip),
        ("algorithm.target_kl", algorithm.target_kl),
    ] {
        if let Some(value) = value {
            positive(key, value)?;
        }
    }
    Ok(())
}
