//! Checks of `[env]`: environments, workers, episodes.

use super::range::{at_most, refuse};
use crate::config::{ConfigError, EnvConfig, WorkerKind};

/// Checks the section except `params`, which the environment checks.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(env: &EnvConfig) -> Result<(), ConfigError> {
    let (train, eval) = (&env.train, &env.eval);
    let most = [
        (
            "env.train.total_num_envs",
            train.total_num_envs,
            "the most environments",
            65_536,
        ),
        (
            "env.train.workers",
            train.workers,
            "env.train.total_num_envs",
            train.total_num_envs,
        ),
        (
            "env.train.rollout_epoch",
            train.rollout_epoch,
            "the most episodes",
            65_536,
        ),
        ("env.eval.episodes", eval.episodes, "the most episodes", 1 << 20),
        (
            "env.eval.train_episodes",
            eval.train_episodes,
            "the most episodes",
            1 << 20,
        ),
    ];
    for (key, value, bound_key, bound) in most {
        at_most(key, value, bound_key, bound)?;
    }
    if env.python.is_some() && env.worker != WorkerKind::Python {
        return Err(refuse(
            "env.python",
            "given, but `env.worker = \"rust\"` needs no interpreter: remove the key",
        ));
    }
    Ok(())
}
