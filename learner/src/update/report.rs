//! What an update did, in numbers over all ranks.

use crate::loss::ActorMetrics;

/// Means over the minibatches of an iteration; every number is over valid records of all ranks only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UpdateReport {
    /// Means of the policy loss's metrics.
    pub actor: ActorMetrics,
    /// Largest `|ratio - 1|` before the first optimizer step, at the level of the ratio: the parity of engine and learner. Like the next
    /// two over records of the version in training; 0 where there is none.
    pub first_ratio_deviation: f64,
    /// Largest `|value - recorded value|` before the first optimizer step.
    pub first_value_gap: f64,
    /// Largest `|logprob - recorded logprob|` before the first optimizer step.
    pub logprob_gap: f64,
    /// KL estimate of the last minibatch.
    pub last_kl: f64,
    /// Mean entropy of the policy; 0 where the loss has none.
    pub entropy: f64,
    /// Mean value loss; 0 without a critic, like the next.
    pub value_loss: f64,
    /// Share of values moved beyond the clip.
    pub value_clip_fraction: f64,
    /// Of the returns by the critic's values during the first epoch, in which it is already trained; NaN where the returns do not vary, or
    /// without a critic.
    pub explained_variance: f64,
    /// Mean gradient norm of the actor.
    pub grad_norm: f64,
    /// Optimizer steps of the actor.
    pub updates: u64,
    /// Steps skipped for a gradient that was not finite.
    pub skipped: u64,
    /// Learning rate of the actor at the last step.
    pub lr: f64,
    /// Of a loss on the velocity.
    pub credit: Option<CreditReport>,
    /// Records.
    pub records: usize,
    /// Whether `target_kl` ended the iteration early.
    pub stopped_early: bool,
    /// Bytes of the frozen prefixes that this rank kept.
    pub prefix_cache_bytes: u64,
    /// Seconds until the frozen prefixes were kept; prefixes that are not kept run during the updates.
    pub prefix_seconds: f64,
    /// Seconds of the updates.
    pub update_seconds: f64,
}

/// What the chunks of an iteration were worth to a loss on the velocity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CreditReport {
    /// Mean credit.
    pub mean: f64,
    /// Mean distance of the executed actions from the reference's, model units; 0 where the method does not read it.
    pub displacement: f64,
}
