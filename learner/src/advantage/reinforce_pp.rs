//! REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): rewards to go without a critic, normalized over the whole batch.
//!
//! The normalization is `algorithm.normalize_advantages`, which the plan requires. The paper's KL reward against a reference
//! model is `algorithm.kl_beta` with `algorithm.kl_reference`, a term of the loss.

use super::{Advantages, Episode, EstimatorSettings, EstimatorSpec, Result, group::group_spreads};

/// Registry entry of `reinforce_pp`.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    adv_type: "reinforce_pp",
    estimate: episodes,
    layered: None,
    values: false,
    groups: false,
    normalize_advantages: true,
};

/// Registry entry of `reinforce_pp_baseline`, the variant with a group baseline.
pub(super) const BASELINE: EstimatorSpec = EstimatorSpec {
    adv_type: "reinforce_pp_baseline",
    estimate: episodes_with_baseline,
    layered: None,
    values: false,
    groups: true,
    normalize_advantages: true,
};

/// Gives every step its discounted reward to go as advantage.
#[expect(clippy::unnecessary_wraps, reason = "every estimator of the table has one signature")]
fn episodes(episodes: &[Episode<'_>], settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    Ok(episodes
        .iter()
        .map(|episode| episode.rewards_to_go(settings.gamma))
        .collect())
}

/// Gives all steps of an episode its undiscounted score minus the mean score of the group.
fn episodes_with_baseline(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let spreads = group_spreads(episodes)?;
    let one =
        |(episode, (mean, _)): (&Episode<'_>, (f64, f64))| episode.constant((f64::from(episode.score()) - mean) as f32);
    Ok(episodes.iter().zip(spreads).map(one).collect())
}
