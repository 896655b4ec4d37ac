//! `learner sft`: the supervised stages, from data sets to a checkpoint.

pub(crate) mod prepare;
pub mod source;
pub mod dataset;
pub mod loader;
mod prefixes;
mod stage;
pub mod pretrain;
pub mod sft;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use policy::{
    config::ConfigError,
    params::{Heads, Part},
    plan::RunPlan,
};
use tch::Device;

use self::{
    dataset::DataFile,
    loader::{Loader, Targets},
    prepare::{load, prepare, transform},
    pretrain::pretrain,
    sft::sft,
};
use crate::{
    collect::evaluation::check_seed,
    error::Result,
    metrics::MetricsLog,
    model::{ParamStore, Pi0},
    ring::launch::Children,
};

/// Seed of the scenes, distinct from the run's seed.
const SCENES_SEED: u64 = 1_000_003;
/// Seed of the demonstrations, distinct from the run's seed.
const DEMOS_SEED: u64 = 2_000_003;

/// Returns the path of the SFT weights in a run's folder.
pub fn sft_checkpoint(dir: &Path) -> PathBuf {
    dir.join("sft/model.safetensors")
}

/// Runs pre-training (if configured) and SFT. Writes `sft/model.safetensors` with openpi's parameter names.
///
/// # Errors
/// The data sets cannot be written or read, do not fit the policy, or a file operation fails.
pub fn supervised(plan: &RunPlan) -> Result<()> {
    check_seed(plan)?;
    let transform = transform(plan)?;
    let (dir, _) = prepare(plan)?;
    let config = &plan.config;
    let sft_config = config
        .sft
        .as_ref()
        .ok_or_else(|| ConfigError::key("sft", "the section is missing"))?;
    let mut log = MetricsLog::open(&dir)?;
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
        let targets = Targets::KeyPoints(stage.keypoints * plan.dims.cameras);
        let scenes = DataFile::open(&path, targets.name(), plan)?;
        let scenes = Loader::new(plan, &transform, &scenes, targets)?;
        let error = pretrain(&policy, stage, &scenes, config.runner.seed, &mut log)?;
        tracing::info!("pre-training: mean localization error {error:.4} of the image");
    }
    let args = [
        flag("episodes", sft_config.demos.to_string()),
        flag("seed", DEMOS_SEED.to_string()),
        flag("horizon", plan.dims.action_horizon.to_string()),
    ]
    .concat();
    let path = data(&mut children, "demos", &args)?;
    let demos = DataFile::open(&path, Targets::Actions.name(), plan)?;
    let demos = Loader::new(plan, &transform, &demos, Targets::Actions)?;
    let loss = sft(
        &policy,
        sft_config,
        &demos,
        prefixes::bound(plan),
        config.runner.seed,
        &mut log,
    )?;
    tracing::info!("SFT: loss {loss:.4} on {} frames", demos.rows());
    policy
        .store()
        .write(&[Part::Vlm, Part::Expert], &sft_checkpoint(&dir))?;
    Ok(())
}
