//! An estimator and what it asks of a run.

use super::{
    episode::{Advantages, Episode, LayeredEpisode},
    error::Result,
};

/// What the configuration says about estimating advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EstimatorSettings {
    /// Discount per step, in (0, 1].
    pub gamma: f64,
    /// GAE's bias-variance trade-off per chunk, in [0, 1].
    pub gae_lambda: f64,
}

/// Estimates the advantages of a batch of episodes: one advantage per step, one return per chunk, not normalized.
pub type Estimator = fn(&[Episode<'_>], EstimatorSettings) -> Result<Vec<Advantages>>;

/// Estimates the advantages of a batch of episodes over both layers of the two-layer MDP: one advantage and one return per denoise step,
/// from the values of all of them.
pub type LayeredEstimator = fn(&[LayeredEpisode<'_>], EstimatorSettings) -> Result<Vec<Advantages>>;

/// An estimator of the registry with what it asks of a run.
#[derive(Debug, Clone, Copy)]
pub struct EstimatorSpec {
    /// `algorithm.adv_type` of the configuration.
    pub adv_type: &'static str,
    /// The estimator.
    pub estimate: Estimator,
    /// Its form where every denoise step is a transition; without one all denoise steps have the advantage of their chunk.
    pub layered: Option<LayeredEstimator>,
    /// Whether it reads values, and so needs a critic.
    pub values: bool,
    /// Whether it compares the episodes of a group.
    pub groups: bool,
    /// Whether it is defined by the normalization over the batch, and so demands `algorithm.normalize_advantages`.
    pub normalize_advantages: bool,
}
