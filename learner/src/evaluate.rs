//! Evaluation: ODE episodes with fixed seeds that training never sees, through the engine that also serves robots.

use std::path::{Path, PathBuf};

use policy::{bundle::Bundle, plan::RunPlan};
use wire::messages::{Mode, Reset, Trajectory};

use crate::{
    error::{LearnerError, Result},
    film,
    hub::Hub,
    launch::Children,
    prepare::prepare,
    ring::Ring,
    rollout::{collect, failure_rate, success_rate},
};

/// Seed of all evaluation episodes: training uses `runner.seed`, which the plan keeps different from it.
pub const EVAL_SEED: u64 = 0x0e7a_15ee_d000;
/// Episodes of an evaluation that send frames.
const VIDEOS: usize = 12;

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
        return Err(LearnerError::Missing(format!(
            "`runner.seed` {EVAL_SEED} is the evaluation's, choose another"
        )));
    }
    Ok(())
}

/// Evaluates bundles on the same unseen episodes through a local ring; writes a GIF of one episode under each and returns
/// (version, success) of each.
///
/// # Errors
/// A bundle is not usable or a process of the ring fails.
pub fn bundles(plan: &RunPlan, dirs: &[PathBuf], episodes: usize, gif: Option<&Path>) -> Result<Vec<(u64, f64)>> {
    check_seed(plan)?;
    let (dir, config) = prepare(plan)?;
    let opened: Vec<Bundle> = dirs.iter().map(|dir| Bundle::open(dir)).collect::<Result<_, _>>()?;
    for bundle in &opened {
        bundle.verify()?;
    }
    let mut ring = Ring::start(plan, &dir, &config)?;
    let mut results = Vec::new();
    let mut films = Vec::new();
    let videos = if gif.is_some() { VIDEOS.min(episodes) } else { 0 };
    for bundle in &opened {
        let version = bundle.manifest.policy_version;
        ring.hub.announce(bundle)?;
        let (success, trajectories) = evaluate(&ring.hub, &mut ring.children, version, episodes, videos)?;
        tracing::info!(
            "version {version}: success {success:.3}, ended without success {:.3}, out of time {:.3}",
            failure_rate(&trajectories),
            1.0 - success - failure_rate(&trajectories)
        );
        results.push((version, success));
        films.push((version, trajectories));
    }
    drop(ring);
    if let Some(path) = gif {
        film::episode_gif(path, &films)?;
    }
    Ok(results)
}
