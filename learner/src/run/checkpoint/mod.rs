//! Checkpoints of RL: weights, optimizer state, counters and configuration, in a folder that appears complete or not at all.
//!
//! A checkpoint is between two iterations. Random numbers are keyed by the run's seed and the iteration, and environments are reset in
//! every iteration, so that no other state is needed.

mod keeper;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use policy::{
    bundle::{BundleFile, describe_file, write_atomic},
    config::RunConfig,
    params::{ParamSpec, Part},
    weights::WeightFile,
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use self::keeper::Keeper;
use crate::{
    error::{LearnerError, Result, io},
    update::Updater,
};

/// Version of the folder's layout.
pub const FORMAT_VERSION: u32 = 1;
/// Weights under openpi's names, value head included.
pub const MODEL: &str = "model.safetensors";
/// State of the optimizers, `actor.*` and `critic.*`, and the weights of a reference policy, `reference.*`.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// Effective configuration of the run.
pub const CONFIG: &str = "config.toml";
/// Counters, and size and digest of the other files; written last.
pub const STATE: &str = "state.json";
/// Name of the file in the folder of the checkpoints that names the best checkpoint.
pub const BEST: &str = "best.json";

const MAX_STATE_BYTES: u64 = 1 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Best evaluation during training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Number of iterations done by the evaluated policy; also its version.
    pub iteration: u32,
    /// Share of successful episodes.
    pub success: f64,
}

/// Counters of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Number of iterations done; also the policy version.
    pub iteration: u32,
    /// Number of training episodes so far.
    pub episodes: u64,
    /// Best evaluation so far; `None` without `runner.keep_best`.
    pub best: Option<Best>,
    /// Digest of the run's configuration.
    pub config_digest: String,
}

/// Content of `state.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// Counters at the checkpoint.
    pub counters: Counters,
    /// Size and digest of the other files.
    pub files: Vec<BundleFile>,
}

/// Checkpoint that was read and verified.
#[derive(Debug)]
pub struct Checkpoint {
    /// Folder of the checkpoint.
    pub dir: PathBuf,
    /// Counters at the checkpoint.
    pub counters: Counters,
    /// Configuration of the run that wrote the checkpoint.
    pub config: RunConfig,
    model: WeightFile,
    optimizer: BTreeMap<String, Tensor>,
}

fn damaged(dir: &Path, detail: impl Into<String>) -> LearnerError {
    LearnerError::Checkpoint {
        path: dir.to_owned(),
        detail: detail.into(),
    }
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(io("syncing", path))
}

fn remove(path: &Path) -> Result<()> {
    if path.exists() {
        fs::remove_dir_all(path).map_err(io("removing", path))?;
    }
    Ok(())
}

/// Reads at most `limit` bytes of a text file of a checkpoint.
fn text(dir: &Path, name: &str, limit: u64) -> Result<String> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(|e| damaged(dir, format!("file `{name}` cannot be opened: {e}")))?;
    let mut text = String::new();
    file.take(limit)
        .read_to_string(&mut text)
        .map_err(|e| damaged(dir, format!("file `{name}` cannot be read: {e}")))?;
    Ok(text)
}

