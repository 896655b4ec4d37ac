//! Resume from a checkpoint: selects the checkpoint and compares its configuration with the run's.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};

use policy::{
    config::{Neutral, RunConfig},
    params::{ParamSpec, params},
    plan::RunPlan,
};

use super::checkpoint::{self, Checkpoint};
use crate::error::{LearnerError, Result};

/// Most keys that an error lists with both values; further keys are only counted.
const SHOWN: usize = 8;

/// Argument of `learner train --resume`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// The newest complete checkpoint of the run's folder, or a fresh start if the folder has no checkpoints.
    Auto,
    /// The checkpoint in this folder.
    From(PathBuf),
}

impl FromStr for Resume {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "auto" => Self::Auto,
            path => Self::From(PathBuf::from(path)),
        })
    }
}

/// Returns the folder of a run's checkpoints.
pub fn folder(plan: &RunPlan) -> PathBuf {
    plan.config.runner.output_dir.join("checkpoints")
}

/// Finds, reads and checks the checkpoint to resume from; `None` means a fresh start. Changes nothing on disk.
///
/// `auto` skips a damaged checkpoint with a warning. The configurations must be equal except for keys that change no weight and
/// `runner.max_epochs`. A change of `runner.max_epochs` that moves the rest of the learning-rate decay gives a warning.
///
/// # Errors
/// A checkpoint is damaged or incomplete, keys differ (the error lists both values), or the run would overwrite newer checkpoints.
pub fn find(plan: &RunPlan, resume: Option<&Resume>) -> Result<Option<Checkpoint>> {
    let dir = folder(plan);
    let specs = params(&plan.dims, &plan.heads);
    let existing = checkpoint::list(&dir)?;
    let found = match (resume, existing.last()) {
        (None, None) => return Ok(None),
        (None, Some(newest)) => {
            return Err(LearnerError::Checkpoint {
                path: checkpoint::path(&dir, *newest),
                detail: "it would be overwritten: resume from it with `--resume auto`, or restart in another \
                         `runner.output_dir`"
                    .to_owned(),
            });
        }
        (Some(Resume::Auto), None) => {
            tracing::info!("no checkpoint in `{}`: the run begins anew", dir.display());
            return Ok(None);
        }
        (Some(Resume::Auto), Some(_)) => newest_whole(plan, &dir, &existing, &specs)?,
        (Some(Resume::From(path)), newest) => {
            let found = match Checkpoint::read(path, &specs) {
                Err(error) => return Err(other_config(plan, path).unwrap_or(error)),
                Ok(found) => found,
            };
            if let Some(newest) = newest.filter(|newest| **newest > found.counters.iteration) {
                return Err(LearnerError::Checkpoint {
                    path: checkpoint::path(&dir, *newest),
                    detail: format!(
                        "it is newer than `{}` and would be overwritten: resume from it, move it away, or resume in another \
                         `runner.output_dir`",
                        path.display()
                    ),
                });
            }
            found
        }
    };
    check_config(plan, &found.dir, &found.config)?;
    check_length(plan, &found)?;
    tracing::info!(
        "resuming from `{}`: {} iterations and {} episodes are done",
        found.dir.display(),
        found.counters.iteration,
        found.counters.episodes
    );
    Ok(Some(found))
}

fn newest_whole(plan: &RunPlan, dir: &Path, existing: &[u32], specs: &[ParamSpec]) -> Result<Checkpoint> {
    let mut last = None;
    for iteration in existing.iter().rev() {
        let path = checkpoint::path(dir, *iteration);
        match Checkpoint::read(&path, specs) {
            Ok(found) => return Ok(found),
            Err(error) => {
                // a checkpoint of another configuration is not damaged, so it must not be skipped
                if let Some(other) = other_config(plan, &path) {
                    return Err(other);
                }
                tracing::warn!("{error}; trying the one before");
                last = Some(error);
            }
        }
    }
    let detail = last.map_or_else(String::new, |e| format!(" (the last: {e})"));
    Err(LearnerError::Checkpoint {
        path: dir.to_owned(),
        detail: format!(
            "none of its {} checkpoints is whole{detail}: move the folder away to begin anew",
            existing.len()
        ),
    })
}

