//! `critic`: the clipped value loss without a policy loss, used during the critic's warm-up.

use tch::{Kind, Reduction, Tensor};

use super::{
    Result,
    reduce::{aggregate, align, masked_mean, read_metrics},
};
use crate::ranks::{Ranks, RanksError};

/// Inputs of the critic loss. All tensors fit `value` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct CriticInput<'a> {
    /// Value of each row's observation under the current weights, with gradient.
    pub value: &'a Tensor,
    /// Value of the same observation at recording time.
    pub old_value: &'a Tensor,
    /// Value target of each row.
    pub returns: &'a Tensor,
    /// Valid rows; `None` if all rows are valid.
    pub mask: Option<&'a Tensor>,
    /// Valid elements of the row's episode, for [`super::episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// Settings of the critic loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CriticSettings {
    /// Largest rewarded distance of a value from the recorded value, in units of return; `None` disables the clip.
    pub value_clip: Option<f64>,
    /// Absolute error at which the loss changes from quadratic to linear.
    pub huber_delta: f64,
    /// Elements per episode, as [`super::ActorSettings::episode_steps`].
    pub episode_steps: Option<f64>,
}

/// Sums in f64 that determine the explained variance of any union of batches.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ExplainedVariance {
    /// Number of elements.
    pub count: f64,
    /// Sum of the returns.
    pub returns_sum: f64,
    /// Sum of the squared returns.
    pub returns_sq_sum: f64,
    /// Sum of the errors `return - value`.
    pub errors_sum: f64,
    /// Sum of the squared errors.
    pub errors_sq_sum: f64,
}

impl ExplainedVariance {
    /// Adds the sums of another batch.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.returns_sum += other.returns_sum;
        self.returns_sq_sum += other.returns_sq_sum;
        self.errors_sum += other.errors_sum;
        self.errors_sq_sum += other.errors_sq_sum;
    }

    /// Returns the total over all ranks.
    ///
    /// # Errors
    /// The exchange between ranks failed.
    pub fn sum_over(&self, ranks: &dyn Ranks) -> Result<Self, RanksError> {
        let [count, returns_sum, returns_sq_sum, errors_sum, errors_sq_sum] = ranks.sum_numbers([
            self.count,
            self.returns_sum,
            self.returns_sq_sum,
            self.errors_sum,
            self.errors_sq_sum,
        ])?;
        Ok(Self {
            count,
            returns_sum,
            returns_sq_sum,
            errors_sum,
            errors_sq_sum,
        })
    }

    /// Returns `1 - Var(return - value) / Var(return)`: 1 for a perfect critic, 0 for a critic that predicts the mean. `None`
    /// if the returns do not vary.
    pub fn value(&self) -> Option<f64> {
        let variance = |sum: f64, sq_sum: f64| sq_sum / self.count - (sum / self.count).powi(2);
        let returns = variance(self.returns_sum, self.returns_sq_sum);
        let explained = 1.0 - variance(self.errors_sum, self.errors_sq_sum) / returns;
        (self.count > 1.0 && returns > 0.0).then_some(explained)
    }
}

/// Metrics of one critic loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CriticMetrics {
    /// Value of the loss.
    pub value_loss: f64,
    /// Fraction of elements whose value differs from the recorded value by more than the clip.
    pub value_clip_fraction: f64,
    /// Sums for the explained variance of the iteration.
    pub explained_variance: ExplainedVariance,
}

/// Critic loss with its metrics.
#[derive(Debug)]
pub struct CriticLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Metrics of the loss, copied from the device in one transfer.
    pub metrics: CriticMetrics,
}

/// Computes the Huber loss per element (Huber 1964): `e^2 / 2` for `|e| < delta`, else `delta (|e| - delta / 2)`.
pub fn huber(value: &Tensor, target: &Tensor, delta: f64) -> Tensor {
    value.huber_loss(target, Reduction::None, delta)
}

/// Computes the clipped Huber value loss (value clipping as in Schulman et al.'s PPO code, see Huang et al. 2022, "The 37
/// Implementation Details of PPO", detail 9): `max(huber(R - V), huber(R - V_clip))`,
/// `V_clip = V_old + clip(V - V_old, -c, c)`. The loss has neither a factor 1/2 nor a coefficient.
pub fn ppo_critic_loss(input: &CriticInput<'_>, settings: &CriticSettings) -> Result<CriticLoss> {
    let value = input.value.to_kind(Kind::Float);
    let mask = match input.mask {
        Some(mask) => Some(
            align("mask", mask, "value", &value)?
                .to_kind(Kind::Bool)
                .expand_as(&value),
        ),
        None => None,
    };
    // a masked element may hold any value: it must not reach the backward pass either
    let kept = |tensor: Tensor| match &mask {
        Some(mask) => tensor.masked_fill(&mask.logical_not(), 0.0),
        None => tensor,
    };
    let companion = |name, tensor: &Tensor| -> Result<Tensor> {
        let aligned = align(name, &tensor.to_kind(Kind::Float), "value", &value)?;
        Ok(kept(aligned.detach().expand_as(&value)))
    };
    let old_value = companion("old_value", input.old_value)?;
    let returns = companion("returns", input.returns)?;
    let value = kept(value.shallow_clone());
    let moved = &value - &old_value;
    let mut errors = huber(&value, &returns, settings.huber_delta);
    if let Some(clip) = settings.value_clip {
        let clipped = &old_value + moved.clamp(-clip, clip);
        errors = errors.maximum(&huber(&clipped, &returns, settings.huber_delta));
    }
    let loss = aggregate(&errors, mask.as_ref(), input.episode_len, settings.episode_steps)?;

    let metrics = tch::no_grad(|| {
        let outside = match settings.value_clip {
            Some(clip) => moved.abs().gt(clip).to_kind(Kind::Float),
            None => moved.zeros_like(),
        };
        let valid = mask
            .as_ref()
            .map_or_else(|| value.ones_like(), |mask| mask.to_kind(Kind::Float));
        let total = |values: &Tensor| {
            let kept = values.to_kind(Kind::Double).masked_fill(&valid.eq(0), 0.0);
            kept.sum(Kind::Double)
        };
        let error = &returns - &value;
        read_metrics(&[
            loss.detach(),
            masked_mean(&outside, mask.as_ref()),
            valid.sum(Kind::Double),
            total(&returns),
            total(&returns.to_kind(Kind::Double).square()),
            total(&error),
            total(&error.to_kind(Kind::Double).square()),
        ])
    })?;
    let [
        value_loss,
        value_clip_fraction,
        count,
        returns_sum,
        returns_sq_sum,
        errors_sum,
        errors_sq_sum,
    ] = metrics;
    let explained_variance = ExplainedVariance {
        count,
        returns_sum,
        returns_sq_sum,
        errors_sum,
        errors_sq_sum,
    };
    Ok(CriticLoss {
        loss,
        metrics: CriticMetrics {
            value_loss,
            value_clip_fraction,
            explained_variance,
        },
    })
}
