//! Evaluation: ODE episodes with fixed seeds that training never uses, through the engine that also serves robots.

use std::path::{Path, PathBuf};

use policy::{
    bundle::{Bundle, VerifiedFiles},
    plan::RunPlan,
};
use wire::messages::{Mode, Trajectory};

use super::film;
use crate::{
    collect::{
        collecting::{collect, failure_rate, success_rate},
        evaluation::{check_seed, resets},
    },
    error::Result,
    ring::{Ring, hub::Hub, launch::Children},
    supervised::prepare::prepare,
};

/// Number of episodes of an evaluation that send frames.
const VIDEOS: usize = 12;

/// Returns the success rate of a version, and its episodes.
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

/// Evaluates bundles on the same unseen episodes through a local ring. Writes a GIF of one episode with every bundle, and returns
/// (version, success rate) of each bundle.
///
/// # Errors
/// A bundle is invalid or a process of the ring fails.
pub fn bundles(plan: &RunPlan, dirs: &[PathBuf], episodes: usize, gif: Option<&Path>) -> Result<Vec<(u64, f64)>> {
    check_seed(plan)?;
    let (dir, config) = prepare(plan)?;
    let opened: Vec<Bundle> = dirs.iter().map(|dir| Bundle::open(dir)).collect::<Result<_, _>>()?;
    let mut verified = VerifiedFiles::default();
    for bundle in &opened {
        verified = bundle.verify_with(&verified)?;
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
