//! Run configuration: strict TOML, the field's usual key paths, `extends` for bases, `--set a.b=c` for overrides.
//!
//! A key that changes a result has no silent default: such a key is required, or its absence means that a feature is off.

mod algorithm;
mod origin;
mod error;
mod layers;
mod neutral;
mod load;
mod keys;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::{
    algorithm::{
        AlgorithmConfig, BootstrapType, Bounds, FilterConfig, FilterMode, LogprobType, LossAgg, ReferenceConfig,
        RewardType, VelocityConfig,
    },
    error::ConfigError,
    keys::keys,
    load::hex,
    neutral::Neutral,
    origin::{Origin, Origins},
};

use crate::{
    dims::{StackDims, Variant, VisionDims},
    element::ElementType,
    flow::{Mdp, NoiseAnneal, NoiseMethod},
    norm::Normalization,
    params::{CriticInput, NoiseHeadDims, Pooling, ValueSteps},
};

/// Configuration of one run, shared by all its processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Output, length and evaluation of the run.
    pub runner: RunnerConfig,
    /// Vision-language pre-training; absent for a run that starts from a pretrained checkpoint.
    pub pretrain: Option<PretrainConfig>,
    /// Supervised fine-tuning on demonstrations; absent: off.
    pub sft: Option<SftConfig>,
    /// Policy, batches and optimizer.
    pub actor: ActorConfig,
    /// RL algorithm.
    pub algorithm: AlgorithmConfig,
    /// Environment.
    pub env: EnvConfig,
    /// Rollout engine.
    pub rollout: RolloutConfig,
    /// Endpoint of the learner.
    pub learner: LearnerConfig,
}

/// Start of the engine and the env workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launch {
    /// `learner train` starts engine and env workers as child processes.
    Local,
    /// The user starts engine and env workers, on this machine or on others.
    None,
}

/// `[runner]`: output, length and evaluation of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunnerConfig {
    /// Folder for all files of the run.
    pub output_dir: PathBuf,
    /// Seed of initial weights, noise, resets and minibatches.
    pub seed: u64,
    /// RL iterations; each makes one policy version.
    pub max_epochs: u32,
    /// Iterations between checkpoints; 0: only the last iteration.
    pub save_interval: u32,
    /// Iterations between evaluations; 0: none during training.
    pub val_check_interval: u32,
    /// Number of newest checkpoints to keep; absent: all.
    pub keep_last: Option<u32>,
    /// Whether the checkpoint of the best evaluation during training is written and kept.
    #[serde(default)]
    pub keep_best: bool,
    /// Start of the engine and the env workers.
    pub launch: Launch,
}

/// Schedule of a supervised stage: AdamW with linear warm-up and cosine decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageOptim {
    /// Optimizer steps.
    pub steps: u32,
    /// Samples per step.
    pub batch_size: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Length of the linear warm-up in optimizer steps.
    pub lr_warmup_steps: u32,
    /// Final learning rate as a fraction of the peak.
    pub min_lr_ratio: f64,
    /// Factor of the decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm, to which gradients are clipped.
    pub clip_grad: f64,
}

/// `[pretrain]`: referring localization, a task in which a small vision tower learns object positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// Number of random scenes in the data set.
    pub scenes: usize,
    /// Key points per scene (named object, goal, gripper).
    pub keypoints: usize,
    /// Optimizer and schedule.
    pub optim: StageOptim,
}

/// `[sft]`: flow matching on demonstrations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftConfig {
    /// Number of demonstrated episodes.
    pub demos: usize,
    /// Optimizer and schedule.
    pub optim: StageOptim,
}

/// Storage of the frozen vision-language model's outputs during an iteration. The choice does not change a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixCachePlace {
    /// Main memory.
    Memory,
    /// A file in the run's folder.
    Disk,
    /// No storage; the prefix runs again for every micro-batch.
    Off,
}

