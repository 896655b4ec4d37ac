//! `critic`: the clipped value loss, alone; what the critic's warm-up trains with.

use tch::{Kind, Reduction, Tensor};

use super::{
    Result,
    reduce::{aggregate, align, masked_mean, read_metrics},
};
use crate::ranks::{Ranks, RanksError};

/// What the critic loss reads. All tensors fit `value` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct CriticInput<'a> {
    /// Value of each row's observation under the current weights, with gradient.
    pub value: &'a Tensor,
    /// The same when the row was recorded.
    pub old_value: &'a Tensor,
    /// Target.
    pub returns: &'a Tensor,
    /// Rows that count; all without it.
    pub mask: Option<&'a Tensor>,
    /// Valid elements of the row's episode, for [`super::episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// What the configuration says about the critic loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CriticSettings {
    /// How far a value may move from the recorded one before the loss stops rewarding it; none: no clip.
    pub value_clip: Option<f64>,
    /// Error at which the loss turns from squared to linear.
    pub huber_delta: f64,
    /// See [`super::ActorSettings::episode_steps`].
    pub episode_steps: Option<f64>,
}

/// Sums from which the explained variance of any union of batches follows, in f64.
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
    /// Adds another batch's sums.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.returns_sum += other.returns_sum;
        self.returns_sq_sum += other.returns_sq_sum;
        self.errors_sum += other.errors_sum;
        self.errors_sq_sum += other.errors_sq_sum;
    }

    /// Adds up the sums of the ranks.
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

    /// `1 - Var(return - value) / Var(return)`: 1 is a perfect critic, 0 one that knows only the mean. `None` where the
    /// returns do not vary.
    pub fn value(&self) -> Option<f64> {
        let variance = |sum: f64, sq_sum: f64| sq_sum / self.count - (sum / self.count).powi(2);
        let returns = variance(self.returns_sum, self.returns_sq_sum);
        let explained = 1.0 - variance(self.errors_sum, self.errors_sq_sum) / returns;
        (self.count > 1.0 && returns > 0.0).then_some(explained)
    }
}

/// What happened in one critic loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CriticMetrics {
    /// The loss itself.
    pub value_loss: f64,
    /// Share of elements whose value had moved further than the clip, before it was clipped.
    pub value_clip_fraction: f64,
    /// Sums for the explained variance of the iteration.
    pub explained_variance: ExplainedVariance,
}

/// A critic loss and its metrics.
#[derive(Debug)]
pub struct CriticLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Read once from the device.
    pub metrics: CriticMetrics,
}

/// Huber loss per element (Huber 1964): `e^2 / 2` for `|e| < delta`, else `delta (|e| - delta / 2)`.
pub fn huber(value: &Tensor, target: &Tensor, delta: f64) -> Tensor {
    value.huber_loss(target, Reduction::None, delta)
}

/// Clipped Huber value loss (value clipping as in Schulman et al.'s PPO code, see Huang et al. 2022, "The 37
/// Implementation Details of PPO", detail 9): `max(huber(R - V), huber(R - V_clip))`,
/// `V_clip = V_old + clip(V - V_old, -c, c)`. There is no factor 1/2 and no coefficient.
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
    // an element that does not count may hold anything, in the backward pass too
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
