//! The clipped surrogate that the policy losses share: inputs, settings, metrics and the loss itself.

use tch::{Kind, Tensor};

use super::{
    Result, k3,
    reduce::{aggregate, align, masked_mean, read_metrics},
};
use crate::ranks::{Ranks, RanksError};

/// PPO's clipped surrogate as a loss per element (Schulman et al. 2017, eq. 7, with separate bounds):
/// `max(-A r, -A clip(r, 1 - low, 1 + high))`.
pub fn clipped_surrogate(ratio: &Tensor, advantages: &Tensor, clip_ratio_low: f64, clip_ratio_high: f64) -> Tensor {
    let unclipped = -(advantages * ratio);
    let clipped = -(advantages * ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high));
    unclipped.maximum(&clipped)
}

/// Bounds the loss of an action that was bad and has become likely by `c |A|` (dual clip, Ye et al. 2020, eq. 5).
/// Where the advantage is positive the loss is negative and the bound does nothing.
pub fn dual_clip(surrogate: &Tensor, advantages: &Tensor, clip_ratio_c: f64) -> Tensor {
    surrogate.minimum(&(advantages.abs() * clip_ratio_c))
}

/// What the policy losses read. All tensors fit `new_logprob` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct ActorInput<'a> {
    /// Log-probability of the recorded action under the current weights, at the configured level, with gradient.
    pub new_logprob: &'a Tensor,
    /// The same under the weights that acted.
    pub old_logprob: &'a Tensor,
    /// The same under the policy that the update stays close to; without it that is the one that acted.
    pub proximal_logprob: Option<&'a Tensor>,
    /// The same under a reference policy, for the KL penalty; without it the penalty is against the policy that acted.
    pub reference_logprob: Option<&'a Tensor>,
    /// Advantage of each row.
    pub advantages: &'a Tensor,
    /// Rows (or elements) that count; all without it.
    pub mask: Option<&'a Tensor>,
    /// Valid elements of the row's episode, for [`super::episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// Settings of the policy loss, under the names of the configuration's keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActorSettings {
    /// The ratio is clipped below `1 - clip_ratio_low`.
    pub clip_ratio_low: f64,
    /// The ratio is clipped above `1 + clip_ratio_high`.
    pub clip_ratio_high: f64,
    /// Factor of [`dual_clip`]'s bound, above 1; none: no bound.
    pub clip_ratio_c: Option<f64>,
    /// Bounds of the log-ratio; without them a log-ratio above 88 overflows to an infinite loss.
    pub clip_log_ratio: Option<(f64, f64)>,
    /// Elements per episode, valid or not: with it, and with mask and episode lengths, rows are weighted by
    /// [`super::episode_weighted_mean`].
    pub episode_steps: Option<f64>,
    /// Factor of the KL penalty [`super::k3`] against the reference policy, or without one against the policy that acted; none: no
    /// penalty.
    pub kl_beta: Option<f64>,
    /// Decoupled loss only: elements whose ratio of proximal to behaviour policy exceeds this add nothing to the mean. They stay in its
    /// count, so that the parts of a minibatch add up to the whole.
    pub behave_weight_threshold: Option<f64>,
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

    /// Adds up what the ranks added; the largest deviation is the largest of all.
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

/// A policy loss and its metrics.
#[derive(Debug)]
pub struct ActorLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Read once from the device.
    pub metrics: ActorMetrics,
}

/// The inputs in f32, spread over `new_logprob`, without gradient except its own.
struct Elements {
    new_logprob: Tensor,
    old_logprob: Tensor,
    /// `old_logprob` where there is no proximal policy.
    proximal_logprob: Tensor,
    advantages: Tensor,
    /// Elements that the mask admits, bool.
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
        // an element that does not count may hold anything, in the backward pass too
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

/// The policy loss of PPO and of decoupled PPO; without a proximal policy the ratio is to the policy that acted.
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
