//! The clipped surrogate that the policy losses share: inputs, settings, metrics and the loss itself.

use tch::{Kind, Tensor};

use super::{
    Result, k3,
    reduce::{aggregate, align, masked_mean, read_metrics},
};

/// PPO's clipped surrogate as a loss per element (Schulman et al. 2017, eq. 7, with separate bounds):
/// `max(-A r, -A clip(r, 1 - low, 1 + high))`.
pub fn clipped_surrogate(ratio: &Tensor, advantage: &Tensor, clip_low: f64, clip_high: f64) -> Tensor {
    let unclipped = -(advantage * ratio);
    let clipped = -(advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high));
    unclipped.maximum(&clipped)
}

/// Dual clip (Ye et al. 2020, eq. 5): a bound `c |A|` on the loss of an action that was bad and has become likely.
/// Where the advantage is positive the loss is negative and the bound does nothing.
pub fn dual_clip(surrogate: &Tensor, advantage: &Tensor, bound: f64) -> Tensor {
    surrogate.minimum(&(advantage.abs() * bound))
}

/// What the policy losses read. All tensors fit `logprob` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct ActorInput<'a> {
    /// Log-probability of the recorded action under the current weights, at the configured level, with gradient.
    pub logprob: &'a Tensor,
    /// The same under the weights that acted.
    pub old_logprob: &'a Tensor,
    /// The same under the policy that the update stays close to; without it that is the one that acted.
    pub proximal_logprob: Option<&'a Tensor>,
    /// The same under a reference policy, for the KL penalty; without it the penalty is against the policy that acted.
    pub reference_logprob: Option<&'a Tensor>,
    /// Advantage of each row.
    pub advantage: &'a Tensor,
    /// Rows (or elements) that count; all without it.
    pub mask: Option<&'a Tensor>,
    /// Valid elements of the row's episode, for [`super::episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// What the configuration says about the policy loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActorSettings {
    /// The ratio is clipped below `1 - clip_low`.
    pub clip_low: f64,
    /// The ratio is clipped above `1 + clip_high`.
    pub clip_high: f64,
    /// Bound of [`dual_clip`], above 1.
    pub dual_clip: Option<f64>,
    /// Bounds of the log-ratio; without them a log-ratio above 88 overflows to an infinite loss.
    pub log_ratio_clamp: Option<(f64, f64)>,
    /// Elements per episode, valid or not: with it, and with mask and episode lengths, rows are weighted by
    /// [`super::episode_weighted_mean`].
    pub episode_steps: Option<f64>,
    /// Factor of the KL penalty [`super::k3`] against the reference policy, or without one against the policy that acted; none: no
    /// penalty.
    pub kl_beta: Option<f64>,
    /// Decoupled loss only: rows whose proximal-to-behaviour ratio exceeds this add nothing to the mean. They stay in its count, so
    /// that the parts of a minibatch add up to the whole.
    pub behaviour_ratio_max: Option<f64>,
}

/// What happened in one policy loss; all means over the valid elements, the ratio after the configured clamp.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ActorMetrics {
    /// The loss without the KL penalty.
    pub policy_loss: f64,
    /// Mean of the KL penalty before its factor; 0 where none is configured.
    pub kl_penalty: f64,
    /// Mean ratio of new to old (decoupled: proximal) probability.
    pub ratio: f64,
    /// Mean `|r - 1|`.
    pub ratio_deviation: f64,
    /// Largest `|r - 1|`.
    pub ratio_deviation_max: f64,
    /// `mean((r - 1) - log r)` with `r` the ratio to the policy that acted, not clamped; never negative (Schulman 2020, "Approximating
    /// KL Divergence", estimator k3).
    pub approx_kl: f64,
    /// `mean(-log r)` of the same: unbiased, may be negative (estimator k1).
    pub approx_kl_k1: f64,
    /// Share of elements where the clip decided the loss.
    pub clip_fraction: f64,
    /// Share of elements where the dual clip decided the loss.
    pub dual_clip_fraction: f64,
    /// Share of elements left out because the proximal policy is too far from the one that acted.
    pub behaviour_clip_fraction: f64,
}

impl ActorMetrics {
    /// `self += weight * one`; the largest deviation is a maximum, not a mean.
    pub fn add(&mut self, one: &Self, weight: f64) {
        self.policy_loss += weight * one.policy_loss;
        self.kl_penalty += weight * one.kl_penalty;
        self.ratio += weight * one.ratio;
        self.ratio_deviation += weight * one.ratio_deviation;
        self.ratio_deviation_max = self.ratio_deviation_max.max(one.ratio_deviation_max);
        self.approx_kl += weight * one.approx_kl;
        self.approx_kl_k1 += weight * one.approx_kl_k1;
        self.clip_fraction += weight * one.clip_fraction;
        self.dual_clip_fraction += weight * one.dual_clip_fraction;
        self.behaviour_clip_fraction += weight * one.behaviour_clip_fraction;
    }
}

