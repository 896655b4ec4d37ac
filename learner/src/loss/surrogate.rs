//! Clipped surrogate that the policy losses share: inputs, settings, metrics and the loss itself.

use tch::{Kind, Tensor};

use super::{
    Result, k3,
    reduce::{aggregate, align, masked_mean, read_metrics},
};
use crate::ranks::{Ranks, RanksError};

/// Computes PPO's clipped surrogate as a loss per element (Schulman et al. 2017, eq. 7, with separate bounds):
/// `max(-A r, -A clip(r, 1 - low, 1 + high))`.
pub fn clipped_surrogate(ratio: &Tensor, advantages: &Tensor, clip_ratio_low: f64, clip_ratio_high: f64) -> Tensor {
    let unclipped = -(advantages * ratio);
    let clipped = -(advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high));
    unclipped.maximum(&clipped)
}

/// Bounds the loss by `c |A|` (dual clip, Ye et al. 2020, eq. 5). The bound acts where the advantage is negative and the ratio is
/// large. At a positive advantage the loss is negative and the bound has no effect.
pub fn dual_clip(surrogate: &Tensor, advantages: &Tensor, clip_ratio_c: f64) -> Tensor {
    surrogate.minimum(&(advantages.abs() * clip_ratio_c))
}

/// Inputs of the policy losses. All tensors fit `new_logprob` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct ActorInput<'a> {
    /// Log-probability of the recorded action under the current weights, at the configured level, with gradient.
    pub new_logprob: &'a Tensor,
    /// Log-probability of the recorded action under the behavior policy.
    pub old_logprob: &'a Tensor,
    /// Log-probability under the proximal policy, the center of the clip; `None` for the behavior policy.
    pub proximal_logprob: Option<&'a Tensor>,
    /// Log-probability under the reference policy of the KL penalty; `None` for the behavior policy.
    pub reference_logprob: Option<&'a Tensor>,
    /// Advantage of each row.
    pub advantages: &'a Tensor,
    /// Valid rows (or elements); `None` if all are valid.
    pub mask: Option<&'a Tensor>,
    /// Valid elements of the row's episode, for [`super::episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// Settings of the policy loss, under the names of the configuration's keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActorSettings {
    /// Distance of the lower bound of the ratio from 1.
    pub clip_ratio_low: f64,
    /// Distance of the upper bound of the ratio from 1.
    pub clip_ratio_high: f64,
    /// Factor of [`dual_clip`]'s bound, above 1; `None` disables the bound.
    pub clip_ratio_c: Option<f64>,
    /// Bounds of the log-ratio. With `None` a log-ratio above 88 overflows to an infinite loss.
    pub clip_log_ratio: Option<(f64, f64)>,
    /// Elements per episode, valid or not. Given together with mask and episode lengths, rows are weighted by
    /// [`super::episode_weighted_mean`].
    pub episode_steps: Option<f64>,
    /// Factor of the KL penalty [`super::k3`] against the reference policy, or the behavior policy without a reference; `None`
    /// disables the penalty.
    pub kl_beta: Option<f64>,
    /// Largest ratio of proximal to behavior policy, for the decoupled loss only. Elements above the threshold add nothing to the
    /// sum, but stay in the count of the mean, so that the parts of a minibatch add up to the whole.
    pub behave_weight_threshold: Option<f64>,
}

/// Metrics of one policy loss: means over the valid elements, with the ratio after the configured clamp.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ActorMetrics {
    /// Policy loss without the KL penalty.
    pub policy_loss: f64,
    /// Mean of the KL penalty before its factor; 0 without a configured penalty.
    pub kl_penalty: f64,
    /// Mean ratio of new to old (decoupled: proximal) probability.
    pub ratio: f64,
    /// Mean `|r - 1|`.
    pub ratio_deviation: f64,
    /// Largest `|r - 1|`.
    pub ratio_deviation_max: f64,
    /// `mean((r - 1) - log r)` with `r` the unclamped ratio to the behavior policy; not negative (Schulman 2020, "Approximating
    /// KL Divergence", estimator k3).
    pub approx_kl: f64,
    /// `mean(-log r)` with the same `r`: unbiased, may be negative (estimator k1).
    pub approx_kl_k1: f64,
    /// Fraction of elements where the clip determines the loss.
    pub clip_fraction: f64,
    /// Fraction of elements where the dual clip determines the loss.
    pub dual_clip_fraction: f64,
    /// Fraction of elements dropped because the ratio of proximal to behavior policy exceeds the threshold.
    pub behaviour_clip_fraction: f64,
}

impl ActorMetrics {
    /// Adds `weight * one`; the largest deviation is a maximum, not a mean.
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

    /// Returns the total over all ranks; the largest deviation is the maximum over the ranks.
    ///
    /// # Errors
    /// The exchange between ranks failed.
    pub fn sum_over(&self, ranks: &dyn Ranks) -> Result<Self, RanksError> {
        let [
            policy_loss,
            kl_penalty,
            ratio,
            ratio_deviation,
            approx_kl,
            approx_kl_k1,
            clip_fraction,
            dual_clip_fraction,
            behaviour_clip_fraction,
        ] = ranks.sum_numbers([
            self.policy_loss,
            self.kl_penalty,
            self.ratio,
            self.ratio_deviation,
            self.approx_kl,
            self.approx_kl_k1,
            self.clip_fraction,
            self.dual_clip_fraction,
            self.behaviour_clip_fraction,
        ])?;
        Ok(Self {
            policy_loss,
            kl_penalty,
            ratio,
            ratio_deviation,
            ratio_deviation_max: ranks.largest(self.ratio_deviation_max)?,
            approx_kl,
            approx_kl_k1,
            clip_fraction,
            dual_clip_fraction,
            behaviour_clip_fraction,
        })
    }
}

