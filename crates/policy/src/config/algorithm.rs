//! `[algorithm]`: estimator, loss and update of RL.

use serde::{Deserialize, Serialize};

/// Group of elements whose log-probabilities are summed into one probability ratio and one clip decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogprobType {
    /// One ratio per action element: `[N, C, D]`.
    TokenLevel,
    /// One ratio per action row: `[N, C]`.
    ActionLevel,
    /// One ratio per chunk: `[N]`.
    ChunkLevel,
}

/// Unit of a reward and of a step of `gamma` and `gae_lambda`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardType {
    /// One summed reward and one advantage per chunk.
    ChunkLevel,
    /// One reward and one advantage per executed action; `gamma` is per action.
    ActionLevel,
}

/// Episodes after which the return continues with the value of the last observation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootstrapType {
    /// After a time limit (Pardo et al. 2018).
    Truncation,
    /// After every episode, including an episode that terminated.
    Always,
    /// Never; a time limit counts as termination.
    None,
}

/// Weighting of the elements in the mean of the policy loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossAgg {
    /// Equal weight of every valid element.
    Mean,
    /// Equal weight of every episode, for any episode length.
    EpisodeLength,
}

/// Treatment of a group whose mean return is out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilterMode {
    /// Excludes the group from the update.
    Mask,
    /// Replaces the group with a new group from the engine (dynamic sampling: Yu et al. 2025, "DAPO", section 3.2).
    Resample,
}

/// `algorithm.filter_rewards`: bounds on a group's mean return.
///
/// A group-relative estimator has no signal in a group in which all episodes succeed or all fail.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterConfig {
    /// Smallest mean return of a group that is used.
    pub lower: f64,
    /// Largest mean return of a group that is used.
    pub upper: f64,
    /// Treatment of the other groups.
    pub mode: FilterMode,
    /// `resample` only: most orders per iteration, the first included.
    pub max_rounds: Option<u32>,
}

/// A closed interval, `algorithm.clip_log_ratio`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// Lower bound, below 0.
    pub min: f64,
    /// Upper bound, above 0.
    pub max: f64,
}

/// `[algorithm]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlgorithmConfig {
    /// Advantage estimator by registered name (`gae`, `grpo`, `reinforce_pp`, `reinforce_pp_baseline`, `raw`).
    pub adv_type: String,
    /// Loss by registered name (`actor_critic`, `actor`, `decoupled_actor_critic`, `decoupled_actor`; without likelihood
    /// `flow_ipo`, `nft`).
    pub loss_type: String,
    /// Unit of a reward and an advantage.
    pub reward_type: RewardType,
    /// Unit of a probability ratio.
    pub logprob_type: LogprobType,
    /// Episodes after which the return continues with the value of the last observation.
    pub bootstrap_type: BootstrapType,
    /// Weighting of the elements in the mean of the policy loss.
    pub loss_agg: LossAgg,
    /// Discount per action chunk; per executed action with `reward_type = "action_level"`.
    pub gamma: f64,
    /// GAE lambda per action chunk.
    pub gae_lambda: f64,
    /// Whether advantages are normalized over the iteration.
    pub normalize_advantages: bool,
    /// Lower clip range of the ratio: `1 - clip_ratio_low`.
    pub clip_ratio_low: f64,
    /// Upper clip range of the ratio: `1 + clip_ratio_high`.
    pub clip_ratio_high: f64,
    /// Dual clip constant, above 1; absent: off.
    pub clip_ratio_c: Option<f64>,
    /// Bounds of the log-ratio, applied before the exponential; absent: none.
    pub clip_log_ratio: Option<Bounds>,
    /// Largest ratio of the proximal policy to the policy that acted, for decoupled losses only; absent: unbounded.
    pub behave_weight_threshold: Option<f64>,
    /// Factor of the mean entropy that is subtracted from the loss; absent: none.
    pub entropy_bonus: Option<f64>,
    /// Factor of the KL penalty (estimator k3); absent: none.
    pub kl_beta: Option<f64>,
    /// Reference policy of the KL penalty; absent: the policy that acted.
    pub kl_reference: Option<ReferenceConfig>,
    /// Clip range of the value change; absent: off.
    pub value_clip: Option<f64>,
    /// Huber threshold of the value loss.
    pub huber_delta: f64,
    /// Passes over the records of an iteration.
    pub update_epoch: u32,
    /// KL estimate of a minibatch above which the iteration's updates stop; absent: off.
    pub target_kl: Option<f64>,
    /// Episodes with the same task and reset state; 1: no groups.
    pub group_size: usize,
    /// Selection of groups; absent: all groups are used.
    pub filter_rewards: Option<FilterConfig>,
    /// Settings of a loss without likelihood; present only with such a `loss_type`.
    pub velocity: Option<VelocityConfig>,
}

/// `[algorithm.velocity]`: settings of a loss on the velocity, which needs no likelihood and no critic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VelocityConfig {
    /// Reference policy of the loss.
    pub reference: ReferenceConfig,
    /// Parameters of the loss, which the loss checks.
    pub params: toml::Table,
}

/// Weights of the reference policy.
///
/// All variants have braces, because serde rejects unknown keys of a tagged enum only in struct variants.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum ReferenceConfig {
    /// Weights at the start of RL.
    Frozen {},
    /// Exponential mean over the iterations: `ref <- decay ref + (1 - decay) trained` after each iteration.
    Ema {
        /// Weight of the previous reference, in `[0, 1)`.
        decay: f64,
    },
    /// Weights that acted in this iteration.
    Acting {},
}
