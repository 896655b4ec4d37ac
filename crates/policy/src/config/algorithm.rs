//! `[algorithm]`: how RL trains.

use serde::{Deserialize, Serialize};

/// Over what a log-probability is summed before it makes a ratio: one probability ratio, one clip decision each.
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

/// To what a reward belongs, and what a step of `gamma` and `gae_lambda` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardType {
    /// The rewards of a chunk are summed, one advantage per chunk.
    ChunkLevel,
    /// One reward and one advantage per executed action; `gamma` is per action.
    ActionLevel,
}

/// After which episodes the value of the last observation counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootstrapType {
    /// After a time limit (Pardo et al. 2018).
    Truncation,
    /// After every episode, also one that ended by itself.
    Always,
    /// Never: a time limit is an end like any other.
    None,
}

/// How the policy loss averages its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossAgg {
    /// Every valid element weighs the same.
    Mean,
    /// Every episode weighs the same, whatever its length.
    EpisodeLength,
}

/// What becomes of a group whose mean return is out of bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilterMode {
    /// It is left out of the update.
    Mask,
    /// It is replaced by a new group from the engine (dynamic sampling: Yu et al. 2025, "DAPO", section 3.2).
    Resample,
}

/// `algorithm.filter_rewards`: groups in which everything succeeds or fails teach nothing to a group-relative estimator.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilterConfig {
    /// Smallest mean return of a group that is used.
    pub lower: f64,
    /// Largest mean return of a group that is used.
    pub upper: f64,
    /// What becomes of the others.
    pub mode: FilterMode,
    /// `resample` only: orders per iteration, the first included.
    pub max_rounds: Option<u32>,
}

/// A closed interval, `algorithm.clip_log_ratio`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// `[algorithm]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlgorithmConfig {
    /// Advantage estimator by registered name (`gae`, `grpo`, `reinforce_pp`, `reinforce_pp_baseline`, `raw`).
    pub adv_type: String,
    /// Loss by registered name (`actor_critic`, `actor`, `decoupled_actor_critic`, `decoupled_actor`; without likelihood `flow_ipo`,
    /// `nft`).
    pub loss_type: String,
    /// What a reward and an advantage belong to.
    pub reward_type: RewardType,
    /// What a probability ratio belongs to.
    pub logprob_type: LogprobType,
    /// After which episodes the value of the last observation counts.
    pub bootstrap_type: BootstrapType,
    /// How the policy loss averages its elements.
    pub loss_agg: LossAgg,
    /// Discount per action chunk, per executed action with `reward_type = "action_level"`.
    pub gamma: f64,
    /// GAE lambda per action chunk.
    pub gae_lambda: f64,
    /// Normalise advantages over the iteration.
    pub normalize_advantages: bool,
    /// Lower ratio clip.
    pub clip_ratio_low: f64,
    /// Upper ratio clip.
    pub clip_ratio_high: f64,
    /// Dual clip constant; absent: off.
    pub clip_ratio_c: Option<f64>,
    /// Bounds of the log-ratio before it is exponentiated; absent: none.
    pub clip_log_ratio: Option<Bounds>,
    /// Largest ratio of the proximal policy to the one that acted, `decoupled_actor_critic` only; absent: none.
    pub behave_weight_threshold: Option<f64>,
    /// Factor of the mean entropy that is subtracted from the loss; absent: none.
    pub entropy_bonus: Option<f64>,
    /// Factor of the KL penalty (estimator k3); absent: none.
    pub kl_beta: Option<f64>,
    /// Against which policy `kl_beta` holds; absent: the one that acted.
    pub kl_reference: Option<ReferenceConfig>,
    /// Value clip; absent: off.
    pub value_clip: Option<f64>,
    /// Huber threshold of the value loss.
    pub huber_delta: f64,
    /// Passes over the records of an iteration.
    pub update_epoch: u32,
    /// Stop an iteration's updates when the KL estimate of a minibatch exceeds this; absent: off.
    pub target_kl: Option<f64>,
    /// Episodes on the same task and reset state; 1 without groups.
    pub group_size: usize,
    /// Which groups are used; absent: all.
    pub filter_rewards: Option<FilterConfig>,
    /// With a `loss_type` that needs no likelihood, and only there.
    pub velocity: Option<VelocityConfig>,
}

/// `[algorithm.velocity]`: a loss on the velocity itself (`loss_type` names it) needs no likelihood and no critic.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VelocityConfig {
    /// What the trained policy is compared with.
    pub reference: ReferenceConfig,
    /// Parameters of the method; the method checks them.
    pub params: toml::Table,
}

/// Which weights the reference policy has. All variants have braces: serde refuses unknown keys beside the tag only there.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, tag = "kind", rename_all = "snake_case")]
pub enum ReferenceConfig {
    /// Those that RL began with.
    Frozen {},
    /// An exponential mean over the iterations: `ref <- decay ref + (1 - decay) trained` after each.
    Ema {
        /// Share that stays, in `[0, 1)`.
        decay: f64,
    },
    /// Those that acted in this iteration.
    Acting {},
}