/// Policy loss with its metrics.
#[derive(Debug)]
pub struct ActorLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Metrics of the loss, copied from the device in one transfer.
    pub metrics: ActorMetrics,
}

/// Inputs in f32, broadcast to `new_logprob`; only `new_logprob` has a gradient.
struct Elements {
    new_logprob: Tensor,
    old_logprob: Tensor,
    /// `old_logprob` without a proximal policy.
    proximal_logprob: Tensor,
    advantages: Tensor,
    /// Elements whose mask is set, bool.
    valid: Tensor,
    invalid: Tensor,
}

impl Elements {
    fn new(input: &ActorInput<'_>) -> Result<Self> {
        let new_logprob = input.new_logprob.to_kind(Kind::Float);
        let old_logprob = companion("old_logprob", input.old_logprob, &new_logprob)?;
        let proximal_logprob = match input.proximal_logprob {
            Some(proximal) => companion("proximal_logprob", proximal, &new_logprob)?,
            None => old_logprob.shallow_clone(),
        };
        let valid = match input.mask {
            Some(mask) => align("mask", mask, "new_logprob", &new_logprob)?
                .to_kind(Kind::Bool)
                .expand_as(&new_logprob),
            None => new_logprob.ones_like().to_kind(Kind::Bool).detach(),
        };
        let invalid = valid.logical_not();
        // a masked element may hold any value: it must not reach the backward pass either
        let advantages = companion("advantages", input.advantages, &new_logprob)?
            .expand_as(&new_logprob)
            .masked_fill(&invalid, 0.0);
        Ok(Self {
            new_logprob,
            old_logprob,
            proximal_logprob,
            advantages,
            valid,
            invalid,
        })
    }
}

fn companion(name: &'static str, tensor: &Tensor, new_logprob: &Tensor) -> Result<Tensor> {
    Ok(align(name, &tensor.to_kind(Kind::Float), "new_logprob", new_logprob)?.detach())
}

/// Computes the policy loss of PPO and of decoupled PPO; without a proximal policy the ratio is to the behavior policy.
pub(super) fn actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    let elements = Elements::new(input)?;
    let Elements {
        new_logprob,
        old_logprob,
        proximal_logprob,
        advantages,
        valid,
        invalid,
    } = &elements;
    let mean = |values: &Tensor| {
        let mask = input.mask.is_some().then_some(valid);
        aggregate(values, mask, input.episode_len, settings.episode_steps)
    };

    let behave_weight = (proximal_logprob - old_logprob).masked_fill(invalid, 0.0).exp();
    let used = match settings.behave_weight_threshold {
        Some(threshold) => valid.logical_and(&behave_weight.le(threshold)),
        None => valid.shallow_clone(),
    };
    let unused = used.logical_not();

    let mut log_ratio = (new_logprob - proximal_logprob).masked_fill(&unused, 0.0);
    if let Some((min, max)) = settings.clip_log_ratio {
        log_ratio = log_ratio.clamp(min, max);
    }
    let ratio = log_ratio.exp();
    let clipped = clipped_surrogate(&ratio, advantages, settings.clip_ratio_low, settings.clip_ratio_high);
    let surrogate = match settings.clip_ratio_c {
        Some(clip_ratio_c) => dual_clip(&clipped, advantages, clip_ratio_c),
        None => clipped.shallow_clone(),
    };
    let weighted = &surrogate * &behave_weight;
    let policy_loss = mean(&weighted.masked_fill(&unused, 0.0))?;

    let log_ratio_to_old = (new_logprob - old_logprob).masked_fill(invalid, 0.0);
    let (loss, kl_penalty) = match settings.kl_beta {
        Some(kl_beta) => {
            let log_ratio = match input.reference_logprob {
                Some(reference) => companion("reference_logprob", reference, new_logprob)? - new_logprob,
                None => log_ratio_to_old.shallow_clone(),
            };
            let kl_penalty = mean(&k3(&log_ratio.masked_fill(invalid, 0.0)))?;
            (&policy_loss + &kl_penalty * kl_beta, kl_penalty.detach())
        }
        None => (policy_loss.shallow_clone(), policy_loss.zeros_like().detach()),
    };

    let metrics = tch::no_grad(|| {
        let over_used = |values: &Tensor| masked_mean(&values.to_kind(Kind::Float), Some(&used));
        let over_valid = |values: &Tensor| masked_mean(&values.to_kind(Kind::Float), Some(valid));
        let deviation = (&ratio - 1.0).abs();
        let unclipped = -(advantages * &ratio);
        read_metrics(&[
            policy_loss.detach(),
            kl_penalty,
            over_used(&ratio),
            over_used(&deviation),
            deviation.masked_fill(&unused, 0.0).max(),
            over_valid(&k3(&log_ratio_to_old)),
            over_valid(&log_ratio_to_old.neg()),
            over_used(&unclipped.lt_tensor(&clipped)),
            over_used(&surrogate.lt_tensor(&clipped)),
            over_valid(&unused),
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
        clip_fraction,
        dual_clip_fraction,
        behaviour_clip_fraction,
    ] = metrics;
    Ok(ActorLoss {
        loss,
        metrics: ActorMetrics {
            policy_loss,
            kl_penalty,
            ratio,
            ratio_deviation,
            ratio_deviation_max,
            approx_kl,
            approx_kl_k1,
            clip_fraction,
            dual_clip_fraction,
            behaviour_clip_fraction,
        },
    })
}
