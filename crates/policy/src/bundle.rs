//! The policy bundle: a directory that holds one policy version, never changed after its rename.
//!
//! `manifest.json` is written last and names every other file with its size and SHA-256. A writer fills a folder beside the
//! target, syncs, and renames; a reader refuses whatever does not match.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    config::{TokenizerConfig, WeightMode, hex},
    dims::PolicyDims,
    flow::Sampling,
    norm::{DimStats, NormError, NormStats, Normalization, absolute_from_delta, bool_mask, mask_fits},
    params::{Heads, ParamSpec, Part, params},
};

/// Version of the manifest and of the graphs' inputs and outputs.
pub const BUNDLE_VERSION: u32 = 2;
/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";
/// The prefix graph's file name.
pub const PREFIX_GRAPH: &str = "prefix.onnx";
/// The denoise graph's file name.
pub const DENOISE_GRAPH: &str = "denoise.onnx";
/// Weights of the vision-language model.
pub const VLM_WEIGHTS: &str = "vlm.safetensors";
/// Weights of the action expert, the projections and the value head.
pub const EXPERT_WEIGHTS: &str = "expert.safetensors";
/// `SentencePiece` model of the prompt tokenizer, when the policy has one.
pub const TOKENIZER_MODEL: &str = "tokenizer.model";

const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// How the manifest states the direction of flow time.
pub const FLOW_TIME: &str = "t=1 noise, t=0 action";

/// One file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleFile {
    /// File name, no folder in it.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// A reference output of the publisher: the actions of an ODE pass on inputs that both sides draw from `seed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfTest {
    /// Seed of the inputs (see [`crate::selftest`]).
    pub seed: u64,
    /// Actions in model units, `[action_horizon, action_dim]`.
    pub actions: Vec<f32>,
    /// Largest absolute difference that still passes.
    pub tolerance: f32,
}

/// `manifest.json`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`BUNDLE_VERSION`] of the writer.
    pub format_version: u32,
    /// Count of published updates; 0 is the start of RL.
    pub policy_version: u64,
    /// Always [`FLOW_TIME`].
    pub flow_time: String,
    /// Sizes.
    pub dims: PolicyDims,
    /// Heads beside the velocity.
    pub heads: Heads,
    /// Sampling.
    pub sampling: Sampling,
    /// Rows executed per query.
    pub action_chunk: usize,
    /// Action width of the environment.
    pub env_action_dim: usize,
    /// Camera names in order.
    pub cameras: Vec<String>,
    /// Prompt tokenizer; a model path is [`TOKENIZER_MODEL`] inside the bundle.
    pub tokenizer: TokenizerConfig,
    /// The prompt holds the normalised state in words, see [`crate::prompt::pi05_prompt`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discrete_state_input: bool,
    /// Normalisation of state and actions.
    pub normalization: Normalization,
    /// Its statistics.
    pub norm_stats: Option<NormStats>,
    /// Run lengths of the action dimensions that are differences from the state (see [`crate::norm::bool_mask`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_actions: Option<Vec<i32>>,
    /// Weight mode of the denoise graph.
    pub weights: WeightMode,
    /// Batch size of the graphs; absent: dynamic.
    pub batch: Option<usize>,
    /// Digest of the configuration that made it.
    pub config_digest: String,
    /// Reference output.
    pub self_test: Option<SelfTest>,
    /// All files but the manifest, sorted by name.
    pub files: Vec<BundleFile>,
}

/// A bundle that cannot be written or must not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// A file operation failed.
    #[error("{action} `{path}`: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The target is there already.
    #[error("bundle `{0}` exists already and bundles are never changed: choose another folder")]
    Exists(PathBuf),
    /// The manifest does not parse.
    #[error("manifest of bundle `{path}`: {detail}")]
    Manifest {
        /// Which bundle.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Another format version.
    #[error(
        "bundle `{path}` has format version {found}, this program reads {expected}: export it again with a matching `export`"
    )]
    FormatVersion {
        /// Which bundle.
        path: PathBuf,
        /// What this program reads.
        expected: u32,
        /// What the manifest says.
        found: u64,
    },
    /// A file differs from its entry.
    #[error("file `{name}` of bundle `{path}`: expected {expected}, found {found}")]
    File {
        /// Which bundle.
        path: PathBuf,
        /// Which file.
        name: String,
        /// What the manifest says.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Weights that do not fit.
    #[error("weights `{path}`: {source}")]
    Weights {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: crate::weights::WeightsError,
    },
}

/// Adds what was attempted, on which file, to an IO error.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BundleError {
    let path = path.to_owned();
    move |source| BundleError::Io { action, path, source }
}

/// Where the bytes of a new bundle's file come from.
#[derive(Debug)]
pub enum Source {
    /// Written as they are.
    Bytes(Vec<u8>),
    /// A file of another bundle with the same content: linked when the file system can, else copied.
    Same(PathBuf, BundleFile),
}

