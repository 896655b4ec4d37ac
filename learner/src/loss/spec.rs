//! Entry of the policy loss registry: inputs, settings, result and requirements on a run.

use tch::Tensor;

use super::{
    critic::{CriticInput, CriticMetrics, CriticSettings},
    error::Result,
    surrogate::{ActorInput, ActorMetrics, ActorSettings},
};

/// Inputs of a policy loss of the registry.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicyInput<'a> {
    /// Inputs of the policy loss.
    pub actor: Option<ActorInput<'a>>,
    /// Inputs of the critic loss.
    pub critic: Option<CriticInput<'a>>,
    /// Entropy of the policy per row (or per element), with gradient; masked as [`PolicyInput::actor`].
    pub entropy: Option<&'a Tensor>,
    /// Factors of the means over the valid elements, 1 by default.
    pub share: Share,
}

/// Factors of the means of one part of a minibatch, so that the weighted parts add up to the means of the minibatch.
///
/// A part is weighted by its rows. Each factor is the part's share of the minibatch's valid elements over its share of the rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Factor of the policy loss; 1 for a mean by episodes, which counts all elements.
    pub surrogate: f64,
    /// Factor of the mean entropy, which is always a mean over valid elements.
    pub entropy: f64,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            surrogate: 1.0,
            entropy: 1.0,
        }
    }
}

/// Settings of the whole loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicySettings {
    /// Settings of the policy loss.
    pub actor: ActorSettings,
    /// Settings of the critic loss.
    pub critic: CriticSettings,
    /// Factor of the critic loss in the sum.
    pub value_coef: f64,
    /// Factor of the subtracted mean entropy; with `None` the entropy is only reported.
    pub entropy_bonus: Option<f64>,
}

/// Whole loss with its metrics; a part that the loss lacks is `None`.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Metrics of the policy loss.
    pub actor: Option<ActorMetrics>,
    /// Metrics of the critic loss.
    pub critic: Option<CriticMetrics>,
    /// Mean entropy in nats, without factor.
    pub entropy: Option<f64>,
}

/// Function of a policy loss.
pub type PolicyLossFn = fn(&PolicyInput<'_>, &PolicySettings) -> Result<PolicyLoss>;

/// Policy loss of the registry with its requirements on a run.
#[derive(Debug, Clone, Copy)]
pub struct PolicyLossSpec {
    /// `algorithm.loss_type` of the configuration.
    pub loss_type: &'static str,
    /// Function that computes the loss.
    pub loss: PolicyLossFn,
    /// Whether the loss trains a value head.
    pub critic: bool,
    /// Whether the loss clips around a proximal policy, and so accepts records of older versions.
    pub proximal: bool,
}
