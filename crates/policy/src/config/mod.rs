//! The run configuration as typed: strict TOML, key paths as the field writes them, `extends` below, `--set a.b=c` on top.
//!
//! Nothing that changes a result has a silent default: a key is either required or its absence means that a feature is off.

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
    flow::{Mdp, NoiseAnneal, NoiseMethod},
    norm::Normalization,
    params::{CriticInput, NoiseHeadDims, Pooling, ValueSteps},
};

/// One run: every process of the ring reads the same file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The run as a whole.
    pub runner: RunnerConfig,
    /// Vision-language pre-training; absent when a pretrained checkpoint is the start.
    pub pretrain: Option<PretrainConfig>,
    /// Supervised fine-tuning on demonstrations.
    pub sft: Option<SftConfig>,
    /// What is trained.
    pub actor: ActorConfig,
    /// How RL trains it.
    pub algorithm: AlgorithmConfig,
    /// Where it acts.
    pub env: EnvConfig,
    /// The rollout engine.
    pub rollout: RolloutConfig,
    /// The learner's own endpoint.
    pub learner: LearnerConfig,
}

/// Who starts the processes of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Launch {
    /// `learner train` starts engine and env workers as child processes.
    Local,
    /// They are started by hand, here or on other machines.
    None,
}

/// `[runner]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunnerConfig {
    /// Folder of everything that the run leaves.
    pub output_dir: PathBuf,
    /// Seed of weights, noise, resets and minibatches.
    pub seed: u64,
    /// RL iterations; one policy version each.
    pub max_epochs: u32,
    /// Iterations between checkpoints; 0: only the last.
    pub save_interval: u32,
    /// Iterations between evaluations; 0: none during training.
    pub val_check_interval: u32,
    /// Checkpoints that stay, the newest ones; absent: all.
    pub keep_last: Option<u32>,
    /// The checkpoint of the best evaluation during training is written and stays.
    #[serde(default)]
    pub keep_best: bool,
    /// Who starts engine and env workers.
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
    /// Linear warm-up in optimizer steps.
    pub lr_warmup_steps: u32,
    /// Final learning rate as a fraction of the peak.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm.
    pub clip_grad: f64,
}

/// `[pretrain]`: referring localisation, the task that teaches a small vision tower where things are.
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

/// Where the frozen vision-language model's output for a record is kept until the iteration ends. No place changes a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixCachePlace {
    /// Main memory.
    Memory,
    /// A file in the run's folder.
    Disk,
    /// Nowhere: the prefix runs again for every micro-batch.
    Off,
}

impl PrefixCachePlace {
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Off => "off",
        }
    }
}

/// `[actor]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActorConfig {
    /// Chunk records per optimizer step.
    pub global_batch_size: usize,
    /// Chunk records per forward and backward pass; gradients are summed over a global batch.
    pub micro_batch_size: usize,
    /// Threads of libtorch.
    pub threads: usize,
    /// Where the frozen prefixes of an iteration's records are kept; absent: in memory.
    pub prefix_cache: Option<PrefixCachePlace>,
    /// Largest size of the kept prefixes in megabytes (10^6 bytes).
    pub prefix_cache_mb: Option<u64>,
    /// Network.
    pub model: ModelConfig,
    /// Optimizer of RL.
    pub optim: OptimConfig,
}

