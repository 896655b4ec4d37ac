//! The manifest: what a policy is and which files hold it.

use serde::{Deserialize, Serialize};

use super::BundleFile;
use crate::{
    config::{TokenizerConfig, WeightMode},
    dims::PolicyDims,
    flow::Sampling,
    norm::{NormStats, Normalization},
    params::{Heads, ParamSpec, params},
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
/// How the manifest states the direction of flow time.
pub const FLOW_TIME: &str = "t=1 noise, t=0 action";

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

impl Manifest {
    /// The weights that the bundle's two files must hold, by part.
    pub fn params(&self) -> Vec<ParamSpec> {
        params(&self.dims, &self.heads)
    }

    /// The entry of a file.
    pub fn file(&self, name: &str) -> Option<&BundleFile> {
        self.files.iter().find(|f| f.name == name)
    }
}
