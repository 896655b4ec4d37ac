//! Entry of the estimator registry: functions, settings and requirements on a run.

use super::{
    episode::{Advantages, Episode, LayeredEpisode},
    error::Result,
};

/// Settings of an estimator.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EstimatorSettings {
    /// Discount per step, in (0, 1].
    pub gamma: f64,
    /// GAE's trade-off of bias against variance per chunk, in [0, 1].
    pub gae_lambda: f64,
}

/// Function that estimates a batch of episodes: one advantage per step and one return per chunk, not normalized.
pub type Estimator = fn(&[Episode<'_>], EstimatorSettings) -> Result<Vec<Advantages>>;

/// Function that estimates a batch of episodes over both layers of the two-layer MDP: one advantage and one return per denoise
/// step, from one value per denoise step.
pub type LayeredEstimator = fn(&[LayeredEpisode<'_>], EstimatorSettings) -> Result<Vec<Advantages>>;

/// Estimator of the registry with its requirements on a run.
#[derive(Debug, Clone, Copy)]
pub struct EstimatorSpec {
    /// `algorithm.adv_type` of the configuration.
    pub adv_type: &'static str,
    /// Function that estimates advantages.
    pub estimate: Estimator,
    /// Function for a two-layer MDP; with `None` all denoise steps have the advantage of their chunk.
    pub layered: Option<LayeredEstimator>,
    /// Whether the estimator reads values, and so requires a critic.
    pub values: bool,
    /// Whether the estimator compares the episodes of a group.
    pub groups: bool,
    /// Whether normalization over the batch is part of the estimator, and so `algorithm.normalize_advantages` is required.
    pub normalize_advantages: bool,
}
