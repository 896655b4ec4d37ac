//! Results of an update, in numbers over all ranks.

use crate::loss::ActorMetrics;

/// Means over the minibatches of an iteration, over valid records of all ranks only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UpdateReport {
    /// Means of the policy loss's metrics.
    pub actor: ActorMetrics,
    /// Largest `|ratio - 1|` before the first optimizer step, at the level of the ratio: the parity of engine and learner. Read from
    /// records of the version in training; 0 without such records.
    pub first_ratio_deviation: f64,
    /// Largest `|value - recorded value|` before the first optimizer step, over the records of `first_ratio_deviation`.
    pub first_value_gap: f64,
    /// Largest `|logprob - recorded logprob|` before the first optimizer step, over the records of `first_ratio_deviation`.
    pub logprob_gap: f64,
    /// KL estimate of the last minibatch.
    pub last_kl: f64,
    /// Mean entropy of the policy; 0 for a loss without entropy.
    pub entropy: f64,
    /// Mean value loss; 0 without a critic.
    pub value_loss: f64,
    /// Share of values moved beyond the clip; 0 without a critic.
    pub value_clip_fraction: f64,
    /// Explained variance of the returns by the critic's values during the first epoch, in which the critic is already trained. NaN
    /// without a critic, or if the returns do not vary.
    pub explained_variance: f64,
    /// Mean gradient norm of the actor.
    pub grad_norm: f64,
    /// Number of optimizer steps of the actor.
    pub updates: u64,
    /// Number of steps skipped for a gradient that was not finite.
    pub skipped: u64,
    /// Learning rate of the actor at the last step.
    pub lr: f64,
    /// Credit of a loss on the velocity; `None` for another loss.
    pub credit: Option<CreditReport>,
    /// Number of records.
    pub records: usize,
    /// Whether `target_kl` ended the iteration early.
    pub stopped_early: bool,
    /// Bytes of the frozen prefixes that this rank stored.
    pub prefix_cache_bytes: u64,
    /// Seconds until the frozen prefixes were stored; prefixes that are not stored are computed during the updates.
    pub prefix_seconds: f64,
    /// Seconds of the updates.
    pub update_seconds: f64,
}

/// Credit of an iteration's chunks under a loss on the velocity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CreditReport {
    /// Mean credit.
    pub mean: f64,
    /// Mean distance of the executed actions from the reference's actions, in model units; 0 if the method does not read the distance.
    pub displacement: f64,
}
