//! Evaluation: ODE episodes with fixed seeds that training never sees, through the engine that also serves robots.

use policy::plan::RunPlan;
use wire::messages::{Mode, Reset, Trajectory};

use crate::{
    error::Result,
    hub::Hub,
    launch::Children,
    rollout::{collect, success_rate},
};

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

/// Success of a version and its episodes.
///
/// # Errors
/// See [`collect`].
pub fn evaluate(
    hub: &Hub,
    children: &mut Children,
    version: u64,
    episodes: usize,
    videos: usize,
) -> Result<(f64, Vec<Trajectory>)> {
    let label = format!("evaluating version {version}");
    let got = collect(hub, children, version, Mode::Eval, resets(episodes, videos), &label)?;
    Ok((success_rate(&got.trajectories), got.trajectories))
}

/// Refuses a run whose training seed is the evaluation's.
///
/// # Errors
/// The seeds are the same.
pub fn check_seed(plan: &RunPlan) -> Result<()> {
    if plan.config.runner.seed == EVAL_SEED {
        return Err(crate::error::LearnerError::Missing(format!(
            "`runner.seed` {EVAL_SEED} is the evaluation's, choose another"
        )));
    }
    Ok(())
}