impl Manifest {
    /// The weights that the bundle's two files must hold, by part.
    pub fn params(&self) -> Vec<ParamSpec> {
        params(&self.dims, &self.heads)
    }

    /// One executed action, `[env_action_dim]`, from model units to the environment's; `state` is the model's input,
    /// `[action_dim]`, which a policy with delta actions adds in the environment's units.
    ///
    /// # Errors
    /// The statistics do not fit.
    pub fn env_action(&self, action: &[f32], state: &[f32]) -> Result<Vec<f32>, NormError> {
        let in_env_units = |of: fn(&NormStats) -> &DimStats, row: &[f32]| match &self.norm_stats {
            Some(stats) => self.normalization.unnormalize(of(stats), row),
            None => Ok(row.to_vec()),
        };
        let action = in_env_units(|stats| &stats.actions, action)?;
        let Some(runs) = &self.delta_actions else {
            return Ok(action);
        };
        absolute_from_delta(&action, &in_env_units(|stats| &stats.state, state)?, &bool_mask(runs))
    }

    /// The entry of a file.
    pub fn file(&self, name: &str) -> Option<&BundleFile> {
        self.files.iter().find(|f| f.name == name)
    }
}

/// A bundle on disk whose manifest has been read and checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
    /// The manifest.
    pub manifest: Manifest,
}

