//! Preparation of every command: libtorch, the run's folder, statistics and weights from files.

use std::path::{Path, PathBuf};

use policy::{bundle::write_atomic, params::Part, plan::RunPlan, transform::Transform, weights::WeightFile};

use crate::{
    error::{LearnerError, Result},
    model::{ModelError, Pi0},
};

/// Sets the number of libtorch threads to `actor.threads`.
pub(crate) fn libtorch(plan: &RunPlan) {
    tch::set_num_threads(plan.config.actor.threads as i32);
}

/// Prepares libtorch and writes the effective configuration to `config.toml` in the run's folder. Returns the paths of folder and
/// file.
pub(crate) fn prepare(plan: &RunPlan) -> Result<(PathBuf, PathBuf)> {
    libtorch(plan);
    let dir = plan.config.runner.output_dir.clone();
    let config = dir.join("config.toml");
    write_atomic(&config, plan.config.to_toml()?.as_bytes())?;
    Ok((dir, config))
}

/// Loads the statistics and the tokenizer of the configuration, checks the contract of the robot, and logs what needs attention.
pub(crate) fn transform(plan: &RunPlan) -> Result<Transform> {
    let transform = Transform::load(&plan.config.actor.model)?;
    for line in transform.contract().warnings() {
        tracing::warn!("{line}");
    }
    Ok(transform)
}

/// Loads parts of a policy from a checkpoint with openpi's parameter names.
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
