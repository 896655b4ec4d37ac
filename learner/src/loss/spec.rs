//! A policy loss, what it reads, what it gives and what it asks of a run.

use tch::Tensor;

use super::{
    critic::{CriticInput, CriticMetrics, CriticSettings},
    error::Result,
    surrogate::{ActorInput, ActorMetrics, ActorSettings},
};

/// What a policy loss of the registry reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicyInput<'a> {
    /// The policy's part.
    pub actor: Option<ActorInput<'a>>,
    /// The critic's part.
    pub critic: Option<CriticInput<'a>>,
    /// Entropy of the policy per row (or per element), with gradient; masked as the policy's part is.
    pub entropy: Option<&'a Tensor>,
    /// Factors of the means over the valid elements; 1 without.
    pub share: Share,
}

/// A part of a minibatch is weighed by its rows; its means over valid elements have its share of the minibatch's valid elements over its
/// share of the rows as a factor, so that the parts add up to the minibatch's means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Of the policy's mean; 1 where that is by episodes, which counts all elements.
    pub surrogate: f64,
    /// Of the mean entropy, which is over valid elements whatever the policy's is.
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

/// What the configuration says about the whole loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicySettings {
    /// The policy's part.
    pub actor: ActorSettings,
    /// The critic's part.
    pub critic: CriticSettings,
    /// Factor of the critic loss in the sum.
    pub value_coef: f64,
    /// Factor of the mean entropy that is subtracted; none: the entropy is only reported.
    pub entropy_bonus: Option<f64>,
}

/// A whole loss and its metrics; a part that the loss does not have is `None`.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// The policy's part.
    pub actor: Option<ActorMetrics>,
    /// The critic's part.
    pub critic: Option<CriticMetrics>,
    /// Mean entropy.
    pub entropy: Option<f64>,
}

/// A loss of the registry.
pub type PolicyLossFn = fn(&PolicyInput<'_>, &PolicySettings) -> Result<PolicyLoss>;

/// A loss of the registry with what it asks of a run.
#[derive(Debug, Clone, Copy)]
pub struct PolicyLossSpec {
    /// `algorithm.loss_type` of the configuration.
    pub loss_type: &'static str,
    /// The loss.
    pub loss: PolicyLossFn,
    /// Whether it trains a value head.
    pub critic: bool,
    /// Whether it clips around a proximal policy of its own, and so may read records of older versions.
    pub proximal: bool,
}
