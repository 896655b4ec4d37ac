//! The commands: supervised stages, online RL, evaluation of bundles.

use std::path::{Path, PathBuf};
use std::time::Instant;

use policy::{
    bundle::{Bundle, write_atomic},
    config::Launch,
    norm::NormStats,
    params::{Heads, Part},
    plan::RunPlan,
    weights::WeightFile,
};
use tch::Device;

use crate::{
    ahead::Ahead,
    checkpoint::Keeper,
    dataset,
    error::{LearnerError, Result},
    evaluate::{check_seed, evaluate},
    film,
    hub::Hub,
    launch::Children,
    method,
    metrics::MetricsLog,
    model::{ParamStore, Pi0},
    pretrain::pretrain,
    publish::Publisher,
    report,
    resume::{self, Resume},
    rollout::{RolloutBatch, failure_rate},
    sampling::sample,
    sft::sft,
    update::{UpdateReport, Updater},
};

/// Seeds of the data sets, apart from the run's own.
const SCENES_SEED: u64 = 1_000_003;
const DEMOS_SEED: u64 = 2_000_003;
/// Episodes of an evaluation that send frames.
const VIDEOS: usize = 12;

/// Prepares libtorch.
fn libtorch(plan: &RunPlan) -> Result<()> {
    tch::set_num_threads(plan.config.actor.threads as i32);
    check_seed(plan)
}

/// Prepares libtorch and puts `config.toml` (effective) into the run's folder.
fn prepare(plan: &RunPlan) -> Result<(PathBuf, PathBuf)> {
    libtorch(plan)?;
    let dir = plan.config.runner.output_dir.clone();
    let config = dir.join("config.toml");
    write_atomic(&config, plan.config.to_toml()?.as_bytes())?;
    Ok((dir, config))
}

fn norm_stats(plan: &RunPlan) -> Result<Option<NormStats>> {
    let path = plan.config.actor.model.norm_stats.as_deref();
    path.map(|p| NormStats::load(p).map_err(|e| LearnerError::Missing(e.to_string())))
        .transpose()
}

fn load(policy: &Pi0, path: &Path, parts: &[Part]) -> Result<()> {
    let weights = |source| LearnerError::Weights {
        path: path.to_owned(),
        source,
    };
    let file = WeightFile::open(path).map_err(weights)?;
    match policy.store().load(&file, parts) {
        Err(crate::model::ModelError::Weights(source)) => Err(weights(source)),
        other => Ok(other?),
    }
}

/// Where SFT leaves its weights.
pub fn sft_checkpoint(dir: &Path) -> PathBuf {
    dir.join("sft/model.safetensors")
}

/// Pre-training (when configured) and SFT; writes `sft/model.safetensors` under openpi's names.
///
/// # Errors
/// Data, network or file errors.
pub fn supervised(plan: &RunPlan) -> Result<()> {
    let (dir, _) = prepare(plan)?;
    let config = &plan.config;
    let sft_config = config
        .sft
        .as_ref()
        .ok_or_else(|| LearnerError::Missing("section `sft` is missing".to_owned()))?;
    let mut log = MetricsLog::open(&dir)?;
    let stats = norm_stats(plan)?;
    let mut children = Children::default();
    let store = ParamStore::random(
        &plan.dims,
        &Heads::default(),
        config.runner.seed,
        Device::cuda_if_available(),
    )?;
    let policy = Pi0::new(plan.dims.clone(), &Heads::default(), store)?;
    let data = |children: &mut Children, what: &str, args: &[String]| -> Result<PathBuf> {
        let path = dir.join(format!("data/{what}.safetensors"));
        if !path.exists() {
            let mut all = args.to_vec();
            all.extend(["--out".to_owned(), path.display().to_string()]);
            children.write_data(plan, what, &all, &dir)?;
        }
        Ok(path)
    };
    let flag = |name: &str, value: String| [format!("--{name}"), value];
    if let Some(checkpoint) = &config.actor.model.checkpoint {
        load(&policy, checkpoint, &[Part::Vlm, Part::Expert])?;
    } else if let Some(stage) = &config.pretrain {
        let args = [
            flag("count", stage.scenes.to_string()),
            flag("seed", SCENES_SEED.to_string()),
        ]
        .concat();
        let path = data(&mut children, "scenes", &args)?;
        let scenes = dataset::read(&path, "keypoints", &plan.dims, &config.actor.model, stats.as_ref())?;
        let error = pretrain(&policy, stage, &scenes, config.runner.seed, &mut log)?;
        tracing::info!("pre-training: mean localisation error {error:.4} of the image");
    }
    let args = [
        flag("episodes", sft_config.demos.to_string()),
        flag("seed", DEMOS_SEED.to_string()),
        flag("horizon", plan.dims.action_horizon.to_string()),
    ]
    .concat();
    let path = data(&mut children, "demos", &args)?;
    let demos = dataset::read(&path, "actions", &plan.dims, &config.actor.model, stats.as_ref())?;
    let loss = sft(&policy, sft_config, &demos, config.runner.seed, &mut log)?;
    tracing::info!("SFT: loss {loss:.4} on {} frames", demos.observations.len());
    let bytes = policy.store().to_safetensors(&[Part::Vlm, Part::Expert])?;
    Ok(write_atomic(&sft_checkpoint(&dir), &bytes)?)
}

