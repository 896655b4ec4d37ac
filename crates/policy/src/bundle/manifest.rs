//! The manifest of a bundle: the policy's description and the list of its files.

use serde::{Deserialize, Serialize};

use super::BundleFile;
use crate::{
    config::{Flavour, Precision, TokenizerConfig, WeightMode},
    contract::Contract,
    cuda::{CudaContract, CudaError},
    dims::PolicyDims,
    flow::Sampling,
    graph::{DENOISE_GRAPH, PREFIX_GRAPH},
    norm::{NormStats, Normalization},
    params::{Heads, ParamSpec, params},
};

/// Version of the manifest and of the graphs' inputs and outputs.
pub const BUNDLE_VERSION: u32 = 2;
/// The manifest's file name.
pub const MANIFEST: &str = "manifest.json";
/// Weights of the vision-language model.
pub const VLM_WEIGHTS: &str = "vlm.safetensors";
/// Weights of the action expert, the projections, the noise head and the value head.
pub const EXPERT_WEIGHTS: &str = "expert.safetensors";
/// `SentencePiece` model of the prompt tokenizer, if the policy uses one.
pub const TOKENIZER_MODEL: &str = "tokenizer.model";
/// Direction of flow time as written in the manifest.
pub const FLOW_TIME: &str = "t=1 noise, t=0 action";

/// Reference output of the publisher: actions of an ODE pass on inputs that publisher and engine draw from `seed`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SelfTest {
    /// Seed of the inputs (see [`crate::selftest`]).
    pub seed: u64,
    /// Actions in model units, `[action_horizon, action_dim]`.
    pub actions: Vec<f32>,
    /// Largest absolute difference that passes, in model units.
    pub tolerance: f32,
}

/// Contents of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`BUNDLE_VERSION`] of the writer.
    pub format_version: u32,
    /// Number of published updates; 0 is the start of RL.
    pub policy_version: u64,
    /// Always [`FLOW_TIME`].
    pub flow_time: String,
    /// Sizes of the policy.
    pub dims: PolicyDims,
    /// Heads in addition to the velocity output.
    pub heads: Heads,
    /// Sampling parameters.
    pub sampling: Sampling,
    /// Action rows executed per query.
    pub action_chunk: usize,
    /// Action width of the environment.
    pub env_action_dim: usize,
    /// State width of the environment; absent: the width of the statistics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env_state_dim: Option<usize>,
    /// Camera names in order.
    pub cameras: Vec<String>,
    /// Prompt tokenizer; the path of a `SentencePiece` model is [`TOKENIZER_MODEL`] inside the bundle.
    pub tokenizer: TokenizerConfig,
    /// Whether the prompt holds the normalized state in words, see [`crate::prompt::pi05_prompt`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub discrete_state_input: bool,
    /// Normalization of state and actions.
    pub normalization: Normalization,
    /// Statistics of the normalization.
    pub norm_stats: Option<NormStats>,
    /// Run lengths of the action dimensions that are differences from the state (see [`crate::norm::bool_mask`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta_actions: Option<Vec<i32>>,
    /// Form of the graphs.
    #[serde(default, skip_serializing_if = "Flavour::is_plain")]
    pub flavour: Flavour,
    /// Element type of matrices and tokens in the graphs.
    #[serde(default, skip_serializing_if = "Precision::is_f32")]
    pub precision: Precision,
    /// Weight mode of the denoise graph.
    pub weights: WeightMode,
    /// Fixed batch size of the graphs; absent: dynamic.
    pub batch: Option<usize>,
    /// Digest of the configuration that the bundle was made with.
    pub config_digest: String,
    /// Reference output for the self-test.
    pub self_test: Option<SelfTest>,
    /// All files except the manifest, sorted by name.
    pub files: Vec<BundleFile>,
}

impl Manifest {
    /// Returns the weights that the two weight files must hold, in the order of the parameter table.
    pub fn params(&self) -> Vec<ParamSpec> {
        params(&self.dims, &self.heads)
    }

    /// Returns what the policy reads from a robot and commands to the robot.
    pub fn contract(&self) -> Contract {
        let dims = &self.dims;
        Contract {
            cameras: self.cameras.clone(),
            image_size: dims.vision.image_size,
            vocab: dims.vocab,
            prompt_len: dims.prompt_len,
            action_dim: dims.action_dim,
            action_horizon: dims.action_horizon,
            env_action_dim: self.env_action_dim,
            env_state_dim: self.env_state_dim,
            discrete_state_input: self.discrete_state_input,
            normalization: self.normalization,
            norm_stats: self.norm_stats.clone(),
            delta_actions: self.delta_actions.clone(),
        }
    }

    /// Returns the contract of the graphs of flavour `cuda`; `None` for another flavour.
    ///
    /// # Errors
    /// The policy has no such graphs, or the batch size is not fixed.
    pub fn cuda(&self) -> Result<Option<CudaContract>, CudaError> {
        if self.flavour != Flavour::Cuda {
            return Ok(None);
        }
        let element = self.precision.element();
        let batch = self.batch.unwrap_or(0);
        CudaContract::new(&self.dims, &self.heads, element, batch, self.sampling.num_steps).map(Some)
    }

    /// Returns the names of the graph files.
    ///
    /// # Errors
    /// See [`Manifest::cuda`].
    pub fn graph_files(&self) -> Result<Vec<String>, CudaError> {
        Ok(match self.cuda()? {
            None => vec![PREFIX_GRAPH.to_owned(), DENOISE_GRAPH.to_owned()],
            Some(contract) => contract.files(),
        })
    }

    /// Returns the entry of a file.
    pub fn file(&self, name: &str) -> Option<&BundleFile> {
        self.files.iter().find(|f| f.name == name)
    }
}