/// A policy loss and its metrics.
#[derive(Debug)]
pub struct ActorLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Read once from the device.
    pub metrics: ActorMetrics,
}

/// The loss of both: without a proximal policy that is the one that acted.
pub(super) fn actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    let logprob = input.logprob.to_kind(Kind::Float);
    let companion = |name, tensor: &Tensor| align(name, &tensor.to_kind(Kind::Float), "logprob", &logprob);
    let old_logprob = companion("old_logprob", input.old_logprob)?.detach();
    let proximal = match input.proximal_logprob {
        Some(proximal) => companion("proximal_logprob", proximal)?.detach(),
        None => old_logprob.shallow_clone(),
    };
    let given_mask = match input.mask {
        Some(mask) => align("mask", mask, "logprob", &logprob)?
            .to_kind(Kind::Bool)
            .expand_as(&logprob),
        None => logprob.ones_like().to_kind(Kind::Bool).detach(),
    };
    let left_out = given_mask.logical_not();
    // an element that does not count may hold anything, in the backward pass too
    let advantage = companion("advantage", input.advantage)?
        .detach()
        .expand_as(&logprob)
        .masked_fill(&left_out, 0.0);

    let behaviour_ratio = (&proximal - &old_logprob).masked_fill(&left_out, 0.0).exp();
    let mask = match settings.behaviour_ratio_max {
        Some(bound) => given_mask.logical_and(&behaviour_ratio.le(bound)),
        None => given_mask.shallow_clone(),
    };

    let mut log_ratio = (&logprob - &proximal).masked_fill(&mask.logical_not(), 0.0);
    if let Some((low, high)) = settings.log_ratio_clamp {
        log_ratio = log_ratio.clamp(low, high);
    }
    let ratio = log_ratio.exp();
    let surrogate = clipped_surrogate(&ratio, &advantage, settings.clip_low, settings.clip_high);
    let bounded = match settings.dual_clip {
        Some(bound) => dual_clip(&surrogate, &advantage, bound),
        None => surrogate.shallow_clone(),
    };
    let weighted = &bounded * &behaviour_ratio;
    let total = |values: &Tensor| {
        let mask = input.mask.is_some().then_some(&given_mask);
        aggregate(values, mask, input.episode_len, settings.episode_steps)
    };
    let surrogate_loss = total(&weighted.masked_fill(&mask.logical_not(), 0.0))?;
    let moved = (&logprob - &old_logprob).masked_fill(&left_out, 0.0);
    let (loss, kl_penalty) = match settings.kl_beta {
        Some(beta) => {
            let log_ratio = match input.reference_logprob {
                Some(reference) => companion("reference_logprob", reference)?.detach() - &logprob,
                None => moved.shallow_clone(),
            };
            let penalty = total(&k3(&log_ratio.masked_fill(&left_out, 0.0)))?;
            (&surrogate_loss + &penalty * beta, penalty.detach())
        }
        None => (surrogate_loss.shallow_clone(), surrogate_loss.zeros_like().detach()),
    };

    let metrics = tch::no_grad(|| {
        let mean = |values: &Tensor| masked_mean(&values.to_kind(Kind::Float), Some(&mask));
        let over_all = |values: &Tensor| masked_mean(&values.to_kind(Kind::Float), Some(&given_mask));
        let deviation = (&ratio - 1.0).abs();
        let unclipped = -(&advantage * &ratio);
        let dropped = masked_mean(&mask.logical_not().to_kind(Kind::Float), Some(&given_mask));
        read_metrics(&[
            surrogate_loss.detach(),
            kl_penalty,
            mean(&ratio),
            mean(&deviation),
            deviation.masked_fill(&mask.logical_not(), 0.0).max(),
            over_all(&k3(&moved)),
            over_all(&moved.neg()),
            mean(&unclipped.lt_tensor(&surrogate)),
            mean(&bounded.lt_tensor(&surrogate)),
            dropped,
        ])
    })?;
    let [
        policy_loss,
        kl_penalty,
        ratio,
        ratio_deviation,
        ratio_deviation_max,
        approx_kl,
        approx_kl_k1,
        clip,
        dual,
        behaviour,
    ] = metrics;
    let metrics = ActorMetrics {
        policy_loss,
        kl_penalty,
        ratio,
        ratio_deviation,
        ratio_deviation_max,
        approx_kl,
        approx_kl_k1,
        clip_fraction: clip,
        dual_clip_fraction: dual,
        behaviour_clip_fraction: behaviour,
    };
    Ok(ActorLoss { loss, metrics })
}
