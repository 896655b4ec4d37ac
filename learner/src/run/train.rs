//! `learner train`: online RL, iteration by iteration.

use std::time::Instant;

use policy::{params::Part, plan::RunPlan};
use tch::Device;

use super::{
    checkpoint::Keeper,
    evaluate::evaluate,
    iteration::Iteration,
    publish::Publisher,
    resume::{self, Resume},
};
use crate::{
    batch::RolloutBatch,
    collect::{
        ahead::Ahead,
        evaluation::check_seed,
        sampling::{Sampled, sample},
    },
    error::{LearnerError, Result, io},
    method,
    metrics::MetricsLog,
    model::{ParamStore, Pi0},
    ranks::OneRank,
    report,
    ring::Ring,
    supervised::{
        prepare::{libtorch, load, prepare, transform},
        sft_checkpoint,
    },
    update::Updater,
};

/// Runs online RL from the SFT checkpoint, or resumes from a checkpoint of RL. A synchronous run that was killed and resumed gives
/// the same weights as an uninterrupted run, bit for bit on a CPU.
///
/// # Errors
/// A checkpoint cannot be resumed from (the disk is then unchanged), or a process of the ring fails.
pub fn train(plan: &RunPlan, resume: Option<&Resume>) -> Result<()> {
    check_seed(plan)?;
    libtorch(plan);
    method::check(plan)?;
    let config = &plan.config;
    let dir = config.runner.output_dir.clone();
    let from = resume::find(plan, resume)?;
    let start = config
        .actor
        .model
        .checkpoint
        .clone()
        .filter(|_| config.sft.is_none())
        .unwrap_or_else(|| sft_checkpoint(&dir));
    if from.is_none() && !start.exists() {
        let remedy = if config.sft.is_none() && config.actor.model.checkpoint.is_some() {
            "`actor.model.checkpoint` names it: put the weights there"
        } else {
            "run `learner sft` with this configuration first"
        };
        return Err(LearnerError::NoFile { path: start, remedy });
    }
    let transform = transform(plan)?;
    let store = ParamStore::random(&plan.dims, &plan.heads, config.runner.seed, Device::cuda_if_available())?;
    let policy = Pi0::new(plan.dims.clone(), &plan.heads, store)?;
    let ranks = OneRank;
    let mut updater = Updater::new(plan, &policy, &ranks)?;
    match &from {
        Some(from) => from.restore(&mut updater)?,
        None => load(&policy, &start, &[Part::Vlm, Part::Expert])?,
    }
    let (dir, config_path) = prepare(plan)?;
    let counters = from.as_ref().map(|from| &from.counters);
    let first = counters.map_or(0, |c| c.iteration);
    let mut episodes = counters.map_or(0, |c| c.episodes);
    let mut keeper = Keeper::new(&resume::folder(plan), plan, counters)?;
    let mut log = MetricsLog::open_after(&dir, u64::from(first))?;
    let versions = dir.join("policy");
    let mut publisher = Publisher::new(&versions, plan, transform.contract().norm_stats.clone());
    if let Some(from) = from.as_ref().filter(|_| first > 0) {
        if !publisher.take_over()? && start.exists() {
            policy
                .store()
                .init(&[Part::NoiseHead, Part::ValueHead], config.runner.seed)?;
            load(&policy, &start, &[Part::Vlm, Part::Expert])?;
            publisher.publish(&policy, 0)?;
            from.restore(&mut updater)?;
        }
    } else if versions.exists() {
        std::fs::remove_dir_all(&versions).map_err(io("removing the versions of an earlier run", &versions))?;
    }
    drop(from);
    let mut ring = Ring::start(plan, &dir, &config_path)?;
    let mut bundle = publisher.publish(&policy, u64::from(first))?;
    ring.hub.announce(&bundle)?;
    let mut ahead = config.rollout.max_staleness.map(|_| Ahead::new(first));
    for iteration in first..config.runner.max_epochs {
        let version = u64::from(iteration);
        if let Some(ahead) = &mut ahead {
            ahead.order(&ring.hub, plan, version)?;
        }
        let validate = config.runner.val_check_interval;
        if validate > 0 && iteration % validate == 0 {
            let success = validation(&mut ring, plan, ahead.as_mut(), &mut log, version, episodes)?;
            keeper.evaluated(&mut updater, iteration, episodes, success)?;
        }
        let begin = Instant::now();
        let Sampled {
            trajectories,
            report: got,
        } = match &mut ahead {
            Some(ahead) => ahead.sample(&ring.hub, &mut ring.children, plan, iteration)?,
            None => sample(&ring.hub, &mut ring.children, plan, iteration, version)?,
        };
        episodes += got.episodes as u64;
        let batch = RolloutBatch::new(plan, trajectories, version, &ranks)?.to_device(policy.device());
        let whole = batch.whole;
        let report = updater.update(&batch, iteration)?;
        // the batch's images are as large as the episodes' images were
        drop(batch);
        let publishing = Instant::now();
        bundle = publisher.publish(&policy, version + 1)?;
        ring.hub.announce(&bundle)?;
        let done = Iteration {
            got: &got,
            batch: &whole,
            report: &report,
            publish_seconds: publishing.elapsed().as_secs_f64(),
            seconds: begin.elapsed().as_secs_f64(),
        };
        log.write("train", version + 1, &done.metrics(episodes))?;
        tracing::info!(
            "iteration {}/{}: {}",
            iteration + 1,
            config.runner.max_epochs,
            done.told(ahead.is_some())
        );
        let save = config.runner.save_interval;
        let last = iteration + 1 == config.runner.max_epochs;
        if last || (save > 0 && (iteration + 1) % save == 0) {
            keeper.save(&mut updater, iteration + 1, episodes)?;
        }
    }
    let done = config.runner.max_epochs;
    let success = validation(&mut ring, plan, ahead.as_mut(), &mut log, u64::from(done), episodes)?;
    keeper.evaluated(&mut updater, done, episodes, success)?;
    drop(ring);
    tracing::info!(
        "version {} is in {}",
        bundle.manifest.policy_version,
        bundle.dir().display()
    );
    report::success_curve(&dir)
}

/// Measures the success rate of `version` on unseen episodes, writes the rate to the metrics and returns it.
fn validation(
    ring: &mut Ring,
    plan: &RunPlan,
    ahead: Option<&mut Ahead>,
    log: &mut MetricsLog,
    version: u64,
    episodes: u64,
) -> Result<f64> {
    let count = plan.config.env.eval.train_episodes;
    let success = match ahead {
        Some(ahead) => ahead.evaluate(&ring.hub, &mut ring.children, version, count)?,
        None => evaluate(&ring.hub, &mut ring.children, version, count, 0)?.0,
    };
    tracing::info!("version {version}: success {success:.3} on {count} unseen episodes (ODE)");
    log.write(
        "eval",
        version,
        &[
            ("episodes", episodes as f64),
            ("success", success),
            ("eval_episodes", count as f64),
        ],
    )?;
    Ok(success)
}
