//! What every command does before it begins: libtorch, the run's folder, statistics and weights from files.

use std::path::{Path, PathBuf};

use policy::{bundle::write_atomic, norm::NormStats, params::Part, plan::RunPlan, weights::WeightFile};

use crate::{
    error::{LearnerError, Result},
    model::{ModelError, Pi0},
};

/// Gives libtorch its threads.
pub(crate) fn libtorch(plan: &RunPlan) {
    tch::set_num_threads(plan.config.actor.threads as i32);
}

/// Prepares libtorch and puts `config.toml` (effective) into the run's folder; returns the folder and that file.
pub(crate) fn prepare(plan: &RunPlan) -> Result<(PathBuf, PathBuf)> {
    libtorch(plan);
    let dir = plan.config.runner.output_dir.clone();
    let config = dir.join("config.toml");
    write_atomic(&config, plan.config.to_toml()?.as_bytes())?;
    Ok((dir, config))
}

/// The statistics of the configuration, where it names some.
pub(crate) fn norm_stats(plan: &RunPlan) -> Result<Option<NormStats>> {
    let path = plan.config.actor.model.norm_stats.as_deref();
    Ok(path.map(NormStats::load).transpose()?)
}

/// Fills parts of a policy from a checkpoint under openpi's names.
pub(crate) fn load(policy: &Pi0, path: &Path, parts: &[Part]) -> Result<()> {
    let weights = |source| LearnerError::Weights {
        path: path.to_owned(),
        source,
    };
    let file = WeightFile::open(path).map_err(weights)?;
    match policy.store().load(&file, parts) {
        Err(ModelError::Weights(source)) => Err(weights(source)),
        other => Ok(other?),
    }
}
