//! Group-relative advantages (Shao et al. 2024, "DeepSeekMath", section 4.1.2).

use super::{
    AdvantageError, Advantages, Episode, EstimatorSettings, EstimatorSpec, Layout, Result, group_spreads, mean_and_std,
    spread,
};

/// Added to the standard deviation of a group's scores.
pub const GROUP_EPS: f64 = 1e-6;

/// Group-relative advantage of consecutive groups (Shao et al. 2024, section 4.1.2):
/// `(s - mean) / (std + GROUP_EPS)` within each group of `group_size`, unbiased standard deviation. Equal scores give 0.
pub fn group_relative(scores: &[f32], group_size: usize) -> Result<Vec<f32>> {
    if group_size < 2 || !scores.len().is_multiple_of(group_size) {
        return Err(AdvantageError::Group {
            scores: scores.len(),
            group_size,
        });
    }
    let mut advantages = Vec::with_capacity(scores.len());
    for group in scores.chunks_exact(group_size) {
        // two members at least, so the spread exists
        let (mean, std) = mean_and_std(group, None).unwrap_or((0.0, 0.0));
        advantages.extend(
            group
                .iter()
                .map(|score| ((f64::from(*score) - mean) / (std + GROUP_EPS)) as f32),
        );
    }
    Ok(advantages)
}

/// [`group_relative`] of the environments' scores, spread over the valid steps of a grid.
pub fn group_relative_grid(layout: Layout, scores: &[f32], group_size: usize, mask: &[bool]) -> Result<Vec<f32>> {
    spread(layout, &group_relative(scores, group_size)?, mask)
}

/// In the registry.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    name: "grpo",
    estimate: episodes,
    layered: None,
    values: false,
    groups: true,
    normalised: false,
};

/// `(s - mean) / (std + GROUP_EPS)` of an episode's score within its group, for all its steps. A group of equal scores
/// gives 0.
fn episodes(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let spreads = group_spreads(episodes)?;
    let one = |episode: &Episode<'_>| {
        let (mean, std) = spreads.get(&episode.group).copied().unwrap_or((0.0, 0.0));
        episode.constant(((f64::from(episode.score()) - mean) / (std + GROUP_EPS)) as f32)
    };
    Ok(episodes.iter().map(one).collect())
}