/// The processes around the learner, for as long as it lives.
struct Ring {
    hub: Hub,
    children: Children,
}

impl Ring {
    fn start(plan: &RunPlan, dir: &Path, config: &Path) -> Result<Self> {
        let hub = Hub::start(&plan.config.learner.listen)?;
        let mut children = Children::default();
        match plan.config.runner.launch {
            Launch::Local => {
                let engine = children.engine(config, &hub.endpoint, dir)?;
                children.workers(plan, &engine, dir)?;
            }
            Launch::None => tracing::info!(
                "waiting for an engine: rollout-engine serve --config {} --learner {}",
                config.display(),
                hub.endpoint
            ),
        }
        Ok(Self { hub, children })
    }
}

/// Online RL from the SFT checkpoint, or on from a checkpoint of RL: a synchronous run that was killed and goes on gives the same
/// weights, bit for bit on a CPU, as one that was not.
///
/// # Errors
/// A checkpoint cannot be resumed from (then nothing has been changed on disk), or any process of the ring fails.
pub fn train(plan: &RunPlan, resume: Option<&Resume>) -> Result<()> {
    libtorch(plan)?;
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
        return Err(LearnerError::Missing(format!(
            "`{}` is missing: {remedy}",
            start.display()
        )));
    }
    let store = ParamStore::random(&plan.dims, &plan.heads, config.runner.seed, Device::cuda_if_available())?;
    let policy = Pi0::new(plan.dims.clone(), &plan.heads, store)?;
    let mut updater = Updater::new(plan, &policy)?;
    match &from {
        Some(from) => from.restore(&policy, &mut updater)?,
        None => load(&policy, &start, &[Part::Vlm, Part::Expert])?,
    }
    let (dir, config_path) = prepare(plan)?;
    let counters = from.as_ref().map(|from| &from.counters);
    let first = counters.map_or(0, |c| c.iteration);
    let mut episodes = counters.map_or(0, |c| c.episodes);
    let mut keeper = Keeper::new(&resume::folder(plan), plan, counters)?;
    let mut log = MetricsLog::open_after(&dir, u64::from(first))?;
    let versions = dir.join("policy");
    let mut publisher = Publisher::new(&versions, plan, norm_stats(plan)?);
    if let Some(from) = from.as_ref().filter(|_| first > 0) {
        if !publisher.take_over()? && start.exists() {
            policy
                .store()
                .init(&[Part::NoiseHead, Part::ValueHead], config.runner.seed)?;
            load(&policy, &start, &[Part::Vlm, Part::Expert])?;
            publisher.publish(&policy, 0)?;
            from.restore(&policy, &mut updater)?;
        }
    } else if versions.exists() {
        std::fs::remove_dir_all(&versions)
            .map_err(crate::error::io("removing the versions of an earlier run", &versions))?;
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
            keeper.evaluated(&policy, &mut updater, iteration, episodes, success)?;
        }
        let begin = Instant::now();
        let got = match &mut ahead {
            Some(ahead) => ahead.sample(&ring.hub, &mut ring.children, plan, iteration)?,
            None => sample(&ring.hub, &mut ring.children, plan, iteration, version)?,
        };
        episodes += got.episodes as u64;
        let batch = RolloutBatch::new(plan, &got.used.trajectories, version)?;
        let report = updater.update(&policy, &batch, iteration)?;
        let publishing = Instant::now();
        bundle = publisher.publish(&policy, version + 1)?;
        ring.hub.announce(&bundle)?;
        let success = got.success;
        let a = &report.actor;
        let mut values = vec![
            ("episodes", episodes as f64),
            ("success", success),
            ("terminated_failure", got.failure),
            ("records", report.records as f64),
            ("env_steps", got.env_steps as f64),
            ("groups", got.groups as f64),
            ("rounds", f64::from(got.rounds)),
            ("action_magnitude", batch.action_magnitude),
            ("policy_loss", a.policy_loss),
            ("kl_penalty", a.kl_penalty),
            ("entropy", report.entropy),
            ("behaviour_clip_fraction", a.behaviour_clip_fraction),
            ("ratio", a.ratio),
            ("approx_kl", a.approx_kl),
            ("last_kl", report.last_kl),
            ("clip_fraction", a.clip_fraction),
            ("logprob_gap", report.logprob_gap),
            ("first_ratio_deviation", report.first_ratio_deviation),
            ("value_gap", report.first_value_gap),
            ("value_loss", report.value_loss),
            ("value_clip_fraction", report.value_clip_fraction),
            ("explained_variance", report.explained_variance),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
            ("updates", report.updates as f64),
            ("skipped_updates", report.skipped as f64),
            ("staleness_mean", batch.staleness_mean),
            ("staleness_max", batch.staleness_max as f64),
            ("stale_dropped", got.used.stale as f64),
            ("rollout_seconds", got.used.seconds),
            ("wait_seconds", got.used.waited),
            ("reload_seconds", got.used.reload_seconds),
            ("prefix_cache_bytes", report.prefix_cache_bytes as f64),
            ("prefix_seconds", report.prefix_seconds),
            ("update_seconds", report.update_seconds),
            ("publish_seconds", publishing.elapsed().as_secs_f64()),
            ("iteration_seconds", begin.elapsed().as_secs_f64()),
        ];
        if let Some(credit) = report.credit {
            values.extend([("credit", credit.mean), ("displacement", credit.displacement)]);
        }
        log.write("train", version + 1, &values)?;
        let age = if ahead.is_some() {
            format!(", staleness {:.2}", batch.staleness_mean)
        } else {
            String::new()
        };
        tracing::info!(
            "iteration {}/{}: success {success:.3}, {}, {} records{age}, waited {:.1} s, update {:.1} s",
            iteration + 1,
            config.runner.max_epochs,
            learnt(&report, ahead.is_none()),
            report.records,
            got.used.waited,
            report.prefix_seconds + report.update_seconds,
        );
        let save = config.runner.save_interval;
        let last = iteration + 1 == config.runner.max_epochs;
        if last || (save > 0 && (iteration + 1) % save == 0) {
            keeper.save(&policy, &mut updater, iteration + 1, episodes)?;
        }
    }
    let done = config.runner.max_epochs;
    let success = validation(&mut ring, plan, ahead.as_mut(), &mut log, u64::from(done), episodes)?;
    keeper.evaluated(&policy, &mut updater, done, episodes, success)?;
    drop(ring);
    tracing::info!(
        "version {} is in {}",
        bundle.manifest.policy_version,
        bundle.dir().display()
    );
    report::success_curve(&dir)
}

