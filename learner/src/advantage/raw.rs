//! Raw returns: the undiscounted reward of the whole episode, for all its steps.

use super::{Advantages, Episode, EstimatorSettings, EstimatorSpec, Result};

/// In the registry.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    adv_type: "raw",
    estimate: episodes,
    layered: None,
    values: false,
    groups: false,
    normalize_advantages: false,
};

/// The score of each episode.
#[expect(clippy::unnecessary_wraps, reason = "every estimator of the table has one signature")]
fn episodes(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    Ok(episodes
        .iter()
        .map(|episode| episode.constant(episode.score()))
        .collect())
}