/// `[actor.model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Architecture.
    pub variant: Variant,
    /// Start from this openpi checkpoint (`.safetensors`) instead of random weights.
    pub checkpoint: Option<PathBuf>,
    /// Text vocabulary.
    pub vocab: usize,
    /// Vision-language stack.
    pub vlm: StackDims,
    /// Action expert.
    pub expert: StackDims,
    /// Layers of both stacks.
    pub depth: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Head width.
    pub head_dim: usize,
    /// Image tower.
    pub vision: VisionDims,
    /// Camera names in order; the environment's images are matched by position.
    pub cameras: Vec<String>,
    /// Prompt tokens, padding included.
    pub prompt_len: usize,
    /// Padded action width.
    pub action_dim: usize,
    /// Action width of the environment.
    pub env_action_dim: usize,
    /// Rows predicted.
    pub action_horizon: usize,
    /// Rows executed before the next query.
    pub num_action_chunks: usize,
    /// Denoise steps per chunk.
    pub num_steps: usize,
    /// Normalisation of state and actions.
    pub normalization: Normalization,
    /// `norm_stats.json` in openpi's layout; required unless `normalization = "none"`.
    pub norm_stats: Option<PathBuf>,
    /// Leading action dimensions that the policy gives as differences from the state, as run lengths: `[6, -1]` is six differences
    /// and one absolute (openpi's `make_bool_mask`); absent: all are absolute.
    pub delta_actions: Option<Vec<i32>>,
    /// Prompt tokenizer.
    pub tokenizer: TokenizerConfig,
    /// pi0.5 only: the prompt holds the normalised state in words; absent: false, and pi0.5 sees no state.
    #[serde(default)]
    pub discrete_state_input: bool,
    /// Value head; absent for algorithms without a critic.
    pub value_head: Option<ValueHeadConfig>,
    /// Sampling.
    pub openpi: OpenPiConfig,
}

/// `[actor.model.tokenizer]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum TokenizerConfig {
    /// A closed list of words, for small policies.
    Words {
        /// The words, in the order of their ids.
        words: Vec<String>,
    },
    /// `PaliGemma`'s `SentencePiece` model.
    SentencePiece {
        /// Path of `tokenizer.model`.
        model: PathBuf,
    },
}

/// `[actor.model.value_head]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueHeadConfig {
    /// What it reads: `expert` (`V_expert`) or `vlm` (`V_vlm`).
    pub input: CriticInput,
    /// Hidden widths.
    pub hidden: Vec<usize>,
    /// Stop the value gradient at the head's input.
    pub detach_critic_input: bool,
    /// `V_vlm` of pi0 only: also read the proprioceptive state, which pi0's prefix does not hold. pi0.5's prompt holds it with
    /// `discrete_state_input`.
    #[serde(default)]
    pub state: bool,
    /// `V_vlm`: which tokens; absent: the mean over the valid ones.
    pub pooling: Option<Pooling>,
    /// `V_expert`: the mean over the executed action tokens only, not over the whole horizon.
    #[serde(default)]
    pub chunk_critic_input: bool,
    /// `V_expert`: over which denoise steps; absent: the stochastic ones.
    pub steps: Option<ValueSteps>,
}

/// `[actor.model.openpi.noise_head]`
pub type NoiseHeadConfig = NoiseHeadDims;

/// How the log-probabilities of a chunk's denoise steps become one (`mdp = "joint"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JointLogprob {
    /// Their sum: the likelihood of the whole path (piRL, Eq. 5).
    Sum,
    /// Their mean together with the initial noise's, over `K + 1` terms, as the reference does: the ratio is the `K + 1`-th root. The
    /// entropy is such a mean too.
    Mean,
}

/// `[actor.model.openpi]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenPiConfig {
    /// How the stochastic step adds noise.
    pub noise_method: NoiseMethod,
    /// Scale `a` of the noise.
    pub noise_level: f64,
    /// `noise_level` moves with the policy version; absent: constant.
    pub noise_anneal: Option<NoiseAnneal>,
    /// Sizes and range of the noise head; with `flow_noise` and only there.
    pub noise_head: Option<NoiseHeadConfig>,
    /// Which denoise steps are stochastic, and what one decision is.
    pub mdp: Mdp,
    /// With `mdp = "joint"` and only there.
    pub joint_logprob: Option<JointLogprob>,
    /// Use `-(x_next - mean)^2` as the log-probability: no scale, no constant (the reference's `safe_get_logprob`).
    #[serde(default)]
    pub safe_get_logprob: bool,
    /// Keep the last denoise step deterministic.
    pub ignore_last: bool,
    /// Train the action expert only; the vision-language model stays frozen.
    pub train_expert_only: bool,
}

