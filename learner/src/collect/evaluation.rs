//! The episodes of an evaluation: fixed seeds that training never sees.

use policy::{config::ConfigError, plan::RunPlan};
use wire::messages::Reset;

use crate::error::{LearnerError, Result};

/// Seed of all evaluation episodes: training uses `runner.seed`, which the plan keeps different from it.
pub const EVAL_SEED: u64 = 0x0e7a_15ee_d000;

/// The resets of an evaluation: episode `i` is always the same start, the first `videos` send frames.
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

/// Refuses a run whose training seed is the evaluation's.
///
/// # Errors
/// The seeds are the same.
pub fn check_seed(plan: &RunPlan) -> Result<()> {
    if plan.config.runner.seed == EVAL_SEED {
        return Err(LearnerError::Config(ConfigError::key(
            "runner.seed",
            format!("{EVAL_SEED} is the evaluation's, choose another"),
        )));
    }
    Ok(())
}