impl PrefixCachePlace {
    /// Returns the name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Off => "off",
        }
    }
}

/// `[actor]`: policy, batches and optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActorConfig {
    /// Chunk records per optimizer step.
    pub global_batch_size: usize,
    /// Chunk records per forward and backward pass; gradients are summed over a global batch.
    pub micro_batch_size: usize,
    /// Number of libtorch threads.
    pub threads: usize,
    /// Storage of the frozen prefixes of an iteration's records; absent: `memory`.
    pub prefix_cache: Option<PrefixCachePlace>,
    /// Largest size of the stored prefixes in megabytes (10^6 bytes); absent: [`crate::plan::DEFAULT_PREFIX_CACHE_MB`].
    pub prefix_cache_mb: Option<u64>,
    /// Policy network.
    pub model: ModelConfig,
    /// Optimizer of RL.
    pub optim: OptimConfig,
}

/// `[actor.model]`: sizes, heads, inputs and outputs of the policy network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Architecture.
    pub variant: Variant,
    /// openpi checkpoint (`.safetensors`) with the initial weights; absent: random weights.
    pub checkpoint: Option<PathBuf>,
    /// Vocabulary size of the text embedding.
    pub vocab: usize,
    /// Vision-language stack (Gemma).
    pub vlm: StackDims,
    /// Action expert stack (Gemma).
    pub expert: StackDims,
    /// Layers of each stack.
    pub depth: usize,
    /// Query heads of each stack.
    pub heads: usize,
    /// Key and value heads of each stack; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Image tower.
    pub vision: VisionDims,
    /// Camera names in order; the environment's images are matched by position.
    pub cameras: Vec<String>,
    /// Prompt tokens, padding included.
    pub prompt_len: usize,
    /// Padded action and state width of the model.
    pub action_dim: usize,
    /// Action width of the environment.
    pub env_action_dim: usize,
    /// State width of the environment; absent: the width of the statistics.
    pub env_state_dim: Option<usize>,
    /// Predicted action rows per chunk.
    pub action_horizon: usize,
    /// Action rows executed before the next query.
    pub num_action_chunks: usize,
    /// Denoise steps per chunk.
    pub num_steps: usize,
    /// Normalization of state and actions.
    pub normalization: Normalization,
    /// Path of a statistics file (see [`crate::norm::NormStats::from_json`]); required unless `normalization = "none"`.
    pub norm_stats: Option<PathBuf>,
    /// Run lengths of the leading action dimensions that are differences from the state; absent: all dimensions are absolute.
    ///
    /// `[6, -1]` is six differences and one absolute dimension (openpi's `make_bool_mask`).
    pub delta_actions: Option<Vec<i32>>,
    /// Prompt tokenizer.
    pub tokenizer: TokenizerConfig,
    /// Whether pi0.5's prompt holds the normalized state in words (pi0.5 only); absent: false, so that pi0.5 reads no state.
    #[serde(default)]
    pub discrete_state_input: bool,
    /// Value head; absent: no critic.
    pub value_head: Option<ValueHeadConfig>,
    /// Sampling and trained part.
    pub openpi: OpenPiConfig,
}

/// `[actor.model.tokenizer]`: kind of the prompt tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum TokenizerConfig {
    /// A closed list of words, for small policies.
    Words {
        /// Words in the order of ids.
        words: Vec<String>,
    },
    /// `PaliGemma`'s `SentencePiece` model.
    SentencePiece {
        /// Path of `tokenizer.model`.
        model: PathBuf,
    },
}

