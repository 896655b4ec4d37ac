//! Checkpoints of RL: weights, optimizer state and counters in a folder that appears whole or not at all.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use policy::{bundle::write_atomic, params::Part};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    error::{LearnerError, Result, io},
    model::Pi0,
    optim::AdamW,
};

/// Counters of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Iterations done; also the policy version.
    pub iteration: u32,
    /// Training episodes so far.
    pub episodes: u64,
    /// Digest of the configuration.
    pub config_digest: String,
}

/// Writes `DIR/iteration_N`: `model.safetensors` under openpi's names (value head included), `optimizer.safetensors`, `state.json`.
///
/// # Errors
/// A file cannot be written; then nothing is left under the final name.
pub fn write(dir: &Path, policy: &Pi0, optimizers: (&AdamW, Option<&AdamW>), counters: &Counters) -> Result<PathBuf> {
    let target = dir.join(format!("iteration_{:06}", counters.iteration));
    let beside = dir.join(format!(".iteration_{:06}.writing", counters.iteration));
    for old in [&beside, &target] {
        if old.exists() {
            fs::remove_dir_all(old).map_err(io("removing", old))?;
        }
    }
    fs::create_dir_all(&beside).map_err(io("creating the folder", &beside))?;
    let model = policy
        .store()
        .to_safetensors(&[Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead])?;
    write_atomic(&beside.join("model.safetensors"), &model)?;
    let mut named: BTreeMap<String, Tensor> = BTreeMap::new();
    for (prefix, optimizer) in [("actor", Some(optimizers.0)), ("critic", optimizers.1)] {
        if let Some(optimizer) = optimizer {
            named.extend(optimizer.state().into_iter().map(|(n, t)| (format!("{prefix}.{n}"), t)));
        }
    }
    let path = beside.join("optimizer.safetensors");
    let refs: Vec<(&str, &Tensor)> = named.iter().map(|(n, t)| (n.as_str(), t)).collect();
    Tensor::write_safetensors(&refs, &path).map_err(|e| io("writing", &path)(std::io::Error::other(e.to_string())))?;
    let text = serde_json::to_vec_pretty(counters)
        .map_err(|e| LearnerError::Missing(format!("the counters cannot be written: {e}")))?;
    write_atomic(&beside.join("state.json"), &text)?;
    fs::rename(&beside, &target).map_err(io("renaming to", &target))?;
    Ok(target)
}