impl Checkpoint {
    /// Reads a checkpoint and verifies the size and SHA-256 of every file, and every weight of `specs`.
    ///
    /// # Errors
    /// A file or tensor is missing, cut or damaged; the error contains the expected and found values.
    pub fn read(dir: &Path, specs: &[ParamSpec]) -> Result<Self> {
        let bad = |detail: String| damaged(dir, detail);
        let raw: serde_json::Value = serde_json::from_str(&text(dir, STATE, MAX_STATE_BYTES)?)
            .map_err(|e| bad(format!("file `{STATE}` is no JSON: {e}")))?;
        let found = raw.get("format_version").and_then(serde_json::Value::as_u64);
        if found != Some(u64::from(FORMAT_VERSION)) {
            let found = found.map_or_else(|| "none".to_owned(), |v| v.to_string());
            return Err(bad(format!(
                "`format_version` is {found}, this program reads {FORMAT_VERSION}: it was written by another version"
            )));
        }
        let state: State = serde_json::from_value(raw).map_err(|e| bad(format!("file `{STATE}`: {e}")))?;
        for name in [MODEL, OPTIMIZER, CONFIG] {
            let want = state.files.iter().find(|f| f.name == name);
            let want = want.ok_or_else(|| bad(format!("`{STATE}` does not name the file `{name}`")))?;
            let found = describe_file(&dir.join(name)).map_err(|e| bad(format!("file `{name}`: {e}")))?;
            if found.bytes != want.bytes {
                return Err(bad(format!(
                    "file `{name}` has {} bytes, expected {}: it is cut or not whole",
                    found.bytes, want.bytes
                )));
            }
            if found.sha256 != want.sha256 {
                return Err(bad(format!(
                    "file `{name}` has sha256 {}, expected {}: it is damaged",
                    found.sha256, want.sha256
                )));
            }
        }
        let config = RunConfig::parse(&text(dir, CONFIG, MAX_CONFIG_BYTES)?, &dir.join(CONFIG), &[])?;
        let model = WeightFile::open(&dir.join(MODEL))
            .and_then(|file| {
                let wanted: Vec<&ParamSpec> = specs.iter().collect();
                file.check(&wanted).map(|()| file)
            })
            .map_err(|e| bad(format!("file `{MODEL}`: {e}")))?;
        let optimizer = Tensor::read_safetensors(dir.join(OPTIMIZER))
            .map_err(|e| bad(format!("file `{OPTIMIZER}`: {e}")))?
            .into_iter()
            .collect();
        Ok(Self {
            dir: dir.to_owned(),
            counters: state.counters,
            config,
            model,
            optimizer,
        })
    }

    /// Restores weights and optimizer state, bit for bit.
    ///
    /// # Errors
    /// A tensor of the optimizer does not fit the policy; the error names the first.
    pub fn restore(&self, updater: &mut Updater<'_>) -> Result<()> {
        let (mut actor, mut critic, mut reference) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in &self.optimizer {
            let (part, rest) = name.split_once('.').unwrap_or_default();
            let part = match part {
                "actor" => &mut actor,
                "critic" => &mut critic,
                "reference" => &mut reference,
                _ => {
                    return Err(damaged(
                        &self.dir,
                        format!("file `{OPTIMIZER}`: unknown tensor `{name}`"),
                    ));
                }
            };
            part.insert(rest.to_owned(), tensor.shallow_clone());
        }
        if updater.optimizers().1.is_none() && !critic.is_empty() {
            return Err(damaged(
                &self.dir,
                format!("file `{OPTIMIZER}` holds a critic's state, but this policy has no value head"),
            ));
        }
        match updater.reference() {
            Some(own) => own.restore(&reference)?,
            None if reference.is_empty() => {}
            None => {
                return Err(damaged(
                    &self.dir,
                    format!("file `{OPTIMIZER}` holds a reference policy, but this run's loss has none"),
                ));
            }
        }
        updater.policy().store().load(
            &self.model,
            &[Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead],
        )?;
        let (own_actor, own_critic) = updater.optimizers();
        let wrong = |e| damaged(&self.dir, format!("file `{OPTIMIZER}`: {e}"));
        own_actor.load_state(&actor).map_err(wrong)?;
        if let Some(own_critic) = own_critic {
            own_critic.load_state(&critic).map_err(wrong)?;
        }
        Ok(())
    }
}

/// Returns the folder of the checkpoint after `iteration` iterations.
pub fn path(dir: &Path, iteration: u32) -> PathBuf {
    dir.join(format!("iteration_{iteration:06}"))
}

/// Lists the checkpoints in `dir` by iteration, oldest first, without opening any; an absent folder has none.
///
/// # Errors
/// The folder cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<u32>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io("listing", dir))? {
        let name = entry.map_err(io("listing", dir))?.file_name();
        found.extend(
            name.to_str()
                .and_then(|n| n.strip_prefix("iteration_"))
                .and_then(|n| n.parse::<u32>().ok()),
        );
    }
    found.sort_unstable();
    Ok(found)
}