/// `[actor.model.value_head]`: input and widths of the value head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueHeadConfig {
    /// Input: `expert` (`V_expert`) or `vlm` (`V_vlm`).
    pub input: CriticInput,
    /// Hidden widths, at most 16.
    pub hidden: Vec<usize>,
    /// Whether the value gradient stops at the head's input.
    pub detach_critic_input: bool,
    /// `V_vlm` of pi0 only: whether the head reads the proprioceptive state, which is missing from pi0's prefix.
    ///
    /// pi0.5's prompt holds the state with `discrete_state_input`.
    #[serde(default)]
    pub state: bool,
    /// Prefix tokens that a `V_vlm` head reads; absent: the mean over the valid tokens.
    pub pooling: Option<Pooling>,
    /// `V_expert` only: whether the mean is over the executed action tokens instead of the whole horizon.
    #[serde(default)]
    pub chunk_critic_input: bool,
    /// Denoise steps of the value of a `V_expert` head; absent: the stochastic steps.
    pub steps: Option<ValueSteps>,
}

/// `[actor.model.openpi.noise_head]`: widths and range of the noise head.
pub type NoiseHeadConfig = NoiseHeadDims;

/// Reduction of the log-probabilities of a chunk's denoise steps to one number (`mdp = "joint"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JointLogprob {
    /// Sum, the log-likelihood of the whole path (piRL, Eq. 5).
    Sum,
    /// Mean over `K + 1` terms, the `K` steps and the initial noise, as in the reference; the ratio is a `K + 1`-th root. The
    /// entropy is a mean over the same terms.
    Mean,
}

/// `[actor.model.openpi]`: sampling and trained part of the policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenPiConfig {
    /// Noise method of the stochastic steps.
    pub noise_method: NoiseMethod,
    /// Noise scale `a` of the papers.
    pub noise_level: f64,
    /// Noise level as a function of the policy version, instead of `noise_level`; absent: constant.
    pub noise_anneal: Option<NoiseAnneal>,
    /// Widths and range of the noise head; required with `flow_noise`, rejected otherwise.
    pub noise_head: Option<NoiseHeadConfig>,
    /// Choice of the stochastic denoise steps, and unit of one decision.
    pub mdp: Mdp,
    /// Reduction of the log-probabilities; required with `mdp = "joint"`, rejected otherwise.
    pub joint_logprob: Option<JointLogprob>,
    /// Whether the log-probability is `-(x_next - mean)^2`, without scale and constant (the reference's `safe_get_logprob`).
    #[serde(default)]
    pub safe_get_logprob: bool,
    /// Whether the last denoise step is deterministic.
    pub ignore_last: bool,
    /// Whether RL trains the action expert only, with a frozen vision-language model; must be true.
    pub train_expert_only: bool,
}

/// `[actor.optim]`: AdamW optimizer of RL.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimConfig {
    /// Peak learning rate of the actor.
    pub lr: f64,
    /// Learning rate of the value head.
    pub value_lr: f64,
    /// Decay of the first and the second moment.
    pub betas: [f64; 2],
    /// Term that keeps the denominator above 0.
    pub eps: f64,
    /// Factor of the decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm, to which gradients are clipped.
    pub clip_grad: f64,
    /// Length of the linear warm-up of the actor's learning rate in optimizer steps.
    pub lr_warmup_steps: u32,
    /// Final learning rate as a fraction of the peak, reached by a cosine over the run; 1: constant learning rate.
    pub min_lr_ratio: f64,
    /// Number of first iterations that train only the critic.
    pub critic_warmup_epochs: u32,
}

/// `[env]`: environment, workers and episodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvConfig {
    /// Registered name (`tabletop`; in the Python worker `metaworld`, `libero`, `gym`).
    pub name: String,
    /// Program of the env worker.
    pub worker: WorkerKind,
    /// Python interpreter with the simulator, for the Python worker; absent: the interpreter from `scripts/setup-metaworld`.
    pub python: Option<PathBuf>,
    /// Parameters of the environment, which the environment checks.
    pub params: toml::Table,
    /// Parameters that override `params` while demonstrations are collected, such as a demonstrator's flaw.
    pub demo_params: toml::Table,
    /// Environments of training.
    pub train: EnvTrainConfig,
    /// Environments of evaluation.
    pub eval: EnvEvalConfig,
}