impl Bundle {
    /// Reads and checks the manifest; the files are only looked at by [`Bundle::verify`].
    ///
    /// # Errors
    /// Says what was expected and found: missing manifest, other format version, unknown or missing keys, impossible sizes.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join(MANIFEST);
        let mut text = String::new();
        let file = File::open(&path).map_err(io("opening the manifest", &path))?;
        file.take(MAX_MANIFEST_BYTES)
            .read_to_string(&mut text)
            .map_err(io("reading the manifest", &path))?;
        let bad = |detail: String| BundleError::Manifest {
            path: dir.to_owned(),
            detail,
        };
        let raw: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(format!("no JSON: {e}")))?;
        let found = raw
            .get("format_version")
            .and_then(serde_json::Value::as_u64)
            .ok_or_else(|| bad("`format_version` is missing".to_owned()))?;
        if found != u64::from(BUNDLE_VERSION) {
            return Err(BundleError::FormatVersion {
                path: dir.to_owned(),
                expected: BUNDLE_VERSION,
                found,
            });
        }
        let manifest: Manifest = serde_json::from_value(raw).map_err(|e| bad(e.to_string()))?;
        manifest.dims.check().map_err(|e| bad(e.to_string()))?;
        if manifest.flow_time != FLOW_TIME {
            return Err(bad(format!(
                "`flow_time` is `{}`, expected `{FLOW_TIME}`",
                manifest.flow_time
            )));
        }
        if manifest.action_chunk == 0
            || manifest.action_chunk > manifest.dims.action_horizon
            || manifest.env_action_dim == 0
            || manifest.env_action_dim > manifest.dims.action_dim
            || manifest.sampling.num_steps == 0
            || manifest.sampling.num_steps > 1000
            || manifest.cameras.len() != manifest.dims.cameras
        {
            return Err(bad(
                "`action_chunk`, `env_action_dim`, `num_steps` or `cameras` do not fit the sizes".to_owned(),
            ));
        }
        if let Some(runs) = manifest
            .delta_actions
            .as_ref()
            .filter(|runs| !mask_fits(runs, manifest.env_action_dim))
        {
            return Err(bad(format!(
                "`delta_actions` is {runs:?}, expected runs other than 0 over at most `env_action_dim` = {}",
                manifest.env_action_dim
            )));
        }
        for required in [PREFIX_GRAPH, DENOISE_GRAPH, VLM_WEIGHTS, EXPERT_WEIGHTS] {
            if manifest.file(required).is_none() {
                return Err(bad(format!("`files` lacks `{required}`")));
            }
        }
        if let Some(entry) = manifest.files.iter().find(|f| !plain_name(&f.name)) {
            return Err(bad(format!(
                "`files` names `{}`, expected a plain file name",
                entry.name
            )));
        }
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
        })
    }

    /// The bundle's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Path of one of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Checks every file: present, no other beside it, size, SHA-256; and every weight: name, shape, type, finite.
    ///
    /// # Errors
    /// Names the first file or weight that differs, with both values.
    pub fn verify(&self) -> Result<(), BundleError> {
        let entries = fs::read_dir(&self.dir).map_err(io("listing the bundle", &self.dir))?;
        for entry in entries {
            let entry = entry.map_err(io("listing the bundle", &self.dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != MANIFEST && self.manifest.file(&name).is_none() {
                return Err(self.file_error(&name, "no such file", "a file that the manifest does not name"));
            }
        }
        for entry in &self.manifest.files {
            self.verify_file(entry)?;
        }
        self.check_weights()
    }

    fn verify_file(&self, entry: &BundleFile) -> Result<(), BundleError> {
        let path = self.path(&entry.name);
        let found = describe_file(&path)?;
        if found.bytes != entry.bytes {
            return Err(self.file_error(
                &entry.name,
                &format!("{} bytes", entry.bytes),
                &format!("{} bytes", found.bytes),
            ));
        }
        if found.sha256 != entry.sha256 {
            return Err(self.file_error(&entry.name, &format!("sha256 {}", entry.sha256), &found.sha256));
        }
        Ok(())
    }

    fn file_error(&self, name: &str, expected: &str, found: &str) -> BundleError {
        BundleError::File {
            path: self.dir.clone(),
            name: name.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    fn check_weights(&self) -> Result<(), BundleError> {
        let all = self.manifest.params();
        for (name, vlm) in [(VLM_WEIGHTS, true), (EXPERT_WEIGHTS, false)] {
            let wanted: Vec<&ParamSpec> = all.iter().filter(|p| (p.part == Part::Vlm) == vlm).collect();
            let path = self.path(name);
            let weights = crate::weights::WeightFile::open(&path).map_err(|source| BundleError::Weights {
                path: path.clone(),
                source,
            })?;
            weights.check(&wanted).map_err(|source| BundleError::Weights {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }
}

fn plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && name != MANIFEST
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// Size and SHA-256 of a file.
///
/// # Errors
/// The file cannot be read.
pub fn describe_file(path: &Path) -> Result<BundleFile, BundleError> {
    let mut file = File::open(path).map_err(io("opening", path))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0u64;
    loop {
        let n = file.read(&mut buffer).map_err(io("reading", path))?;
        if n == 0 {
            break;
        }
        bytes += n as u64;
        digest.update(buffer.get(..n).unwrap_or_default());
    }
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(BundleFile {
        name,
        bytes,
        sha256: hex(&digest.finalize()),
    })
}

/// Writes a bundle: files beside the target, synced, manifest last, then one rename. `manifest.files` is filled in here.
///
/// # Errors
/// The target exists or a file operation fails; then nothing is left at the target.
pub fn publish(dir: &Path, files: Vec<(String, Source)>, mut manifest: Manifest) -> Result<Bundle, BundleError> {
    if dir.exists() {
        return Err(BundleError::Exists(dir.to_owned()));
    }
    let parent = dir
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io("creating the folder", parent))?;
    let name = dir
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let beside = parent.join(format!(".{name}.writing.{}", std::process::id()));
    if beside.exists() {
        fs::remove_dir_all(&beside).map_err(io("removing an earlier attempt", &beside))?;
    }
    let written = fill(&beside, files, &mut manifest).and_then(|()| {
        fs::rename(&beside, dir).map_err(io("renaming to", dir))?;
        sync_dir(parent)
    });
    if let Err(error) = written {
        if beside.exists() {
            fs::remove_dir_all(&beside).map_err(io("removing a failed attempt", &beside))?;
        }
        return Err(error);
    }
    Ok(Bundle {
        dir: dir.to_owned(),
        manifest,
    })
}

fn fill(beside: &Path, files: Vec<(String, Source)>, manifest: &mut Manifest) -> Result<(), BundleError> {
    fs::create_dir_all(beside).map_err(io("creating the folder", beside))?;
    manifest.files.clear();
    for (name, source) in files {
        let path = beside.join(&name);
        let entry = match source {
            Source::Bytes(bytes) => {
                write_synced(&path, &bytes)?;
                BundleFile {
                    name,
                    bytes: bytes.len() as u64,
                    sha256: hex(&Sha256::digest(&bytes)),
                }
            }
            Source::Same(from, entry) => {
                if fs::hard_link(&from, &path).is_err() {
                    fs::copy(&from, &path).map_err(io("copying to", &path))?;
                    File::open(&path)
                        .and_then(|f| f.sync_all())
                        .map_err(io("syncing", &path))?;
                }
                BundleFile { name, ..entry }
            }
        };
        manifest.files.push(entry);
    }
    manifest.files.sort_by(|a, b| a.name.cmp(&b.name));
    let text = serde_json::to_vec_pretty(manifest).map_err(|e| BundleError::Manifest {
        path: beside.to_owned(),
        detail: e.to_string(),
    })?;
    write_synced(&beside.join(MANIFEST), &text)?;
    sync_dir(beside)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let mut file = File::create(path).map_err(io("creating", path))?;
    file.write_all(bytes).map_err(io("writing", path))?;
    file.sync_all().map_err(io("syncing", path))
}

fn sync_dir(path: &Path) -> Result<(), BundleError> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(io("syncing the folder", path))
}

/// Writes one file atomically: beside it, synced, renamed.
///
/// # Errors
/// A file operation fails; then the old file, if any, is untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io("creating the folder", parent))?;
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let beside = parent.join(format!(".{name}.writing.{}", std::process::id()));
    let done = write_synced(&beside, bytes).and_then(|()| fs::rename(&beside, path).map_err(io("renaming to", path)));
    if done.is_err() {
        // the error at hand says more than one of the tidying-up would
        drop(fs::remove_file(&beside));
    }
    done?;
    sync_dir(parent)
}