/// Writes the policy and the optimizers of `updater` to `DIR/iteration_N`, replacing an existing checkpoint. The files are written to a
/// temporary folder next to the target, synced and renamed.
///
/// # Errors
/// A file cannot be written; an incomplete checkpoint never has the final name.
pub fn write(dir: &Path, updater: &mut Updater<'_>, counters: &Counters, config: &RunConfig) -> Result<PathBuf> {
    let target = path(dir, counters.iteration);
    let beside = dir.join(format!(".iteration_{:06}.writing", counters.iteration));
    remove(&beside)?;
    fs::create_dir_all(&beside).map_err(io("creating the folder", &beside))?;
    let all = [Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead];
    let model = updater.policy().store().write(&all, &beside.join(MODEL))?;
    let mut named: BTreeMap<String, Tensor> = BTreeMap::new();
    if let Some(reference) = updater.reference() {
        let state = reference.state().into_iter();
        named.extend(state.map(|(n, t)| (format!("reference.{n}"), t)));
    }
    let (actor, critic) = updater.optimizers();
    for (prefix, optimizer) in [("actor", Some(actor)), ("critic", critic)] {
        if let Some(optimizer) = optimizer {
            named.extend(optimizer.state().into_iter().map(|(n, t)| (format!("{prefix}.{n}"), t)));
        }
    }
    let file = beside.join(OPTIMIZER);
    let refs: Vec<(&str, &Tensor)> = named.iter().map(|(n, t)| (n.as_str(), t)).collect();
    Tensor::write_safetensors(&refs, &file).map_err(|e| io("writing", &file)(std::io::Error::other(e.to_string())))?;
    sync(&file)?;
    write_atomic(&beside.join(CONFIG), config.to_toml()?.as_bytes())?;
    let state = State {
        format_version: FORMAT_VERSION,
        counters: counters.clone(),
        files: vec![
            model,
            describe_file(&beside.join(OPTIMIZER))?,
            describe_file(&beside.join(CONFIG))?,
        ],
    };
    write_atomic(&beside.join(STATE), &json(&state)?)?;
    if target.exists() {
        discard(dir, counters.iteration)?;
    }
    fs::rename(&beside, &target).map_err(io("renaming to", &target))?;
    sync(dir)?;
    Ok(target)
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(LearnerError::State)
}

/// Removes a checkpoint. Renames the folder first, so that no half-removed checkpoint is ever found.
fn discard(dir: &Path, iteration: u32) -> Result<()> {
    let (target, aside) = (
        path(dir, iteration),
        dir.join(format!(".iteration_{iteration:06}.removing")),
    );
    remove(&aside)?;
    fs::rename(&target, &aside).map_err(io("removing", &target))?;
    remove(&aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_checkpoints_are_listed_in_the_order_of_iterations() {
        let dir = tempfile::tempdir().expect("folder");
        assert!(list(&dir.path().join("none")).expect("list").is_empty());
        for name in [
            "iteration_000100",
            "iteration_000020",
            "iteration_1000000",
            ".iteration_000120.writing",
            "iteration_x",
            "other",
        ] {
            fs::create_dir(dir.path().join(name)).expect("folder");
        }
        assert_eq!(list(dir.path()).expect("list"), [20, 100, 1_000_000]);
        discard(dir.path(), 20).expect("discard");
        assert_eq!(list(dir.path()).expect("list"), [100, 1_000_000]);
    }

    #[test]
    fn a_folder_that_is_no_checkpoint_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("folder");
        let refused = |text: &str| {
            fs::write(dir.path().join(STATE), text).expect("state");
            Checkpoint::read(dir.path(), &[]).expect_err("refused").to_string()
        };
        let error = Checkpoint::read(dir.path(), &[]).expect_err("refused").to_string();
        assert!(
            error.contains("state.json") && error.contains("checkpoint `"),
            "{error}"
        );
        assert!(refused("{\"format_version\":").contains("no JSON"));
        assert!(refused("{}").contains("`format_version` is none, this program reads 1"));
        assert!(refused("{\"format_version\": 7}").contains("`format_version` is 7, this program reads 1"));
        assert!(refused("{\"format_version\": 1}").contains("counters"));
    }
}