/// Program that runs the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerKind {
    /// The Rust binary `env-worker`.
    Rust,
    /// The Python package, `python -m pirl_env_worker`.
    Python,
}

/// `[env.train]`: environments of training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvTrainConfig {
    /// Number of environments over all workers.
    pub total_num_envs: usize,
    /// Episodes per environment and iteration.
    pub rollout_epoch: usize,
    /// Number of worker processes.
    pub workers: usize,
}

/// `[env.eval]`: episodes of evaluations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvEvalConfig {
    /// Episodes of `learner eval`, with seeds that training never uses.
    pub episodes: usize,
    /// Episodes of an evaluation during training.
    pub train_episodes: usize,
}

/// Execution provider of the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// ONNX Runtime's CPU provider.
    Cpu,
    /// ONNX Runtime's CUDA provider.
    Cuda,
    /// ONNX Runtime's `TensorRT` provider.
    Tensorrt,
}

impl Provider {
    /// Returns the flavour of the graphs that the provider runs.
    pub fn flavour(self) -> Flavour {
        match self {
            Self::Cpu | Self::Tensorrt => Flavour::Plain,
            Self::Cuda => Flavour::Cuda,
        }
    }
}

/// Storage of the denoise graph's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightMode {
    /// External data of the graph, at offsets in the safetensors file.
    Constants,
    /// Graph inputs, bound by the engine.
    Inputs,
}

/// Form of exported graphs, which depends on the device that runs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Flavour {
    /// Standard operators, one graph for prefix and one for denoise steps.
    #[default]
    Plain,
    /// Fused operators over buffers in the memory of a CUDA device (see [`crate::cuda`]).
    Cuda,
}

impl Flavour {
    /// Returns whether the flavour is the default.
    pub fn is_plain(&self) -> bool {
        *self == Self::Plain
    }
}

/// Element type of matrices and tokens in exported graphs. Projections of actions, heads, noise and log-probabilities are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats with the exponent of 32-bit floats.
    Bf16,
}

impl Precision {
    /// Returns whether the precision is the default.
    pub fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Returns the element type.
    pub fn element(self) -> ElementType {
        match self {
            Self::F32 => ElementType::F32,
            Self::Bf16 => ElementType::Bf16,
        }
    }
}

/// `[rollout]`: engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// Execution provider of the graphs.
    pub provider: Provider,
    /// Element type of matrices and tokens in the graphs, for provider `cuda`; absent: f32.
    #[serde(default, skip_serializing_if = "Precision::is_f32")]
    pub precision: Precision,
    /// Weight mode of the exported denoise graph.
    pub weights: WeightMode,
    /// Endpoint for env workers and clients, `tcp://HOST:PORT`; port 0 picks a free one.
    pub listen: String,
    /// `HOST:PORT` of `/healthz` and `/metrics`; port 0 picks a free one.
    pub http: String,
    /// Most rows of one inference.
    pub max_batch: usize,
    /// Number of rows of every inference, padded, so that results do not depend on the composition of batches; absent: as many
    /// rows as are pending.
    pub fixed_batch: Option<usize>,
    /// Longest wait of a request for further requests, in microseconds.
    pub batch_deadline_micros: u64,
    /// Most pending rows. In a full queue, the client with the most rows makes room for a client with fewer rows; otherwise a
    /// request is rejected as overloaded.
    pub queue_capacity: usize,
    /// Number of ONNX Runtime threads.
    pub threads: usize,
    /// Most versions, at least 1, by which a record may be older than the weights in training; absent: synchronous training.
    ///
    /// In synchronous training, every record is of the version in training.
    pub max_staleness: Option<u32>,
}

/// `[learner]`: endpoint of the learner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnerConfig {
    /// Endpoint for engines, `tcp://HOST:PORT`; port 0 picks a free one.
    pub listen: String,
}

#[cfg(test)]
mod tests;