/// What an update did, in the numbers that its loss has. Parity of engine and learner is that of records of the version in training,
/// which asynchronous training may not have.
fn learnt(report: &UpdateReport, parity: bool) -> String {
    let a = &report.actor;
    if let Some(credit) = report.credit {
        return format!(
            "loss {:.4}, credit {:.3}, gradient {:.3}",
            a.policy_loss, credit.mean, report.grad_norm
        );
    }
    let mut parts = vec![format!("KL {:.4}, clip {:.3}", a.approx_kl, a.clip_fraction)];
    if report.explained_variance.is_finite() {
        parts.push(format!("EV {:.2}", report.explained_variance));
    }
    if parity {
        parts.push(format!("ratio gap {:.1e}", report.first_ratio_deviation));
    }
    parts.join(", ")
}

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

/// Evaluates bundles on the same unseen episodes through a local ring; writes a GIF of one episode under each and returns
/// (version, success) of each.
///
/// # Errors
/// A bundle is not usable or a process of the ring fails.
pub fn eval(plan: &RunPlan, bundles: &[PathBuf], episodes: usize, gif: Option<&Path>) -> Result<Vec<(u64, f64)>> {
    let (dir, config) = prepare(plan)?;
    let opened: Vec<Bundle> = bundles.iter().map(|b| Bundle::open(b)).collect::<Result<_, _>>()?;
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
