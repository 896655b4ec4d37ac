//! Raw returns: every step has the undiscounted reward of the whole episode as its advantage.

use super::{Advantages, Episode, EstimatorSettings, EstimatorSpec, Result};

/// Registry entry of `raw`.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    adv_type: "raw",
    estimate: episodes,
    layered: None,
    values: false,
    groups: false,
    normalize_advantages: false,
};

/// Gives all steps of an episode its score as advantage.
#[expect(clippy::unnecessary_wraps, reason = "every estimator of the table has one signature")]
fn episodes(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    Ok(episodes
        .iter()
        .map(|episode| episode.constant(episode.score()))
        .collect())
}
