//! Episodes of an evaluation: fixed seeds that training never uses.

use policy::{config::ConfigError, plan::RunPlan};
use wire::messages::Reset;

use crate::error::{LearnerError, Result};

/// Seed of all evaluation episodes; [`check_seed`] rejects a run with the same `runner.seed`.
pub const EVAL_SEED: u64 = 0x0e7a_15ee_d000;

/// Returns the resets of an evaluation: episode `i` always has the same start, and the first `videos` episodes send frames.
pub fn resets(episodes: usize, videos: usize) -> Vec<Reset> {
    (0..episodes)
        .map(|i| Reset {
            seed: EVAL_SEED,
            env: i as u32,
            episode: 0,
            reset_state: None,
            task: None,
            group: None,
            video: i < videos,
        })
        .collect()
}

/// Rejects a run whose training seed is [`EVAL_SEED`].
///
/// # Errors
/// The seeds are equal.
pub fn check_seed(plan: &RunPlan) -> Result<()> {
    if plan.config.runner.seed == EVAL_SEED {
        return Err(LearnerError::Config(ConfigError::key(
            "runner.seed",
            format!("{EVAL_SEED} is the evaluation's, choose another"),
        )));
    }
    Ok(())
}
