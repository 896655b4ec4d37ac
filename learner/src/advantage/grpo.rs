//! Group-relative advantages (Shao et al. 2024, "DeepSeekMath", section 4.1.2).

use super::{Advantages, Episode, EstimatorSettings, EstimatorSpec, Result, group::group_spreads};

/// Summand of the standard deviation of a group's scores, against division by zero.
const GROUP_EPS: f64 = 1e-6;

/// Registry entry of `grpo`.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    adv_type: "grpo",
    estimate: episodes,
    layered: None,
    values: false,
    groups: true,
    normalize_advantages: false,
};

/// Gives all steps of an episode the advantage `(s - mean) / (std + GROUP_EPS)` of the score `s` within the group. Equal scores
/// yield 0.
fn episodes(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let spreads = group_spreads(episodes)?;
    let one = |(episode, (mean, std)): (&Episode<'_>, (f64, f64))| {
        episode.constant(((f64::from(episode.score()) - mean) / (std + GROUP_EPS)) as f32)
    };
    Ok(episodes.iter().zip(spreads).map(one).collect())
}