/// Returns an error about differing keys, which explains more than an error about tensors that do not fit.
fn other_config(plan: &RunPlan, dir: &Path) -> Option<LearnerError> {
    let path = dir.join(checkpoint::CONFIG);
    let config = RunConfig::load(&path, &[]).ok()?;
    check_config(plan, dir, &config).err()
}

fn check_config(plan: &RunPlan, dir: &Path, config: &RunConfig) -> Result<()> {
    let (there, here) = (config.keys()?, plan.config.keys()?);
    let mut different: Vec<String> = Vec::new();
    for key in there.keys().chain(here.keys().filter(|key| !there.contains_key(*key))) {
        let (a, b) = (there.get(key), here.get(key));
        let free = matches!(
            Neutral::of(key),
            Some(Neutral::Place | Neutral::Upkeep | Neutral::Length)
        );
        if a != b && !free {
            let show = |value: Option<&String>| value.cloned().unwrap_or_else(|| "absent".to_owned());
            different.push(format!("`{key}` is {} there, {} here", show(a), show(b)));
        }
    }
    if different.is_empty() {
        return Ok(());
    }
    let more = different.len().saturating_sub(SHOWN);
    different.truncate(SHOWN);
    if more > 0 {
        different.push(format!("{more} more"));
    }
    Err(LearnerError::Checkpoint {
        path: dir.to_owned(),
        detail: format!(
            "its configuration (digest {}) is not this run's (digest {}): {}; resume with its own `{}`, or restart",
            config.digest()?,
            plan.config_digest,
            different.join("; "),
            checkpoint::CONFIG
        ),
    })
}

fn check_length(plan: &RunPlan, found: &Checkpoint) -> Result<()> {
    let (there, here) = (found.config.runner.max_epochs, plan.config.runner.max_epochs);
    if found.counters.iteration > here {
        return Err(LearnerError::Checkpoint {
            path: found.dir.clone(),
            detail: format!(
                "it has {} iterations, `runner.max_epochs` is {here}: nothing is left to train",
                found.counters.iteration
            ),
        });
    }
    if there != here && (plan.config.actor.optim.min_lr_ratio - 1.0).abs() > f64::EPSILON {
        tracing::warn!(
            "`runner.max_epochs` was {there} and is {here}: the learning rate falls over the whole run \
             (`actor.optim.min_lr_ratio` = {}), so the result is neither run's from its start",
            plan.config.actor.optim.min_lr_ratio
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(overrides: &[&str]) -> RunPlan {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        RunPlan::new(RunConfig::load(&path, &overrides).expect("quickstart")).expect("plan")
    }

    #[test]
    fn keys_that_change_no_weight_may_differ_and_all_others_are_named_with_both_values() {
        let run = plan(&[]);
        let free = plan(&[
            "actor.prefix_cache=\"disk\"",
            "actor.prefix_cache_mb=7",
            "runner.max_epochs=9",
            "runner.output_dir=\"elsewhere\"",
            "runner.save_interval=3",
            "runner.val_check_interval=4",
            "runner.keep_last=2",
            "runner.keep_best=true",
            "runner.launch=\"none\"",
            "learner.listen=\"tcp://127.0.0.1:5999\"",
            "rollout.listen=\"tcp://127.0.0.1:5998\"",
            "rollout.http=\"127.0.0.1:5997\"",
        ]);
        check_config(&run, Path::new("c"), &free.config).expect("free keys");
        for (set, wanted) in [
            ("algorithm.gamma=0.5", "`algorithm.gamma` is 0.5 there, 0.99 here"),
            ("runner.seed=8", "`runner.seed` is 8 there, 1 here"),
            (
                "algorithm.target_kl=0.1",
                "`algorithm.target_kl` is 0.1 there, absent here",
            ),
            (
                "env.params.grasp_tol=0.1",
                "`env.params.grasp_tol` is 0.1 there, 0.05 here",
            ),
        ] {
            let error = check_config(&run, Path::new("c"), &plan(&[set]).config).expect_err("refused");
            let text = error.to_string();
            assert!(text.contains(wanted) && text.contains("checkpoint `c`"), "{text}");
            assert!(text.contains(&run.config_digest), "{text}");
        }
    }
}