/// `[actor.optim]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimConfig {
    /// Learning rate of the actor.
    pub lr: f64,
    /// Learning rate of the value head.
    pub value_lr: f64,
    /// First and second moment decay.
    pub betas: [f64; 2],
    /// Denominator guard.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest global gradient norm.
    pub clip_grad: f64,
    /// Linear warm-up of the actor's learning rate, in optimizer steps.
    pub lr_warmup_steps: u32,
    /// Final learning rate as a fraction of the peak, reached by a cosine over the run; 1 keeps it constant.
    pub min_lr_ratio: f64,
    /// Iterations at the start that train the critic only.
    pub critic_warmup_epochs: u32,
}

/// `[env]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvConfig {
    /// Registered name (`tabletop`; of the Python worker `metaworld`, `libero`, `gym`).
    pub name: String,
    /// Which env worker: the Rust binary or the Python package.
    pub worker: WorkerKind,
    /// Interpreter of the Python worker, of an environment that has the simulator; absent: the one of `scripts/setup-metaworld`.
    pub python: Option<PathBuf>,
    /// Parameters of the environment; the environment checks them.
    pub params: toml::Table,
    /// Parameters that differ when demonstrations are collected (a demonstrator's flaw lies here).
    pub demo_params: toml::Table,
    /// Environments of training.
    pub train: EnvTrainConfig,
    /// Environments of evaluation.
    pub eval: EnvEvalConfig,
}

/// Which program runs the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerKind {
    /// `env-worker`.
    Rust,
    /// `python -m pirl_env_worker`.
    Python,
}

/// `[env.train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvTrainConfig {
    /// Environments over all workers.
    pub total_num_envs: usize,
    /// Episodes per environment and iteration.
    pub rollout_epoch: usize,
    /// Worker processes.
    pub workers: usize,
}

/// `[env.eval]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvEvalConfig {
    /// Episodes of `learner eval`, with seeds that training never sees.
    pub episodes: usize,
    /// Episodes of the evaluations during training.
    pub train_episodes: usize,
}

/// Which device runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provider {
    /// ONNX Runtime on the CPU.
    Cpu,
    /// ONNX Runtime's CUDA provider.
    Cuda,
    /// ONNX Runtime's `TensorRT` provider.
    Tensorrt,
}

/// Where the denoise graph has its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightMode {
    /// External data of the graph, at their offsets in the safetensors file.
    Constants,
    /// Graph inputs, bound by the engine.
    Inputs,
}

/// `[rollout]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// Execution provider.
    pub provider: Provider,
    /// Weight mode of the exported denoise graph.
    pub weights: WeightMode,
    /// Endpoint for env workers and clients, `tcp://HOST:PORT`; port 0 picks a free one.
    pub listen: String,
    /// `HOST:PORT` of `/healthz` and `/metrics`; port 0 picks a free one.
    pub http: String,
    /// Largest batch of one inference.
    pub max_batch: usize,
    /// Every run of the graphs has exactly so many rows, padded, so that no result depends on which rows share a batch; absent:
    /// as many rows as there are.
    pub fixed_batch: Option<usize>,
    /// How long a request may wait for others, in microseconds.
    pub batch_deadline_micros: u64,
    /// Rows of clients that may wait; when it is full, the client with the most rows makes room for one with fewer, else a request is
    /// refused as overloaded.
    pub queue_capacity: usize,
    /// Threads of ONNX Runtime.
    pub threads: usize,
    /// Asynchronous training: how many versions older than the weights in training a record may be, at least 1; absent:
    /// synchronous, every record is of the version in training.
    pub max_staleness: Option<u32>,
}

/// `[learner]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnerConfig {
    /// Endpoint for engines, `tcp://HOST:PORT`; port 0 picks a free one.
    pub listen: String,
}

#[cfg(test)]
mod tests;
